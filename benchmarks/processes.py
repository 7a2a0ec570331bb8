"""Least times of libraries that run in processes of their own.

Idle threads of one library's pool would slow another down in the same process.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

Found = list[dict[str, float]]  # least milliseconds of each call, by shape


def least(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Return the least time of a call in milliseconds, without the first."""
    call()
    found, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        found = min(found, 1e3 * (time.perf_counter() - start))
    return found


def in_turns(program: str, libraries: Iterable[str], rounds: int) -> Found:
    """Run `program --library NAME` for each library in turn; return the least of all rounds.

    The program prints what it has found as JSON.
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
