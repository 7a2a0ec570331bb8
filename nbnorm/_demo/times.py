"""How long a batch takes, beside a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import numba
import numpy as np

from nbnorm._demo.data import Data, pieces
from nbnorm._demo.findings import EPS
from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_forward, batch_norm_inference, batch_norm_stats

TIMED = 1 << 25  # values at most: 128 MiB of float32, more than caches hold
SECONDS = 1.0  # for all rounds together, about
LEAST, MOST = 3, 1000  # rounds
REPEATED = 3  # times in a row, since threads that have slept take long to wake


@dataclass(frozen=True)
class Timing:
    """The least time of an operation, and the bytes that it must read and write."""

    name: str
    seconds: float
    bytes: int


def batch(data: Data) -> tuple[NDArray, str]:
    """Return the first values in memory, TIMED at most, and what they are."""
    first = data.items[0]()
    if len(data.items) == 1:
        x = np.array(next(iter(pieces(first, data.axes, TIMED))))
        part = "all values" if x.size == prod(first.shape) else "the first part"
        return x, f"{part}, of shape {x.shape}"
    images = [first]
    for item in data.items[1 : max(1, TIMED // first.size)]:
        image = item()
        if image.shape != first.shape:
            break
        images.append(image)
    x = np.concatenate(images)
    return x, f"the first {len(images)} images, stacked, of shape {x.shape}"


def time(x: NDArray, axes: tuple[int, ...]) -> tuple[Timing, ...]:
    """Return the times of a copy, the faster of one and many threads, and of nbnorm's functions."""
    y = np.empty_like(x, dtype=np.float32 if x.dtype.kind in "iu" else x.dtype)
    with np.errstate(all="ignore"):
        moments = batch_norm_stats(x, axis=axes)
        given = moments.mean, moments.var()
    calls: dict[str, Callable[[], Any]] = {
        "statistics": lambda: batch_norm_stats(x, axis=axes),
        "normalise": lambda: batch_norm_inference(x, None, None, *given, eps=EPS, axis=axes, out=y),
    }
    if x.dtype.kind == "f":
        calls["training forward (both)"] = lambda: batch_norm_forward(
            x, eps=EPS, axis=axes, correction=0, out=y
        )
    threads = numba.get_num_threads()
    from_, to = (np.array_split(a.ravel(order="K"), threads) for a in (x, y))
    with ThreadPoolExecutor(threads) as pool:
        copies: dict[str, Callable[[], Any]] = {
            "one": lambda: np.copyto(y, x),
            "many": lambda: list(pool.map(np.copyto, to, from_)),
        }
        least = _least(copies | calls)
    both = x.nbytes + y.nbytes
    timings = [Timing("copy", min(least[name] for name in copies), both)]
    for name in calls:
        timings.append(Timing(name, least[name], x.nbytes if name == "statistics" else both))
    return tuple(timings)


def _least(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the least time of each call, in turns; not of first calls, which may compile."""
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float("inf"))
    begin, rounds = perf_counter(), 0
    while rounds < LEAST or (rounds < MOST and perf_counter() - begin < SECONDS):
        for name, call in calls.items():
            for _ in range(REPEATED):
                start = perf_counter()
                call()
                least[name] = min(least[name], perf_counter() - start)
        rounds += 1
    return least
