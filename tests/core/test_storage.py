"""Slots: one matrix of a network under all its names, and where a base stores it."""

import numpy as np
import pytest

from loralens.core import Layout, LazyArray, weights_of
from loralens.core.matching import MatrixSlot, same_modules, slots
from loralens.core.weights import share_of
from tests.models import low_rank

MOE = "model.layers.0.mlp.experts"
MIXTRAL = "model.layers.0.block_sparse_moe.experts"
GATE, UP, DOWN = (f"layers.0.mlp.experts.{part}_proj" for part in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (f"{MOE}.gate_up_proj[3]", (MatrixSlot(GATE, 3), MatrixSlot(UP, 3))),
        (f"{MOE}.gate_up_proj", (MatrixSlot(GATE), MatrixSlot(UP))),
        (f"{MOE}.3.gate_proj", (MatrixSlot(GATE, 3),)),
        (f"{MIXTRAL}.3.w1", (MatrixSlot(GATE, 3),)),
        (f"{MIXTRAL}.3.w3", (MatrixSlot(UP, 3),)),
        (f"{MIXTRAL}.3.w2", (MatrixSlot(DOWN, 3),)),
        ("model.layers.0.block_sparse_moe.switch_mlp.up_proj[3]", (MatrixSlot(UP, 3),)),
        ("model.layers.0.mlp.switch_mlp.down_proj[0]", (MatrixSlot(DOWN, 0),)),
        ("model.layers.0.block_sparse_moe.input_linear", (MatrixSlot(GATE), MatrixSlot(UP))),
        ("model.layers.0.block_sparse_moe.output_linear", (MatrixSlot(DOWN),)),
        ("model.layers.0.block_sparse_moe.gate", (MatrixSlot("layers.0.mlp.router"),)),
        ("model.layers.0.block_sparse_moe.router.layer", (MatrixSlot("layers.0.mlp.router"),)),
        ("model.layers.0.mlp.gate", (MatrixSlot("layers.0.mlp.router"),)),
        ("model.layers.0.mlp.gate_proj", (MatrixSlot("layers.0.mlp.gate_proj"),)),
        ("model.language_model.layers.0.mlp.gate_proj", (MatrixSlot("layers.0.mlp.gate_proj"),)),
        ("language_model.model.layers.0.mlp.gate_proj", (MatrixSlot("layers.0.mlp.gate_proj"),)),
        ("vision_tower.vision_model.encoder.x", (MatrixSlot("vision_tower.encoder.x"),)),
        ("vit.encoder.layer.3.attention.attention.query", (MatrixSlot("vit.layers.3.attention.q_proj"),)),
        ("vit.encoder.layer.3.attention.output.dense", (MatrixSlot("vit.layers.3.attention.o_proj"),)),
        ("encoder.layer.3.output.dense", (MatrixSlot("layers.3.mlp.fc2"),)),
        ("encoder.layer.3.mlp.weights_in", (MatrixSlot("layers.3.mlp.gate_proj"), MatrixSlot("layers.3.mlp.up_proj"))),
    ],
)
def test_every_spelling_of_a_matrix_is_one_slot(name, wanted):
    assert slots(name) == wanted


def tensor(*shape, seed=0, dtype=np.float32):
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return LazyArray(lambda: array, shape=shape, dtype=array.dtype, rows=lambda start, stop: array[start:stop])


def module(out, in_, kind="linear", **layout):
    return low_rank(out, in_, scale=0.5, dtype=float, layout=Layout(kind, **layout))


def singles(path, names, *, f=4, d=6, count=3):
    """Experts that are stored one by one."""
    gate, up, down = names
    shapes = {gate: (f, d), up: (f, d), down: (d, f)}
    return {
        f"{path}.{e}.{name}.weight": tensor(*shape, seed=10 * e + i)
        for e in range(count)
        for i, (name, shape) in enumerate(shapes.items())
    }


def added(modules, weights, base):
    """The base with every update in its place, by the pieces of the weights, dense."""
    found = {key: held.read().astype(np.float64) for key, held in base.items()}
    for name, update in modules.items():
        weight = weights[name]
        for piece in weight.pieces:
            here = found[piece.key]
            D = share_of(update, weight, piece).dense()
            rows = here.reshape(-1, piece.width)[piece.start : piece.start + piece.rows]
            rows += D.T if weight.transposed else D
    return found


