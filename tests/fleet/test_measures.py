"""Norms and effective ranks of one pass, module keys, and the start sketch."""

import numpy as np
import pytest

import loralens
from loralens.fleet.measuring import measure_adapter, norm_of_update
from loralens.fleet.sketches import module_keys
from tests.conftest import small_adapter
from tests.draws import draw_basis, draw_factors
from tests.fleet.makers import random_adapter
from tests.reference import effective_rank


def start_cosine(first: loralens.Adapter, second: loralens.Adapter) -> float:
    a, b = (measure_adapter(each).sketch.start.astype(float) for each in (first, second))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("adapter", [small_adapter(), random_adapter(1), random_adapter(2, rank=40)])
def test_norms_and_ranks_are_those_of_the_dense_update(adapter: loralens.Adapter) -> None:
    measures = measure_adapter(adapter)
    dense = {key: adapter.modules[name].dense() for key, name in measures.names.items()}
    whole = np.linalg.norm(np.concatenate([matrix.ravel() for matrix in dense.values()]))
    assert norm_of_update(measures.norms) == pytest.approx(whole, rel=1e-12)
    for key, matrix in dense.items():
        assert measures.norms[key] == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
        spectrum = np.linalg.svd(matrix, compute_uv=False)
        rank = adapter.modules[measures.names[key]].rank
        expected = effective_rank(spectrum[:rank]) if matrix.any() else 0.0
        assert measures.effective_ranks[key] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_small_singular_values_are_those_of_the_factors(count: int) -> None:
    """Gram matrices know a singular value of 1e-6 of the largest one to four digits, and one of 1e-9 not at all.

    The factors of one module alone, and those of several together, give all of them.
    """
    rng = np.random.default_rng(3)
    modules, expected = {}, {}
    for i in range(count):
        U, V = (draw_basis(rng, size, 4) for size in (30, 40))
        spectrum = np.array([1, 1e-3, 1e-6 * (i + 1), 1e-9])
        turn = np.triu(rng.standard_normal((4, 4))) + 3 * np.eye(4)
        modules[f"q{i}"] = loralens.LowRank(U * spectrum @ turn, np.linalg.solve(turn, V.T), -0.5 - i)
        expected[f"q{i}"] = effective_rank(spectrum)
    measures = measure_adapter(loralens.Adapter(modules=modules))
    assert measures.effective_ranks == pytest.approx(expected, rel=1e-11)
    assert measures.norms["q0"] == pytest.approx(0.5 * np.hypot(1, 1e-3), rel=1e-12)


