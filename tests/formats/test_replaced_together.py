"""An adapter that takes the place of another: killed at any step it is the old one, the new one, or not there."""

import errno
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.atomic import _is_bound, why_immovable
from loralens.formats.files.hold import lock
from tests.marks import slow_except

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

STEPS = [
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (Path, "touch"),
    (os, "link"),
    (shutil, "copy2"),
    (shutil, "rmtree"),
]


def adapter(alpha: float) -> loralens.Adapter:
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
    loralens.save(adapter(OLD), folder)
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


@pytest.fixture(params=slow_except(["folder", "working directory", "one file"], "folder"))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with an adapter, and the target under which it is replaced."""
    folder = furnished(tmp_path / "home" / "run")
    if request.param == "working directory":
        monkeypatch.chdir(folder)
    return folder, folder / "adapter_model.safetensors" if request.param == "one file" else folder


def refused(target: Path, *, dry_run: bool = False) -> None:
    """A run that is refused as something stands at its target: it tidies up, and changes nothing else."""
    with pytest.raises(OptionError, match="exists"):
        loralens.save(adapter(NEW), target, dry_run=dry_run)


@pytest.mark.slow
def test_killed_at_every_step(place: tuple[Path, Path]) -> None:
    folder, target = place
    before, absent = others(folder), 0
    held = {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
    for step in range(1, 200):
        ended = forked(lambda: loralens.save(adapter(NEW), target, overwrite=True), step)
        seen = product(folder)
        refused(target, dry_run=True)
        assert product(folder) == seen  # a dry run moves nothing
        refused(target)
        if seen is None:
            absent += 1
            assert held == {name: (folder / name).read_bytes() for name in held}
        assert product(folder) == (seen or VALUES[OLD])
        assert others(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        loralens.save(adapter(OLD), target, overwrite=True)
        assert others(folder) == before
    assert ended == 0
    assert seen == VALUES[NEW]
    assert step > 5
    assert absent >= 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711


@pytest.mark.slow
def test_killed_while_it_is_put_back(place: tuple[Path, Path]) -> None:
    folder, target = place
    before, first = others(folder), 0
    while product(folder) is not None:
        loralens.save(adapter(OLD), target, overwrite=True)
        first += 1
        forked(lambda: loralens.save(adapter(NEW), target, overwrite=True), first)
    killed = folder.parent.with_name("killed")
    shutil.copytree(folder.parent, killed, symlinks=True)
    here = Path.cwd()
    for step in range(1, 100):
        ended = forked(lambda: refused(target), step)
        assert product(folder) in (VALUES[OLD], None)
        refused(target)
        assert product(folder) == VALUES[OLD]
        assert others(folder) == before
        if ended == 0:
            break
        os.chdir("/")
        shutil.rmtree(folder.parent)
        shutil.copytree(killed, folder.parent, symlinks=True)
        os.chdir(here)
    assert ended == 0
    assert step > 1


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_what_was_not_beside_the_old_one_is_gone_when_it_comes_back(before: bool, tmp_path: Path) -> None:
    """loralib keeps α in a record beside the weights: the next run must not give the old ones the new one's."""
    folder = tmp_path / "run"
    folder.mkdir()
    target = folder / "lora.bin"
    for step in range(1, 200):
        loralens.save(adapter(OLD), target, format="loralib", overwrite=True)
        if not before:
            (folder / "loralens.json").unlink()
        old = product(folder) if before else None
        ended = forked(lambda: loralens.save(adapter(NEW), target, format="loralib", overwrite=True), step)
        with pytest.raises(OptionError, match="exists"):
            loralens.save(adapter(NEW), target, format="loralib")
        record = (folder / "loralens.json").exists()
        assert record or not before
        assert product(folder) in (VALUES[NEW], old) or not record
        if ended == 0:
            break
    assert ended == 0


