"""read_pickle against torch itself, and against files made to do harm."""

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from loralens import FormatError, LoraLensError
from tests.formats.blobs import damaged
from tests.formats.files import read_pickle
from tests.marks import examples, slow_except

LEGACY_HEAD = b"".join(
    pickle.dumps(part, protocol=2)
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
)

both = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(state, path: Path, zipped: bool) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def same(found, tensor: torch.Tensor) -> None:
    """Bit-equal, dtype and shape included."""
    array = found.read()
    assert array.flags.c_contiguous
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert array.shape == found.shape == tuple(tensor.shape)
    assert array.tobytes() == tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def push(value) -> bytes:
    """Opcodes that put a value on the stack without the memo; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(push, value)) + b"t"
        case list():
            return b"](" + b"".join(map(push, value)) + b"e"
        case dict():
            return b"}(" + b"".join(push(x) for item in value.items() for x in item) + b"u"
    raise AssertionError(value)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args) -> bytes:
    return function + push(args) + b"R"


def storage(*, key="0", kind="FloatStorage", numel=4, view=()) -> bytes:
    return push(("storage", named("torch", kind), key, "cpu", numel, *view)) + b"Q"


REBUILD = named("torch._utils", "_rebuild_tensor_v2")


def tensor(*, offset=0, size=(4,), strides=(1,), of=None) -> bytes:
    return call(REBUILD, of or storage(), offset, size, strides, False, call(named("collections", "OrderedDict")))


def program(value) -> bytes:
    return b"\x80\x02" + push(value) + b"."


def zip_file(path: Path, pickled: bytes, *, entries=(("archive/data/0", bytes(16)),), **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries:
            archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")
    return path


STORAGE = struct.pack("<q", 4) + bytes(16)


def legacy_file(path: Path, pickled: bytes, *, keys=("0",), data=STORAGE) -> Path:
    path.write_bytes(LEGACY_HEAD + pickled + program(list(keys)) + data)
    return path


def refused(path: Path, match: str) -> FormatError:
    with pytest.raises(FormatError, match=match) as caught:
        read_pickle(path)
    assert caught.value.where[0] == str(path)
    assert caught.value.fix
    return caught.value


# --- what torch writes ---


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype, zipped):
    if not (zipped or dtype in torch.storage._dtype_to_storage_type_map()):
        pytest.skip("torch does not read this dtype from the older container")
    x = (torch.arange(6).reshape(2, 3) - (2 if dtype.is_signed else 0)).to(dtype)
    tensors, _ = read_pickle(save({"x": x}, tmp_path / "x.bin", zipped))
    same(tensors["x"], x)


@both
def test_views_share_one_storage(tmp_path, zipped):
    base = torch.arange(24.0)
    state = {
        "base": base,
        "tail": base[5:],
        "matrix": base[4:].reshape(4, 5),
        "transposed": base.reshape(4, 6).T,
        "every other": base[3::2],
        "block": base.reshape(2, 3, 4).permute(2, 0, 1)[1:, :, 1:],
        "repeated": base[:1].expand(5),
        "one row": base.reshape(4, 6)[1:2],
        "bool": (base > 3).reshape(4, 6).T,
        "negative": torch._neg_view(base),
    }
    path = save(state, tmp_path / "x.pt", zipped)
    tensors, _ = read_pickle(path)
    assert list(tensors) == list(state)
    for key, value in state.items():
        same(tensors[key], value)
    assert path.stat().st_size < 3600 + 24 * 4 + 24  # or the storages were not shared, and this tests nothing


@both
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 5, 1)], ids=str)
def test_scalars_and_empty_tensors(tmp_path, shape, zipped):
    x = torch.ones(shape)
    state = {"x": x, "transposed": x.permute(tuple(reversed(range(len(shape))))), "bool": x.bool()}
    tensors, _ = read_pickle(save(state, tmp_path / "x.ckpt", zipped))
    same(tensors["x"], state["x"])
    same(tensors["bool"], state["bool"])
    same(tensors["transposed"], state["transposed"])


@both
def test_plain_values_come_back_beside_the_tensors(tmp_path, zipped):
    plain = {
        "lora_alpha": 16,
        "big": 2**70,
        "lr": 1e-4,
        "name": "σ",
        "flag": True,
        "none": None,
        "kinds": ["q", "v", 3],
    }
    given_ = {**plain, "x": torch.ones(2), "pair": (1, 2), "size": torch.ones(2, 3).shape}
    tensors, rest = read_pickle(save(given_, tmp_path / "x.bin", zipped))
    assert list(tensors) == ["x"]
    assert rest == {**plain, "pair": [1, 2], "size": [2, 3]}
    assert rest["flag"] is True


@both
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_one_level_of_wrapping_is_undone(tmp_path, wrapper, zipped):
    x = torch.arange(3.0)
    state = {"epoch": 3, wrapper: OrderedDict(x=x, r=8), "note": "done"}
    tensors, rest = read_pickle(save(state, tmp_path / "x.ckpt", zipped))
    assert list(tensors) == ["x"]
    same(tensors["x"], x)
    assert rest == {"epoch": 3, "r": 8, "note": "done"}


def test_a_bool_is_true_whatever_its_byte(tmp_path):
    of = storage(kind="BoolStorage")
    path = zip_file(tmp_path / "x.bin", program({"x": tensor(of=of)}), entries=[("archive/data/0", b"\0\1\2\xff")])
    assert read_pickle(path)[0]["x"].read().tobytes() == b"\0\1\1\1"  # NumPy counts on nothing else


# --- what is refused though nobody meant harm ---


@both
@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"x": torch.ones(2), 3: 4}, "a key that is not a string"),
        ({"x": torch.ones(2), "\x1b[2J": 4}, "control characters"),
        ({"x": torch.ones(2), "config": {"r": 8}}, "config holds a dict"),
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(2)}}, "more than one state dict: a, b"),
        ({"a": {"x": torch.ones(2), "r": 8}, "r": 4}, "r inside and beside a"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, r"torch\.ComplexFloatStorage"),
        ({"x": Path("a")}, r"pathlib"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_state_dict_is_refused_by_name(tmp_path, state, match, zipped):
    refused(save(state, tmp_path / "x.bin", zipped), match)


def test_another_protocol_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"x": torch.ones(2)}, path, pickle_protocol=4)
    refused(path, "protocol 4")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", pickle.dumps({"x": 1}, 2), bytes(100)],
    ids=["empty", "two bytes", "plain pickle", "zeros"],
)
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    refused(path, "not written by torch.save|damaged")


@both
def test_a_file_that_shrinks_after_it_was_opened(tmp_path, zipped):
    path = save({"x": torch.ones(64), "y": torch.ones(64).bool()}, tmp_path / "x.bin", zipped)
    tensors, _ = read_pickle(path)
    os.truncate(path, path.stat().st_size - 8)
    for tensor in tensors.values():
        with pytest.raises(FormatError, match="was changed"):
            tensor.read()


# --- programs ---

SHELL = "touch marker"
ARGS = push((SHELL,))
OBJECT = b"(" + named("os", "system") + push(SHELL) + b"o"
ATTACKS = {
    "GLOBAL": b"\x80\x02" + named("os", "system") + ARGS + b"R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + ARGS + b"R.",
    "INST": b"\x80\x02(" + push(SHELL) + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02" + OBJECT + b".",
    "NEWOBJ": b"\x80\x02" + named("subprocess", "Popen") + push((["touch", "marker"],)) + b"\x81.",
    "BUILD": b"\x80\x02" + named("types", "SimpleNamespace") + b")R" + push({"__setstate__": named("os", "system")})
    + b"b" + push(SHELL) + b"b.",
    "getattr": b"\x80\x02" + call(call(named("builtins", "getattr"), named("os", "path"), "os.system"), SHELL) + b".",
    "text protocol": b"cos\nsystem\n(S'touch marker'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("NEWOBJ", "getattr")])
def test_the_attacks_are_real(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pickle.loads(ATTACKS[name])
    assert (tmp_path / "marker").exists()


@both
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "inside"])
def test_attacks_are_refused_and_nothing_runs(tmp_path, monkeypatch, name, wrap, zipped):
    monkeypatch.chdir(tmp_path)
    body = ATTACKS[name]
    if wrap:
        body = program({"x": tensor(), "y": body[:-1]})
    path = tmp_path / "x.bin"
    if zipped:
        zip_file(path, body)
    else:
        legacy_file(path, body)
    refused(path, "asks for '|opcode|protocol|not written")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("part", range(5))
def test_attacks_in_any_of_the_five_legacy_pickles(tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    path = save({"x": torch.ones(1)}, tmp_path / "x.bin", False)
    stream = io.BytesIO(path.read_bytes())
    ends = [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    path.write_bytes(stream.getvalue()[: ends[part]] + ATTACKS["GLOBAL"] + stream.getvalue()[ends[part + 1] :])
    refused(path, r"os\.system")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "value",
    [
        REBUILD + push({"__defaults__": (1,)}) + b"b",
        tensor() + push({"shape": (9,)}) + b"b",
        call(named("torch", "FloatStorage"), 1 << 40),
        named("torch", "Size") + push([1]) + b"R",
        call(named("collections", "OrderedDict"), [["a", 1]]),
        call(REBUILD, 3, 0, (1,), (1,), False, None),
        named("torch._utils", "_rebuild_qtensor"),
        call(REBUILD, storage(), 0, (1,), (1,), False, None, {"neg": True}),
        tensor(offset="0"),
        push(("storage", named("torch", "Size"), "0", "cpu", 4)) + b"Q",
        push(("storage", named("torch", "FloatStorage"), "0", "cpu", 4, ("1", 0, 4))) + b"Q",
        b"(((",
        b"e",
        b"h\x07",
        b"Nq\x01",
        b"}(" + push("a") + b"u",
        b"X\x02\0\0\0\xff\xff",
        b"ctorch\nSize",
        b"c\x1b[2J\nSize\n",
        b"\x80\x03",
        b"P0\n",
    ],
)
def test_programs_that_torch_does_not_write(tmp_path, value):
    refused(zip_file(tmp_path / "x.bin", b"\x80\x02" + value + b"."), ".")


def test_a_pickle_of_too_many_steps(tmp_path, monkeypatch):
    path = save({"x": torch.ones(2)}, tmp_path / "x.bin", True)
    monkeypatch.setattr("loralens.formats.files.torch_pickle.MOST_STEPS", 30)
    refused(path, "more than 30 steps")


DEEP = 400_000  # deep enough to crash CPython 3.11 when hashed
BOMBS = {
    "key": b"}" + b")" + b"\x85" * DEEP + b"Ns",
    "lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "storage": push(("storage", b")" + b"\x85" * DEEP, "0", "cpu", 4)) + b"Q",
    "itself": b"]q\x00" + b"h\x00a" * 3,
    "doubled": b"})q\x00" + b"".join(bytes([104, i, 104, i, 0x86, 113, i + 1]) for i in range(99)) + b"Ns",
}


@pytest.mark.parametrize("name", slow_except(BOMBS, "key", "itself"))
def test_bombs(tmp_path, name):
    refused(zip_file(tmp_path / "x.bin", b"\x80\x02" + BOMBS[name] + b"."), ".")


FALSE = struct.pack("<I", 0xFFFFFFF0)


@both
@pytest.mark.parametrize(
    "body",
    [
        b"X" + FALSE + b"abc",  # BINUNICODE
        b"B" + FALSE,  # BINBYTES
        b"\x8d" + struct.pack("<Q", 2**40),  # BINUNICODE8
        b"\x96" + struct.pack("<Q", 2**40),  # BYTEARRAY8
        b"Nr" + FALSE,  # LONG_BINPUT: 16 GB of memo in CPython's own
    ],
    ids=lambda body: body[:2].hex(),
)
def test_false_lengths_allocate_nothing(tmp_path, body, zipped):
    path = tmp_path / "x.bin"
    if zipped:
        zip_file(path, b"\x80\x02" + body + b".")
    else:
        path.write_bytes(LEGACY_HEAD + b"\x80\x02" + body + b".")
    tracemalloc.start()
    try:
        refused(path, "damaged|opcode|sizes that its pickle says")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# --- tensors that lie about their storage ---

HUGE = 1 << 62


@pytest.mark.parametrize(
    "value",
    [
        tensor(offset=1),
        tensor(size=(5,)),
        tensor(strides=(-1,), offset=3),
        tensor(strides=(2,)),
        tensor(size=(2, 2), strides=(2,)),
        tensor(size=(HUGE,), strides=(0,)),
        tensor(size=(2**10,) * 64, strides=(0,) * 64),
        tensor(size=(2,), strides=(1 << 2000,)),
        tensor(of=storage(numel=5)),
        tensor(of=storage(numel=-1), size=(0,)),
        tensor(of=storage(kind="DoubleStorage")),
    ],
)
def test_geometry_is_checked(tmp_path, value):
    refused(zip_file(tmp_path / "x.bin", program({"some.key": value})), ".")


# --- containers ---


def test_zip_bombs_are_refused(tmp_path):
    zeros, plain = bytes(50_000_000), program({"x": tensor()})
    bombs = {
        "storage": {"pickled": plain, "entries": [("archive/data/0", zeros)]},
        "pickle": {"pickled": program("a" * 5_000_000)},
    }
    for name, content in bombs.items():
        path = zip_file(tmp_path / name, compression=zipfile.ZIP_DEFLATED, **content)
        tracemalloc.start()
        refused(path, "compressed")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def test_a_pickle_too_large_to_be_one(tmp_path):
    refused(zip_file(tmp_path / "x.bin", bytes((1 << 24) + 1)), "larger than")


def test_a_big_endian_file(tmp_path):
    entries = [("archive/data/0", bytes(16)), ("archive/byteorder", b"big")]
    refused(zip_file(tmp_path / "x.bin", program({"x": tensor()}), entries=entries), "big-endian")


@pytest.mark.parametrize("name", ["archive/data/0", "archive/DATA.PKL"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path, name):
    entries = [("archive/data/0", bytes(16)), (name, bytes(16))]
    refused(zip_file(tmp_path / "x.bin", program({"x": tensor()}), entries=entries), "two entries")


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", b"hello")
    refused(path, "not one of torch.save")


def test_torch_reads_no_other_directory_than_the_one_that_was_checked(tmp_path):
    path = zip_file(tmp_path / "x.bin", program({"x": tensor()}))
    content = path.read_bytes()
    *_, count, size, start, _ = struct.unpack("<4s4H2LH", content[-22:])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)

    def locator(place: int) -> bytes:
        return struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)

    path.write_bytes(content[:-22] + record + locator(len(content) - 22) + content[-22:])
    assert list(read_pickle(path)[0]) == ["x"]
    elsewhere = content[:-22] + record + locator(0) + content[-22:]
    for changed in (b"PK\3\4" + content, content[:-2] + b"\1\0", elsewhere):
        path.write_bytes(changed)
        refused(path, "damaged|does not begin")


@pytest.mark.parametrize(
    ("at", "new", "match"),
    [
        (10, struct.pack("<H", 8), "compressed"),
        (8, struct.pack("<H", 1), "encrypted"),
        (42, FALSE, "does not read it"),
        (20, struct.pack("<II", 1 << 20, 1 << 20), "does not read it"),
    ],
    ids=["deflated to the same size", "encrypted", "beyond the file", "ends after the file"],
)
def test_what_the_zip_directory_says_of_an_entry_is_checked(tmp_path, at, new, match):
    path = zip_file(tmp_path / "x.bin", program({"x": tensor()}))
    content = bytearray(path.read_bytes())
    at += content.rindex(b"PK\x01\x02")
    content[at : at + len(new)] = new
    path.write_bytes(content)
    refused(path, match)


@both
def test_every_truncation_is_refused(tmp_path, zipped):
    path = save({"x": torch.arange(3.0)}, tmp_path / "x.bin", zipped)
    content = path.read_bytes()
    for length in range(0, len(content), 1 if not zipped else 7):
        path.write_bytes(content[:length])
        refused(path, ".")


@pytest.mark.parametrize(
    ("keys", "data"),
    [
        (["0"], b""),
        (["0"], struct.pack("<q", 5) + bytes(16)),
        (["0"], struct.pack("<q", 1 << 62) + bytes(16)),
        (["0"], struct.pack("<q", 4) + bytes(17)),
        ([], struct.pack("<q", 4) + bytes(16)),
        ([0], struct.pack("<q", 4) + bytes(16)),
    ],
)
def test_legacy_storages_are_checked(tmp_path, keys, data):
    pickled = program({"x": tensor(of=storage(view=(None,)))})
    refused(legacy_file(tmp_path / "x.bin", pickled, keys=keys, data=data), ".")


def test_a_legacy_storage_that_is_not_listed_would_hold_what_was_in_memory(tmp_path):
    tensors = {key: tensor(of=storage(key=key, view=(None,))) for key in ("0", "1")}
    refused(legacy_file(tmp_path / "x.bin", program(tensors), keys=("0", "0"), data=2 * STORAGE), "twice")


# --- fuzz ---


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def arrays(path: Path) -> list[np.ndarray]:
    """What a damaged file still gives: anything but a LoraLensError on the way is a failure."""
    try:
        return [found.read() for found in read_pickle(path)[0].values()]
    except LoraLensError:
        return []


STATE = {
    "a": torch.arange(6.0).reshape(2, 3).T,
    "b": torch.tensor([True, False]),
    "state": 3,
    "p": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)),
    "f": torch.ones(2).to(torch.float8_e5m2),
}


@pytest.fixture(scope="module")
def whole(scratch):
    return {zipped: save(STATE, scratch / f"whole{zipped}.bin", zipped).read_bytes() for zipped in (True, False)}


fuzz = examples(500, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@both
@fuzz
@given(data=st.data())
def test_damaged_files_give_a_result_or_a_clear_error(scratch, whole, zipped, data):
    path = scratch / "damaged.bin"
    path.write_bytes(data.draw(damaged(whole[zipped])))
    assert all(array.nbytes <= path.stat().st_size for array in arrays(path))


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_damaged_pickles_in_a_whole_zip(scratch, data):
    pickled = program({"x": tensor(), "y": tensor(offset=1, size=(3,)), "r": 8, "z": [1, "a", None]})
    path = zip_file(scratch / "pickle.bin", data.draw(damaged(pickled)))
    assert not any(array.any() for array in arrays(path))  # every byte of the storage is 0
