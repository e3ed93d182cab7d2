"""Views and watchers of a model that two processes train together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loralens.formats.records.watch_log import read_watch_log

ROOT = Path(__file__).parents[2]


# Forks two processes from one that has imported everything: to import torch, transformers and PEFT takes seconds.
PAIR = """
import os, runpy, sys
import peft, torch, transformers
from transformers import LlamaForCausalLM

module, folder = sys.argv[1:]
children = []
for rank in (0, 1):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            sys.argv = [module, folder, str(rank)]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def run_pair(module: str, folder: Path) -> None:
    """Run a module in two processes, which must both succeed."""
    pytest.importorskip("peft")
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", PAIR, module, str(folder)], env={**os.environ, **alone}, cwd=ROOT, timeout=300,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_see_the_whole_adapter_and_one_writes(tmp_path: Path) -> None:
    run_pair("tests.watching.pair", tmp_path)
    ddp, fsdp = (read_watch_log(tmp_path / f"{name}.jsonl") for name in ("ddp", "fsdp"))
    assert [look.step for look in ddp] == [look.step for look in fsdp] == [0, 1, 2]
    # Of one seed and one batch, both ways of dividing the work train the same adapter.
    for first, second in zip(ddp, fsdp, strict=True):
        assert first.total["frobenius"] == pytest.approx(second.total["frobenius"], rel=1e-4)
        assert first.total["gradient_B_norm"] == pytest.approx(second.total["gradient_B_norm"], rel=1e-4)


@pytest.mark.slow
def test_each_process_merges_its_rows_and_restores_them_bit_for_bit(tmp_path: Path) -> None:
    run_pair("tests.watching.pair_merging", tmp_path)