def test_a_product_that_cancels_is_measured_from_its_factors() -> None:
    """B·A is small although both are large: the Gram matrices know no digit of it."""
    rng = np.random.default_rng(0)
    b, a, d = *draw_factors(rng, 50, 60, 1), rng.standard_normal((1, 60))
    B, A = np.hstack([b, b]), np.vstack([a, -a + 1e-9 * d])
    measures = measure_adapter(loralens.Adapter(modules={"q": loralens.LowRank(B, A)}))
    assert measures.norms["q"] == pytest.approx(1e-9 * np.linalg.norm(b) * np.linalg.norm(d), rel=1e-5)
    # Both singular values are small here, so none of them tells that the other one is wrong.
    B = np.hstack([b, b + 1e-7 * rng.standard_normal((50, 1))])
    A = np.vstack([a, -a + 1e-7 * d])
    measures = measure_adapter(loralens.Adapter(modules={"q": loralens.LowRank(B, A)}))
    assert measures.norms["q"] == pytest.approx(np.linalg.norm(B @ A), rel=1e-7)


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("size", [1e-60, 1e-155, 1e-161, 1e-200, 1e-250, 1e-290, 1e-306, 1e-320])
def test_updates_of_any_size_are_measured(size: float, rank: int) -> None:
    """Squares of such numbers underflow, and powers of two that would make them large overflow."""
    usual = random_adapter(1, rank=rank, scale=1.0)
    expected = measure_adapter(usual)
    for adapter in (
        usual.map(lambda m: loralens.LowRank(m.B, m.A, size)),
        usual.map(lambda m: loralens.LowRank(m.B * np.float64(size), m.A, 1.0)),
        usual.map(lambda m: loralens.LowRank(m.B, m.A * np.float64(size), -1.0)),
    ):
        measures = measure_adapter(adapter)
        relative = 1e-12 if size > 1e-300 else 1e-2  # the numbers themselves lose digits below 2e-308
        assert measures.norms == pytest.approx({k: size * v for k, v in expected.norms.items()}, rel=relative, abs=0)
        assert measures.effective_ranks == pytest.approx(expected.effective_ranks, rel=relative)
        if size > 1e-260:
            sign = -1 if next(iter(adapter.modules.values())).scale < 0 else 1
            assert np.abs(measures.sketch.codes.astype(int) - sign * expected.sketch.codes).max() <= 1
            assert measures.sketch.step == pytest.approx(size * expected.sketch.step, rel=1e-2)


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("count", [1, 8, 9])
@pytest.mark.parametrize("difference", [0, 1])
@pytest.mark.parametrize("scale", [1e150, 1e160])
def test_a_scale_that_is_too_large_is_named(rank: int, count: int, difference: float, scale: float) -> None:
    """Also where the singular values came from Gram matrices or from several modules at once."""
    rng = np.random.default_rng(0)
    modules = {}
    for i in range(count):
        B, A = draw_factors(rng, 33, 65, rank)
        A[1] = A[0] + difference * A[1]
        modules[f"q{i}"] = loralens.LowRank(B, A, scale)
    message = (
        r"^q\d: ΔW is too large for float64, .* its scale is 1e\+1[56]0 and the largest singular value of B·A is \d\d"
    )
    with pytest.raises(loralens.errors.FormatError, match=message):
        measure_adapter(loralens.Adapter(modules=modules))


SAME = [
    ("distilbert.transformer.layer.0.attention.q_lin", "transformer.layer.0.attention.q_lin"),
    ("base_model.model.model.layers.3.self_attn.q_proj", "layers.3.self_attn.q_proj"),
    ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
    ("roberta.encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.query"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
]
DIFFERENT = [
    ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"),
    ("unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.0.attentions.0.proj_in"),
    ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_one_module_under_two_names_has_one_key(first: str, second: str) -> None:
    assert module_keys([first])[first] == module_keys([second])[second]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_two_modules_have_two_keys(first: str, second: str) -> None:
    assert module_keys([first])[first] != module_keys([second])[second]
    together = module_keys([first, second])
    assert len(set(together.values())) == 2


def test_modules_whose_keys_would_be_equal_keep_more_of_their_names() -> None:
    names = ["text_model.encoder.layers.0.q", "model.encoder.layers.0.q", "model.encoder.layers.1.q"]
    keys = module_keys(names)
    assert keys[names[0]] == "text_model_encoder_layers_0_q"
    assert keys[names[1]] == "model_encoder_layers_0_q"
    assert keys[names[2]] == "encoder_layers_1_q"
    assert len(set(module_keys(["a.b", "a/b", "a_b"]).values())) == 3


def test_the_start_tells_who_began_from_one_A() -> None:
    rng = np.random.default_rng(0)
    first = random_adapter(1, in_=300)
    moved = first.map(
        lambda m: loralens.LowRank(
            rng.standard_normal(m.B.shape).astype(np.float32),
            (m.A + 0.3 * rng.standard_normal(m.A.shape)).astype(np.float32),
            m.scale,
        )
    )
    assert start_cosine(first, moved) > 0.9
    assert abs(start_cosine(first, random_adapter(2, in_=300))) < 0.25


def test_the_start_estimates_cosines_of_any_numbers() -> None:
    """Half of the entries of A are ones, and in the other adapter the other half: the cosine is 0."""
    halves = np.zeros((2, 1, 1024), np.float32)
    halves[0, 0, :512] = halves[1, 0, 512:] = 1
    B = np.ones((3, 1), np.float32)
    layers = [f"layers.{i}.q" for i in range(8)]
    first, second = (loralens.Adapter(modules={name: loralens.LowRank(B, A) for name in layers}) for A in halves)
    assert abs(start_cosine(first, second)) < 0.25
