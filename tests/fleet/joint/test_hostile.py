"""Damaged and forged files of fleets: one clear error, whatever is wrong, and never another exception."""

import json

import numpy as np
import pytest

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, LoraLensError
from loralens.fleet.joint.compress import compress_fleet
from loralens.formats.files.container import Stored, read_safetensors
from loralens.formats.files.writing import write_safetensors
from loralens.formats.records.fleets.contents import KEY, fields_digest, tensor_digest
from loralens.formats.records.fleets.reader import FleetFile
from tests.fleet.joint.collection import make


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    sources = make(root)
    compress_fleet([list(sources.values())], root / "fleet.safetensors", error=0.15)
    return root / "fleet.safetensors"


def read_all(path):
    """Every number of every adapter of a file."""
    file = FleetFile(path)
    for name in file.contents.adapters:
        for rank in (None, 1):
            adapter = file.adapter(name, rank=rank)
            for module in adapter.modules.values():
                module.load()
            for extra in adapter.extra.values():
                extra.tensor.read()


def forge(path, target, change):
    """A file whose digests are right, after ``change`` of its fields and tensors (bytes by key)."""
    stored = read_safetensors(path)
    fields = json.loads(stored.metadata[KEY])
    tensors = {key: tensor.read().copy() for key, tensor in stored.tensors.items()}
    change(fields, tensors)
    lazy = {key: LazyArray.of(array) for key, array in tensors.items()}
    fields["digests"] = {key: tensor_digest(tensor) for key, tensor in lazy.items()} | fields.pop("forged", {})
    fields["digest"] = fields_digest(fields)
    write_safetensors(Stored(lazy, {KEY: json.dumps(fields)}), target)


def number(fields, name):
    return list(fields["adapters"]).index(name)


def in_contents(*path, value):
    """A change of one field of the table of contents."""

    def change(fields, _):
        *outer, last = path
        for key in outer:
            fields = fields[key]
        fields[last] = value

    return change


def in_about(name, *path, value):
    """A change of one field of the description of an adapter."""

    def change(fields, tensors):
        key = f"adapters.{number(fields, name)}.about"
        about = json.loads(tensors[key].tobytes())
        *outer, last = path
        place = about
        for step in outer:
            place = place[step]
        place[last] = value
        tensors[key] = np.frombuffer(json.dumps(about).encode(), np.uint8)

    return change


def renamed(new):
    def change(fields, _):
        fields["adapters"] = {new if name == "run0" else name: entry for name, entry in fields["adapters"].items()}

    return change


def in_bytes(key, change_bytes):
    def change(fields, tensors):
        name = key.format(run1=number(fields, "run1"), stranger=number(fields, "stranger"))
        tensors[name] = change_bytes(tensors[name].copy())

    return change


def put(array, place, value):
    array[place] = value
    return array


