"""read_safetensors against the safetensors library, and against files that are broken on purpose."""

import gc
import json
import os
import socket
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loralens import FormatError
from loralens.core import LazyArray
from loralens.formats.files.container import (
    DTYPES,
    HEADER_LIMIT,
    header_bytes,
    read_json,
    read_safetensors,
)
from loralens.formats.files.json_text import dumps
from tests.formats.blobs import blob, entry, limits
from tests.marks import examples

GOOD = blob({"a": entry([2], 0, 2), "b": entry([1], 2, 6, "F32")}, bytes(6))
KIB = 1024
SMALL = 256 * KIB  # what Python itself needs to refuse a file


def read(data, folder):
    path = Path(folder) / "adapter_model.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


def assert_like_the_library(data, folder):
    """Same keys, dtypes, shapes and bytes as the reference implementation reads."""
    theirs = dict(safetensors.deserialize(data))
    ours = read(data, folder)
    assert ours.tensors.keys() == theirs.keys()
    for key, tensor in ours.tensors.items():
        array = tensor.read()
        assert tensor.dtype == array.dtype == DTYPES[theirs[key]["dtype"]]
        assert tensor.shape == array.shape == tuple(theirs[key]["shape"])
        assert array.tobytes() == bytes(theirs[key]["data"])
    return ours


@st.composite
def files(draw):
    """Valid files: tensors in any order of key, header and place, with and without metadata, padded or not."""
    keys = draw(st.lists(st.text("abé.0 ", min_size=1, max_size=6), unique=True, max_size=5))
    header, begin = {}, 0
    for key in keys:
        name, shape = draw(st.sampled_from(list(DTYPES))), draw(st.lists(st.integers(0, 4), max_size=3))
        end = begin + prod(shape) * DTYPES[name].itemsize
        header[key], begin = entry(shape, begin, end, name), end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(st.text("ab", max_size=3), st.text("abé\n😀")))
    order = draw(st.permutations(list(header)))
    text = json.dumps({key: header[key] for key in order}, ensure_ascii=draw(st.booleans())).encode()
    return blob(text + b" " * draw(st.integers(0, 9)), bytes(i % 2 for i in range(begin)))


@examples(150)
@given(files())
def test_any_valid_file(data):
    with tempfile.TemporaryDirectory() as folder:
        stored = assert_like_the_library(data, folder)
        with safetensors.safe_open(Path(folder) / "adapter_model.safetensors", "numpy") as file:
            assert (stored.metadata or None) == (file.metadata() or None)


@examples(60)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5, min_side=0)), st.data())
def test_rows_are_a_slice(array, draw):
    stop = draw.draw(st.integers(0, len(array)))
    start = draw.draw(st.integers(0, stop))
    data = blob({"pad": entry([3], 0, 3), "a": entry(list(array.shape), 3, 3 + array.nbytes, "F32")})
    with tempfile.TemporaryDirectory() as folder:
        rows = read(data + b"pad" + array.tobytes(), folder).tensors["a"].rows(start, stop)
        assert rows.shape == array[start:stop].shape
        assert rows.read().tobytes() == array[start:stop].tobytes()


def test_no_number_is_read_before_it_is_asked_for_and_none_is_kept(tmp_path):
    data = blob({"a": entry([1 << 22], 0, 1 << 22)}, bytes(1 << 22))
    (tmp_path / "a.safetensors").write_bytes(data)
    with limits(5, SMALL):
        tensor = read_safetensors(tmp_path / "a.safetensors").tensors["a"]
    with limits(5, (1 << 22) + SMALL):
        tensor.read()
        tensor.read()


BROKEN = {  # name: file, what the message says
    "empty": (b"", "0 bytes are too few"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "the header claims 100 bytes"),
    "not UTF-8": (blob(b'{"\xff":{}}'), "the header is not valid JSON ('utf-8' codec"),
    "deep objects": (blob(b'{"a":' * 100_000), "the header is not valid JSON (nested more than 64 levels"),
    "deep dtype": (
        blob(b'{"a":{"dtype":' + b"[" * 40 + b"]" * 40 + b',"shape":[],"data_offsets":[0,1]}}', b"1"),
        "dtype",
    ),
    "huge int": (blob(b'{"a":' + b"9" * 5000 + b"}"), "the header is not valid JSON (Exceeds the limit"),
    "key twice": (blob(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "a appears twice"),
    "lone surrogate": (blob(b'{"\\ud800":{}}'), r"the name '\ud800' holds control characters"),
    "escape sequence": (blob({"\x1b[2J": {}}), r"the name '\x1b[2J' holds control characters"),
    "endless name": (blob({"a" * 50_000: {}}), "a name is 50,000 characters long"),
    "entry is null": (blob({"a": None}), "a: its header entry lacks dtype"),
    "unknown dtype": (blob({"a": entry([1], 0, 1, "I128")}, b"1"), "a: dtype 'I128' is unknown"),
    "negative dimension": (blob({"a": entry([-1], 0, 1)}, b"1"), "a: shape or data_offsets are not whole"),
    "product overflows": (blob({"a": entry([2**32, 2**32], 0, 0)}), "a: U8 (4294967296, 4294967296) is too big"),
    "product overflows beside a zero": (blob({"a": entry([0, 2**62, 2**62], 0, 0)}), "is too big for any array"),
    "a million dimensions": (blob({"a": entry([2] * 1_000_000, 0, 1)}, b"1"), "is too big for any array"),
    "wrong size": (blob({"a": entry([2], 0, 4, "F32")}, bytes(4)), "F32 (2) does not take the 4 bytes"),
    "out of range": (blob({"a": entry([2], 0, 2)}, b"1"), "a ends at byte 2 of the data, but the file holds 1"),
    "overlap": (blob({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, bytes(3)), "a and b overlap"),
    "trailing byte": (GOOD + b"x", "1 bytes follow the last tensor"),
}
STRICTER = {"key twice", "escape sequence", "endless name", "a million dimensions"}
STRICTER |= {"product overflows beside a zero"}


@pytest.mark.some(8)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, tmp_path):
    data, what = BROKEN[name]
    (tmp_path / "broken.safetensors").write_bytes(data)
    with limits(5, 12 * len(data) + SMALL), pytest.raises(FormatError) as caught:
        read_safetensors(tmp_path / "broken.safetensors")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/broken.safetensors: ")
    assert what in message.splitlines()[0]
    assert len(message.splitlines()[1]) > len("  fix: ")
    assert len(message) < 5000
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - STRICTER))
def test_the_library_refuses_it_too(name):
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(BROKEN[name][0])


