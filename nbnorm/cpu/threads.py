"""Threads of Numba's that kernels may use: how many, who waits for whom, and after a fork.

Numba's own rules hold: `numba.set_num_threads`, `NUMBA_NUM_THREADS` and `NUMBA_THREADING_LAYER` are
respected, and nothing global is changed.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache

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
    on_host, most = loop_of(_host), _host.omp_get_max_threads
    return on_host.address, lambda: min(count(), most())


_host: ctypes.CDLL | None = None


def adopt(library: str) -> None:
    """Run kernels on the threads of a host's OpenMP library instead of Numba's own.

    `library` is the file of a libgomp that the host has loaded. Nothing changes where it has not,
    or where Numba's threads are not OpenMP's.
    """
    global _host
    with suppress(OSError, AttributeError):
        found = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        found.GOMP_parallel, found.omp_get_max_threads  # noqa: B018
        _host = found
        _pool.cache_clear()


def one_at_a_time() -> bool:
    """Whether kernels that use threads must take turns."""
    layer: str = numba.threading_layer()
    return layer == "workqueue"


def turn(parallel: bool) -> AbstractContextManager[object]:
    """Return the context that a kernel runs in."""
    return _one_at_a_time if parallel and one_at_a_time() else _no_wait


def _after_fork() -> None:
    """GNU OpenMP ends a child that uses threads its parent had started: stay serial in it."""
    global _one_at_a_time, _serial_only
    _one_at_a_time = threading.RLock()
    with suppress(ValueError):  # not started yet: the child starts its own
        _serial_only = _serial_only or numba.threading_layer() == "omp"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
