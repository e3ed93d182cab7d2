"""Folders with pipes, dead links, loops and a thousand nested folders, and bases that change while they are read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from loralens.cli.main import main
from loralens.errors import FormatError
from loralens.formats.files.container import read_safetensors
from loralens.formats.files.outside import folders
from tests.bases import contents, sharded, tensors
from tests.formats.blobs import limits

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def message(*words):
    """The one message of a command that fails."""
    with limits(60, 1 << 30):
        done = CliRunner().invoke(main, [*map(str, words)])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    assert done.output.count("error:") == done.output.count("fix:") == 1, done.output
    return done.output


@pytest.fixture
def base(tmp_path):
    return sharded(tmp_path / "base", tensors(size=2.0))


def test_a_pipe_beside_the_base(small, base, tmp_path):
    os.mkfifo(base / "extra.txt")
    assert f"{base}: extra.txt is not a regular file" in message("merge", small, "--base", base, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dead_link_beside_the_base(small, base, tmp_path):
    (base / "more").mkdir()
    (base / "more" / "gone.txt").symlink_to("nowhere")
    said = message("merge", small, "--base", base, "-o", tmp_path / "out")
    assert f"{base}: more/gone.txt is a link to a file that is not there" in said


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["pipe", "dead link"])
def test_a_pipe_or_dead_link_in_the_adapter(name, make, small, tmp_path):
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    make(tmp_path / name)
    message("inspect", tmp_path)


@pytest.mark.parametrize("words", ["inspect A", "curve A", "convert A --to kohya -o OUT", "compress A --rank 1 -o OUT"])
def test_a_configuration_that_is_nested_deeply(words, small, tmp_path):
    """Python parses 900 levels, and copying or writing them would fail."""
    folder = tmp_path / "a"
    shutil.copytree(small, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps({**settings, "auto_mapping": "DEEP"}).replace('"DEEP"', "[" * 900 + "]" * 900)
    (folder / "adapter_config.json").write_text(text)
    paths = {"A": folder, "OUT": tmp_path / "out.safetensors"}
    said = message(*(paths.get(word, word) for word in words.split()))
    assert "adapter_config.json: is not valid JSON (nested more than 64 levels deep)" in said


def test_a_pipe_as_a_recipe_or_activations(small, tmp_path):
    os.mkfifo(tmp_path / "r.toml")
    os.mkfifo(tmp_path / "m.safetensors")
    assert "is not a regular file" in message("combine", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out")
    message("compress", small, "--rank", 1, "--activations", tmp_path / "m.safetensors", "-o", tmp_path / "out")


@pytest.fixture
def nested(tmp_path):
    """A thousand and a half of folders, each in the one before."""
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            Path("d").mkdir()
            os.chdir("d")
        yield tmp_path
    finally:
        os.chdir(tmp_path)
        deep = [tmp_path]
        while (deep[-1] / "d").is_dir():
            deep.append(deep[-1] / "d")
        for folder in reversed(deep[1:]):
            folder.rmdir()
        os.chdir(before)


@pytest.mark.slow
def test_nested_folders_are_walked_through(nested):
    done = CliRunner().invoke(main, ["survey", str(nested)])
    assert done.exception is None
    assert "no adapter in this folder" in done.output
    message("inspect", nested)
    assert CliRunner().invoke(main, ["doctor", str(nested)]).exception is None
    assert len(list(folders(nested, without=lambda _: False))) > 1000


def rewrite(path, *, replace):
    """The same file with other numbers, written into it or put in its place."""
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(7).tobytes()
    status = path.stat()
    target = path.with_name("new") if replace else path
    target.write_bytes(data)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # whatever the clock of the file system is
    if replace:
        target.replace(path)


@pytest.mark.some(2)
@pytest.mark.parametrize("replace", [False, True], ids=["written to", "replaced"])
@pytest.mark.parametrize("verb", ["merge", "verify", "unmerge"])
def test_a_model_that_is_rewritten_while_it_is_read(verb, replace, small, base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert CliRunner().invoke(main, ["merge", str(small), "--base", str(base), "-o", str(out)]).exit_code == 0
    shard = min((out if verb == "unmerge" else base).glob("*.safetensors"))
    words = {
        "merge": ["merge", small, "--base", base, "-o", tmp_path / "new"],
        "verify": ["verify", out, "--adapter", small, "--base", base],
        "unmerge": ["unmerge", out, "-o", tmp_path / "new"],
    }[verb]
    module, name = {
        "merge": ("loralens.verbs.merges.merge_run", "prepare"),
        "verify": ("loralens.verbs.merges.verify", "prepare"),
        "unmerge": ("loralens.verbs.merges.unmerge", "restore_tensor"),
    }[verb]
    monkeypatch.setattr(f"{module}.{name}", rewriting(module, name, shard, replace=replace))
    before = {path: path.read_bytes() for path in small.iterdir()}
    said = message(*words)
    assert str(shard) in said
    assert "was changed while it was read" in said
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in small.iterdir()} == before
    assert contents(out)


def rewriting(module, name, shard, *, replace):
    """The function of this name, which first has somebody else rewrite a shard, once."""
    from importlib import import_module
    from threading import Lock

    function, done, lock = getattr(import_module(module), name), [], Lock()

    def work(*words, **options):
        with lock:  # several threads merge, and one of them alone is to rewrite it
            if not done:
                done.append(1)
                rewrite(shard, replace=replace)
        return function(*words, **options)

    return work


def test_a_file_that_grows_or_is_touched_is_noticed_at_the_next_read(tmp_path, small):
    path = tmp_path / "a.safetensors"
    path.write_bytes((small / "adapter_model.safetensors").read_bytes())
    stored = read_safetensors(path)
    tensor = next(iter(stored.tensors.values()))
    tensor.read()
    rewrite(path, replace=False)
    with pytest.raises(FormatError, match="was changed while it was read"):
        tensor.read()


def test_an_undamaged_merge_still_holds(small, base, tmp_path):
    done = CliRunner().invoke(main, ["merge", str(small), "--base", str(base), "-o", str(tmp_path / "o"), "--json"])
    assert json.loads(done.output)["total"]
