"""mlx-lm files: orientation, the raw scale, experts, DoRA by rows, what is refused, and what is written."""

import json
from dataclasses import replace

import numpy as np
import pytest

import loralens
from loralens import FormatError, LowRank, ShapeError
from loralens.core import Extra, Layout, LazyArray, Scaling
from tests.formats.dialects import FORM
from tests.formats.stores import assert_same_file, drawn, stored
from tests.models import low_rank

mlx = FORM["mlx"]
write = FORM["mlx"].write

Q, EMBED, UP = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "model.layers.0.mlp.switch_mlp.up_proj"
CONFIG = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0, "alpha": 16},
    "model": "tiny/base",
    "num_layers": 4,
}


def file(config=CONFIG, **tensors):
    return stored(tensors or full(), config=config)


def full():
    """One of each kind, and something unknown."""
    return {
        f"{Q}.lora_a": drawn(4, 2),
        f"{Q}.lora_b": drawn(2, 6),
        f"{EMBED}.lora_a": drawn(7, 2),
        f"{EMBED}.lora_b": drawn(2, 4),
        f"{UP}.lora_a": drawn(3, 2, 4),
        f"{UP}.lora_b": drawn(3, 6, 2),
        "model.norm.weight": drawn(4),
    }


def made(modules, extra=None):
    return loralens.Adapter(modules=modules, extra=extra or {}, base_model="tiny/base")


def random_module(out=6, in_=4, scale=2.0, kind="linear", **more):
    return low_rank(out, in_, scale=scale, layout=Layout(kind), **more)


def test_a_bare_file_has_an_unknown_scale_and_names_the_option():
    adapter = mlx.read(file(None))
    assert {module.scaling.formula for module in adapter.modules.values()} == {"unknown"}
    (finding,) = adapter.findings
    assert finding.code == "alpha-unknown"
    assert "scale=" in finding.fix
    assert "alpha=" not in finding.fix
    assert write(adapter).config is None


@pytest.mark.parametrize("scale", ["10", True, float("nan"), 10**400])
def test_a_scale_that_is_no_number_is_an_error(scale):
    with pytest.raises(FormatError, match="finite number"):
        mlx.read(file({**CONFIG, "lora_parameters": {"scale": scale}}))


def test_full_fine_tuning_is_refused_by_name():
    whole = stored({f"{Q}.weight": drawn(6, 4)}, config={"fine_tune_type": "full", "lora_parameters": None})
    assert mlx.detect(whole)
    with pytest.raises(FormatError, match="fine_tune_type full"):
        mlx.read(whole)


