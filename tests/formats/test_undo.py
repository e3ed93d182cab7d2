"""The undo file on disk: what is written is read, and whatever is none is said."""

from pathlib import Path

import numpy as np
import pytest

from loralens import FormatError
from loralens.core import LazyArray
from loralens.formats import Stored
from loralens.formats.records.merged_files import KEY, NAME, Spool, read_undo, write_undo
from tests.formats.files import write_safetensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = np.arange(300, dtype=np.uint8)
    with Spool(tmp_path) as spool:
        kept = [spool.keep(part.tobytes()) for part in (data[:100], data[100:100], data[100:])]
        np.testing.assert_array_equal(kept[2].rows(5, 9).read(), data[105:109])
        arrays = {f"{i}": array for i, array in enumerate(kept)}
        write_undo(arrays.items, {"é": [1, None]}.items, tmp_path / NAME)
    tensors, content = read_undo(tmp_path / NAME)
    assert content == {"é": [1, None]}
    np.testing.assert_array_equal(np.concatenate([tensors[f"{i}"].read() for i in range(3)]), data)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("metadata", [None, {}, {KEY: ""}, {KEY: "{"}, {KEY: "[]"}, {KEY: "[" * 100_000}], ids=range(6))
def test_what_is_no_undo_file(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / NAME
    write_safetensors(Stored({"x": LazyArray.of(np.zeros(2))}, metadata), path)
    with pytest.raises(FormatError, match=f"{path}: is not an undo file"):
        read_undo(path)
