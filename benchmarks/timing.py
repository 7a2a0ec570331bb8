"""Least and median times of calls that take turns."""

import math
import statistics
import time
from typing import NamedTuple

from benchmarks.peers import Call

# Seconds that one turn of one peer lasts at least. The first calls after a pause may stall for 4
# or 8 ms, the scheduler's slices, until each thread has a core. In turns of 1 ms such a stall was
# all that was seen of a call of 0.006 ms, in each of nine rounds.
TURN = 1e-2
SAMPLE = 1e-4  # seconds that a sample of it lasts at least
# Seconds between turns. Two libraries have two pools of threads, and an idle OpenMP thread keeps
# its core busy for a while before it sleeps: without a pause the next peer pays for it.
PAUSE = 0.03


class Times(NamedTuple):
    """Of one call, in seconds."""

    least: float
    median: float


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """Time calls in turns, at least `rounds` of them and for half a second."""
    repeats = {name: math.ceil(SAMPLE / min(turn(call, 1))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < 0.5:
        for name, call in calls.items():
            samples[name] += turn(call, repeats[name])
        done += 1
    return {name: Times(min(all_), statistics.median(all_)) for name, all_ in samples.items()}


def turn(call: Call, repeats: int) -> list[float]:
    """Pause, wake the threads with a call that does not count, and time the next.

    A sample is the mean of so many calls. There are several, as a thread that woke up on a busy
    core is moved to another only after some milliseconds.
    """
    time.sleep(PAUSE)
    call()
    samples: list[float] = []
    while sum(samples) * repeats < TURN:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - begin) / repeats)
    return samples
