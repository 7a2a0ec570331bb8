"""Minimum and median times of interleaved calls."""

import math
import statistics
import time
from typing import NamedTuple

from benchmarks.peers import Call

# Minimum length of one peer's turn, in seconds. The first calls after a pause may stall for 4 or
# 8 ms, the scheduler's slices, until each thread has a core. With turns of 1 ms, all nine samples
# of a call of 0.006 ms were stalls.
TURN = 1e-2
SAMPLE = 1e-4  # minimum length of a sample within a turn, in seconds
# Seconds between turns. Each library has its own pool of threads, and an idle OpenMP thread keeps
# its core busy for a while before it sleeps, which would slow down the next peer.
PAUSE = 0.03


class Times(NamedTuple):
    """Times of one call, in seconds."""

    least: float
    median: float


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """Time the calls in turn, for at least `rounds` rounds and half a second."""
    repeats = {name: math.ceil(SAMPLE / min(turn(call, 1))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < 0.5:
        for name, call in calls.items():
            samples[name] += turn(call, repeats[name])
        done += 1
    return {name: Times(min(all_), statistics.median(all_)) for name, all_ in samples.items()}


def turn(call: Call, repeats: int) -> list[float]:
    """Pause, wake the threads with a call that is not timed, then take samples.

    A sample is the mean of `repeats` calls. There are several samples, because a thread that wakes
    up on a busy core moves to another core only after some milliseconds.
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
