"""Threads that measure adapters compute one after the other, and transform side by side."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loralens.fleet.indexing.measuring import measure_files
from loralens.fleet.sketching import turns
from loralens.fleet.sketching.start_sketch import StartSketch
from tests.fleet.makers import random_adapter, save

LIMIT = 20.0  # seconds after which a thread is taken to be stuck


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """The files of two adapters."""
    for name in ("a", "b"):
        save(tmp_path / name, random_adapter(ord(name)))
    return ["a/adapter_model.safetensors", "b/adapter_model.safetensors"]


def in_two_threads(root: Path, names: list[str]) -> list[str]:
    """The status of two files, each measured in a thread of its own."""
    with ThreadPoolExecutor(2) as pool:
        measured = pool.map(lambda name: measure_files(str(root), [name], False, False), names)
        return [file.status for files in measured for file in files]


def test_transforms_run_side_by_side(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Each thread waits in its first transform until the other one is in its own.
    both, transform, waited = threading.Barrier(2, timeout=LIMIT), np.fft.fft, threading.local()

    def meeting(x: np.ndarray, axis: int = -1, *, out: np.ndarray) -> np.ndarray:
        if not getattr(waited, "done", False):
            waited.done = True
            both.wait()
        return transform(x, axis=axis, out=out)

    monkeypatch.setattr(np.fft, "fft", meeting)
    assert in_two_threads(tmp_path, names) == ["adapter", "adapter"]
    assert not both.broken


def test_everything_else_is_done_in_turn(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, add = 0, 0, StartSketch.add

    def watched(self: StartSketch, *arguments: object) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.05)  # long enough for the other thread to come here, if nothing stops it
        add(self, *arguments)  # type: ignore[arg-type]
        inside -= 1

    monkeypatch.setattr(StartSketch, "add", watched)
    assert in_two_threads(tmp_path, names) == ["adapter", "adapter"]
    assert most == 1


def test_an_error_in_a_turn_ends_it(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **keywords: object) -> None:
        raise ArithmeticError("in a transform")

    monkeypatch.setattr(np.fft, "fft", failing)
    assert [file.status for file in measure_files(str(tmp_path), names, False, False)] == ["unreadable"] * 2
    with turns.turn():
        pass
