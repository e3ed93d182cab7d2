"""Compression on a Dask cluster, one of whose workers is killed: the same bytes as in one process."""

import os
import signal
import threading
import time

import pytest

from loralens.fleet.joint.compress import compress_fleet
from tests.fleet.joint.collection import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_killed_worker_of_a_local_cluster_changes_nothing(tmp_path):
    distributed = pytest.importorskip("distributed")
    groups = []
    for i in range(6):
        sources = make(tmp_path / f"fleet{i}")
        named = [type(s)(f"{i}/{name}", s.path) for name, s in sources.items() if not name.startswith("copy")]
        groups += [named[:6], *([source] for source in named[6:])]
    compress_fleet(groups, tmp_path / "whole.safetensors", error=0.15)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        victim = next(iter(pids.values()))

        def kill() -> None:
            # As soon as the worker has a task.
            while not any(client.processing().values()):
                time.sleep(0.001)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        compress_fleet(groups, tmp_path / "fleet.safetensors", error=0.15, executor=client.get_executor(pure=False))
        killer.join()
        assert victim not in client.run(os.getpid).values()
    assert (tmp_path / "fleet.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
