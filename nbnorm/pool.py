"""Memory for large results, used again once the last array on it is gone.

A fresh 100 MB from the system costs more than batch normalization: its pages are mapped and zeroed
one by one while they are first written (32 x 256 x 56 x 56 forward: 6.4 ms into memory at hand,
11.0 ms into new memory). A result is a plain ndarray whose base is a block of the pool; the block
comes back when the array and all views of it have been collected.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nbnorm._arrays import NDArray

LEAST = 1 << 18  # bytes: less comes from malloc's own store without new pages
LINE = 64  # bytes: results begin at a cache line, as streaming stores like it


def set_pool_limit(nbytes: int | None) -> int:
    """Set how much memory may lie idle for later results; 0 turns the pool off.

    Results of 256 KiB and more live in memory that is kept when they are gone, and used for the
    next result of their size: a loop of ``y = batch_norm_forward(x, ...)`` costs what it costs with
    ``out=``. Beyond the limit, what has been idle longest goes back to the system. The environment
    variable ``NBNORM_POOL_LIMIT`` sets the limit at import.

    Parameters
    ----------
    nbytes : int or None
        Bytes. None: an eighth of the machine's, or the container's, memory.

    Returns
    -------
    int
        The limit that held before.

    Raises
    ------
    TypeError
        nbytes is no integer.
    ValueError
        nbytes is negative.

    Notes
    -----
    A result from the pool has a ``base``, does not own its data and so cannot be resized in place.
    Otherwise it is an ndarray like any other. Threads may share the pool.

    Examples
    --------
    >>> import nbnorm
    >>> before = nbnorm.set_pool_limit(0)  # off; what was idle is given back at once
    >>> nbnorm.set_pool_limit(before)
    0
    """
    if nbytes is None:
        limit = _default_limit()
    else:
        try:
            limit = operator.index(nbytes)
        except TypeError:
            raise TypeError(f"nbytes must be an int or None, got {nbytes!r}") from None
        if limit < 0:
            raise ValueError(f"nbytes is {limit}, expected 0 or more")
    return _pool.set_limit(limit)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    """`numpy.empty` in C order, of pooled memory where it is large."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < LEAST or not _pool.limit:
        return np.empty(shape, dtype)
    return np.asarray(_Block(_pool.take(nbytes), nbytes)).view(dtype).reshape(shape)


def idle() -> tuple[int, int]:
    """Bytes that wait in the pool, and the limit."""
    return _pool.idle, _pool.limit


class _Block:
    """Base of a result: hands its memory back when nothing refers to it any more."""

    def __init__(self, memory: NDArray, nbytes: int) -> None:
        self._memory = memory
        start = memory.__array_interface__["data"][0]
        self.__array_interface__ = {
            "version": 3,
            "data": (start + -start % LINE, False),
            "shape": (nbytes,),
            "typestr": "|u1",
        }

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be going down
            _pool.give(self._memory)


class _Pool:
    """Idle memory by size, the longest idle first.

    A block can be collected at any point of any thread, also while this thread holds the lock.
    So `give` only appends to a queue, which is atomic, and sorts it in if the lock is free; else
    the holder, or the next `take`, does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle = 0
        self._returned: deque[NDArray] = deque()
        self._waiting: OrderedDict[int, NDArray] = OrderedDict()  # by id
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> NDArray:
        """Memory for so many bytes from the next cache line on."""
        size = nbytes + LINE
        with self._lock:
            self._sort_in()
            for key in reversed(self._waiting):
                if self._waiting[key].nbytes == size:
                    self.idle -= size
                    return self._waiting.pop(key)
        return np.empty(size, np.uint8)

    def give(self, memory: NDArray) -> None:
        """Take memory back."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def set_limit(self, limit: int) -> int:
        """Set the limit, keep to it, return the one before."""
        with self._lock:
            before, self.limit = self.limit, limit
            self._sort_in()
        return before

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._waiting[id(memory)] = memory
            self.idle += memory.nbytes
        while self.idle > self.limit:
            _, memory = self._waiting.popitem(last=False)
            self.idle -= memory.nbytes


def _default_limit() -> int:
    """An eighth of the memory that this process may have."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        memory = 4 << 30
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 8


def _limit_from_environment() -> int:
    text = os.environ.get("NBNORM_POOL_LIMIT", "")
    if not text:
        return _default_limit()
    if not text.isdecimal():
        raise ValueError(f"NBNORM_POOL_LIMIT is {text!r}, expected a number of bytes")
    return int(text)


_pool = _Pool(_limit_from_environment())


def _after_fork() -> None:
    """Another thread may have held the lock when this process was forked."""
    _pool._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
