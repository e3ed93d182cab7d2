"""AdaLoRA, LoHa and LoKr in PEFT's own files: updates by their dense formulas, scales by the configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import FormatError, LoraLensError, load, save
from tests.bases import peft_folder as folder
from tests.bases import single

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]


def draw(**shapes: tuple[int, ...]) -> Tensors:
    rng = np.random.default_rng(7)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def under(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def assert_update(adapter: loralens.Adapter, name: str, expected: Array) -> None:
    np.testing.assert_allclose(adapter[name].dense(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def adalora(r: int = 3, out: int = 8, in_: int = 7) -> tuple[Tensors, Array]:
    """The tensors of one module, and B · diag(E) · A."""
    held = draw(lora_A=(r, in_), lora_B=(out, r), lora_E=(r, 1))
    wide = {leaf: tensor.astype(np.float64) for leaf, tensor in held.items()}
    return held, wide["lora_B"] @ np.diag(wide["lora_E"][:, 0]) @ wide["lora_A"]


ADALORA = {"peft_type": "ADALORA", "init_r": 5, "lora_alpha": 10, "target_modules": ["q"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("fields", "ranknum", "scale"),
    [
        ({}, None, 10 / (5 + 1e-5)),
        ({"lora_alpha": 0}, None, 5 / (5 + 1e-5)),
        ({}, 4.0, 10 / (4 + 1e-5)),
        ({"r": 2, "alpha_pattern": {"q": 3}}, None, 10 / (5 + 1e-5)),  # which AdaLoRA does not look at
    ],
)
def test_adalora(fields: dict[str, Any], ranknum: float | None, scale: float, tmp_path: Path) -> None:
    held, product = adalora()
    if ranknum:
        held["ranknum"] = np.array([ranknum], np.float32)
    adapter = load(folder(tmp_path, under("q", held), ADALORA | fields))
    assert (adapter.format, dict(adapter.extra)) == ("peft", {})
    assert [finding.code for finding in adapter.findings] == ["peft-type"]
    assert_update(adapter, "q", scale * product)


def test_adalora_after_pruning(tmp_path: Path) -> None:
    """The file holds what remained; the scale is that of ``init_r``; a module of which nothing remained is left out."""
    held, product = adalora()
    gone = {"lora_A": np.zeros((0, 7)), "lora_B": np.zeros((8, 0)), "lora_E": np.zeros((0, 1))}
    masks = {"a.q.lora_E.default": [True, False, True, True, False], "b.q.lora_E": [False] * 5}
    adapter = load(folder(tmp_path, under("a.q", held) | under("b.q", gone), ADALORA | {"rank_pattern": masks}))
    assert list(adapter) == ["a.q"]
    assert [finding.code for finding in adapter.findings] == ["peft-type", "pruned-away"]
    assert_update(adapter, "a.q", 10 / (5 + 1e-5) * product)
    save(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["a.q"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True] * 5, "keeps 5 directions and lora_A has 3"),
        (3, "not a list of true and false"),
    ],
)
def test_masks_that_make_no_sense(mask: Any, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path, under("q", adalora()[0]), ADALORA | {"rank_pattern": {"q.lora_E": mask}})
    with pytest.raises(LoraLensError, match=message):
        load(path)


LOHA = draw(hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12))
LOKR = draw(lokr_w1=(2, 3), lokr_w2_a=(5, 2), lokr_w2_b=(2, 4))


def test_without_a_configuration_the_scale_is_unknown(tmp_path: Path) -> None:
    for n, held in enumerate((adalora()[0], LOHA, LOKR)):
        adapter = load(folder(tmp_path / str(n), under("q", held), None))
        assert adapter.format == "peft"
        assert [finding.code for finding in adapter.findings] == ["alpha-unknown", "peft-type"]
        assert adapter["q"].scaling.formula == "unknown"


@pytest.mark.parametrize("kind", ["IA3", "PROMPT_TUNING", "lora", ["LORA"]])
def test_another_type_is_refused_before_a_dialect_is_tried(kind: Any, tmp_path: Path) -> None:
    pair = draw(**{"q.lora_A.weight": (2, 4), "q.lora_B.weight": (5, 2)})
    path = folder(tmp_path, pair, {"peft_type": kind})
    with pytest.raises(FormatError, match="not a LoRA"):
        load(path)


@pytest.mark.parametrize(
    ("said", "held", "message"),
    [
        ("LORA", adalora()[0], "says LORA, and the file holds .*, which is ADALORA's"),
        ("LOKR", LOHA, "says LOKR, and the file holds .*, which is LOHA's"),
        ("ADALORA", draw(**{"lora_A.weight": (2, 4), "lora_B.weight": (5, 2)}), "which is LORA's"),
    ],
)
def test_a_type_that_contradicts_the_tensors(said: str, held: Tensors, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path, under("q", held), {"peft_type": said})
    with pytest.raises(FormatError, match=message):
        load(path)


@pytest.mark.parametrize(("name", "width", "refusal"), [("conv1", 36, None), ("conv2", 18, "grouped")])
def test_a_convolution_is_written_with_the_kernel_of_its_base_or_not_at_all(
    name: str, width: int, refusal: str | None, tmp_path: Path
) -> None:
    held = under(name, draw(lokr_w1=(2, 1), lokr_w2_a=(4, 1), lokr_w2_b=(1, width)))
    source = folder(tmp_path / "in", held, {"peft_type": "LOKR", "target_modules": [name], "r": 1, "alpha": 2})
    shapes = {"conv1.weight": (8, 4, 3, 3), "conv2.weight": (8, 2, 3, 3)}  # the second one of two groups
    single(tmp_path / "base", {key: np.zeros(shape, "f") for key, shape in shapes.items()}, config={})
    for base, message in ((None, "kernel"), (tmp_path / "base", refusal)):
        if message:
            with pytest.raises(LoraLensError, match=message):
                loralens.convert(source, to="peft", output=tmp_path / "out", base=base)
            assert not (tmp_path / "out").exists()
        else:
            loralens.convert(source, to="peft", output=tmp_path / "out", base=base)
            assert load(tmp_path / "out")[name].layout.kernel == (3, 3)