@pytest.mark.parametrize(
    ("path", "names"), [(MIXTRAL, ("w1", "w3", "w2")), (MOE, ("gate_proj", "up_proj", "down_proj"))]
)
@pytest.mark.parametrize("turned", [False, True], ids=["peft-0.19", "peft-0.18"])
def test_stacks_in_memory_on_experts_stored_one_by_one(path, names, turned):
    """Older versions of PEFT take the second dimension of a stack for its inputs, whatever it is."""
    base = singles(path, names)
    shapes = {"gate_up_proj": (8, 6), "down_proj": (6, 4)}
    modules = {
        f"{MOE}.{part}[{e}]": module(*(shape[::-1] if turned else shape), "experts")
        for part, shape in shapes.items()
        for e in range(3)
    }
    found = weights_of(modules, base)
    assert found.match.edit.startswith("reading names as the base is stored")
    for e in range(3):
        gate, up, down = (base[f"{path}.{e}.{name}.weight"].read() for name in names)
        both, last = found.modules[f"{MOE}.gate_up_proj[{e}]"], found.modules[f"{MOE}.down_proj[{e}]"]
        W = np.vstack([gate, up])
        np.testing.assert_array_equal(both.stored.read(), W)
        np.testing.assert_array_equal(np.vstack([rows for _, rows in both.blocks(7)]), W)
        assert both.transposed is last.transposed is turned
        assert both.scattered
        assert not last.scattered
        np.testing.assert_array_equal(last.stored.read(), down)
    held = added(modules, found.modules, base)
    for e in range(3):
        D = modules[f"{MOE}.gate_up_proj[{e}]"].dense()
        D = D.T if turned else D
        for name, half in zip(names[:2], (D[:4], D[4:]), strict=True):
            key = f"{path}.{e}.{name}.weight"
            np.testing.assert_allclose(held[key], base[key].read() + half, atol=1e-12)


def test_a_square_stack_follows_the_other_one():
    """OLMoE: gate and up together are as many rows as there are inputs."""
    base = singles(MOE, ("gate_proj", "up_proj", "down_proj"), f=3, d=6, count=2)
    for shape in ((6, 3), (3, 6)):
        modules = {f"{MOE}.{part}[{e}]": module(*size, "experts") for e in range(2)
                   for part, size in (("gate_up_proj", (6, 6)), ("down_proj", shape))}  # fmt: skip
        found = weights_of(modules, base).modules
        assert {weight.transposed for weight in found.values()} == {shape == (3, 6)}
    alone = {f"{MOE}.gate_up_proj[0]": module(6, 6, "experts")}
    assert not weights_of(alone, base).modules[f"{MOE}.gate_up_proj[0]"].transposed
    older = {f"{MOE}.gate_up_proj[0]": module(6, 6, "experts", transposed=True)}
    assert weights_of(older, base).modules[f"{MOE}.gate_up_proj[0]"].transposed


def test_a_square_stack_of_gpt_oss_lies():
    base = {f"{MOE}.down_proj": tensor(2, 6, 6), f"{MOE}.down_proj_bias": tensor(2, 6)}
    assert weights_of({f"{MOE}.down_proj[1]": module(6, 6, "experts")}, base).modules[f"{MOE}.down_proj[1]"].transposed


@pytest.mark.parametrize(
    ("stacked", "alternate"),
    [((3, 8, 6), False), ((3, 6, 8), False), ((3, 6, 8), True)],
    ids=["rows", "columns", "gpt-oss"],
)
@pytest.mark.parametrize("name", [f"{MIXTRAL}.2.{{}}", f"{MOE}.2.{{}}", "model.layers.0.mlp.switch_mlp.{}[2]"])
def test_single_experts_on_a_stack(stacked, alternate, name):
    key = f"{MOE}.gate_up_proj"
    base = {key: tensor(*stacked), f"{MOE}.down_proj": tensor(3, *((6, 4) if stacked[1] == 8 else (4, 6)))}
    base |= {f"{key}_bias": tensor(3, 8)} if alternate else {}
    parts = ("w1", "w3", "w2") if "block_sparse" in name else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = names = [name.format(part) for part in parts]
    modules = dict(zip(names, (module(4, 6), module(4, 6), module(6, 4)), strict=True))
    found = weights_of(modules, base).modules
    W = base[key].read()[2]
    W = W if stacked[1] == 8 else W.T
    first, second = (slice(0, None, 2), slice(1, None, 2)) if alternate else (slice(0, 4), slice(4, 8))
    np.testing.assert_array_equal(found[gate].read(), W[first])
    np.testing.assert_array_equal(found[up].read(), W[second])
    assert not found[down].scattered
    held = added(modules, found, base)
    whole = held[key][2] if stacked[1] == 8 else held[key][2].T
    np.testing.assert_allclose(whole[first], W[first] + modules[gate].dense(), atol=1e-12)
    np.testing.assert_allclose(whole[second], W[second] + modules[up].dense(), atol=1e-12)
    np.testing.assert_array_equal(held[key][:2], base[key].read()[:2])


def test_two_adapters_call_one_module_by_its_names_in_memory_and_on_disk():
    old = {
        "vit.encoder.layer.0.attention.attention.query": 1,
        "model.layers.0.block_sparse_moe.experts.1.w1": 2,
        "x": 3,
    }
    new = {"vit.layers.0.attention.q_proj": 1, "model.layers.0.mlp.switch_mlp.gate_proj[1]": 2, "y": 3}
    found = same_modules(old, new)
    assert found == {one: two for one, two in zip(old, new, strict=True) if one != "x"}