def test_truncated_at_every_byte(tmp_path):
    for n in range(len(GOOD)):
        with pytest.raises(FormatError):
            read(GOOD[:n], tmp_path)
    assert len(read(GOOD, tmp_path).tensors) == 2


def test_a_header_above_the_limit(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(3 * HEADER_LIMIT)  # sparse: takes no space
    with limits(5, SMALL), pytest.raises(FormatError, match="the header claims 33,554,433 bytes"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    stored = read(blob({"a": entry([1 << 16], 0, 1 << 16)}, bytes(1 << 16)), tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", 1000)
    for tensor in (stored.tensors["a"], stored.tensors["a"].rows(60_000, 60_001)):
        with (
            limits(5, 1 << 18),
            pytest.raises(FormatError, match=r"adapter_model\.safetensors: the file became shorter"),
        ):
            tensor.read()


@pytest.fixture
def odd(tmp_path):
    """Things that are no files, by name."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(tmp_path / "socket"))
        yield {name: tmp_path / name for name in ("pipe", "folder", "loop", "socket", "nothing")} | {
            "null": Path("/dev/null"),
            "zero": Path("/dev/zero"),
        }


@pytest.mark.parametrize("name", ["pipe", "folder", "loop", "socket", "nothing", "null", "zero"])
@pytest.mark.parametrize("reader", [read_safetensors, read_json])
def test_what_is_no_file(name, reader, odd):
    with limits(5, SMALL), pytest.raises(FormatError, match=f"{odd[name]}: (is not a regular file|cannot be opened)"):
        reader(odd[name])


def test_no_file_stays_open(tmp_path):
    def count():
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    stored = read(GOOD, tmp_path)
    assert count() == before + 1
    tensor = stored.tensors["a"].rows(0, 1)
    del stored
    assert tensor.read().shape == (1,)
    del tensor
    for broken in (b"", GOOD[:-1]):
        with pytest.raises(FormatError):
            read(broken, tmp_path)
    assert count() == before


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "is not valid JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"r": 8, "r": 16}', "r appears twice"),
        (b'{"a": {"\x7f": 1}}', "holds control characters"),
        (b'{"a":' * 64 + b"[]" + b"}" * 64, "nested more than 64 levels deep"),
        (b'{"r": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_a_broken_configuration(text, what, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(text)
    with limits(5, 12 * len(text) + SMALL), pytest.raises(FormatError, match=f"adapter_config.json: .*{what}"):
        read_json(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("value", [{"é": ["😀", 1.5, None, True]}, {"lone": "\ud800 and \udfff"}, {}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_comes_back_as_it_was(value, mark, tmp_path):
    (tmp_path / "a.json").write_bytes(mark + dumps(value).encode())
    assert read_json(tmp_path / "a.json") == value


def test_what_safetensors_cannot_hold_is_not_written():
    def tensors(key="a", dtype=np.float32):
        return {key: LazyArray.of(np.zeros(1, dtype))}

    for held, metadata, what in (
        (tensors(dtype=np.longdouble), None, "safetensors has no float128"),
        (tensors(dtype=">f4"), None, "safetensors has no >f4"),
        (tensors("a\nb"), None, "holds control characters"),
        (tensors(), {"a": "\ud800"}, "__metadata__ is not a mapping of text"),
        (tensors(), {"a": 1}, "__metadata__ is not a mapping of text"),
    ):
        with pytest.raises(FormatError, match=what):
            header_bytes(held, metadata)


@pytest.mark.parametrize("value", ["{}", "[[]]", "[[[[[[[[]]]]]]]]"])
def test_a_header_of_small_values_is_refused_before_it_is_parsed(tmp_path, value):
    header = "{" + ",".join(f'"{n}":{value}' for n in range(1_350_000)) + "}"
    data = header[:HEADER_LIMIT].encode()
    (tmp_path / "a.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    with limits(5, 3 * HEADER_LIMIT), pytest.raises(FormatError, match="too many values"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_header_that_could_not_be_read_back_is_not_written():
    tensor = LazyArray.of(np.zeros((1, 1), np.float32))
    with pytest.raises(FormatError, match=r"270,000 tensors need a header of .*\n? *.*divide the modules"):
        header_bytes({f"{n}": tensor for n in range(270_000)}, None)