def test_findings_of_rank_and_of_an_alpha_that_early_versions_used():
    adapter = mlx.read(file({"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16}, "lora_layers": 4}))
    assert [f.code for f in adapter.findings] == ["rank-disagrees", "alpha-beside-scale"]


def test_dora_magnitudes_are_on_the_rows_of_the_stored_weight():
    adapter = mlx.read(file(**full(), **{f"{Q}.m": drawn(6), f"{EMBED}.m": drawn(7), "model.norm.m": drawn(3)}))
    roles = {key: extra.role for key, extra in adapter.extra.items() if key.endswith(".m")}
    assert roles == {f"{Q}.m": "magnitude", f"{EMBED}.m": "magnitude_in", "model.norm.m": "other"}
    with pytest.raises(ShapeError, match="not one number for each of 6 rows"):
        mlx.read(file(**full(), **{f"{Q}.m": drawn(5)}))


def test_dora_without_magnitudes_has_the_lengths_of_the_base():
    adapter = mlx.read(
        file({"fine_tune_type": "dora", "lora_parameters": {"scale": 2.0}}, **full(), **{f"{Q}.m": drawn(6)})
    )
    roles = {extra.module: extra.role for extra in adapter.extra.values() if extra.role != "other"}
    assert (roles.pop(Q), roles[EMBED]) == ("magnitude", "norms_in")
    linear = {name for name, module in adapter.items() if module.layout.kind == "linear"} - {Q}
    assert roles == {EMBED: "norms_in", **dict.fromkeys(linear, "norms")}
    (finding,) = [one for one in adapter.findings if one.code == "dora-magnitudes-missing"]
    assert "mlx-lm uses the lengths in W" in finding.text
    again = write(adapter)
    assert set(again.tensors) == {*full(), f"{Q}.m"}
    assert again.config["fine_tune_type"] == "dora"


def test_another_scale_changes_the_configuration_alone():
    source = file()
    doubled = mlx.read(source).map(lambda m: m.rescaled(20.0, Scaling("given")))
    out = write(doubled)
    assert out.config == {**CONFIG, "lora_parameters": {**CONFIG["lora_parameters"], "scale": 20.0}}
    assert_same_file(replace(out, config=None), replace(source, config=None))


def test_from_another_dialect_with_a_configuration_that_makes_the_same_layers():
    experts = {f"{UP}[{e}]": random_module(kind="experts", seed=e) for e in range(3)}
    adapter = made({Q: random_module(), EMBED: random_module(4, 7, kind="embedding"), **experts})
    out = write(adapter)
    assert out.config == {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "rank": 2,
            "scale": 2.0,
            "dropout": 0.0,
            "keys": ["mlp.switch_mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"],
        },
        "model": "tiny/base",
        "num_layers": -1,
    }
    back = mlx.read(out)
    for name, module in adapter.items():
        np.testing.assert_array_equal(back[name].dense(), module.dense())


def test_other_scales_are_folded_exactly_where_they_are_powers_of_two_apart():
    modules = {
        "a.q": random_module(scale=3.0),
        "b.q": random_module(scale=3.0),
        "half": random_module(scale=1.5, dtype=np.float64),
        "third": random_module(scale=-1.0, dtype=np.float16),
        "narrow": random_module(scale=0.75, dtype=np.float16),
        "none": random_module(scale=0.0),
    }
    out = write(made(modules))
    assert out.config["lora_parameters"]["scale"] == 3.0
    assert out.tensors["half.lora_b"].dtype == np.float64
    assert out.tensors["third.lora_b"].dtype == np.float32
    assert out.tensors["narrow.lora_b"].dtype == np.float32  # float16 has no exponents to spare
    back = mlx.read(out)
    for name in ("a.q", "b.q", "half", "narrow", "none"):
        np.testing.assert_array_equal(back[name].dense(), modules[name].dense())
    np.testing.assert_allclose(back["third"].dense(), modules["third"].dense(), rtol=1e-5, atol=1e-6)


def test_a_magnitude_of_another_dialect_is_that_of_the_rows():
    m = LazyArray.of(drawn(6))
    out = write(made({Q: random_module()}, {"x": Extra("magnitude", Q, m)}))
    assert out.config["fine_tune_type"] == "dora"
    np.testing.assert_array_equal(out.tensors[f"{Q}.m"].read(), m.read())


def test_what_mlx_cannot_hold_is_refused_by_name():
    with pytest.raises(FormatError, match="no LoRA for a conv weight"):
        write(made({"c": LowRank(drawn(6, 2), drawn(2, 36), layout=Layout("conv", (3, 3)))}))
    with pytest.raises(FormatError, match=r"mlx-lm has no place for head\.weight \(saved\)"):
        write(made({Q: random_module()}, {"head.weight": Extra("saved", "head", LazyArray.of(drawn(2, 4)))}))
    with pytest.raises(ShapeError, match="some experts of this stack are missing"):
        write(made({f"{UP}[1]": random_module(kind="experts")}))


@pytest.mark.live
def test_mlx_lm_itself_applies_what_is_written(tmp_path):
    """Live: the layers that mlx-lm makes by our configuration, fused, are W + ΔW."""
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    load_adapters = pytest.importorskip("mlx_lm.tuner.utils").load_adapters

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 6, bias=False) for _ in range(3)]

    block = type("Block", (nn.Module,), {})
    model = Model()
    for i, linear in enumerate(model.layers):
        model.layers[i] = block()
        model.layers[i].q_proj = linear
    W = np.array(model.layers[0].q_proj.weight).astype(np.float64)
    module = random_module(scale=3.0)
    out = write(made({"layers.0.q_proj": module}))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {k: mx.array(t.read()) for k, t in out.tensors.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps(out.config))
    load_adapters(model, str(tmp_path))
    fused = np.array(model.layers[0].q_proj.fuse().weight).astype(np.float64)
    assert np.abs(fused - W).max() > 1e-2
    np.testing.assert_allclose(fused, W + module.dense(), atol=1e-5)
