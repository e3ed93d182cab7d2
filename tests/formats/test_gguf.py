"""GGUF adapters: llama.cpp's names, rows and one α, and a container that nothing damaged gets through."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import loralens
from loralens import FormatError, LoraLensError, MismatchError, OptionError, ShapeError
from loralens.core import Layout, Scaling
from loralens.formats import Stored
from loralens.formats.dialects.gguf_architectures import architecture_in
from tests import ggufs, models
from tests.formats import stores
from tests.formats.blobs import damaged
from tests.formats.dialects import FORM
from tests.formats.files import gguf_file as gguf_values
from tests.formats.files import read_gguf, write_gguf
from tests.formats.stores import assert_same_tensors
from tests.formats.test_fuzz import read_everything
from tests.marks import examples
from tests.tolerances import CONFORMANCE, SAME_UPDATE

gguf = FORM["gguf"]
write = FORM["gguf"].write
HEADS, HEADS_KV = "loralens.attention.head_count", "loralens.attention.head_count_kv"

package = pytest.importorskip("gguf")
OWN = sorted((Path(__file__).parent.parent / "conformance").glob("gguf-*"))
Q, K, V = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 4}
KINDS = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}
fuzz = examples(200, suppress_health_check=[HealthCheck.too_slow])


def drawn(*shape, dtype=np.float32, seed=0):
    return stores.number(shape, [seed, *shape], dtype)


def low_rank(out=16, in_=6, *, r=2, scale=2.0, **rest):
    return models.low_rank(out, in_, r, scale, **rest)


def adapter(modules=None, **rest):
    return loralens.Adapter(modules=modules or {Q: low_rank(), K: low_rank(8), V: low_rank(8)}, **rest)


def stored(tensors, metadata=None, **rest):
    metadata = KINDS if metadata is None else metadata
    return stores.stored(tensors, metadata=metadata, plain=gguf_values.plain_values(metadata), **rest)


def pair(tensor="blk.0.attn_v", *, out=16, in_=6, r=2, dtype=np.float32):
    return {
        f"{tensor}.weight.lora_a": drawn(r, in_, dtype=dtype, seed=1),
        f"{tensor}.weight.lora_b": drawn(out, r, dtype=dtype),
    }


def on_disk(value: Stored, folder: Path) -> Stored:
    write_gguf(value, folder / "adapter.gguf")
    return read_gguf(folder / "adapter.gguf")


# --- rows of q and k ------------------------------------------------------------------------------------------------


def test_rows_of_q_and_k_are_written_in_llama_cpp_s_order():
    written, source = write(adapter(), base_config=LLAMA).tensors, adapter()
    for name, key, heads in ((Q, "q", 4), (K, "k", 2)):
        B = written[f"blk.0.attn_{key}.weight.lora_b"].read()
        np.testing.assert_array_equal(B, ggufs.permute(source[name].B, heads))
        assert not np.array_equal(B, source[name].B)


def test_only_q_and_k_of_llama_need_the_numbers_of_heads():
    assert write(adapter({V: low_rank()}), arch="llama").tensors
    assert write(adapter(), arch="qwen2").tensors
    with pytest.raises(OptionError, match="self_attn") as caught:
        write(adapter(), arch="llama")
    assert "--base" in caught.value.fix


# --- what is read ---------------------------------------------------------------------------------------------------


def test_rows_are_brought_back_where_the_file_or_the_base_says_the_heads():
    tensors, llama = pair("blk.0.attn_q"), {**KINDS, "general.architecture": "llama"}
    own = {**llama, f"{HEADS}:u32": "4", f"{HEADS_KV}:u32": "2"}
    for value in (stored(tensors, own), stored(tensors, llama, config=LLAMA)):
        found = gguf.read(value)
        np.testing.assert_array_equal(ggufs.permute(found[Q].B, 4), tensors["blk.0.attn_q.weight.lora_b"])
        assert not found.findings


def test_rows_stay_where_nothing_says_the_heads_and_that_is_said():
    llama = {**KINDS, "general.architecture": "llama"}
    found = gguf.read(stored(pair("blk.0.attn_q"), llama))
    assert [finding.code for finding in found.findings] == ["rows-permuted"]
    assert "base=" in found.findings[0].fix
    np.testing.assert_array_equal(found[Q].B, drawn(16, 2))
    assert not gguf.read(stored(pair("blk.0.attn_v"), llama)).findings
    assert not gguf.read(stored(pair("blk.0.attn_q"))).findings


def test_other_heads_or_a_base_of_another_architecture_are_refused():
    with pytest.raises(MismatchError, match="16 rows cannot be divided into 3 heads"):
        gguf.read(stored(pair("blk.0.attn_q"), {**KINDS, "general.architecture": "llama", f"{HEADS}:u32": "3"}))
    with pytest.raises(MismatchError, match=r"qwen2.*llama"):
        gguf.read(stored(pair(), config=LLAMA))


def test_an_unknown_architecture_keeps_its_names():
    found = gguf.read(stored({**pair(), **pair("blk.3.ssm_in")}, {**KINDS, "general.architecture": "brand_new"}))
    assert list(found) == ["blk.0.attn_v", "blk.3.ssm_in"]
    assert [finding.code for finding in found.findings] == ["names-unknown"]
    assert list(gguf.read(stored(pair("blk.3.ssm_in")))) == ["blk.3.ssm_in"]
    assert_same_tensors(write(found).tensors, stored({**pair(), **pair("blk.3.ssm_in")}).tensors)


def test_norms_and_strange_tensors_ride_along():
    tensors = {**pair(), "blk.0.attn_norm.weight": drawn(6), "mystery": np.arange(3, dtype=np.int32)}
    found = gguf.read(stored(tensors))
    assert {key: extra.role for key, extra in found.extra.items()} == {
        "blk.0.attn_norm.weight": "saved",
        "mystery": "other",
    }
    assert_same_tensors(write(found).tensors, stored(tensors).tensors)
    assert [finding.code for finding in found.findings] == ["norms-ignored"]


A_KEY = "blk.0.attn_v.weight.lora_a"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({A_KEY: None}, FormatError, "has no A beside it"),
        ({A_KEY: np.zeros((2, 6), np.int8)}, FormatError, "int8"),
        ({A_KEY: np.zeros((3, 6), np.float32)}, ShapeError, "do not multiply"),
        (
            {"blk.0.attn_v_exps.lora_a": np.zeros((2, 2, 6)), "blk.0.attn_v_exps.lora_b": np.zeros((3, 8, 2))},
            ShapeError,
            "experts",
        ),
        ({"blk.0.attn_v.lora_a": np.zeros((2, 6), np.float32)}, FormatError, "same tensor"),
    ],
)
def test_a_damaged_pair_is_refused_with_its_name(change, error, message):
    tensors = {key: array for key, array in {**pair(), **change}.items() if array is not None}
    with pytest.raises(error, match=message) as caught:
        read_everything(gguf.read(stored(tensors)))
    assert "blk.0.attn_v" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [(":f32", "NaN"), (":f64", "1e300"), (":f64", "0.1"), ("", "16")],
)
def test_an_alpha_that_is_no_float32_is_refused(kind, alpha):
    with pytest.raises(FormatError, match="finite float32"):
        gguf.read(stored(pair(), {**KINDS, f"adapter.lora.alpha{kind}": alpha}))


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_reference_implementation_reads_what_is_written(tmp_path):
    value = write(replace(adapter(), base_model="org/base"), base_config=LLAMA)
    write_gguf(value, tmp_path / "a.gguf")
    reader = package.GGUFReader(tmp_path / "a.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.base_model.count": 1,
        "general.base_model.0.name": "org/base",
        HEADS: 4,
        HEADS_KV: 2,
        "adapter.lora.alpha": 4.0,
    }
    assert reader.fields["adapter.lora.alpha"].types == [package.GGUFValueType.FLOAT32]
    assert [tensor.name for tensor in reader.tensors] == [
        f"blk.0.attn_{kind}.weight.lora_{half}" for kind in "kqv" for half in "ab"
    ]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, value.tensors[tensor.name].read())
        assert tensor.tensor_type == package.GGMLQuantizationType.F32


@pytest.mark.parametrize("base", [LLAMA, QWEN])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "scales", [(2, 2, 2), (0.1, 0.1, 0.1), (2, 3, 2), (-1, -1, -1), (0, 0, 0), (0, 1, 2), (1, 1, 1), (1e-30, 1, 1e30)]
)
def test_the_update_survives_whatever_the_scales(base, dtype, scales, tmp_path):
    first = adapter({name: low_rank(16, dtype=dtype, scale=s) for name, s in zip((Q, K, V), scales, strict=True)})
    back = gguf.read(on_disk(write(first, base_config=base), tmp_path))
    assert set(back) == set(first)
    for name, module in first.items():
        error = np.abs(back[name].dense() - module.dense()).max()
        assert error <= CONFORMANCE * np.abs(module.dense()).max()


def test_an_embedding_is_written_transposed_and_only_as_one():
    embedding = low_rank(4, 9, layout=Layout("embedding"))
    value = write(adapter({"model.embed_tokens": embedding}), arch="qwen2")
    assert value.tensors["token_embd.weight.lora_a"].shape == (9, 2)
    np.testing.assert_allclose(gguf.read(value)["model.embed_tokens"].dense(), embedding.dense(), **SAME_UPDATE)
    with pytest.raises(FormatError, match="token_embd as linear"):
        write(adapter({"model.embed_tokens": low_rank()}), arch="qwen2")


@pytest.mark.parametrize(
    ("arch", "pattern", "tensor"),
    [
        ("qwen3moe", "model.layers.1.mlp.experts.{}.down_proj", "blk.1.ffn_down_exps"),
        ("llama", "model.layers.1.block_sparse_moe.experts.{}.w3", "blk.1.ffn_up_exps"),
    ],
)
def test_experts_are_stacked(arch, pattern, tensor, tmp_path):
    modules = {pattern.format(e): low_rank(8, 6, scale=e + 1.0) for e in range(11)}
    value = write(adapter(modules), arch=arch)
    assert value.tensors[f"{tensor}.weight.lora_a"].shape == (11, 2, 6)
    assert value.tensors[f"{tensor}.weight.lora_b"].shape == (11, 8, 2)
    back = gguf.read(on_disk(value, tmp_path))
    names = {value.names.get(name, name): module for name, module in back.items()}
    assert set(names) == set(modules)
    for name, module in modules.items():
        np.testing.assert_allclose(names[name].dense(), module.dense(), rtol=1e-6, atol=1e-6)


def test_a_stack_without_some_experts_is_refused():
    modules = {f"model.layers.1.mlp.experts.{e}.down_proj": low_rank() for e in (0, 2)}
    with pytest.raises(ShapeError, match="2 experts"):
        write(adapter(modules), arch="qwen3moe")
    modules = {f"model.layers.1.mlp.experts.{e}.down_proj": low_rank() for e in (0, 1)}
    with pytest.raises(ShapeError, match="0 to 3"):
        write(adapter(modules), base_config={"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4})
    modules = {f"model.layers.1.mlp.experts.{e}.down_proj": low_rank(r=e + 1) for e in (0, 1)}
    with pytest.raises(ShapeError, match="rank"):
        write(adapter(modules), arch="qwen3moe")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.0.conv": low_rank()}, "no tensor of that name"),
        ({Q: low_rank(in_=9, layout=Layout("conv", kernel=(3, 3)))}, "convolutions"),
        ({Q: low_rank(), f"language_model.{Q}": low_rank()}, "has the same place in a GGUF file as"),
        ({Q: low_rank(dtype=np.float64)}, "float64"),
        ({"lm_head": low_rank()}, "head is its embedding"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(modules, message):
    with pytest.raises(FormatError, match=message) as caught:
        write(adapter(modules), base_config={**QWEN, "tie_word_embeddings": True})
    assert next(reversed(modules)) in str(caught.value)


def test_a_head_that_is_the_embedding_is_refused_where_only_the_family_says_so():
    gemma = {
        "architectures": ["Gemma2ForCausalLM"],
        "num_attention_heads": 4,
    }  # tied, and transformers does not save it
    with pytest.raises(FormatError, match="head is its embedding") as caught:
        write(adapter({"lm_head": low_rank()}), base_config=gemma)
    assert "loralens drop ADAPTER -m NAME" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_config": {"architectures": ["GPT9ForCausalLM"], "model_type": "llama"}}, "GPT9ForCausalLM"),
        ({"base_config": LLAMA, "arch": "qwen2"}, "arch= says qwen2"),
        ({"base_config": {**LLAMA, "num_attention_heads": "many"}}, "not numbers of heads"),
        ({"base_config": {**LLAMA, "num_key_value_heads": [1, 2]}}, "not numbers of heads"),
    ],
)
def test_options_that_say_nothing_or_two_things_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        write(adapter(), **options)


# --- back into the same file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OWN, ids=lambda folder: folder.name)
def test_what_was_read_is_written_back_to_the_bit(folder):
    first = read_gguf(folder / "adapter.gguf")
    again = write(gguf.read(first))
    assert_same_tensors(again.tensors, first.tensors)
    assert again.metadata == first.metadata


@pytest.mark.parametrize("known", [True, False])
def test_a_changed_module_is_written_in_the_rows_of_its_file(known):
    """Where rows were brought into Hugging Face's order they go back; where nobody knew the heads they never left."""
    tensors, metadata = pair("blk.0.attn_q"), {**KINDS, "general.architecture": "llama"}
    first = gguf.read(stored(tensors, metadata, config=LLAMA if known else None))
    changed = first.map(lambda m: loralens.LowRank(2 * m.B, m.A, m.scale, scaling=m.scaling))
    value = write(changed)
    np.testing.assert_array_equal(
        value.tensors["blk.0.attn_q.weight.lora_b"].read(), 2 * tensors["blk.0.attn_q.weight.lora_b"]
    )
    assert_same_tensors(write(changed, base_config=LLAMA).tensors, value.tensors)


