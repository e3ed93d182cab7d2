"""AdaLoRA, LoHa and LoKr in PEFT's own files: updates by their dense formulas, scales by the configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.core.structured import Structured
from loralens.errors import FormatError, LoraLensError
from loralens.formats import load, save

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

PREFIX = "base_model.model."


def folder(path: Path, tensors: Tensors, config: dict[str, Any] | None, prefix: str = PREFIX) -> Path:
    path.mkdir(exist_ok=True)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path / "adapter_model.safetensors")
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


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


def test_adalora_becomes_a_plain_pair(tmp_path: Path) -> None:
    held, product = adalora()
    adapter = load(folder(tmp_path / "in", under("q", held), ADALORA))
    save(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["task_type"]) == ("LORA", 3, "CAUSAL_LM")
    assert not {"init_r", "target_r", "total_step"} & set(config)
    back = load(tmp_path / "out")
    assert back["q"].scale == pytest.approx(10 / (5 + 1e-5), rel=1e-15)
    assert_update(back, "q", 10 / (5 + 1e-5) * product)


def loha_case() -> tuple[Tensors, Array]:
    held = draw(hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12))
    wide = {leaf: tensor.astype(np.float64) for leaf, tensor in held.items()}
    return held, (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])


def lokr_case() -> tuple[Tensors, Array]:
    held = draw(lokr_w1=(2, 3), lokr_w2_a=(5, 2), lokr_w2_b=(2, 4))
    return held, np.kron(held["lokr_w1"].astype(np.float64), held["lokr_w2_a"].astype(np.float64) @ held["lokr_w2_b"])


PRODUCTS = {
    "loha": (loha_case, "LOHA"),
    "lokr": (lokr_case, "LOKR"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_become_plain_pairs(name: str, tmp_path: Path) -> None:
    make, kind = PRODUCTS[name]
    held, product = make()
    config = {"peft_type": kind, "r": 2, "alpha": 6, "alpha_pattern": {"b": 5}, "target_modules": ["a", "b"]}
    config |= {"rank_dropout": 0.5, "task_type": "X"}
    adapter = load(folder(tmp_path / "in", under("x.a", held) | under("x.b", held), config))
    assert_update(adapter, "x.a", 3 * product)
    assert_update(adapter, "x.b", 2.5 * product)
    assert not [finding for finding in adapter.findings if finding.level != "note"]
    wide = isinstance(adapter["x.a"], Structured)
    if wide:
        with pytest.raises(LoraLensError, match="--rank"):
            save(adapter, tmp_path / "out")
        assert "--rank R" in adapter.findings[0].fix
        adapter = adapter.map(
            lambda module: module.truncated(module.rank) if isinstance(module, Structured) else module
        )
    save(adapter, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["task_type"]) == ("LORA", adapter["x.a"].rank, "X")
    assert not {"alpha", "rank_dropout"} & set(said)
    assert_update(load(tmp_path / "out"), "x.a", 3 * product)


def test_without_a_configuration_the_scale_is_unknown(tmp_path: Path) -> None:
    for n, held in enumerate((adalora()[0], loha_case()[0], lokr_case()[0])):
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
        ("LOKR", loha_case()[0], "says LOKR, and the file holds .*, which is LOHA's"),
        ("ADALORA", draw(**{"lora_A.weight": (2, 4), "lora_B.weight": (5, 2)}), "which is LORA's"),
    ],
)
def test_a_type_that_contradicts_the_tensors(said: str, held: Tensors, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path, under("q", held), {"peft_type": said})
    with pytest.raises(FormatError, match=message):
        load(path)


def base_of_convolutions(path: Path) -> Path:
    """A base with the convolution of the input, one with four groups, and one without a kernel that its name says."""
    shapes = {"conv1": (8, 4, 3, 3), "conv2": (8, 2, 3, 3), "pw_conv": (8, 8), "one": (8, 8, 1, 1), "fc": (8, 8)}
    path.mkdir()
    save_file(
        {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}, path / "model.safetensors"
    )
    return path


def of_kind(kind: str, name: str, width: int) -> tuple[Tensors, dict[str, Any]]:
    """A module with a kernel that is flat in its factors, and a configuration."""
    held = {
        "ADALORA": draw(lora_A=(2, width), lora_B=(8, 2), lora_E=(2, 1)),
        "LOHA": draw(hada_w1_a=(8, 1), hada_w1_b=(1, width), hada_w2_a=(8, 1), hada_w2_b=(1, width)),
        "LOKR": draw(lokr_w1=(2, 1), lokr_w2_a=(4, 1), lokr_w2_b=(1, width)),
    }[kind]
    rank = {"init_r": 2, "lora_alpha": 2} if kind == "ADALORA" else {"r": 1, "alpha": 2}
    return under(name, held), {"peft_type": kind, "target_modules": [name], **rank}


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR"])
@pytest.mark.parametrize(
    ("name", "width", "kernel"),
    [("conv1", 36, (3, 3)), ("conv2", 18, None), ("pw_conv", 8, ()), ("one", 8, (1, 1))],
)
def test_a_convolution_is_written_with_the_kernel_of_its_base_or_not_at_all(
    kind: str, name: str, width: int, kernel: tuple[int, ...] | None, tmp_path: Path
) -> None:
    tensors, config = of_kind(kind, name, width)
    source, base = folder(tmp_path / "in", tensors, config), base_of_convolutions(tmp_path / "base")
    writers: dict[str, Any] = {
        "convert": lambda **more: loralens.convert(source, to="peft", **more),
        "compress": lambda **more: loralens.compress(source, rank=1, **more),
    }
    for verb, write in writers.items():
        out = tmp_path / verb
        if "conv" in name:
            with pytest.raises(LoraLensError, match="kernel"):
                write(output=out)
        if kernel is None:  # of groups, which a pair does not have
            with pytest.raises(LoraLensError, match="grouped"):
                write(output=out, base=base)
            assert not out.exists()
            continue
        write(output=out, base=base)
        assert load(out)[name].layout.kernel == kernel
        assert loralens.inspect(out, base=base, consumer="peft").answer
