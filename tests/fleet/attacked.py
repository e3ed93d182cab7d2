"""``python -m tests.fleet.attacked FOLDER OUT``: asks an index everything, one command after the other.

It prints JSON: for each command its exit code and what it has said on standard error, and the peak of memory in bytes.
"""

import json
import re
import sys
from pathlib import Path

from tests.cli.command import Command

SELECT = "select * from adapters, signatures order by name"


def commands(folder: str, out: str) -> dict[str, list[str]]:
    """The commands; the last one writes the index."""
    place = ["--fleet", folder]
    return {
        "near": ["fleet", "near", "a000", *place],
        "near --sketch": ["fleet", "near", "a000", "--sketch", *place],
        **{name: ["fleet", name, *place] for name in ("copies", "runs", "families", "bases", "empty", "stats")},
        "rows": ["fleet", "rows", SELECT, *place],
        "report": ["report", *place, "-o", out],
        "survey": ["survey", folder],
        "index": ["fleet", "index", folder],
    }


def listing(home: Path) -> dict[str, tuple[int, int]]:
    """The files of an index with their sizes and times."""
    return {file.name: (file.lstat().st_size, file.lstat().st_mtime_ns) for file in home.iterdir()}


if __name__ == "__main__":
    told = {}
    home = Path(sys.argv[1], ".loralens-fleet")
    before = listing(home)
    for name, words in commands(*sys.argv[1:]).items():
        if name == "index":
            told["written by readers"] = [int(listing(home) != before), ""]
        ended = Command().run(*words)
        told[name] = [ended.exit_code, ended.stderr if ended.exit_code in (0, 2) else repr(ended.exception)]
    # What the kernel counts of this process alone: `getrusage` begins with the peak of the parent.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    sys.stdout.write(json.dumps([told, 1024 * int(peak[1])]))
