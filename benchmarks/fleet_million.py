"""A fleet of a million adapters on one machine, simulated: sketches and rows of the catalogue, but no adapters.

    python -m benchmarks.fleet_million [FOLDER] [-n 1000000]

Measured at the full size: a query by short sketches, and SELECTs of the catalogue. Measured on a part and extrapolated:
all pairs (quadratic, from one block), and opening the index (linear, from 50,000 members).
"""

import argparse
import json
import resource
import sqlite3
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

import loralens
from loralens.fleet.catalogue import APPLICATION, TABLES, VERSION
from loralens.fleet.near import propose
from loralens.fleet.sketches import START_WIDTH, WIDTH, Sketches

SHORT = 512  # numbers of the short sketches that a query is compared with
BLOCK = 16_384  # rows that are converted to float32 at a time: 32 MiB
PAIRS = 8_192  # members of a block of all pairs
OPENED = 50_000
KEPT = 200  # candidates whose whole sketches are compared
QUERIES = 5
SELECTS = (
    "select count(*) from adapters where base = 'base-3'",
    "select rank, count(*) from adapters group by rank order by rank",
    "select name from adapters where fingerprint = 'f123456'",
    "select fingerprint, count(*) from adapters group by fingerprint having count(*) > 1 limit 10",
    "select name, frobenius from adapters order by frobenius desc limit 10",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("-n", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        result = {
            "members": options.n,
            "query": query(options.n),
            "all pairs": all_pairs(options.n),
            "catalogue": catalogue(Path(work), options.n),
            "opening": opening(Path(work), options.n),
        }
    print(json.dumps(result, indent=1))


def timed(work: Callable[[], object], runs: int = 1) -> float:
    """The least processor seconds of some runs, with one thread of BLAS."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def query(n: int) -> dict[str, object]:
    """The best candidates of one adapter among all, by short sketches in int8."""
    rng = np.random.default_rng(0)
    before = peak()
    codes = np.empty((n, SHORT), np.int8)
    for start in range(0, n, BLOCK):
        part = codes[start : start + BLOCK]
        part[:] = rng.integers(-127, 128, part.shape, dtype=np.int8)
    lengths = np.concatenate(
        [np.linalg.norm(codes[i : i + BLOCK].astype(np.float32), axis=1) for i in range(0, n, BLOCK)]
    )

    def search() -> object:
        example = codes[n // 2].astype(np.float32)
        cosines = np.concatenate([codes[i : i + BLOCK].astype(np.float32) @ example for i in range(0, n, BLOCK)])
        cosines /= lengths
        return np.argpartition(cosines, -KEPT)[-KEPT:]

    return {
        "bytes of the short sketches": codes.nbytes,
        "memory": peak() - before,
        "seconds": round(timed(search, QUERIES), 3),
    }


def all_pairs(n: int) -> dict[str, object]:
    """The cosines of all pairs by sketches of 1,024 numbers, extrapolated from one block."""
    rng = np.random.default_rng(1)
    sketches = Sketches(
        rng.integers(-127, 128, (2 * PAIRS, WIDTH), dtype=np.int8),
        np.ones(2 * PAIRS),
        np.zeros((2 * PAIRS, 256), np.int8),
    )
    first, second = (sketches.directions(1024, slice(i * PAIRS, (i + 1) * PAIRS)) for i in (0, 1))
    seconds = timed(lambda: np.nonzero(first @ second.T >= 0.4))
    blocks = (n / PAIRS) * (n / PAIRS + 1) / 2
    return {
        "seconds for a block": round(seconds, 2),
        "pairs a second": round(PAIRS**2 / seconds),
        "hours for all pairs": round(blocks * seconds / 3600, 1),
    }


def catalogue(work: Path, n: int) -> dict[str, object]:
    """The size of the catalogue, and the seconds of some questions."""
    file = work / "catalogue.sqlite"
    connection = new_catalogue(file)
    start = time.process_time()
    insert_rows(connection, n)
    filled = time.process_time() - start
    answers = {sql: round(timed(lambda sql=sql: connection.execute(sql).fetchall()), 3) for sql in SELECTS}
    connection.close()
    return {"bytes": file.stat().st_size, "seconds to fill": round(filled, 1), "seconds": answers}


def new_catalogue(file: Path) -> sqlite3.Connection:
    """An empty catalogue."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.executescript(f"pragma application_id = {APPLICATION}; pragma user_version = {VERSION}; {TABLES}")
    return connection


def insert_rows(connection: sqlite3.Connection, n: int) -> None:
    """Rows as of 24 modules of rank 8."""
    norms = json.dumps([round(0.1 + i / 100, 5) for i in range(24)], separators=(",", ":"))
    columns = (
        "path, name, real, bytes, stamp, status, added, indexed, step, format, base, "
        "signature, modules, zero_modules, extras, rank, ranks, scales, parameters, frobenius, effective_rank, norms, "
        "fingerprint, findings"
    )
    rows = (
        (
            f"org-{i % 5000}/adapter-{i}/adapter_model.safetensors", f"org-{i % 5000}/adapter-{i}", f"1:{i}", 600_000,
            f"{i}.1", "adapter", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", 0.01, "peft", f"base-{i % 10}",
            f"s{i % 40}", 24, 0, 2, 8,
            "[8]", "[2.0]", 147_456, 1 + (i * 7919 % n) / n, 4.5, norms, f"f{i // 2 if i % 50 == 1 else i}", "[]",
        )
        for i in range(n)
    )  # fmt: skip
    connection.execute("begin")
    connection.executemany(f"insert into files({columns}) values ({', '.join('?' * 24)})", rows)
    connection.execute("commit")


def opening(work: Path, n: int) -> dict[str, object]:
    """The seconds and the memory of an index that is opened, and of a search in it, extrapolated from a part."""
    home = work / "index"
    home.mkdir()
    rng = np.random.default_rng(2)
    connection = new_catalogue(home / "catalogue.sqlite")
    insert_rows(connection, OPENED)
    codes = (rng.integers(-127, 128, WIDTH + START_WIDTH, dtype=np.int8).tobytes() for _ in range(OPENED))
    connection.execute("begin")
    connection.executemany(
        "update files set sketch = ? where number = ?", zip(codes, range(1, OPENED + 1), strict=True)
    )
    connection.execute("insert into state values('root', '..'), ('reading', '')")
    connection.execute("commit")
    connection.close()
    fleet = loralens.Fleet.open(home)
    seconds = timed(lambda: len(fleet.members()))
    sketches, example = fleet.sketches(), fleet.sketches().at(0)
    proposed = timed(lambda: propose(sketches, example, np.arange(OPENED), 30), QUERIES)
    factor = n / OPENED
    return {
        "members": OPENED,
        "seconds": round(seconds, 2),
        "seconds for all": round(seconds * factor, 1),
        "bytes of the members in memory for all": round(members_bytes(home) * factor),
        "bytes of the sketches for all": n * (WIDTH + START_WIDTH),
        "seconds of a search by sketches": round(proposed, 3),
        "seconds of a search by sketches for all": round(proposed * factor, 2),
    }


def members_bytes(home: Path) -> int:
    """The memory of the rows and the sketches of an opened index."""
    tracemalloc.start()
    fleet = loralens.Fleet.open(home)
    fleet.members()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


if __name__ == "__main__":
    main()
