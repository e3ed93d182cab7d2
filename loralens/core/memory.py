"""How much memory this process may still use."""

import os
from contextlib import suppress
from pathlib import Path

# Where Linux says what a container may use and uses: version 2 of control groups, and version 1.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory() -> int | None:
    """The bytes that can be used without swapping, by the system and by the container; None where nothing says so."""
    limits: list[int] = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit, usage, stat, cache in _LIMITS:
        # Without a limit the file says "max", which is no number.
        with suppress(OSError, ValueError):
            used = int(Path(usage).read_text())
            # Pages of files are given back when memory is short.
            used -= sum(
                int(line.split()[1]) for line in Path(stat).read_text().splitlines() if line.split()[0] == cache
            )
            limits.append(max(0, int(Path(limit).read_text()) - used))
    if not limits:
        # macOS: half of all memory, since nothing simple says what is free.
        with suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(limits, default=None)
