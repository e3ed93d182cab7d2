"""Folders with pipes, dead links, loops and a thousand nested folders, and bases that change while they are read."""

import os

import numpy as np
import pytest

from tests.bases import contents, sharded, tensors
from tests.cli.command import Command
from tests.formats.blobs import limits

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def message(*words):
    """The one message of a command that fails."""
    with limits(60, 1 << 30):
        done = Command().run(*words)
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
    Command().good("merge", small, "--base", base, "-o", out)
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