def test_one_changed_rank_keeps_alpha_and_one_changed_scale_folds_all():
    first = gguf.read(stored({**pair(), **pair("blk.1.attn_v")}, {**KINDS, "adapter.lora.alpha:f32": "4.0"}))
    truncated = loralens.LowRank(first[V].B[:, :1], first[V].A[:1], 4.0)
    value = write(replace(first, modules={**first.modules, V: truncated}))
    assert value.plain["adapter.lora.alpha"] == 4.0
    assert value.tensors["blk.0.attn_v.weight.lora_b"].shape == (16, 1)
    mixed = replace(first, modules={**first.modules, V: first[V].rescaled(3.0, Scaling())})
    back = gguf.read(write(mixed))
    for name, module in mixed.items():
        np.testing.assert_allclose(back[name].dense(), module.dense(), rtol=1e-6, atol=1e-6)


# --- the container --------------------------------------------------------------------------------------------------


def test_values_keep_their_types(tmp_path):
    metadata = {
        **KINDS,
        "text": "two\nlines: é",
        "colon:in:key:str": "x",
        "adapter.alora.invocation_tokens:u32[]": "[64, 4294967295]",
        "yes:bool": "true",
        "flags:bool[]": "[true, false]",
        "far:i64": "-9223372036854775808",
        "third:f32": "0.3333333432674408",
    }
    assert on_disk(stored(pair(), metadata), tmp_path).metadata == metadata
    reader = package.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["adapter.alora.invocation_tokens"].types == [
        package.GGUFValueType.ARRAY,
        package.GGUFValueType.UINT32,
    ]
    assert reader.fields["colon:in:key"].contents() == "x"
    assert on_disk(stored(pair(), metadata), tmp_path).plain["far"] == -(2**63)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("x:u9", "1", "not a type"),
        ("x:u8", "256", "cannot be stored as u8"),
        ("x:u8", "true", "cannot be stored as u8"),
        ("x:f32", "1e39", "cannot be stored as f32"),
        ("x:str[]", "[1]", "cannot be stored as str"),
        ("x:u32[]", "[]", "empty array"),
    ],
)
def test_a_value_that_gguf_cannot_hold_is_refused_and_nothing_is_written(key, text, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        write_gguf(Stored({}, {**KINDS, key: text}), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int16, np.int64])
@pytest.mark.parametrize("shape", [(1,), (3,), (0, 4), (5, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_every_dtype_and_shape_survives_the_file(dtype, shape, tmp_path):
    value = stored({"before": np.ones(3, np.int8), "x": drawn(*shape).astype(dtype), "y": drawn(2, 3)})
    back = on_disk(value, tmp_path)
    assert_same_tensors(back.tensors, value.tensors)
    if shape and shape[0] > 1:
        np.testing.assert_array_equal(back.tensors["x"].rows(1, 2).read(), value.tensors["x"].read()[1:2])


def test_a_header_of_several_chunks(tmp_path):
    """Values begin at every place of a chunk."""
    texts = {f"long.{i}": "x" * (gguf_values.CHUNK - 5 * i) for i in range(9)}
    numbers = {f"n.{i}:u32[]": str(list(range(40))) for i in range(9)}
    between = dict(item for pair in zip(texts.items(), numbers.items(), strict=True) for item in pair)
    filled = {f"{i}:u32[]": str(list(range(1000))) for i in range(40)}
    value = stored(pair(), {**KINDS, **between, **filled})
    assert on_disk(value, tmp_path).metadata == value.metadata


def test_another_alignment_is_kept(tmp_path):
    value = stored(pair(), {**KINDS, "general.alignment:u32": "256"})
    assert_same_tensors(on_disk(value, tmp_path).tensors, value.tensors)
    for said in ("3", "0", "131072"):
        with pytest.raises(FormatError, match="alignment"):
            write_gguf(stored(pair(), {**KINDS, "general.alignment:u32": said}), tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "llama"}, "is a GGUF 'model' file"),
        ({"general.type": "imatrix"}, "'imatrix' file"),
        ({**KINDS, "adapter.type": "control"}, "'control' adapter"),
    ],
)
def test_a_gguf_file_that_is_no_lora_is_refused_by_its_name(metadata, message, tmp_path):
    write_gguf(stored(pair(), metadata), tmp_path / "a.gguf")
    with pytest.raises(FormatError, match=message):
        read_gguf(tmp_path / "a.gguf")
    assert not gguf.detect(stored(pair(), metadata))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small file."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    metadata = {**KINDS, "adapter.lora.alpha:f32": "16.0", "tokens:u32[]": "[1, 2]", "yes:bool": "true"}
    write_gguf(stored({**pair(), "blk.0.attn_norm.weight": drawn(6)}, metadata), path)
    return path.read_bytes()


