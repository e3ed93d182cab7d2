"""Writing: whole or not at all, the same bytes for the same input, and readable by everybody else."""

import json
import os
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import safetensors

import loralens
from loralens import FormatError, LoraLensError, OptionError
from loralens.core import LazyArray
from loralens.formats import Stored
from loralens.formats.files.adapter_files import write_file
from loralens.formats.files.container import DTYPES, read_json
from tests.formats.files import read_safetensors, write_folder, write_safetensors

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG_FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "é"}


def stored(value=1.0, config=CONFIG_FIELDS):
    arrays = {
        "base_model.model.q.lora_A.weight": np.full((2, 3), value, np.float32),
        "base_model.model.q.lora_B.weight": np.full((5, 2), value, ml_dtypes.bfloat16),
        "base_model.model.odd": np.arange(3, dtype=np.uint8),
    }
    return Stored({key: LazyArray.of(array) for key, array in arrays.items()}, {"format": "pt"}, config)


def failing(error):
    """What stored() gives, with one tensor that cannot be read to its end."""

    def read():
        raise error

    good = stored(2.0, {**CONFIG_FIELDS, "lora_alpha": 999})
    return Stored({**good.tensors, "z": LazyArray(read, shape=(4,), dtype=np.uint8)}, good.metadata, good.config)


