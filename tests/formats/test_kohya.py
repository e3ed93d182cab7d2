"""kohya: what its files say, what is written for it, and what must not be read or written."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import loralens
from loralens import FormatError
from loralens.core import Extra, Layout, LazyArray, Scaling
from loralens.formats import encode_adapter
from tests import models
from tests.formats.dialects import FORM
from tests.formats.files import read_safetensors
from tests.formats.stores import assert_same_tensors, stored
from tests.marks import examples
from tests.tolerances import SAME_UPDATE

kohya = FORM["kohya"]
lycoris = FORM["lycoris"]
write = FORM["kohya"].write

CONFORMANCE = Path(__file__).parent.parent / "conformance"
Q = "lora_unet_mid_block_attn1_to_q"
fuzz = examples(200, suppress_health_check=[HealthCheck.too_slow])


def pair(name=Q, *, out=6, r=2, in_=4, dtype=np.float32, alpha=None, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {
        f"{name}.lora_down.weight": rng.standard_normal((r, in_)).astype(dtype),
        f"{name}.lora_up.weight": rng.standard_normal((out, r)).astype(dtype),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": np.float32(alpha)}


def case(name):
    return read_safetensors(CONFORMANCE / name / "adapter_model.safetensors")


def low_rank(scale=1.0, *, r=2, **more):
    return models.low_rank(6, 4, r, scale, **more)


def adapter(*names, scale=1.0, **rest):
    return loralens.Adapter(modules={name: low_rank(scale, seed=i) for i, name in enumerate(names)}, **rest)


# --- what a file says ---


def test_without_alpha_the_scale_is_one_and_that_is_said():
    read = kohya.read(case("kohya-glued"))
    (name, module), *_ = read.items()
    assert name == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    assert (module.scale, module.scaling.formula) == (1.0, "alpha/r")
    assert "no alpha" in str(module.scaling)
    assert [(finding.level, finding.code) for finding in read.findings] == [("note", "alpha-missing")]
    some = kohya.read(stored({**pair("lora_unet_a", alpha=4), **pair("lora_unet_b")}))
    assert [(finding.level, finding.code) for finding in some.findings] == [("warning", "alpha-missing")]
    assert not loralens.load(CONFORMANCE / "kohya-glued", alpha=4).findings


def test_alpha_zero_means_r():
    read = kohya.read(stored(pair(alpha=0)))
    assert read[Q].scale == 1.0
    assert [finding.code for finding in read.findings] == ["alpha-zero"]
    assert_same_tensors(stored(pair(alpha=0)).tensors, write(read).tensors)


ONES = np.ones((2, 4), np.float32)


# --- which files are kohya's ---


@pytest.mark.parametrize("own", ["x.hada_w1_a", "x.lora_mid.weight", "x.diff", "x.oft_blocks"])
def test_lycoris_files_are_left_to_lycoris(own):
    tensors = {**pair(), f"lora_unet_{own}": ONES}
    assert not kohya.detect(stored(tensors))
    assert lycoris.detect(stored(tensors))


# --- there and back ---


def test_a_new_scale_changes_alpha_alone():
    read = kohya.read(stored(pair(dtype=ml_dtypes.bfloat16, alpha=8), metadata={"ss_network_alpha": "8", "a": "b"}))
    for scale in (7 / 24, -0.1, 1e-30):
        half = read.map(lambda module, scale=scale: module.rescaled(scale, Scaling("given")))
        once = write(half)
        alpha = once.tensors[f"{Q}.alpha"].read()
        assert (alpha.shape, alpha.dtype) == ((), np.float32)
        assert kohya.read(once)[Q].scale == pytest.approx(scale, rel=1e-7)
        assert_same_tensors({**once.tensors, f"{Q}.alpha": read[Q].origin.tensors[f"{Q}.alpha"]}, write(read).tensors)
        assert once.metadata["a"] == "b"
        assert float(once.metadata["ss_network_alpha"]) == float(alpha)


@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_scale_of_zero_goes_into_the_factor(scale):
    """α = 0 would mean α = r to sd-scripts."""
    for one in (adapter(Q, scale=scale), kohya.read(stored(pair(alpha=8))).map(lambda m: m.rescaled(scale, Scaling()))):
        back = kohya.read(write(one))
        assert back[Q].scale == 1.0
        assert not back[Q].dense().any()
        assert back[Q].A.any()


def test_a_changed_adapter_has_true_metadata():
    said = {"ss_network_dim": "2", "ss_network_alpha": "8", "a": "b"}
    read = kohya.read(stored({**pair("lora_unet_a", alpha=8), **pair("lora_unet_b", alpha=8)}, metadata=said))
    changed = replace(read, modules={**read.modules, "lora_unet_b": low_rank(4.0, r=1)})
    true = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic", "a": "b"}
    assert encode_adapter(changed)[0].metadata == true
    assert write(replace(changed, metadata=None)).metadata is None
    assert encode_adapter(read)[0].metadata == said


# --- from other dialects ---

NAMES = {
    "unet.down_blocks.0.attn1.to_q": "lora_unet_down_blocks_0_attn1_to_q",
    "diffusion_model.blocks.0.q": "lora_unet_blocks_0_q",
    "text_encoder.text_model.q": "lora_te_text_model_q",
    "lora_te2_text_model_q": "lora_te2_text_model_q",
    "lycoris_q": "lycoris_q",
    "model.layers.10.q_proj": "lora_unet_model_layers_10_q_proj",
}


def test_names():
    one = adapter(*NAMES, scale=2.0)
    once = write(one)
    assert {key.split(".")[0] for key in once.tensors} == set(NAMES.values())
    assert once.names == {file: name for name, file in NAMES.items() if file != name}
    assert once.metadata == {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "4"}
    assert kohya.detect(once)
    back = kohya.read(once)
    for name, file in NAMES.items():
        np.testing.assert_array_equal(back[file].dense(), one[name].dense())


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["text_encoder.q", "text_encoder_2.q"], ["lora_te1_q", "lora_te2_q"]),
        (["text_encoder_2.encoder.block.0.q"], ["lora_te3_encoder_block_0_q"]),
        (["unet.q", "text_encoder.q"], ["lora_unet_q", "lora_te_q"]),
    ],
)
def test_text_encoders(names, files):
    once = write(adapter(*names))
    assert {key.split(".")[0] for key in once.tensors} == set(files)
    assert sorted(once.names.values()) == sorted(names)
    assert set(once.names) == set(kohya.read(once))


def test_two_modules_of_one_name():
    with pytest.raises(FormatError, match="would be called lora_unet_a_b_c too"):
        write(adapter("unet.a.b_c", "unet.a_b.c"))


@pytest.mark.parametrize(
    ("kernel", "role", "given", "shape"),
    [
        ((), "magnitude", (6,), (6, 1)),
        ((2, 1), "magnitude_in", (2,), (1, 2, 1, 1)),
    ],
)
def test_magnitudes_are_translated(kernel, role, given, shape):
    layout = Layout("conv", kernel=kernel) if kernel else Layout()
    numbers = np.arange(1, 1 + np.prod(given), dtype=np.float32).reshape(given)
    extra = {"unet.x.lora_magnitude_vector": Extra(role, "unet.x", LazyArray.of(numbers))}
    once = write(loralens.Adapter(modules={"unet.x": low_rank(layout=layout)}, extra=extra))
    assert once.tensors["lora_unet_x.dora_scale"].shape == shape
    back = kohya.read(once).extra["lora_unet_x.dora_scale"]
    assert (back.role, back.module) == (role, "lora_unet_x")
    np.testing.assert_array_equal(back.tensor.read().ravel(), numbers.ravel())


def test_a_leftover_never_overwrites_a_factor():
    """A lone alpha under the name that a changed module gets."""
    read = kohya.read(stored({**pair("lora_unet_a"), "lora_unet_b.alpha": np.float32(3)}))
    with pytest.raises(FormatError, match=r"lora_unet_b\.alpha would be written twice"):
        write(replace(read, modules={**read.modules, "lora_unet_b": low_rank()}))


# --- anything at all ---

module_names = st.lists(
    st.sampled_from(["unet", "text_encoder", "a", "b_c", "0", "unet_", "é"]), min_size=1, max_size=4
)


@fuzz
@given(
    st.lists(module_names.map(".".join), min_size=1, max_size=4, unique=True),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]),
    st.integers(1, 3),
)
def test_what_is_written_is_read_back(given_names, scale, dtype, r):
    modules = {name: low_rank(scale, seed=i, r=r, dtype=dtype) for i, name in enumerate(given_names)}
    try:
        once = write(loralens.Adapter(modules=modules))
    except FormatError:
        return
    back = kohya.read(once)
    assert len(back) == len(modules)
    for file, module in back.items():
        other = modules[once.names[file]]
        assert module.dtype == dtype
        np.testing.assert_allclose(module.dense(), other.dense(), rtol=1e-6, atol=SAME_UPDATE["atol"] * abs(scale))
