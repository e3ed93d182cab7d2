"""What a killed run leaves beside its target is gone after the next run, whatever it wrote; a live one's stays."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.stored import Moment, Moments, State
from loralens.errors import OptionError
from loralens.formats.files import hold, leftovers
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.leftovers import hidden_path, reserve, tidy
from loralens.formats.models.model_files import model_files
from loralens.formats.models.model_writer import Change, write_model
from loralens.formats.records.cache import SvdCache
from loralens.formats.records.merged import write_undo
from loralens.formats.records.results import save_moments, write_sarif
from loralens.formats.records.training import Training
from loralens.linalg.lanczos import Decomposed
from tests.bases import single, tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

DIALECTS = {
    "peft": "folder",
    "gguf": "x.gguf",
    "mlx": "folder",
    "kohya": "x.safetensors",
    "diffusers": "x.safetensors",
    "comfyui": "folder",
    "loralib": "x.bin",
}
LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}


def adapter() -> loralens.Adapter:
    A, B = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
    return loralens.Adapter(modules={"model.layers.0.self_attn.q_proj": loralens.LowRank(B, A, 1.0)})


def write_adapter(dialect: str, home: Path) -> None:
    more = {"base_config": LLAMA} if dialect == "gguf" else {}
    loralens.save(adapter(), home / DIALECTS[dialect], format=dialect, overwrite=True, **more)


def write_copy(home: Path) -> None:
    key, new = "model.layers.0.self_attn.q_proj.weight", np.ones((6, 4), np.float32)
    base = home.parent / "base"
    if not base.exists():
        single(base, tensors())
    change = {key: Change(new.dtype, new.shape)}
    write_model(model_files(base), home / "model", changes=change, fill=lambda _: iter([new]), overwrite=True)


def write_figure(home: Path) -> None:
    from matplotlib.figure import Figure

    from loralens.charts.figure_file import save_figure

    save_figure(Figure(), home / "a.png", overwrite=True)


def write_entry(home: Path) -> None:
    SvdCache(home, limit=10**9).write("0" * 64, Decomposed(np.ones((2, 2)), np.ones(2), np.ones((2, 2))))


def write_state(home: Path) -> None:
    training = Training(home / "run")
    if (training.folder / "run.json").exists():
        training.resume({"a": 1})
    else:
        training.begin({"a": 1}, overwrite=False)
    training.save(State(1, {"x": np.ones(2)}, {}, {}))
    training.snapshot(1, adapter())
    training.release()


def write_picture_folder(home: Path) -> None:
    from loralens.reporting.writing import _write_folder

    _write_folder(home / "page_files", {"a.png": b"x"})


MOMENTS = Moments(modules={"q": Moment(np.eye(2), 3, trace=1.0)}, fingerprint="f")
WRITERS: dict[str, Callable[[Path], None]] = {
    **{dialect: lambda home, dialect=dialect: write_adapter(dialect, home) for dialect in DIALECTS},  # type: ignore[misc]
    "model": write_copy,
    "undo file": lambda home: write_undo({}.items, {}.items, home / "undo.loralens"),
    "moments": lambda home: save_moments(MOMENTS, home / "m.safetensors", overwrite=True),
    "log of findings": lambda home: write_sarif("{}", home / "a.sarif"),
    "figure": write_figure,
    "cache": write_entry,
    "pictures of a report": write_picture_folder,
    "training run": write_state,
}


def killed(work: Callable[[], None], *, at: int) -> bool:
    """Whether a child that does the work is killed as it waits for the disk the n-th time."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    count, fsync = [0], os.fsync

    def deadly(descriptor: int) -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    try:
        os.fsync = deadly
        work()
    finally:
        os._exit(0)


def hidden_names(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".*")]


@pytest.mark.some(1)
@pytest.mark.parametrize("name", WRITERS)
def test_the_next_run_removes_what_a_killed_one_left(name: str, tmp_path: Path) -> None:
    home, write = tmp_path / "home", WRITERS[name]
    home.mkdir()
    if name == "figure":
        write(tmp_path)  # imports matplotlib before the fork
    left = 0
    for at in range(1, 30):
        died = killed(lambda: write(home), at=at)
        left += bool(hidden_names(home))
        write(home)
        assert hidden_names(home) == []
        if not died:
            break
    assert not died
    assert left >= 1


