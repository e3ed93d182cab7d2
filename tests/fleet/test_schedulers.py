"""A Dask scheduler that is not there, or ends while it is used: one message, and no traceback."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.makers import save_many

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
                while not (root / ".loralens-fleet" / ".catalogue.sqlite.part").exists():
                    assert command.poll() is None
                cluster.kill()
                _, messages = command.communicate(timeout=100)
        finally:
            cluster.kill()
    assert command.returncode == 2
    assert messages.startswith(f"error: the Dask scheduler at {address} has ended")
    assert messages.count("\n") == 2
