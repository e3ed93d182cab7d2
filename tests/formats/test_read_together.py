"""Tensors of a file that are read in one call are those that are read one by one."""

import os
from math import prod
from pathlib import Path

import numpy as np
import pytest

from loralens import FormatError
from loralens.core import LazyArray
from loralens.formats.files.container import DTYPES, MOST_READ, read_together
from tests.formats.blobs import blob, entry
from tests.formats.files import read_safetensors

KINDS = [("F32", [3, 5]), ("F16", [7]), ("U8", [3]), ("BF16", [2, 2]), ("F64", [4]), ("F32", [0, 3]), ("F32", [])]


def stored(path: Path, gaps: dict[int, int] | None = None) -> list[LazyArray]:
    """Tensors of all kinds in one file; before some of them another one of so many bytes, which is not returned."""
    header, begin = {}, 0
    for i, (kind, shape) in enumerate(KINDS):
        if size := (gaps or {}).get(i, 0):
            header[f"gap{i}"], begin = entry([size], begin, begin + size), begin + size
        end = begin + prod(shape) * DTYPES[kind].itemsize
        header[f"t{i}"], begin = entry(shape, begin, end, kind), end
    path.write_bytes(blob(header, np.random.default_rng(0).integers(256, size=begin, dtype=np.uint8).tobytes()))
    tensors = read_safetensors(path).tensors
    return [tensors[f"t{i}"] for i in range(len(KINDS))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every call that reads."""
    counts: list[int] = []
    pread = os.pread

    def counting(fd: int, count: int, start: int) -> bytes:
        counts.append(count)
        return pread(fd, count, start)

    monkeypatch.setattr(os, "pread", counting)
    return counts


@pytest.mark.parametrize("gaps", [{}, {2: 5}, {3: 1, 5: 2}, {4: 10_000}])
def test_arrays_are_those_that_are_read_one_by_one(gaps: dict[int, int], tmp_path: Path) -> None:
    arrays = stored(tmp_path / "a.safetensors", gaps) + stored(tmp_path / "b.safetensors")[:2]
    arrays += [LazyArray.of(np.arange(6.0)), arrays[0].T, arrays[0].reshape(5, 3), arrays[0]]
    order = np.random.default_rng(1).permutation(len(arrays)).tolist()
    for i, array in zip(order, read_together([arrays[i] for i in order]), strict=True):
        expected = arrays[i].read()
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.tobytes() == expected.tobytes()
        assert array.flags.aligned


def test_one_call_reads_what_lies_together(tmp_path: Path, reads: list[int]) -> None:
    arrays = stored(tmp_path / "a.safetensors", {0: 8})[::2]
    reads.clear()
    read_together(arrays)
    # Behind three bytes no number of four or eight bytes is aligned, so those are read again.
    assert reads == [60 + 14 + 3 + 8 + 32 + 4, 32, 4]


def test_bytes_that_nobody_needs_are_not_read(tmp_path: Path, reads: list[int]) -> None:
    needed = sum(array.nbytes for array in stored(tmp_path / "a.safetensors")[:2])
    arrays = stored(tmp_path / "a.safetensors", {1: MOST_READ * needed})[:2]
    reads.clear()
    read_together(arrays)
    assert reads == [60, 14]


@pytest.mark.parametrize("change", ["shorter", "newer"])
def test_a_file_that_changes_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays = stored(path)
    if change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    else:
        os.utime(path, (1, 1))
    with pytest.raises(FormatError, match=r"a\.safetensors: (the file became shorter|was changed)"):
        read_together(arrays)