def test_a_cache_forgets_the_half_of_another_entry(tmp_path: Path) -> None:
    (tmp_path / f".{'1' * 64}.svd.safetensors.99999999.part").write_bytes(b"half")
    (tmp_path / ".mine.99999999.part").write_bytes(b"mine")
    write_entry(tmp_path)
    assert hidden_names(tmp_path) == [".mine.99999999.part"]


ALIVE = """
import sys
from pathlib import Path
from loralens.formats.files.leftovers import reserve
with reserve(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as part:
    print(part, flush=True)
    sys.stdin.read()
"""


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("namesake", [False, True])
def test_what_a_live_run_writes_stays(kind: str, namesake: bool, tmp_path: Path) -> None:
    """In another container its process may have any number here: no process's, another's, or ours."""
    command = [sys.executable, "-c", ALIVE, str(tmp_path / "a"), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        part = Path(process.stdout.readline().strip())
        there = hidden_path(tmp_path / "a", "part") if namesake else part.with_name(".a.99999999.part")
        part.rename(there)
        tidy(tmp_path / "a")
        assert there.exists()
        if namesake:
            with pytest.raises(OptionError, match="another run is writing there"), atomic_file(tmp_path / "a"):
                pass
        else:
            with atomic_file(tmp_path / "a") as stream:
                stream.write(b"x")
        process.stdin.close()
        process.wait()
    assert there.exists()
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"y")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_number_that_another_process_has_now_tells_nothing(tmp_path: Path) -> None:
    """Numbers are given again; in a container every run may have the same."""
    for pid in (os.getpid(), os.getppid(), 1):
        (tmp_path / f".a.{pid}.part").write_bytes(b"half")
    tidy(tmp_path / "a")
    assert hidden_names(tmp_path) == []


def test_without_locks_the_number_of_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr(leftovers, "lock", none)
    for pid in (os.getppid(), 99999999):
        (tmp_path / f".a.{pid}.part").write_bytes(b"half")
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"x")
    assert hidden_names(tmp_path) == [f".a.{os.getppid()}.part"]


@pytest.mark.slow
def test_who_writes_and_who_tidies_at_once(tmp_path: Path) -> None:
    """A part that is made and not yet locked may be taken for a dead one's: the writer makes it anew."""
    target, stop = tmp_path / "a", threading.Event()

    def keep_tidying() -> None:
        while not stop.is_set():
            tidy(target)

    others = [threading.Thread(target=keep_tidying) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        for _ in range(300):
            with reserve(target) as part:
                part.write_bytes(b"x")
                assert part.exists()
    finally:
        stop.set()
        for thread in others:
            thread.join()


def test_a_part_that_is_made_anew_while_one_tidies_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was locked is the part before, and the name is that of a live one."""
    part = tmp_path / ".a.99999999.part"
    part.write_bytes(b"dead")

    def late(path: Path) -> int | None:
        descriptor = hold.lock(path)
        path.unlink()
        path.write_bytes(b"alive")
        return descriptor

    monkeypatch.setattr(leftovers, "lock", late)
    tidy(tmp_path / "a")
    assert part.read_bytes() == b"alive"


@pytest.mark.parametrize("name", ["b", "a.7", "a b", "a\nb"])
def test_names_of_other_targets_are_left_alone(name: str, tmp_path: Path) -> None:
    for end in ("part", "old"):
        (tmp_path / f".{name}.99999999.{end}").write_bytes(b"")
    (tmp_path / ".a.part").write_bytes(b"")
    (tmp_path / ".a.x.part").write_bytes(b"")
    before = sorted(hidden_names(tmp_path))
    tidy(tmp_path / "a")
    assert sorted(hidden_names(tmp_path)) == before


def test_a_fifo_or_a_link_of_such_a_name_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.99999999.part")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    (tmp_path / ".a.99999998.part").symlink_to("mine")
    tidy(tmp_path / "a")
    assert (tmp_path / "mine" / "x").exists()
    assert hidden_names(tmp_path) == []


def test_a_lock_is_free_again_after_a_kill(tmp_path: Path) -> None:
    def work() -> None:
        with reserve(tmp_path / "a"):
            os.fsync(0)

    assert killed(work, at=1)
    (part,) = tmp_path.iterdir()
    descriptor = hold.lock(part)
    assert descriptor is not None
    os.close(descriptor)
