"""loralib state dicts: against loralib's own merged weights, fused slices, convolutions, what else they hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import FormatError, LowRank, ShapeError
from loralens.core import Extra, Layout, LazyArray
from tests.formats.dialects import FORM
from tests.formats.stores import assert_same_file, drawn, stored

loralib = FORM["loralib"]
write = FORM["loralib"].write

Q = "roberta.encoder.layer.0.attention.self.query"
SLICES = {"enable_lora": [True, False, True]}


def pair(name, out, in_, rank):
    return {f"{name}.lora_A": drawn(rank, in_), f"{name}.lora_B": drawn(out, rank)}


def fused():
    """A query and a value of a fused weight of 9 rows, rank 2."""
    return {"c_attn.lora_A": drawn(4, 5), "c_attn.lora_B": drawn(6, 2)}


def of(adapter):
    """``adapter`` as loralib, with no trace of the file it was read from."""
    return replace(adapter, modules={n: LowRank(m.B, m.A, m.scale, layout=m.layout) for n, m in adapter.items()})


def test_fused_projections_need_a_word_about_which():
    with pytest.raises(FormatError, match=r"c_attn: .* does not say which of them\n  fix: .*enable_lora"):
        loralib.read(stored(fused()))
    for held in ({"config": SLICES}, {"plain": SLICES}):
        adapter = loralib.read(stored(fused(), **held))
        assert adapter["c_attn"].shape == (9, 5)
        assert adapter["c_attn"].scaling.rank == 2
        assert adapter.config == SLICES
        assert not adapter["c_attn"].dense()[3:6].any()
        assert write(adapter).config == SLICES
    with pytest.raises(ShapeError, match="do not fit 3 adapted slices"):
        loralib.read(stored(fused(), config={"enable_lora": [True, True, True]}))


def test_one_slice_alone_is_taken_from_the_configuration():
    file = stored(pair("c_attn", 3, 5, 2), config={"enable_lora": [False, False, True]})
    adapter = loralib.read(file)
    assert adapter["c_attn"].shape == (9, 5)
    assert not adapter["c_attn"].dense()[:6].any()
    assert_same_file(write(adapter), file)
    with pytest.raises(ShapeError, match="one slice of a fused weight"):
        write(of(adapter))


def test_roles_of_what_stands_beside():
    tensors = {
        **pair(Q, 6, 4, 2),
        f"{Q}.bias": drawn(6),
        "out.dense.bias": drawn(4),
        "classifier.dense.weight": drawn(4, 4),
        "classifier.dense.bias": drawn(4),
        "step": drawn(1),
    }
    roles = {key: extra.role for key, extra in loralib.read(stored(tensors)).extra.items()}
    assert roles == {
        f"{Q}.bias": "bias",
        "out.dense.bias": "bias",
        "classifier.dense.weight": "saved",
        "classifier.dense.bias": "saved",
        "step": "other",
    }


def test_a_convolution_without_its_weight_is_doubted():
    adapter = loralib.read(stored(pair("features.conv1", 6, 4, 2)))
    assert [finding.code for finding in adapter.findings] == ["alpha-unknown", "conv-unknown"]


def test_from_another_dialect():
    modules = {Q: LowRank(drawn(6, 2), drawn(2, 4), 4.0), "embed_tokens": LowRank(drawn(4, 2), drawn(2, 7))}
    bias = {f"base_model.model.{Q}.bias": Extra("bias", Q, LazyArray.of(drawn(6)))}
    out = write(loralens.Adapter(modules=modules, extra=bias))
    assert set(out.tensors) == {f"{n}.lora_{half}" for n in modules for half in "AB"} | {f"{Q}.bias"}
    assert out.config is None
    with pytest.raises(FormatError, match="does not say what a conv weight is"):
        write(loralens.Adapter(modules={"c": LowRank(drawn(6, 2), drawn(2, 36), layout=Layout("conv", (3, 3)))}))


def test_loralib_itself_loads_what_is_written(tmp_path):
    """Live: our state dict in loralib's layer, merged with lora_alpha = scale · r, is W + ΔW."""
    lora, torch = pytest.importorskip("loralib"), pytest.importorskip("torch")
    module = LowRank(drawn(6, 2), drawn(2, 4), 4.0)
    loralens.save(loralens.Adapter(modules={"q": module}), tmp_path / "a.bin", format="loralib")
    model = torch.nn.Module()
    model.add_module("q", lora.Linear(4, 6, r=2, lora_alpha=8))
    missing = model.load_state_dict(torch.load(tmp_path / "a.bin"), strict=False)
    assert not missing.unexpected_keys
    before = model.q.weight.detach().clone()
    model.q.eval()
    np.testing.assert_allclose((model.q.weight - before).detach(), module.dense(), atol=1e-5)


def test_alpha_belongs_to_r_and_not_to_the_width_of_a_convolution():
    file = Path(__file__).parent.parent / "conformance" / "loralib-conv" / "adapter_model.bin"
    assert loralens.load(file, alpha=16)["wide"].scale == 8
