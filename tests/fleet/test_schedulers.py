"""A Dask scheduler that is not there, or ends while it is used: one message, and no traceback."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.verbs.fleets.fleet_verbs import index_fleet
from tests.fleet.makers import save_many


def use(monkeypatch: pytest.MonkeyPatch, client: Callable[[str], Any]) -> None:
    """Take this for Dask."""
    distributed, comm = types.ModuleType("distributed"), types.ModuleType("distributed.comm")
    vars(distributed)["Client"] = client
    vars(comm)["CommClosedError"] = type("CommClosedError", (OSError,), {})
    monkeypatch.setitem(sys.modules, "distributed", distributed)
    monkeypatch.setitem(sys.modules, "distributed.comm", comm)


@pytest.mark.parametrize("error", [OSError("timed out"), ValueError("missing port number")])
def test_no_scheduler_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def client(address: str) -> None:
        raise error

    use(monkeypatch, client)
    save_many(tmp_path, 2)
    with pytest.raises(loralens.OptionError, match="no Dask scheduler at nowhere"):
        index_fleet(tmp_path, dask="nowhere")


# Without workers, so that the command waits.
SCHEDULER = """
import distributed, time
if __name__ == "__main__":
    cluster = distributed.LocalCluster(n_workers=0, dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""


@pytest.mark.live
def test_a_scheduler_that_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    root = tmp_path / "fleet"
    save_many(root, 3)
    script = tmp_path / "scheduler.py"
    script.write_text(SCHEDULER)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], **pipes) as cluster:
        try:
            assert cluster.stdout
            address = cluster.stdout.readline().strip()
            words = [sys.executable, "-m", "loralens", "fleet", "index", root, "--dask", address]
            with subprocess.Popen(words, **pipes) as command:
                while not (root / ".loralens-fleet" / "catalogue.sqlite.part").exists():
                    assert command.poll() is None
                cluster.kill()
                _, messages = command.communicate(timeout=100)
        finally:
            cluster.kill()
    assert command.returncode == 2
    assert messages.startswith(f"error: the Dask scheduler at {address} has ended")
    assert messages.count("\n") == 2
