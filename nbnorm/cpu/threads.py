"""Threads of parallel kernels: their number, their pool, taking turns, and forks.

Numba's own rules hold: `numba.set_num_threads`, `NUMBA_NUM_THREADS` and `NUMBA_THREADING_LAYER` are
respected, and nothing global is changed. Only `adopt` replaces the threads that kernels run on.
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

# The workqueue layer aborts the process if two threads run parallel kernels at the same time. The
# lock is reentrant: a signal handler or finaliser may run kernels within a thread's turn.
_one_at_a_time = threading.RLock()
_no_wait = nullcontext()
_serial_only = False


def count() -> int:
    """Number of threads for a parallel kernel; starts them."""
    return 1 if _serial_only else _pool()[1]()


def pool() -> int:
    """Address of the function that runs a loop on threads, 0 if Numba has none; starts them."""
    return 0 if _serial_only else _pool()[0]


@lru_cache(maxsize=1)
def _pool() -> tuple[int, Callable[[], int]]:
    """Start threads; return the function that runs a loop on them, and one that counts them.

    Numba's compiled code calls both by these names. `numba.get_num_threads` takes 1 us, for a lock.
    """
    numba.get_num_threads()
    loop, how_many = (address_of_symbol(name) for name in ("numba_parallel_for", "get_num_threads"))
    if not loop or not how_many:
        return 0, lambda: 1
    count = ctypes.PYFUNCTYPE(ctypes.c_int)(how_many)
    if _host is None or numba.threading_layer() != "omp":
        return loop, count
    library, most = _host
    _loops.append(loop_of(library))  # never freed: sites keep its address
    return _loops[-1].address, lambda: min(count(), most())


_host: tuple[ctypes.CDLL, Callable[[], int]] | None = None
_loops: list[Any] = []


def adopt(library: str, most: Callable[[], int]) -> None:
    """Run kernels on the threads of a host's OpenMP library instead of Numba's own.

    `library` is the file of a libgomp that the host has loaded; `most` returns the number of
    threads that the host would use. Nothing changes if the library is not loaded, or if Numba's
    threads are not OpenMP's.
    """
    global _host
    with suppress(OSError, AttributeError):
        found = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        found.GOMP_parallel  # noqa: B018
        _host = found, most
        _pool.cache_clear()


def one_at_a_time() -> bool:
    """Whether kernels that use threads must take turns; known once threads have started."""
    return not _serial_only and numba.threading_layer() == "workqueue"


def turn(parallel: bool) -> AbstractContextManager[object]:
    """Return the context to run a kernel in: a lock if kernels must take turns."""
    return _one_at_a_time if parallel and one_at_a_time() else _no_wait


def _after_fork() -> None:
    """Stay serial in a child under GNU OpenMP: using its parent's threads would end or hang it.

    Whether a host had started its threads is unknown, so its children stay serial, too.
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
