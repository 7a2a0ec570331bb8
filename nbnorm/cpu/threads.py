"""Threads of Numba's that kernels may use: how many, who waits for whom, and after a fork.

Numba's own rules hold: `numba.set_num_threads`, `NUMBA_NUM_THREADS` and `NUMBA_THREADING_LAYER` are
respected, and nothing global is changed; only whose threads run kernels may be another's (`adopt`).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from typing import Any

import numba
from llvmlite.binding import address_of_symbol

from nbnorm.cpu.host import loop_of

# The workqueue layer aborts the process where two threads run parallel kernels at the same time.
# Reentrant: a signal handler or a finaliser with kernels of its own runs within a thread's turn.
_one_at_a_time = threading.RLock()
_no_wait = nullcontext()
_serial_only = False


def count() -> int:
    """Threads for a parallel kernel; asking starts them."""
    return 1 if _serial_only else _pool()[1]()


def pool() -> int:
    """Address of the function that runs a loop on threads; 0 where Numba has none. Starts them."""
    return 0 if _serial_only else _pool()[0]


@lru_cache(maxsize=1)
def _pool() -> tuple[int, Callable[[], int]]:
    """Start threads; return the functions that run a loop on them and count them.

    Compiled code of Numba's calls both by these names; `numba.get_num_threads` takes 1 us, a lock.
    """
    numba.get_num_threads()
    loop, how_many = (address_of_symbol(name) for name in ("numba_parallel_for", "get_num_threads"))
    if not loop or not how_many:
        return 0, lambda: 1
    count = ctypes.PYFUNCTYPE(ctypes.c_int)(how_many)
    if _host is None or numba.threading_layer() != "omp":
        return loop, count
    library, most = _host
    _loops.append(loop_of(library))  # sites know its address for ever
    return _loops[-1].address, lambda: min(count(), most())


_host: tuple[ctypes.CDLL, Callable[[], int]] | None = None
_loops: list[Any] = []


def adopt(library: str, most: Callable[[], int]) -> None:
    """Run kernels on the threads of a host's OpenMP library instead of Numba's own.

    `library` is the file of a libgomp that the host has loaded, `most` says how many threads the
    host would use. Nothing changes where it is not loaded, or where Numba's threads are not
    OpenMP's.
    """
    global _host
    with suppress(OSError, AttributeError):
        found = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        found.GOMP_parallel  # noqa: B018
        _host = found, most
        _pool.cache_clear()


def one_at_a_time() -> bool:
    """Whether kernels that use threads must take turns, once threads have been started."""
    return not _serial_only and numba.threading_layer() == "workqueue"


def turn(parallel: bool) -> AbstractContextManager[object]:
    """Return the context that a kernel runs in."""
    return _one_at_a_time if parallel and one_at_a_time() else _no_wait


def _after_fork() -> None:
    """Stay serial under GNU OpenMP: a child that uses its parent's threads is ended, or hangs.

    Whether a host had started them is not known.
    """
    global _one_at_a_time, _serial_only
    _one_at_a_time = threading.RLock()
    try:
        omp = numba.threading_layer() == "omp"
    except ValueError:  # not started yet: the child starts its own
        omp = _host is not None
    _serial_only = _serial_only or omp


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