MODULE = "model.layers.0.self_attn.q_proj"
FORGED = {
    "name leaves the folder": renamed("../run0"),
    "name is absolute": renamed("/run0"),
    "name is empty": renamed(""),
    "name has a drive": renamed("C:\\run0"),
    "name has a control character": renamed("run\x1b[2J"),
    "version": in_contents("version", value=2),
    "version is a list": in_contents("version", value=[1]),
    "no groups": in_contents("groups", value=None),
    "group is too wide": in_contents("groups", 0, 0, value=[40, 48, 41, 2]),
    "group has other columns": in_contents("groups", 0, 0, value=[40, 48, 4, 2]),
    "group is huge": in_contents("groups", 0, 0, value=[2**40, 2**40, 3, 3]),
    "group has a module less": lambda fields, _: fields["groups"][0].pop(),
    "kind": in_contents("adapters", "run1", "kind", value="diagonal"),
    "kind is a list": in_contents("adapters", "run1", "kind", value=[]),
    "error is NaN": in_contents("adapters", "run1", "error", value=float("nan")),
    "error is text": in_contents("adapters", "run1", "error", value="0"),
    "group does not exist": in_contents("adapters", "run1", "group", value=7),
    "group is true": in_contents("adapters", "run1", "group", value=True),
    "group is missing": in_contents("adapters", "run1", "group", value=None),
    "numbers of another": in_contents("adapters", "run1", "numbers", value=0),
    "numbers of nobody": in_contents("adapters", "run1", "numbers", value=99),
    "copy of a copy": in_contents("adapters", "copy-half", "numbers", value=1),
    "entry is a list": in_contents("adapters", "run1", value=[]),
    "digest of no tensor": lambda fields, _: fields.__setitem__("forged", {"other": "0" * 64}),
    "tensor without a digest": lambda _, tensors: tensors.pop("groups.0.widths"),
    "about is not JSON": in_bytes("adapters.{run1}.about", lambda data: data[:-1]),
    "about is a number": in_bytes("adapters.{run1}.about", lambda data: data[:0].tolist() or np.array([49], np.uint8)),
    "about is nested": in_bytes(
        "adapters.{run1}.about", lambda data: np.frombuffer(b"[" * 200_000 + b"]" * 200_000, np.uint8)
    ),
    "about is text in UTF-16": in_bytes("adapters.{run1}.about", lambda data: np.append(np.uint8(255), data)),
    "no description": in_about("run1", "description", value=None),
    "description of a newer version": in_about("run1", "description", "version", value=9),
    "description without modules": in_about("run1", "description", "modules", value={}),
    "module of another shape": in_about("run1", "description", "modules", MODULE, value=[41, 48, 4, 0, 0]),
    "module of rank 0": in_about("run1", "description", "modules", MODULE, value=[40, 48, 0, 0, 0]),
    "module of a rank above its size": in_about("run1", "description", "modules", MODULE, value=[40, 48, 41, 0, 0]),
    "scaling does not exist": in_about("run1", "description", "modules", MODULE, value=[40, 48, 4, 9, 0]),
    "scale is infinite": in_about("run1", "description", "scalings", 0, value=[1e999, "alpha/r", 8, 4, ""]),
    "source is a list": in_about("run1", "description", "source", value=[]),
    "config is a list": in_about("run1", "description", "config", value=[1]),
    "place is negative": in_about("run1", "frame", MODULE, value=-1),
    "place is true": in_about("run1", "frame", MODULE, value=True),
    "place does not exist": in_about("run1", "frame", MODULE, value=4),
    "place of another shape": in_about("run1", "frame", MODULE, value="0"),
    "dtype of integers": in_about("run1", "dtypes", value={MODULE: "I64"}),
    "dtype is a list": in_about("run1", "dtypes", value={MODULE: []}),
    "extra does not exist": in_about("run1", "extras", value={"base_model.model.classifier.weight": "0" * 32}),
    "extra of no key": in_about("run1", "extras", value={"other": "0" * 32}),
    "extra is a list": in_about("run1", "extras", value={"base_model.model.classifier.weight": []}),
    "parts are missing": in_about("stranger", "parts", value=None),
    "part of another shape": in_about("stranger", "parts", 0, value=[40, 47, 4]),
    "part of a rank above its size": in_about("stranger", "parts", 0, value=[40, 48, 400]),
    "part is huge": in_about("stranger", "parts", 0, value=[2**50, 2**50, 2]),
    "part is true": in_about("stranger", "parts", 0, value=[True, 48, 4]),
    "core ends early": in_bytes("adapters.{run1}.numbers", lambda data: data[:-1]),
    "core is empty": in_bytes("adapters.{run1}.numbers", lambda data: data[:0]),
    "step is NaN": in_bytes(
        "adapters.{run1}.numbers", lambda data: put(data, slice(0, 4), np.array([np.nan], "<f4").view(np.uint8))
    ),
    "numbers end early": in_bytes("adapters.{stranger}.numbers", lambda data: data[:-1]),
    "numbers go on": in_bytes("adapters.{stranger}.numbers", lambda data: np.append(data, np.uint8(0))),
    "direction of 1 bit": in_bytes("adapters.{stranger}.numbers", lambda data: put(data, 0, 1)),
    "numbers of another dtype": in_bytes("adapters.{stranger}.numbers", lambda data: data.astype(np.float32)),
    "numbers of two axes": in_bytes("adapters.{stranger}.numbers", lambda data: data[None]),
    "basis ends early": in_bytes("groups.0.out", lambda data: data[:-1]),
    "basis goes on": in_bytes("groups.0.in", lambda data: np.append(data, np.uint8(0))),
    "column of 0 bits": in_bytes("groups.0.out", lambda data: put(data, 0, 0)),
    "column of 255 bits": in_bytes("groups.0.in", lambda data: put(data, 0, 255)),
    "widths end early": in_bytes("groups.0.widths", lambda data: data[:-1]),
    "entry of 1 bit": in_bytes("groups.0.widths", lambda data: put(data, 0, 0x99)),
}