def tree(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_file(target, folder, **options):
    write_file(target, folder / MODEL, **options)


def as_folder(target, folder, **options):
    write_folder(target, folder, **options)


forms = pytest.mark.parametrize("write", [as_file, as_folder])
FAILURES = [KeyboardInterrupt(), FormatError("became shorter", fix="copy it"), OSError(5, "I/O")]


def test_what_is_written_is_what_was_given(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{name} {shape}": np.frombuffer(
            rng.integers(0, 2, np.prod(shape, dtype=int) * dtype.itemsize, np.uint8), dtype
        )
        for name, dtype in DTYPES.items()
        for shape in [(), (3,), (0, 2), (2, 3, 4)]
    }
    arrays = {key: array.reshape(eval(key.partition(" ")[2])) for key, array in arrays.items()}
    arrays["transposed"] = arrays["F32 (2, 3, 4)"].T
    arrays["every other"] = arrays["F32 (3,)"][::2]
    metadata = {"format": "pt", "é": '{"a": "\\u0000\n"}', "empty": ""}
    write_safetensors(Stored({key: LazyArray.of(array) for key, array in arrays.items()}, metadata), tmp_path / "a")
    again = read_safetensors(tmp_path / "a")
    theirs = dict(safetensors.deserialize((tmp_path / "a").read_bytes()))
    assert again.metadata == metadata
    assert again.tensors.keys() == theirs.keys() == arrays.keys()
    for key, array in arrays.items():
        assert again.tensors[key].shape == array.shape
        assert again.tensors[key].dtype == array.dtype
        assert again.tensors[key].read().tobytes() == bytes(theirs[key]["data"]) == array.tobytes(), key


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    tensors = {name: LazyArray.of(np.zeros(1, DTYPES[name])) for name in ("U8", "F16", "F32", "F64")}
    write_safetensors(Stored(tensors), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    header, start = read_header(data)
    assert start % 8 == 0
    assert all(entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0 for entry in header.values())


def read_header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def test_the_same_bytes_from_any_process(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from loralens.core.lazy import LazyArray\n"
        "from loralens.formats.files.container import Stored\n"
        "from loralens.formats.files.adapter_files import write_folder\n"
        "tensors = {f'{c}{i}': LazyArray.of(np.ones(2, np.float32)) for i in range(9) for c in 'ab'}\n"
        "metadata = {c: c for c in 'zyxwvutabc'}\n"
        "write_folder(Stored(tensors, metadata, {'z': ['b', 'a'], 'r': 1}), Path(sys.argv[1]), overwrite=False)\n"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=env)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert set(tree(tmp_path / "1")) == {MODEL, CONFIG}


@forms
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_leaves_what_was_there(write, error, tmp_path):
    write(stored(), tmp_path, overwrite=True)
    before = tree(tmp_path)
    with pytest.raises((type(error), LoraLensError)):
        write(failing(error), tmp_path, overwrite=True)
    assert tree(tmp_path) == before  # the configuration too: new α with old factors would be a wrong scale


@contextmanager
def room(nbytes):
    """No file can grow beyond this: as on a full disk, the error comes from the system, mostly while flushing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@forms
@pytest.mark.parametrize("nbytes", [0, 50, 300])  # 300: enough for the configuration
def test_no_room_on_the_disk(write, nbytes, tmp_path):
    write(stored(), tmp_path, overwrite=True)
    before = tree(tmp_path)
    with room(nbytes), pytest.raises(FormatError, match=r"cannot be written: File too large\n  fix: check free space"):
        write(stored(2.0), tmp_path, overwrite=True)
    assert tree(tmp_path) == before
    if write is as_folder:
        with room(nbytes), pytest.raises(FormatError, match="cannot be written"):
            write(stored(2.0), tmp_path / "new", overwrite=False)
        assert tree(tmp_path) == before


@forms
def test_what_exists_is_replaced_only_where_asked(write, tmp_path):
    write(stored(), tmp_path, overwrite=True)
    before = tree(tmp_path)
    with pytest.raises(OptionError, match="exists\n  fix: choose another target, or give overwrite=True"):
        write(stored(2.0), tmp_path, overwrite=False)
    assert tree(tmp_path) == before
    (tmp_path / "README.md").write_text("mine")
    write(stored(2.0), tmp_path, overwrite=True)
    assert set(tree(tmp_path)) == {MODEL, CONFIG, "README.md"}
    assert (read_safetensors(tmp_path / MODEL).tensors["base_model.model.q.lora_A.weight"].read() == 2).all()


@forms
def test_no_foreign_configuration_stays_beside(write, tmp_path):
    write(stored(), tmp_path, overwrite=True)
    write(stored(2.0, config=None), tmp_path, overwrite=True)
    assert set(tree(tmp_path)) == {MODEL}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@forms
def test_the_mode_follows_the_umask(write, umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write(stored(), tmp_path, overwrite=True)
        write_folder(stored(), tmp_path / "new", overwrite=False)
    finally:
        os.umask(before)
    for path in (MODEL, CONFIG, f"new/{MODEL}", f"new/{CONFIG}"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("name", ["", MODEL])
def test_over_the_very_file_that_is_read(name, tmp_path):
    write_folder(stored(3.0), tmp_path, overwrite=True)
    adapter = loralens.load(tmp_path)
    module = adapter["q"]
    loralens.save(adapter, tmp_path / name, overwrite=True)
    loralens.save(adapter, tmp_path / name, overwrite=True)
    assert (module.A == 3).all()  # still the file that was opened
    again = loralens.load(tmp_path)["q"]
    assert again.B.tobytes() == module.B.tobytes()
    assert read_json(tmp_path / CONFIG) == CONFIG_FIELDS


def made(folder):
    write_folder(stored(), folder, overwrite=False)
    return folder


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    """A snapshot of the Hub cache links to blobs that other snapshots share."""
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / MODEL).symlink_to("blob")
    as_file(stored(), tmp_path, overwrite=True)
    assert (tmp_path / "blob").read_bytes() == b"shared"
    assert not (tmp_path / MODEL).is_symlink()


@pytest.mark.parametrize(
    ("there", "target", "overwrite", "message"),
    [
        ("file", f"file/{MODEL}", False, "file: is a file, not a folder"),
        (CONFIG, MODEL, False, f"{CONFIG}: exists"),
        ("file", "file", True, "file: is a file, not a folder"),
        ("folder/adapter_model.bin", "folder", True, "holds another adapter, adapter_model.bin"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_dry_run_refuses_what_writing_would(dry_run, there, target, overwrite, message, tmp_path):
    adapter = loralens.load(made(tmp_path / "in"))
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    with pytest.raises(OptionError, match=message):
        loralens.save(adapter, tmp_path / target, overwrite=overwrite, dry_run=dry_run)
    assert set(tree(tmp_path)) == {f"in/{MODEL}", f"in/{CONFIG}", there}


@pytest.mark.parametrize("mode", [0o600, 0o444])
@forms
def test_what_is_replaced_keeps_its_permissions(write, mode, tmp_path):
    write(stored(), tmp_path / "out", overwrite=True)
    for name in (MODEL, CONFIG):
        (tmp_path / "out" / name).chmod(mode)
    (tmp_path / "out").chmod(0o700)
    write(stored(2.0), tmp_path / "out", overwrite=True)
    assert [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("", MODEL, CONFIG)] == [
        0o700,
        mode,
        mode,
    ]
    assert (read_safetensors(tmp_path / "out" / MODEL).tensors["base_model.model.q.lora_A.weight"].read() == 2).all()
