"""Views and watchers of a model that two processes train together."""

from pathlib import Path

import pytest

from loralens.watching import read_watch_log
from tests.processes import run_module


def run_pair(module: str, folder: Path) -> None:
    """Run a module in two processes, which must both succeed."""
    pytest.importorskip("peft")
    run_module(module, folder)


@pytest.mark.slow
def test_two_processes_see_the_whole_adapter_and_one_writes(tmp_path: Path) -> None:
    run_pair("tests.watching.pair", tmp_path)
    ddp, fsdp = (read_watch_log(tmp_path / f"{name}.jsonl") for name in ("ddp", "fsdp"))
    assert [snapshot.step for snapshot in ddp] == [snapshot.step for snapshot in fsdp] == [0, 1, 2]
    # Of one seed and one batch, both ways of dividing the work train the same adapter.
    for first, second in zip(ddp, fsdp, strict=True):
        assert first.total["frobenius"] == pytest.approx(second.total["frobenius"], rel=1e-4)
        assert first.total["gradient_B_norm"] == pytest.approx(second.total["gradient_B_norm"], rel=1e-4)


@pytest.mark.slow
def test_each_process_merges_its_rows_and_restores_them_bit_for_bit(tmp_path: Path) -> None:
    run_pair("tests.watching.pair_merging", tmp_path)
