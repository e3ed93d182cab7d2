"""The check at every sync: a server that keeps the adapter of an earlier sync is found out, and the log says so."""

import json
from pathlib import Path

import loralens
from loralens.watching.watcher import Watcher
from tests import models
from tests.serving.fake import Engine, served, speaks
from tests.serving.test_interfaces import TEXTS, made


def test_a_stale_adapter_is_found_at_the_next_sync(tmp_path: Path) -> None:
    base, log = models.folder(models.llama(), tmp_path / "base"), tmp_path / "watch.jsonl"
    steps = [made(seed) for seed in range(3)]
    nothing = loralens.scale(steps[0], 0).adapter
    engine = Engine(nothing)
    with served(speaks("vllm", engine)) as (url, seen):
        check = loralens.SyncCheck(base, server=url, model="my-adapter", data=TEXTS)
        watcher = Watcher(log=log, on_sync=check)
        asked: list[int] = []
        for step, adapter in enumerate((nothing, *steps)):
            if step != 3:  # the last push does not arrive
                engine.applied = adapter
            watcher.look(step, adapter)
            before = len(seen)
            watcher.synced(adapter)
            asked.append(len(seen) - before)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = [(line["step"], line["served"]["verdict"]) for line in lines if "served" in line]
    assert told == [(0, "cannot-tell"), (1, "live"), (2, "live"), (3, "other-adapter")]
    assert "of step 2" in lines[-1]["served"]["headline"]
    assert asked[0] == 0
    assert asked[1] == asked[2] == asked[3]
    assert len(loralens.watching.watcher.read_watch_log(log)) == 4  # the lines of syncs are no snapshots
