"""Threads of Numba's that kernels may use: how many, who waits for whom, and after a fork.

Numba's own rules hold: `numba.set_num_threads`, `NUMBA_NUM_THREADS` and `NUMBA_THREADING_LAYER` are
respected, and nothing global is changed.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext, suppress

import numba

# The workqueue layer aborts the process where two threads run parallel kernels at the same time.
# Reentrant: a signal handler or a finaliser with kernels of its own runs within a thread's turn.
_one_at_a_time = threading.RLock()
_no_wait = nullcontext()
_serial_only = False


def count() -> int:
    """Threads for a parallel kernel; asking starts them."""
    return 1 if _serial_only else numba.get_num_threads()


def turn() -> AbstractContextManager[object]:
    """Return the context that a parallel kernel runs in, once threads have been started."""
    return _one_at_a_time if numba.threading_layer() == "workqueue" else _no_wait


def _after_fork() -> None:
    """GNU OpenMP ends a child that uses threads its parent had started: stay serial in it."""
    global _one_at_a_time, _serial_only
    _one_at_a_time = threading.RLock()
    with suppress(ValueError):  # not started yet: the child starts its own
        _serial_only = _serial_only or numba.threading_layer() == "omp"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
