"""The PEFT reader and writer on files made by hand; no torch."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import Adapter, FormatError, LoraLensError, LowRank, ShapeError
from loralens.core import Scaling
from loralens.formats import Stored
from tests.formats import stores
from tests.formats.dialects import FORM
from tests.formats.files import find_adapter, read_safetensors, write_folder
from tests.formats.stores import assert_same_file, number
from tests.tolerances import SAME_UPDATE

peft = FORM["peft"]

P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ".*"}
Shapes = Mapping[str, tuple[int, ...]]


def stored(shapes: Shapes, config: dict[str, Any] | None = None, *, dtype: Any = np.float32, **more: Any) -> Stored:
    """Random tensors under these keys; ``more`` joins the configuration, None is no configuration."""
    tensors = {key: number(shape, i, dtype) for i, (key, shape) in enumerate(shapes.items())}
    config = {**(CONFIG if config is None else config), **more}
    return stores.stored(tensors, metadata={"format": "pt"}, config=config)


def bare(source: Stored) -> Stored:
    return replace(source, config=None, metadata=None)


def pair(path: str, r: int = 2, out: int = 5, in_: int = 4) -> Shapes:
    return {f"{path}.lora_A.weight": (r, in_), f"{path}.lora_B.weight": (out, r)}


def got(source: Stored, key: str) -> np.ndarray:
    return source.tensors[key].read().astype(np.float64)


def changed(adapter: Adapter) -> Adapter:
    """The same numbers in new arrays, which is what the writer has to lay out by itself."""
    return adapter.map(lambda m: LowRank(m.B, m.A, m.scale, layout=m.layout, scaling=m.scaling))


def assert_same(first: Stored, second: Stored) -> None:
    """All that a file holds, and the order of the keys of its configuration."""
    assert_same_file(first, second)
    assert json.dumps(first.config) == json.dumps(second.config)


# ---------------------------------------------------------------- every kind of file

EXPERTS = {"target_modules": ["q"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
STACKS = {
    **pair(f"{P}m.experts.base_layer", 6, 7, 4),
    **pair(f"{P}m.experts", 6, 4, 5),
    **pair(f"{P}m.q"),
}
FUSED = {f"{P}h.0.attn.lora_A.weight": (4, 6), f"{P}h.0.attn.lora_B.weight": (10, 2, 1)}
CONV = {f"{P}q.lora_A.weight": (4, 3, 3, 2), f"{P}q.lora_B.weight": (6, 4, 1, 1)}
GROUPED_CONV = {f"{P}q.lora_A.weight": (4, 6, 3), f"{P}q.lora_B.weight": (8, 2, 1)}
EMBEDDING = {f"{P}words.lora_embedding_A": (2, 9), f"{P}words.lora_embedding_B": (4, 2)}
ATTENTION = {**pair(f"{P}x.attn", 3, 12, 4), **pair(f"{P}x.attn.base_layer.out_proj", 3, 4, 4)}
EXTRAS = {
    **pair(f"{P}m.q"),
    **EMBEDDING,
    f"{P}m.q.lora_magnitude_vector": (5,),
    f"{P}m.q.lora_B.bias": (5,),
    f"{P}m.q.base_layer.bias": (5,),
    f"{P}m.norm.bias": (4,),
    f"{P}classifier.dense.weight": (3, 4),
    f"{P}classifier.modules_to_save.dense.weight": (3, 4),
    f"{P}classifier.original_module.dense.weight": (3, 4),
    f"{P}words.base_layer.weight": (9, 4),
    f"{P}lm_head.weight": (9, 4),
    f"{P}x.token_adapter.trainable_tokens_delta": (2, 4),
    f"{P}m.q.lora_monteclora_sampler.std": (3,),
    "unheard.of": (2, 2, 2),
}

FILES = {
    "plain": stored({**pair(f"{P}a.0.q"), **pair(f"{P}a.0.v"), **pair(f"{P}a.10.q")}),
    "bfloat16": stored(pair(f"{P}q"), dtype=ml_dtypes.bfloat16),
    "adapter-name": stored({f"{P}q.lora_A.task.weight": (2, 4), f"{P}q.lora_B.task.weight": (5, 2)}),
    "no-prefix": stored(pair("m.q")),
    "bare": bare(stored(pair(f"{P}q"))),
    "conv": stored(CONV, r=4),
    "grouped-conv": stored(GROUPED_CONV, r=4),
    "embedding": stored(EMBEDDING),
    "attention": stored(ATTENTION, rank_pattern={"attn": 3}),
    "fused": stored(FUSED, enable_lora=[True, False, True], fan_in_fan_out=True),
    "experts": stored(STACKS, **EXPERTS),
    "experts-grouped": stored(STACKS, **EXPERTS, lora_B_layout="grouped_by_expert"),
    "kasa": stored({**pair(f"{P}q"), f"{P}q.lora_diag": (2,)}, kasa_config={"beta": 1.0}),
    "patterns": stored({**pair(f"{P}a.q", 3), **pair(f"{P}b.q")}, rank_pattern={"a.q": 3}, alpha_pattern={"^b.q": 7.5}),
    "extras": stored(EXTRAS, use_dora=True, lora_bias=True, bias="all", modules_to_save=["classifier"]),
    "unknown-fields": stored(pair(f"{P}q"), zeta={"deep": [1, 2.5, None]}, alpha="β", revision=None),
    "untargeted": stored(pair(f"{P}other"), target_modules=["q"]),
    "rank-disagrees": stored(pair(f"{P}q"), r=3),
    "more-metadata": replace(stored(pair(f"{P}q")), metadata={"format": "np", "note": "ü", "": "x"}),
}


@pytest.mark.parametrize("name", [name for name in FILES if name != "no-prefix"])
def test_what_is_read_is_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = FILES[name]
    assert_same(peft.write(peft.read(source)), source)
    loralens.save(peft.read(source), tmp_path / "out")
    back = loralens.load(tmp_path / "out", strict=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text()) if source.config else None
    assert_same(replace(read_safetensors(find_adapter(tmp_path / "out").file), config=config), source)
    assert_same(peft.write(back), source)


def test_a_missing_prefix_is_a_finding_and_is_written() -> None:
    """PEFT loads factors without the prefix without an effect; the bits of the tensors stay."""
    source = stored({**pair("m.q"), "classifier.weight": (3, 4)}, modules_to_save=["classifier"])
    assert [finding.code for finding in peft.read(source).findings] == ["prefix-missing"]
    written = peft.write(peft.read(source))
    assert_same(replace(written, tensors={key.removeprefix(P): each for key, each in written.tensors.items()}), source)
    assert all(key.startswith(P) for key in written.tensors)
    assert not peft.read(written).findings


# ---------------------------------------------------------------- what a file means


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True]])
def test_fused_projections_fill_the_enabled_slices(enabled: list[bool]) -> None:
    source = stored(FUSED, enable_lora=enabled)
    A, B = got(source, f"{P}h.0.attn.lora_A.weight"), got(source, f"{P}h.0.attn.lora_B.weight")[:, :, 0]
    blocks = [3.0 * B[:5] @ A[:2], 3.0 * B[5:] @ A[2:]]
    expected = np.concatenate([blocks.pop(0) if on else np.zeros((5, 6)) for on in enabled])
    np.testing.assert_allclose(peft.read(source)["h.0.attn"].dense(), expected, **SAME_UPDATE)


@pytest.mark.parametrize(("name", "grouped"), [("experts", False), ("experts-grouped", True)])
@pytest.mark.parametrize(("path", "parameter"), [("m.experts", "down_proj"), ("m.experts.base_layer", "gate_up_proj")])
def test_experts_take_their_rows_and_columns(name: str, grouped: bool, path: str, parameter: str) -> None:
    source = FILES[name]
    A, B = got(source, f"{P}{path}.lora_A.weight"), got(source, f"{P}{path}.lora_B.weight")
    for e in range(3):
        columns = [2 * e, 2 * e + 1] if grouped else [e, 3 + e]
        expected = 3.0 * B[:, columns] @ A[2 * e : 2 * e + 2]
        np.testing.assert_allclose(peft.read(source)[f"m.experts.{parameter}[{e}]"].dense(), expected, **SAME_UPDATE)


def test_kasa_folds_its_diagonal() -> None:
    source = FILES["kasa"]
    A, B, d = (got(source, f"{P}q.{leaf}") for leaf in ("lora_A.weight", "lora_B.weight", "lora_diag"))
    np.testing.assert_allclose(peft.read(source)["q"].dense(), 3.0 * B @ np.diag(d) @ A, **SAME_UPDATE)


def test_a_pair_that_old_peft_saved_twice_is_one_module() -> None:
    """A head that is adapted and trained in full, too: only what is at its own place is applied."""
    twice = pair(f"{P}q") | pair(f"{P}q.modules_to_save") | pair(f"{P}q.original_module")
    source = stored(twice, task_type="SEQ_CLS", target_modules=["q"])
    read = peft.read(source)
    assert list(read) == ["q"]
    assert read.findings == ()
    assert {extra.role for extra in read.extra.values()} == {"copy"}
    assert_same(peft.write(read), source)
    # Only what is at its own place, too, is a copy.
    assert list(peft.read(stored(pair(f"{P}q.modules_to_save")))) == ["q.modules_to_save"]


@pytest.mark.parametrize(
    ("key", "config", "role"),
    [
        ("score.weight", {"task_type": "SEQ_CLS"}, "saved"),
        ("lm_head.weight", {"modules_to_save": ["head"]}, "saved"),  # PEFT looks at the end of the name
        ("head.dense.weight", {"modules_to_save": ["head"]}, "saved"),
        ("headless.weight", {"modules_to_save": ["head"]}, "other"),
        ("score.modules_to_save.weight", {}, "saved"),
        ("q.lora_magnitude_vector.default.weight", {}, "magnitude"),
        ("q.lora_magnitude_vector.default", {}, "magnitude"),
    ],
)
def test_roles_by_name(key: str, config: dict[str, Any], role: str) -> None:
    adapter = peft.read(stored({**pair(f"{P}q"), f"{P}{key}": (2,)}, **config))
    assert adapter.extra[f"{P}{key}"].role == role


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, 2.0, "2", None, True]),
        ("lora_alpha", ["16", None, True, float("nan"), 10**400]),
        ("rank_pattern", [[], {"q": 0}, {"q": 2.5}, {"(": 2}]),
        ("alpha_pattern", [[], {"q": "1"}, {"q": float("nan")}]),
        ("target_modules", [3, ["q", None], "("]),
        ("target_parameters", ["experts.w1", [1]]),
        ("use_rslora", ["false", 1]),
        ("fan_in_fan_out", ["false"]),
    ],
)
def test_bad_fields_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(FormatError, match=r"fix: correct adapter_config\.json"):
            peft.read(stored(pair(f"{P}q"), **{field: value}))


@pytest.mark.parametrize(
    ("config", "codes"),
    [
        ({"init_lora_weights": "pissa"}, ["mutated-base"]),
        ({"init_lora_weights": "PiSSA_niter_16"}, ["mutated-base"]),
        ({"init_lora_weights": "gaussian"}, []),
        ({"use_dora": True}, ["dora-magnitudes-missing"]),
        ({"layer_replication": [[0, 4], [2, 6]]}, ["layer-replication"]),
        ({"kasa_config": {"beta": 1}}, ["kasa-config"]),
        ({"target_modules": "nowhere.*"}, ["target-unmatched", "module-untargeted"]),
        ({"target_modules": ["q", "down"], "exclude_modules": ["mlp.down"]}, []),
        ({"target_modules": ["q", "down"], "exclude_modules": r".*\.up"}, []),
        ({"target_modules": ["v"], "ensure_weight_tying": True}, ["target-unmatched"]),
        ({"target_modules": [], "target_parameters": ["q.weight"]}, []),
    ],
)
def test_findings(config: dict[str, Any], codes: list[str]) -> None:
    source = stored(pair(f"{P}q"), {**CONFIG, "target_modules": ["q"], **config})
    assert [finding.code for finding in peft.read(source).findings] == codes


@pytest.mark.parametrize(
    ("key", "shape", "field"),
    [
        ("lora_magnitude_vector", (5,), "use_dora"),
        ("lora_B.bias", (5,), "lora_bias"),
        ("token_adapter.trainable_tokens_delta", (2, 4), "trainable_token_indices"),
        ("lora_diag", (2,), "kasa_config"),
    ],
)
def test_tensors_that_peft_passes_over_are_a_warning(key: str, shape: tuple[int, ...], field: str) -> None:
    """PEFT 0.21.2 makes no parameter for them without the field, and loralens applies them."""
    tensors = {**pair(f"{P}q"), f"{P}q.{key}": shape}
    for off in ({}, {field: None}, {field: False}):
        found = [each for each in peft.read(stored(tensors, **off)).findings if each.code == "switched-off"]
        assert [field in each.text for each in found] == [True]
    on = {"use_dora": True, "lora_bias": True, "trainable_token_indices": [1, 3], "kasa_config": {}}[field]
    assert "switched-off" not in {each.code for each in peft.read(stored(tensors, **{field: on})).findings}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("shapes", "config", "error", "message"),
    [
        ({f"{P}q.lora_A.weight": (2, 4)}, {}, FormatError, r"q: .*lora_A.weight \(2, 4\) has no lora_B"),
        ({f"{P}q.lora_A.weight": (2, 4), f"{P}q.lora_B.weight": (5, 3)}, {}, ShapeError, "do not multiply"),
        ({f"{P}q.lora_A.weight": (4, 4, 3), f"{P}q.lora_B.weight": (5, 2, 1)}, {}, ShapeError, "do not fit together"),
        ({f"{P}q.lora_A.weight": (1, 1, 1), f"{P}q.lora_B.weight": ()}, {}, ShapeError, "do not fit together"),
        ({f"{P}experts.w9.lora_A.weight": (3, 2, 4), f"{P}experts.w9.lora_B.weight": (3, 5, 2)},
         {}, FormatError, "an axis for the experts"),
        ({f"{P}q.lora_A.a.weight": (2, 4), f"{P}q.lora_B.a.weight": (5, 2), f"{P}v.lora_A.b.weight": (2, 4)},
         {}, FormatError, "several adapters: a, b"),
        ({**pair(f"{P}m.q"), **pair("m.q")}, {}, FormatError, "are the same tensor of one module"),
        (FUSED, {}, FormatError, "enable_lora is None"),
        (FUSED, {"enable_lora": [True, True, True]}, ShapeError, "do not fit 3 adapted slices"),
        (pair(f"{P}q"), {"use_bdlora": {"nblocks": 2}}, FormatError, "compact blocks"),
        (STACKS, {**EXPERTS, "r": 4}, ShapeError, "not a stack of experts of rank 4"),
        ({**pair(f"{P}e"), **pair(f"{P}e.base_layer")}, {"target_modules": [], "target_parameters": ["e.x", "e.y"]},
         FormatError, "depends on the model's code"),
    ],
)  # fmt: skip
def test_files_that_make_no_sense(
    shapes: Shapes, config: dict[str, Any], error: type[LoraLensError], message: str
) -> None:
    with pytest.raises(error, match=message):
        peft.read(stored(shapes, **config))


# ---------------------------------------------------------------- through load


def folder(source: Stored, path: Path) -> Path:
    write_folder(source, path, overwrite=False)
    return path


def test_a_file_without_configuration(tmp_path: Path) -> None:
    path = folder(FILES["bare"], tmp_path / "a")
    adapter = loralens.load(path)
    assert [(f.level, f.code) for f in adapter.findings] == [("warning", "alpha-unknown")]
    assert (adapter["q"].scale, adapter["q"].scaling.formula, adapter.config) == (1.0, "unknown", None)
    for given, scale, rule in [({"alpha": 5}, 2.5, "alpha/r"), ({"scale": -0.3}, -0.3, "given")]:
        adapter = loralens.load(path, **given)
        assert (adapter["q"].scale, adapter["q"].scaling.formula, adapter.findings) == (scale, rule, ())
        loralens.save(adapter, tmp_path / rule.replace("/", " "))
        assert loralens.load(tmp_path / rule.replace("/", " "))["q"].scale == scale
    doubled = folder(bare(FILES["attention"]), tmp_path / "attention")  # PEFT adds out_proj's update twice
    assert loralens.load(doubled, scale=3)["x.attn.out_proj"].scale == 6


# ---------------------------------------------------------------- changed adapters


def mixed(ranks: Mapping[str, int], scales: Mapping[str, float], **config: Any) -> Adapter:
    modules = {name: LowRank(number((5, r), 1), number((r, 4), 2), scales.get(name, 1.5)) for name, r in ranks.items()}
    return Adapter(modules=modules, config={**CONFIG, "target_modules": ["q"], **config} if config else None)


MIXED = [
    ({"q": 2, "b.q": 4, "a.b.q": 2, "c.q": 4}, {"a.b.q": 0.1}),
    ({"a.q": 1, "b.q": 1}, {"a.q": 0.1, "b.q": -7 / 3}),
    ({"a+b.q": 1, "a(b.q": 3, "[c].q": 2}, {"a+b.q": 0.7}),
    ({f"h.{i}.q": 1 + i % 3 for i in range(12)}, {f"h.{i}.q": 1 / (1 + i) for i in range(12)}),
]


@pytest.mark.parametrize(("ranks", "scales"), MIXED)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"q": 9}, "alpha_pattern": {".*": 9}}])
def test_mixed_ranks_and_scales(ranks: dict[str, int], scales: dict[str, float], config: dict[str, Any]) -> None:
    adapter = mixed(ranks, scales, **config)
    written = peft.write(adapter)
    back = peft.read(written)
    assert {name: module.rank for name, module in back.items()} == ranks
    for name, module in adapter.items():
        # A scale may be doubled and B halved, so that α is whole.
        np.testing.assert_allclose(back[name].dense(), module.dense(), rtol=1e-15)
    assert back.findings == ()
    assert written.config
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT takes the first that matches
        lengths = [len(key) for key in written.config[pattern] if "\\" not in key]
        assert lengths == sorted(lengths, reverse=True)


def without(adapter: Adapter, *names: str) -> Adapter:
    return replace(adapter, modules={name: m for name, m in adapter.items() if name not in names})


def ranked(adapter: Adapter, name: str, r: int) -> Adapter:
    m = adapter[name]
    less = LowRank(m.B[:, :r], m.A[:r], m.scale, layout=m.layout, scaling=m.scaling)
    return replace(adapter, modules={**adapter.modules, name: less})


def rescaled(adapter: Adapter, name: str, scale: float) -> Adapter:
    return replace(adapter, modules={**adapter.modules, name: adapter[name].rescaled(scale, Scaling())})


READ = {name: peft.read(source) for name, source in FILES.items()}
GATE_UP = [f"m.experts.gate_up_proj[{e}]" for e in range(3)]
E0 = "m.experts.down_proj[0]"


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (rescaled(READ["experts"], E0, 9.0), ShapeError, "differ in rank or scale"),
        (without(READ["experts"], E0), ShapeError, "some experts of this stack are missing"),
        (ranked(READ["attention"], "x.attn.out_proj", 1), ShapeError, "x.attn: its parts differ"),
        (without(peft.read(stored(ATTENTION, r=3)), "x.attn.out_proj"), FormatError, "x.attn would appear"),
        (without(READ["experts"], *GATE_UP), FormatError, "names 2 parameters here and the file holds 1"),
        (changed(READ["grouped-conv"]), ShapeError, "no longer block-diagonal"),
        (ranked(READ["kasa"], "q", 1), FormatError, "changes the base weight"),
    ],
)
def test_what_peft_cannot_hold_is_refused(adapter: Adapter, error: type[LoraLensError], message: str) -> None:
    with pytest.raises(error, match=message):
        peft.write(adapter)
