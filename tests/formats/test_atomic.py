"""A target is the old one or the new one, complete, and what a killed run leaves is gone after the next."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import LoraLensError, Moments, OptionError, save_moments
from loralens.core import Moment, State
from loralens.formats.files import atomic
from loralens.formats.files.atomic import atomic_file, tidy
from loralens.formats.files.disk import lock
from loralens.formats.models.model_writer import Change, CopyOptions, write_model
from loralens.formats.records.cache import SvdCache
from loralens.formats.records.merged_files import write_undo
from loralens.formats.records.results import write_sarif
from loralens.formats.records.training import Training
from loralens.linalg.lanczos import Decomposed
from tests.bases import single, tensors
from tests.formats.files import model_files
from tests.marks import slow_except

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

DIALECTS = {
    "peft": "folder",
    "gguf": "x.gguf",
    "kohya": "x.safetensors",
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
    write_model(
        model_files(base),
        home / "model",
        changes=change,
        fill=lambda _: iter([new]),
        options=CopyOptions(overwrite=True),
    )


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


MOMENTS = Moments(modules={"q": Moment(np.eye(2), 3, trace=1.0)}, fingerprint="f")
WRITERS: dict[str, Callable[[Path], None]] = {
    **{dialect: lambda home, dialect=dialect: write_adapter(dialect, home) for dialect in DIALECTS},  # type: ignore[misc]
    "model": write_copy,
    "undo file": lambda home: write_undo({}.items, {}.items, home / "undo.loralens"),
    "moments": lambda home: save_moments(MOMENTS, home / "m.safetensors", overwrite=True),
    "log of findings": lambda home: write_sarif("{}", home / "a.sarif"),
    "cache": write_entry,
    "training run": write_state,
}


def hidden_names(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".*")]


@pytest.mark.some(1)
@pytest.mark.parametrize("name", WRITERS)
def test_the_next_run_removes_what_a_killed_one_left(name: str, tmp_path: Path) -> None:
    home, write = tmp_path / "home", WRITERS[name]
    home.mkdir()
    left = 0
    for step in range(1, 99):
        died = forked(lambda: write(home), step) == -signal.SIGKILL
        left += bool(hidden_names(home))
        write(home)
        assert hidden_names(home) == []
        if not died:
            break
    assert not died
    assert left >= 1


def test_a_cache_forgets_the_half_of_another_entry(tmp_path: Path) -> None:
    (tmp_path / f".{'1' * 64}.svd.safetensors.part").write_bytes(b"half")
    (tmp_path / ".mine.part").write_bytes(b"mine")
    write_entry(tmp_path)
    assert hidden_names(tmp_path) == [".mine.part"]


ALIVE = """
import sys
from pathlib import Path
from loralens.formats.files.atomic import reserve
with reserve(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as part:
    print(part, flush=True)
    sys.stdin.read()
"""


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_live_run_writes_stays_and_a_second_run_is_refused(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALIVE, str(tmp_path / "a"), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        part = Path(process.stdout.readline().strip())
        tidy(tmp_path / "a")
        with pytest.raises(OptionError, match="a run is going on there"), atomic_file(tmp_path / "a"):
            pass
        assert part.exists()
        process.kill()
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"y")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_part_that_is_made_anew_while_one_tidies_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was locked is the part before, and the name is that of a live one."""
    part = tmp_path / ".a.part"
    part.write_bytes(b"dead")

    def late(path: Path) -> int | None:
        if path != part:
            return None
        descriptor = lock(path)
        path.unlink(missing_ok=True)
        path.write_bytes(b"alive")
        return descriptor

    monkeypatch.setattr(atomic, "lock", late)
    tidy(tmp_path / "a")
    assert part.read_bytes() == b"alive"


@pytest.mark.parametrize("name", ["b", "a.7", "a b", "a\nb"])
def test_names_of_other_targets_are_left_alone(name: str, tmp_path: Path) -> None:
    for end in ("part", "old"):
        (tmp_path / f".{name}.{end}").write_bytes(b"")
    (tmp_path / ".a.x.part").write_bytes(b"")
    before = sorted(hidden_names(tmp_path))
    tidy(tmp_path / "a")
    assert sorted(hidden_names(tmp_path)) == before


def test_a_fifo_or_a_link_of_such_a_name_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.part")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    (tmp_path / ".a.old").symlink_to("mine")
    tidy(tmp_path / "a")
    assert (tmp_path / "mine" / "x").exists()
    assert hidden_names(tmp_path) == []


STEPS = [(Path, name) for name in ("rename", "replace", "unlink", "mkdir", "touch")]
STEPS += [(shutil, "rmtree"), (os, "fsync")]


def scaled_adapter(alpha: float) -> loralens.Adapter:
    """Factors of ones times α, and a scale of α/2: the old file's with the new one's scale are no adapter of ours."""
    A, B = np.full((2, 3), alpha, np.float32), np.ones((5, 2), np.float32)
    return loralens.Adapter(modules={"model.layers.0.self_attn.q_proj": loralens.LowRank(B, A, alpha / 2)})


def product(path: Path) -> float | None:
    """An entry of ΔW of the adapter at a path; None where there is none."""
    try:
        (module,) = loralens.load(path).modules.values()
    except LoraLensError:
        return None
    return float(module.scale * (module.B @ module.A)[0, 0])


OLD, NEW = 2.0, 16.0
VALUES = {OLD: OLD / 2 * 2 * OLD, NEW: NEW / 2 * 2 * NEW}  # scale · r · α


def forked(work: Callable[[], None], dies_at: int = 0) -> int:
    """How a child ends that does the work and is killed before its n-th step on the disk; 0 where it was done."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        count = [0]

        def deadly(inner: Callable[..., object]) -> Callable[..., object]:
            def step(*args: object, **named: object) -> object:
                count[0] += 1
                if count[0] == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return inner(*args, **named)

            return step

        for home, name in STEPS:
            setattr(home, name, deadly(getattr(home, name)))
        work()
        code = 0
    finally:
        os._exit(code)


def others(folder: Path) -> dict[str, object]:
    """What lies in a folder besides the adapter, links as links, with modes and inodes' numbers of links."""
    seen: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in ("adapter_model.safetensors", "adapter_config.json", "lora.bin", "loralens.json"):
            continue
        if path.is_symlink():
            seen[name] = str(path.readlink())
        elif path.is_dir():
            seen[name] = stat.S_IMODE(path.stat().st_mode)
        else:
            seen[name] = path.read_bytes(), stat.S_IMODE(path.stat().st_mode), path.stat().st_mtime_ns
    return seen


def furnished(folder: Path) -> Path:
    """A folder with an adapter and all that trainers and users put beside it."""
    loralens.save(scaled_adapter(OLD), folder)
    (folder / "README.md").write_text("mine")
    (folder / "README.md").chmod(0o440)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-10" / "deep").mkdir(parents=True)
    (folder / "checkpoint-10" / "deep" / "optimizer.pt").write_bytes(bytes(100_000))
    (folder / "checkpoint-10").chmod(0o750)
    (folder / "empty").mkdir()
    (folder / "latest").symlink_to("checkpoint-10")
    (folder / "gone").symlink_to("../nowhere")
    (folder / ".hidden").write_text("x")
    folder.chmod(0o711)
    return folder


@pytest.fixture(params=slow_except(["folder", "one file"], "folder"))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an adapter, and the target under which it is replaced."""
    folder = furnished(tmp_path / "home" / "run")
    return folder, folder / "adapter_model.safetensors" if request.param == "one file" else folder


def refused(target: Path, *, dry_run: bool = False) -> None:
    """A run that is refused as something stands at its target: it tidies up, and changes nothing else."""
    with pytest.raises(OptionError):
        loralens.save(scaled_adapter(NEW), target, dry_run=dry_run)


@pytest.mark.slow
def test_killed_at_every_step(place: tuple[Path, Path]) -> None:
    folder, target = place
    before, absent = others(folder), 0
    for step in range(1, 200):
        ended = forked(lambda: loralens.save(scaled_adapter(NEW), target, overwrite=True), step)
        seen = product(folder)
        refused(target, dry_run=True)
        assert product(folder) == seen  # a dry run moves nothing
        refused(target)
        absent += seen is None
        assert product(folder) == (seen or VALUES[OLD])
        assert others(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        loralens.save(scaled_adapter(OLD), target, overwrite=True)
        assert others(folder) == before
    assert ended == 0
    assert seen == VALUES[NEW]
    assert step > 5
    assert absent >= 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_what_was_not_beside_the_old_one_is_gone_when_it_comes_back(before: bool, tmp_path: Path) -> None:
    """loralib keeps α in a record beside the weights: the next run must not give the old ones the new one's."""
    folder = tmp_path / "run"
    folder.mkdir()
    target = folder / "lora.bin"
    for step in range(1, 200):
        loralens.save(scaled_adapter(OLD), target, format="loralib", overwrite=True)
        if not before:
            (folder / "loralens.json").unlink()
        old = product(folder) if before else None
        ended = forked(lambda: loralens.save(scaled_adapter(NEW), target, format="loralib", overwrite=True), step)
        with pytest.raises(OptionError):
            loralens.save(scaled_adapter(NEW), target, format="loralib")
        record = (folder / "loralens.json").exists()
        assert record or not before
        assert product(folder) in (VALUES[NEW], old) or not record
        if ended == 0:
            break
    assert ended == 0


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "disk" / "run")
    before = others(folder)
    (tmp_path / "link").symlink_to("disk/run")
    loralens.save(scaled_adapter(NEW), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert product(folder) == VALUES[NEW]
    assert others(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]


def test_a_folder_where_the_weights_should_be_is_never_removed(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "mine").write_text("x")
        for target in (folder, folder / "adapter_model.safetensors"):
            with pytest.raises(OptionError, match=f"{name}: is a folder"):
                loralens.save(scaled_adapter(NEW), target, overwrite=True)
        assert (folder / name / "mine").read_text() == "x"
        shutil.rmtree(folder / name)
        loralens.save(scaled_adapter(OLD), folder, overwrite=True)


def test_an_error_names_the_target_and_not_the_hidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    furnished(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("run", "new"):
        with pytest.raises(
            LoraLensError, match=f"{tmp_path}/{name}/adapter_config.json: cannot be written: No sp"
        ) as e:
            loralens.save(scaled_adapter(NEW), tmp_path / name, overwrite=True)
        assert ".part" not in str(e.value)


def test_the_current_directory_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = furnished(tmp_path / "run")
    before, inode = others(folder), folder.stat().st_ino
    monkeypatch.chdir(folder / "checkpoint-10")
    loralens.save(scaled_adapter(NEW), "..", overwrite=True)
    assert others(folder) == before
    assert folder.stat().st_ino == inode == Path("..").stat().st_ino  # nobody stands in a folder that was removed
    assert product(folder) == VALUES[NEW]