def placed(data, position, number, size):
    return data[:position] + number.to_bytes(size, "little") + data[position + size :]


def after(data, text):
    return data.index(text) + len(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "needs 4 bytes"),
        (lambda d: b"GGML" + d[4:], "does not begin"),
        (lambda d: placed(d, 4, 1, 4), "version 1"),
        (lambda d: placed(d, 4, 3 << 24, 4), "big-endian"),
        (lambda d: placed(d, after(d, b"general.architecture"), 99, 4), "type 99"),
        (lambda d: placed(d, after(d, b"lora_a"), 5, 4), "axes"),
        (lambda d: placed(d, after(d, b"lora_a") + 4, 1 << 62, 8), "truncated"),
        (lambda d: placed(d, after(d, b"lora_a") + 20, 2, 4), "Q4_0"),
        (lambda d: placed(d, after(d, b"lora_a") + 20, 8, 4), "blocks of 32"),
        (lambda d: placed(d, after(d, b"lora_a") + 24, 32, 8), "not right after"),
        (lambda d: d.replace(b"lora_b", b"lora_a"), "appears twice"),
        (lambda d: d.replace(b"tokens", b"tok\x1b[s"), "control characters"),
        (lambda d: d.replace(b"qwen2", b"qwen\xff"), "not UTF-8"),
        (lambda d: d[:-40], "truncated"),
        (lambda d: d + bytes(64), "bytes follow"),
    ],
)
def test_a_damaged_file_is_refused_before_a_number_is_read(whole, change, message, tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(change(whole))
    with pytest.raises(FormatError, match=message) as caught:
        read_gguf(file)
    assert str(file) in str(caught.value)


@pytest.mark.slow
@fuzz
@given(st.data())
def test_whatever_happens_to_the_bytes_it_is_an_adapter_or_an_error(whole, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    file.write_bytes(data.draw(damaged(whole)))
    try:
        found = gguf.read(read_gguf(file))
        read_everything(found)
        written = write(found)
        assert gguf.read(written).modules.keys() == found.modules.keys()
    except LoraLensError as error:
        assert "\x1b" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("base", "arch"),
    [("Qwen/Qwen2.5-0.5B", "qwen2"), ("google/gemma-2b", "gemma"), ("google/gemma-2-9b", "gemma2"), ("mine", None)],
)
def test_the_name_of_the_base_tells_which_architecture_to_give(base: str, arch: str | None) -> None:
    found = architecture_in(base)
    assert (found and found.name) == arch
