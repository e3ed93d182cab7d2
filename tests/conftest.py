"""Adapters that several tests share: small ones made here, real ones where there are any."""

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

import loralens
from loralens.core import Scaling
from tests.threads import one_thread

__all__ = ["one_thread"]

# Threads of torch that wait would spin, and two processes on two cores would take the time from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):  # how the output of commands looks
    os.environ.pop(name, None)
    os.unsetenv(name)  # readline, which pytest may import, sets COLUMNS where Python does not see it

# A shell that starts the tests in the background lets them and all commands that they start ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# With a search for garbage every 700 new objects, as Python has it, collecting the tests takes a fifth longer.
gc.set_threshold(50_000, 20, 20)

# No deadline, which would assert a time. Every run draws other examples, so that sixty of them need not be a hundred.
settings.register_profile("house", deadline=None, max_examples=60)
settings.register_profile("quick", settings.get_profile("house"), max_examples=25)
settings.load_profile("house")

ROOT = Path(__file__).parent.parent

# Files whose tests are all slow, or all live.
NOT_QUICK = re.compile(r"^pytestmark = \[?pytest\.mark\.(slow|live)\b", re.MULTILINE)


def is_quick(config: pytest.Config) -> bool:
    """Whether this is the run of `make test`, which leaves out what is slow or live."""
    return str(config.option.markexpr) == "not slow and not live"


def pytest_configure(config: pytest.Config) -> None:
    if is_quick(config):
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a file of which no test is quick: some import what takes seconds."""
    if is_quick(config) and collection_path.match("test_*.py") and NOT_QUICK.search(collection_path.read_text("utf-8")):
        return True
    return None


@pytest.hookimpl(tryfirst=True)  # before the selection by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the quick cases of a test with the marker ``some(count)``, let so many be quick, evenly spread.

    Files with torch come first: one process of several begins with them, so that only few import PEFT.
    """
    series: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some") and not item.get_closest_marker("slow"):
            series.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in series.values():
        (count,) = next(cases[0].iter_markers("some")).args
        quick = {round(i * (len(cases) - 1) / max(count - 1, 1)) for i in range(count)}
        for place in set(range(len(cases))) - quick:
            cases[place].add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not any(hasattr(getattr(item, "module", None), name) for name in ("torch", "peft")))


def pytest_collection_finish() -> None:
    """Take what stays to the end out of the search for garbage: imported packages, and thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Tests write tens of thousands of small files, and none can tell whether a file would outlast a loss of power."""

    def fsync(file: int | BinaryIO) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())  # which refuses what is closed, as fsync does

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def real_adapters() -> Path | None:
    """The folder of real adapters: ``LORALENS_REAL_ADAPTERS``, else ``../shared/adapters``; None where absent."""
    folder = Path(os.environ.get("LORALENS_REAL_ADAPTERS", ROOT.parent / "shared" / "adapters"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="module")
def quiet_torch() -> Iterator[None]:
    """Torch on one thread and transformers silent; skips where they are not installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real() -> Path:
    folder = real_adapters()
    if folder is None:
        pytest.skip("no real adapters here: set LORALENS_REAL_ADAPTERS")
    return folder


def small_adapter() -> loralens.Adapter:
    """Two blocks of q_proj and v_proj, rank 2, scale 4; singular values are powers of two; one B is 0."""
    scaling = Scaling("alpha/r", 8, 2, "adapter_config.json")
    modules = {}
    for block in (0, 1, 10):
        for kind in ("q_proj", "v_proj"):
            B, A = np.zeros((6, 2), np.float32), np.zeros((2, 4), np.float32)
            B[0, 0], B[1, 1] = 1.0, 0.5
            A[0, 0], A[1, 1] = 1.0, 0.5 if kind == "v_proj" else 1.0
            if (block, kind) == (10, "v_proj"):
                B[:] = 0
            modules[f"model.layers.{block}.self_attn.{kind}"] = loralens.LowRank(B, A, 4.0, scaling=scaling)
    return loralens.Adapter(modules=modules, base_model="tiny/base")


def small_base(folder: Path) -> Path:
    """W = diag(8, 4, 2, 1) under two rows of zeros, for every module; the directions of ΔW are the first two."""
    W = np.vstack([np.diag([8, 4, 2, 1]), np.zeros((2, 4))]).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": W.copy() for name in small_adapter()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `small_adapter`, as PEFT has it."""
    folder = tmp_path_factory.mktemp("adapters") / "small"
    loralens.save(small_adapter(), folder)
    return folder
