"""Minimum times of libraries that each run in their own processes.

In one process, idle threads of one library's pool would slow down the other libraries.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

Found = list[dict[str, float]]  # least milliseconds of each call, by shape


def least(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Return the minimum time of a call in milliseconds, not counting the first call."""
    call()
    found, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        found = min(found, 1e3 * (time.perf_counter() - start))
    return found


def in_turns(program: str, libraries: Iterable[str], rounds: int) -> Found:
    """Run `program --library NAME` for each library in turn; return the minimum over all rounds.

    The program prints its results as JSON.
    """
    libraries = list(libraries)
    total: Found = []
    for _ in range(rounds):
        for library in libraries:
            command = [sys.executable, program, "--library", library]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            found = json.loads(output)
            total = total or [{} for _ in found]
            for best, times in zip(total, found, strict=True):
                for name, ms in times.items():
                    best[name] = min(best.get(name, ms), ms)
    return total