def test_a_folder_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point says EBUSY; a folder of somebody else's in a sticky one EPERM."""
    folder, rename = furnished(tmp_path / "run"), Path.rename
    before = others(folder)

    def refuse(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert product(folder) == VALUES[NEW]
    assert others(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_one_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mkdir = furnished(tmp_path / "run"), Path.mkdir

    def refuse(self: Path, *args: object, **named: object) -> None:
        if self.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert product(folder) == VALUES[NEW]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "disk" / "run")
    before = others(folder)
    (tmp_path / "link").symlink_to("disk/run")
    loralens.save(adapter(NEW), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert product(folder) == VALUES[NEW]
    assert others(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]


def test_big_files_are_not_copied(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "run")
    file = folder / "checkpoint-10" / "deep" / "optimizer.pt"
    inode = file.stat().st_ino
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert file.stat().st_ino == inode
    assert file.stat().st_nlink == 1


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    folder = furnished(tmp_path / "run")
    before = others(folder)
    monkeypatch.setattr(os, "link", refuse)
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert others(folder) == before


def test_what_comes_while_the_new_folder_is_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer may be at work in the folder."""
    folder, rename = furnished(tmp_path / "run"), Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == folder:
            (folder / "checkpoint-10" / "late").write_text("x")
            (folder / "checkpoint-20").mkdir()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert (folder / "checkpoint-10" / "late").read_text() == "x"
    assert (folder / "checkpoint-20").is_dir()


def test_a_folder_where_the_weights_should_be_is_never_removed(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "mine").write_text("x")
        for target in (folder, folder / "adapter_model.safetensors"):
            with pytest.raises(OptionError, match=f"{name}: is a folder"):
                loralens.save(adapter(NEW), target, overwrite=True)
        assert (folder / name / "mine").read_text() == "x"
        shutil.rmtree(folder / name)
        loralens.save(adapter(OLD), folder, overwrite=True)


def test_a_folder_that_another_run_holds_is_refused(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "run")
    held = lock(folder)
    assert held is not None
    with pytest.raises(OptionError, match="a run is going on there"):
        loralens.save(adapter(NEW), folder, overwrite=True)
    os.close(held)
    assert product(folder) == VALUES[OLD]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def moved_aside(folder: Path) -> None:
    """Leave a folder as a run does that is killed between the two renames."""
    furnished(folder)
    for step in range(1, 200):
        forked(lambda: loralens.save(adapter(NEW), folder, overwrite=True), step)
        if not folder.exists():
            return
        loralens.save(adapter(OLD), folder, overwrite=True)


def test_a_verb_that_checks_its_target_first_puts_back_what_a_killed_run_moved_aside(tmp_path: Path) -> None:
    folder, source = tmp_path / "home" / "run", tmp_path / "source"
    loralens.save(adapter(NEW), source)
    moved_aside(folder)
    seen = sorted(folder.parent.iterdir())
    with pytest.raises(OptionError, match="a run that was killed has moved it aside"):
        loralens.load(folder)
    loralens.scale(source, by=1.0, output=folder, overwrite=True, dry_run=True)
    assert sorted(folder.parent.iterdir()) == seen
    loralens.scale(source, by=1.0, output=folder, overwrite=True)
    assert product(folder) == VALUES[NEW]
    assert others(folder)["README.md"]
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_folder_that_a_living_run_moves_aside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "run"
    moved_aside(folder)
    (old,) = folder.parent.glob(".run.*.old")
    held = lock(old)
    assert held is not None
    with pytest.raises(OptionError, match="another run is writing there"):
        loralens.save(adapter(NEW), folder, overwrite=True)
    assert not folder.exists()
    os.close(held)
    loralens.save(adapter(NEW), folder, overwrite=True)
    assert product(folder) == VALUES[NEW]


def test_an_error_names_the_target_and_not_the_hidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    furnished(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("run", "new"):
        with pytest.raises(
            LoraLensError, match=f"{tmp_path}/{name}/adapter_config.json: cannot be written: No sp"
        ) as e:
            loralens.save(adapter(NEW), tmp_path / name, overwrite=True)
        assert ".part" not in str(e.value)


def test_the_current_directory_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = furnished(tmp_path / "run")
    before, inode = others(folder), folder.stat().st_ino
    monkeypatch.chdir(folder / "checkpoint-10")
    loralens.save(adapter(NEW), "..", overwrite=True)
    assert others(folder) == before
    assert folder.stat().st_ino == inode == Path("..").stat().st_ino  # nobody stands in a folder that was removed
    assert product(folder) == VALUES[NEW]
    assert why_immovable(folder)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux says what is mounted where")
def test_mount_points_are_known(tmp_path: Path) -> None:
    assert why_immovable(Path("/proc")) == "a disk is mounted there"
    assert _is_bound(Path("/proc"))
    assert not _is_bound(tmp_path)
    assert why_immovable(tmp_path) is None
