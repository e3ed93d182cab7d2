"""Changed copies of GGUF models: every byte that is not of a changed tensor is the original's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from loralens.formats import open_checkpoint
from loralens.formats.models.gguf_writer import (
    float_dtypes,
    float_types,
    gguf_copy_bytes,
    write_gguf_copy,
)
from loralens.formats.models.model_writer import Change, CopyOptions
from tests import ggufs
from tests.bases import contents
from tests.formats.files import model_config, model_files
from tests.formats.test_gguf_base import STACKS, mixtral, split

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]


def moved_codes(root: Path, keys: list[str], *, rows: int = 7) -> Any:
    """A filler that moves every code by one, within the grid, in blocks of a few rows; and the numbers then."""
    coded = open_checkpoint(root).coded

    def fill(key: str) -> Iterator[np.ndarray]:
        weight = coded[key]
        assert weight.grid is not None
        assert weight.encode is not None
        for start in range(0, weight.shape[0], rows):
            grid = weight.grid(start, min(start + rows, weight.shape[0]))
            yield weight.encode(start, np.where(grid.codes < grid.highest, grid.codes + 1, grid.codes - 1))

    def numbers(key: str) -> np.ndarray:
        weight = coded[key]
        assert weight.grid is not None
        grid = weight.grid(0, weight.shape[0])
        return grid.values(np.where(grid.codes < grid.highest, grid.codes + 1, grid.codes - 1))

    return fill, {key: numbers(key) for key in keys}


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """The bytes of every stored tensor in a file, by gguf's own reader."""
    return {t.name: (t.data_offset, t.data_offset + t.n_bytes) for t in GGUFReader(path).tensors}


def only_differ(first: Path, second: Path, names: set[str]) -> None:
    """Both files are equal but for the bytes of these tensors, all of which differ."""
    one, other = bytearray(first.read_bytes()), bytearray(second.read_bytes())
    for name, (begin, end) in spans(first).items():
        if name in names:
            assert one[begin:end] != other[begin:end], name
            one[begin:end] = other[begin:end] = bytes(end - begin)
    assert one == other


def nothing(key: str) -> Iterator[np.ndarray]:
    raise AssertionError(key)


def test_a_copy_without_changes_is_the_original(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "m.gguf", ggufs.llama())
    steps: list[int] = []
    files = model_files(tmp_path / "m.gguf")
    write_gguf_copy(
        files, tmp_path / "o.gguf", changes=(), fill=nothing, options=CopyOptions(threads=3, step=steps.append)
    )
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert files.gguf is not None
    assert sum(steps) == gguf_copy_bytes(files.gguf)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"]
)
def test_only_the_codes_of_changed_weights_change(kind: str, tmp_path: Path) -> None:
    hidden = 512 if "K" in kind else 64
    before = ggufs.write(tmp_path / "m.gguf", ggufs.llama(hidden=hidden), kinds=kind)
    fill, numbers = moved_codes(tmp_path / "m.gguf", [Q, DOWN])
    write_gguf_copy(
        model_files(tmp_path / "m.gguf"),
        tmp_path / "o.gguf",
        changes=[Q, DOWN],
        fill=fill,
        options=CopyOptions(threads=2),
    )
    only_differ(tmp_path / "m.gguf", tmp_path / "o.gguf", {"blk.1.attn_q.weight", "blk.0.ffn_down.weight"})
    after = open_checkpoint(tmp_path / "o.gguf").tensors
    for key in before:
        np.testing.assert_array_equal(after[key].read(), numbers.get(key, before[key]), err_msg=key)
    # By gguf's own reading: the rows of q in llama.cpp's order.
    raw = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "o.gguf").tensors}["blk.1.attn_q.weight"]
    read = quants.dequantize(np.ascontiguousarray(raw.data), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read, ggufs.permute(numbers[Q], ggufs.HEADS))


def test_one_expert_of_a_stack(tmp_path: Path) -> None:
    weights = mixtral()
    kinds = dict.fromkeys(weights, "Q4_0") | {"model.layers.0.block_sparse_moe.gate.weight": "F32"}
    ggufs.write(tmp_path / "m.gguf", weights, kinds=kinds, names=STACKS)
    key = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    fill, numbers = moved_codes(tmp_path / "m.gguf", [key])
    write_gguf_copy(model_files(tmp_path / "m.gguf"), tmp_path / "o.gguf", changes=[key], fill=fill)
    only_differ(tmp_path / "m.gguf", tmp_path / "o.gguf", {"blk.0.ffn_up_exps.weight"})
    before, after = (open_checkpoint(tmp_path / name).tensors for name in ("m.gguf", "o.gguf"))
    for other in before:
        np.testing.assert_array_equal(after[other].read(), numbers.get(other, before[other].read()), err_msg=other)


