"""Cache sizes of the processors that this process may use, as the system reports them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CPUS = Path("/sys/devices/system/cpu")  # Linux
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Caches(NamedTuple):
    """Cache sizes in bytes.

    Attributes
    ----------
    own : int
        Second-level cache available to one thread when every processor runs one.
    last : int
        Last-level caches of all processors, added up.
    """

    own: int
    last: int


# Used if the system reports no sizes. Wrong sizes cost time, never correctness.
TYPICAL = Caches(own=1 << 20, last=32 << 20)


def caches(cpus: Path = _CPUS) -> Caches:
    """Return the cache sizes of the processors that this process is allowed to run on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    # (level, list of processors that share the cache): (bytes, number of those processors)
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for cpu in allowed:
        for folder in cpus.glob(f"cpu{cpu}/cache/index*"):
            with suppress(OSError, ValueError, KeyError, IndexError):
                if (folder / "type").read_text().strip() == "Instruction":
                    continue
                level = int((folder / "level").read_text())
                shared = (folder / "shared_cpu_list").read_text().strip()
                size = (folder / "size").read_text().strip()
                found[level, shared] = int(size[:-1]) * _UNITS[size[-1]], _count(shared)
    own = [size // sharing for (level, _), (size, sharing) in found.items() if level == 2]
    if not own:
        return TYPICAL
    highest = max(level for level, _ in found)
    return Caches(
        min(own), sum(size for (level, _), (size, _) in found.items() if level == highest)
    )


def _count(processors: str) -> int:
    """Return the number of processors in a list such as 0-3,8."""
    spans = (span.partition("-") for span in processors.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)