@pytest.mark.some(9)
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_file_is_one_error(fleet, tmp_path, what):
    forge(fleet, tmp_path / "forged.safetensors", FORGED[what])
    with pytest.raises(LoraLensError) as caught:
        read_all(tmp_path / "forged.safetensors")
    assert "\x1b" not in str(caught.value)


def test_an_unchanged_file_is_no_error(fleet, tmp_path):
    forge(fleet, tmp_path / "same.safetensors", lambda *_: None)
    read_all(tmp_path / "same.safetensors")


def test_columns_that_depend_on_each_other_are_one_error(fleet, tmp_path):
    def zero_scale(fields, tensors):
        p = fields["groups"][0][0][2]
        tensors["groups.0.out"][p : p + 4] = 0

    forge(fleet, tmp_path / "forged.safetensors", zero_scale)
    with pytest.raises(FormatError, match="depend on each other"):
        read_all(tmp_path / "forged.safetensors")


def test_a_rank_that_would_need_huge_arrays_is_refused(fleet, tmp_path):
    # A module of 2²⁰ × 2²⁰ with one direction of 2 bits takes half a megabyte, and 2²⁰ directions eight terabytes.
    side = 2**20

    def grow(fields, tensors):
        key = f"adapters.{number(fields, 'stranger')}"
        about = json.loads(tensors[f"{key}.about"].tobytes())
        about["description"]["modules"] = {MODULE: [side, side, side, 0, 0]}
        about["frame"], about["parts"] = {MODULE: 0}, [[side, side, 1]]
        tensors[f"{key}.about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        tensors[f"{key}.numbers"] = np.concatenate([[np.uint8(2)], np.zeros(8 + side // 2, np.uint8)])

    forge(fleet, tmp_path / "forged.safetensors", grow)
    with pytest.raises(FormatError, match="larger than their bytes"):
        FleetFile(tmp_path / "forged.safetensors").adapter("stranger")


@pytest.mark.some(4)
@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_is_one_error(fleet, tmp_path, seed):
    data = bytearray(fleet.read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        read_all(tmp_path / "flipped.safetensors")


def test_a_digit_of_the_table_of_contents_is_checked(fleet, tmp_path):
    # The error of an adapter is in no tensor, so only the digest of the table knows it.
    data = fleet.read_bytes()
    place = data.index(b'\\"error\\":', data.index(b"adapters")) + len(b'\\"error\\": 0.1')
    digit = data[place : place + 1]
    assert digit.isdigit()
    (tmp_path / "digit.safetensors").write_bytes(data[:place] + (b"1" if digit != b"1" else b"2") + data[place + 1 :])
    with pytest.raises(FormatError, match="table of contents"):
        FleetFile(tmp_path / "digit.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_one_error(fleet, tmp_path, share):
    data = fleet.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(FormatError):
        read_all(tmp_path / "short.safetensors")


def test_another_safetensors_file_is_named_as_such(small):
    with pytest.raises(FormatError, match="not a compressed fleet"):
        FleetFile(small / "adapter_model.safetensors")