def test_floats_keep_their_type_and_norms_their_shift(tmp_path: Path) -> None:
    weights = ggufs.llama(blocks=1)
    before = ggufs.write(tmp_path / "m.gguf", weights, arch="gemma2", kinds="F16")
    norm, matrix = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
    new = {norm: np.full(64, 0.25, np.float32), matrix: np.ones((96, 64), np.float16)}
    files = model_files(tmp_path / "m.gguf")
    write_gguf_copy(files, tmp_path / "o.gguf", changes=new, fill=lambda key: iter([new[key]]))
    only_differ(tmp_path / "m.gguf", tmp_path / "o.gguf", {"output_norm.weight", "blk.0.ffn_gate.weight"})
    after = open_checkpoint(tmp_path / "o.gguf").tensors
    for key in before:
        np.testing.assert_array_equal(np.asarray(after[key].read(), np.float32), new.get(key, before[key]), err_msg=key)


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_copy_in_floats(arch: str, dtype: np.dtype, tmp_path: Path) -> None:
    """Every weight is what it was, rounded once; the key-values are the original's but for the type of the file."""
    before = ggufs.write(tmp_path / "m.gguf", ggufs.llama(), arch=arch)
    files = model_files(tmp_path / "m.gguf")
    assert files.gguf is not None
    dtypes, steps = float_dtypes(files.gguf, dtype), list[int]()
    assert dtypes["model.norm.weight"] == np.float32
    changed = np.random.default_rng(0).standard_normal((64, 64)).astype(dtype)

    def fill(key: str) -> Iterator[np.ndarray]:
        assert key == Q
        yield from (changed[start : start + 5] for start in range(0, 64, 5))

    target = tmp_path / "o.gguf"
    types, options = float_types(files.gguf, dtype), CopyOptions(threads=2, step=steps.append)
    write_gguf_copy(files, target, changes=[Q], fill=fill, types=types, options=options)
    assert sum(steps) == gguf_copy_bytes(files.gguf, types=types)
    after = open_checkpoint(target).tensors
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == dtypes[key], key
        expected = changed if key == Q else before[key].astype(dtype if before[key].ndim > 1 else np.float32)
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=key)
    old, new = GGUFReader(tmp_path / "m.gguf"), GGUFReader(target)
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    fields = {name: field.contents() for name, field in old.fields.items()}
    number = {"float32": 0, "float16": 1, "bfloat16": 32}[str(dtype)]
    assert {name: field.contents() for name, field in new.fields.items()} == fields | {"general.file_type": number}
    assert model_config(target) == model_config(tmp_path / "m.gguf")


def test_a_split_model_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    split(tmp_path / "m", ggufs.llama())
    (tmp_path / "m" / "README.md").write_text("about it")
    files = model_files(tmp_path / "m" / "m-00001-of-00002.gguf")
    fill, numbers = moved_codes(tmp_path / "m", [Q])
    write_gguf_copy(files, tmp_path / "o", changes=[Q], fill=fill)
    old, new = contents(tmp_path / "m"), contents(tmp_path / "o")
    assert [name for name in old if old[name] != new[name]] == ["m-00002-of-00002.gguf"]
    assert old.keys() == new.keys()
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "o").tensors[Q].read(), numbers[Q])
    head = np.ones((40, 64), np.float32)
    changes = {"lm_head.weight": Change(head.dtype, (40, 64))}
    assert files.gguf is not None
    types = float_types(files.gguf, head.dtype)
    write_gguf_copy(files, tmp_path / "f", changes=changes, fill=lambda key: iter([head]), types=types)
    fields = GGUFReader(tmp_path / "f" / "m-00001-of-00002.gguf").fields
    assert fields["split.tensors.count"].contents() == len(open_checkpoint(tmp_path / "f").tensors)


def test_another_alignment_and_padding_are_kept(tmp_path: Path) -> None:
    weights = {k: v for k, v in ggufs.llama().items() if "norm" in k or "q_proj" in k}
    ggufs.write(tmp_path / "m.gguf", weights, alignment=1024)
    files = model_files(tmp_path / "m.gguf")
    assert files.gguf is not None
    assert files.gguf.headers[0].alignment == 1024
    write_gguf_copy(files, tmp_path / "o.gguf", changes=(), fill=nothing, types=float_types(files.gguf, BF16))
    assert all(tensor.data_offset % 1024 == 0 for tensor in GGUFReader(tmp_path / "o.gguf").tensors)
    # Padding that is not zero is copied too.
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    _, end = spans(tmp_path / "m.gguf")["output_norm.weight"]
    assert end % 1024
    data[end : end + 4] = b"odd!"
    (tmp_path / "m.gguf").write_bytes(data)
    write_gguf_copy(model_files(tmp_path / "m.gguf"), tmp_path / "same.gguf", changes=(), fill=nothing)
    assert (tmp_path / "same.gguf").read_bytes() == data
