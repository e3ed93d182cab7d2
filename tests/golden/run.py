"""Run: the cases of the table in worker processes, each case in a folder of its own, as records."""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.golden.arguments import argument_list
from tests.golden.call import OUT, Call, Case
from tests.golden.content import file_record, parsed, sha256, steady, steady_lines
from tests.terminal import on_screen

# One thread a process, no colours, no network, no cache of the user's: nothing of the machine decides what is said.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TZ": "UTC",
}  # fmt: skip
MADE, CACHE = "made", "cache"

_worker: dict[str, Any] = {}


def records(cases: Sequence[Case], place: Path, jobs: int) -> Iterator[tuple[dict[str, Any], float]]:
    """The record of every case and the seconds it took; bases are made meanwhile, so cases that need them come last."""
    if not cases:
        return
    before = dict(os.environ)
    folders = {"HOME": place, "HF_HOME": place / "hub", "MPLCONFIGDIR": place / "matplotlib"}
    os.environ.update(ENVIRONMENT | {name: str(path) for name, path in folders.items()})
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin, initargs=(str(place),)) as pool:
            made = pool.submit(_make, any(MADE in case.sources for case in cases))
            waiting = [case for case in cases if MADE in case.sources]
            running = [pool.submit(case_record, case) for case in cases if MADE not in case.sources]
            made.result()
            running += [pool.submit(case_record, case) for case in waiting]
            for future in running:
                yield future.result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(place: str) -> None:
    """Set a worker up: its folder, and the command line with its imports."""
    from tests.golden.product import entry_point

    logging.getLogger().setLevel(logging.ERROR)  # what matplotlib says of its caches depends on the machine
    os.chdir(place)
    _worker.update(place=place, main=entry_point())


def _make(wanted: bool) -> None:
    if wanted:
        from tests.golden.bases import make

        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(Path(_worker["place"]) / MADE)


def case_record(case: Case) -> tuple[dict[str, Any], float]:
    """All that the calls of a case say and write, and the seconds it took."""
    started = time.monotonic()
    folder = f"out/{hashlib.sha256(case.name.encode()).hexdigest()[:8]}"  # as long for every case
    Path(folder).mkdir(parents=True)
    cache = folder.replace("out", CACHE, 1)  # nobody finds there what another case has kept
    os.environ["XDG_CACHE_HOME"] = f"{_worker['place']}/{cache}"
    known: dict[str, str] = {}
    try:
        record = {"case": case.name, "calls": [_call_record(call, folder, known) for call in case.calls]}
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(cache, ignore_errors=True)
    return record, time.monotonic() - started


def _call_record(call: Call, folder: str, known: dict[str, str]) -> dict[str, Any]:
    from click.testing import CliRunner

    words = argument_list(call, folder)
    if call.terminal:
        code, shown = on_screen(words, **({"NO_COLOR": "1"} if call.terminal == "plain" else {}))
        screen = steady_lines(_without_paths(shown.encode(), folder).decode())
        written = _written(Path(folder), known, lambda data: _without_paths(data, folder))
        asked = {"call": call.record(), "command": argument_list(call, OUT)}
        return {**asked, "exit": code, "screen": screen, "files": written}
    with warnings.catch_warnings():  # what other packages warn of, they warn of once a process
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(_worker["main"], words, prog_name="loralens")

    def clean(data: bytes) -> bytes:
        return _without_paths(data, folder)

    stdout = clean(result.stdout_bytes).decode()
    whole = parsed(stdout) if stdout[:1] in ("{", "[") else None
    raised = result.exception if not isinstance(result.exception, SystemExit) else None
    return {
        "call": call.record(),
        "command": argument_list(call, OUT),
        "exit": result.exit_code,
        **({"raised": clean(f"{type(raised).__name__}: {raised}".encode()).decode()} if raised else {}),
        "stdout": steady_lines(stdout) if whole is None else steady(whole),
        "stderr": steady_lines(clean(result.stderr_bytes).decode()),
        "files": _written(Path(folder), known, clean),
    }


def _without_paths(data: bytes, folder: str) -> bytes:
    place = _worker["place"]
    for path, name in ((folder, OUT), (folder.replace("out", CACHE, 1), CACHE)):
        data = data.replace(f"{place}/{path}".encode(), name.encode()).replace(path.encode(), name.encode())
    return data.replace(f"{place}/".encode(), b"").replace(place.encode(), b".")


def _written(folder: Path, known: dict[str, str], clean: Any) -> dict[str, Any]:
    """Files that are new or other than before the call, and those that are gone."""
    files: dict[str, Any] = {}
    present = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in sorted(set(known) - set(present)):
        del known[name]
        files[name] = {"kind": "removed"}
    for name, path in present.items():
        digest = sha256(path.read_bytes())
        if known.get(name) != digest:
            known[name] = digest
            files[name] = file_record(path, clean)
    return files
