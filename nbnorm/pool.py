"""Memory pool for large results, which reuses memory after the last array on it is collected.

Allocating 100 MB from the system costs more than batch normalization: the system maps and zeroes
each page at its first write (32 x 256 x 56 x 56 forward: 6.4 ms into reused memory, 11.0 ms into
new memory). A result is a plain ndarray whose base is a block of the pool. The memory returns to
the pool when the array and all its views have been collected.

A block can be collected, and a signal handler can raise, at any line of any thread. The pool
therefore uses no lock and runs no Python code at a collection: the interpreter appends the block's
record to a queue, which is one operation in C. The state is in containers with atomic operations,
and totals are summed from them instead of counted. An interrupt can drop memory, which then goes
back to the system, but it cannot leak memory or hand it out twice.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections import deque
from contextlib import suppress
from functools import cache
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from nbnorm._typing import NDArray

# Bytes. malloc serves smaller results from its own store, without new pages. With results of one
# size, one at a time, the pool took 1.05 times as long at 1 MiB, 1.03 at 2 and 1.01 at 4.
LEAST = 1 << 21
LINE = 64  # bytes: results start at a cache line, which favours streaming stores


def set_pool_limit(nbytes: int | None) -> int:
    """Set how much memory the pool may hold for results; 0 turns it off.

    The pool keeps the memory of large results after they are collected, and reuses it for later
    results of similar size. A loop of ``y = batch_norm_forward(x, ...)`` then takes as long as with
    ``out=``. Used and idle memory together do not exceed `nbytes`; further results are ordinary
    arrays. The pool does not keep more memory than was in use at once, and drops the memory that
    has been idle longest first. The environment variable ``NBNORM_POOL_LIMIT`` sets the limit at
    import.

    Parameters
    ----------
    nbytes : int or None
        Limit in bytes. None means an eighth of the memory of the machine or container.

    Returns
    -------
    int
        The previous limit.

    Raises
    ------
    TypeError
        nbytes is not an integer.
    ValueError
        nbytes is negative.

    Notes
    -----
    A result from the pool has a ``base`` and does not own its data, so it cannot be resized in
    place. Otherwise it is an ordinary ndarray. Threads may share the pool; if several need new
    memory at the same moment, they may together exceed the limit by that amount.

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
    """Return `numpy.empty` in C order, from pooled memory if the array is large."""
    try:
        return _empty(shape, dtype)
    except MemoryError:  # retry, as dropping idle memory may free enough
        _pool.shrink(0)
        return _empty(shape, dtype)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    nbytes = prod(shape) * dtype.itemsize
    block = _pool.take(nbytes) if nbytes >= LEAST and _pool.limit else None
    if block is None:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, np.asarray(block))  # faster than view and reshape


def idle() -> tuple[int, int]:
    """Return the number of idle bytes in the pool, and the limit."""
    return _pool.idle(), _pool.limit


class _Memory(NamedTuple):
    """`size` bytes that start at a cache line, and the array that holds them."""

    size: int
    interface: dict[str, Any]
    array: NDArray


def _memory(size: int) -> _Memory:
    """Allocate new memory from the system."""
    array = np.empty(size + LINE, np.uint8)
    start = array.__array_interface__["data"][0]
    where = {"data": (start + -start % LINE, False), "shape": (size,)}
    return _Memory(size, {"version": 3, "typestr": "|u1", **where}, array)


class _Block:
    """Base of a result; it lives as long as the result and all its views."""

    __slots__ = ("__array_interface__", "__weakref__", "_memory")

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self.__array_interface__ = memory.interface

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "cannot copy or pickle the memory of a result by itself: copy the array that uses it"
        )


class _Loan(weakref.ref[_Block]):
    """Record of a block's memory; the interpreter queues it when the block is collected."""

    memory: _Memory | None = None  # still None if an interrupt comes before it is set


class _Pool:
    """Memory in use and idle, by size.

    There are four sizes per power of two, so new memory wastes at most a fifth. Idle memory also
    serves results down to half its size, so that results of alternating sizes share it: 60 results
    of (8, 16, 60..120, 60..120), one at a time, took 0.4 of the time without the pool, and 1.3 if
    each needed memory of its exact size.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._peak = 0  # most bytes in use at once since the limit was set
        self._lent: dict[int, dict[int, _Loan]] = {}  # by size, by id
        self._idle: dict[int, deque[tuple[int, _Memory]]] = {}  # by size, oldest first, numbered
        self._returned: deque[_Loan] = deque()
        self._numbers = count()

    def take(self, nbytes: int) -> _Block | None:
        """Return a block of at least `nbytes`, or None if the pool may not grow that much.

        Every step counts: kernels evict this code and data from the caches, so a call that takes
        7 us in a tight loop takes 30 us after a kernel.
        """
        size = _size_class(nbytes)
        if self._returned:
            self._collect()
        for fitting in _sizes_from(size):
            try:
                _, memory = self._idle[fitting].pop()  # the newest, which may still be in cache
                break
            except (KeyError, IndexError):
                continue
        else:
            if not self._make_room(size):
                return None
            memory = _memory(size)
            self._peak = max(self._peak, self._in_use() + size)
        block = _Block(memory)
        loan = _Loan(block, self._returned.append)
        loan.memory = memory
        self._lent[memory.size][id(loan)] = loan
        return block

    def _make_room(self, size: int) -> bool:
        """Drop idle memory until `size` bytes may be added; return False if they may not."""
        self._lent.setdefault(size, {})
        self._idle.setdefault(size, deque())
        in_use, limit = self._in_use() + size, self.limit
        if in_use > limit:
            return False
        self.shrink(min(max(self._peak, in_use), limit) - in_use)
        return True

    def idle(self) -> int:
        """Return the number of idle bytes."""
        self._collect()
        return sum(size * len(waiting) for size, waiting in self._idle.copy().items())

    def set_limit(self, limit: int) -> int:
        """Set the limit, drop idle memory beyond it, and return the previous limit."""
        before, self.limit = self.limit, limit
        self._collect()
        self.shrink(max(limit - self._in_use(), 0))
        self._peak = self._in_use() + self.idle()
        return before

    def _collect(self) -> None:
        """Move returned memory to the idle memory.

        An interrupt or another thread may come between any two steps. A loan therefore stays queued
        until all steps are done, and only the thread that removes it from `_lent` moves its memory.
        """
        while self._returned:
            try:
                loan = self._returned[0]
                memory = loan.memory
                if memory is not None:
                    size = memory.size
                    if self._lent[size].pop(id(loan), None) is not None:
                        self._idle[size].append((next(self._numbers), memory))
                self._returned.remove(loan)
            except (IndexError, ValueError):  # another thread was here
                pass

    def _in_use(self) -> int:
        """Return the number of bytes in use by live results."""
        return sum(size * len(lent) for size, lent in self._lent.copy().items())

    def shrink(self, nbytes: int) -> None:
        """Drop the memory idle longest until at most `nbytes` are idle."""
        excess = self.idle() - nbytes
        while excess > 0:
            with suppress(IndexError, ValueError):  # another thread took the last
                heads = ((q[0][0], size) for size, q in self._idle.copy().items() if q)
                _, size = min(heads)
                self._idle[size].popleft()
                excess -= size
                continue
            excess = self.idle() - nbytes


def _size_class(nbytes: int) -> int:
    """Round nbytes up to 4, 5, 6 or 7 times a power of two."""
    step = 1 << max(nbytes.bit_length() - 3, 0)
    return -(-nbytes // step) * step


@cache
def _sizes_from(size: int) -> tuple[int, ...]:
    """Return a size class and the larger ones up to twice its size, ascending."""
    sizes = [size]
    while sizes[-1] < 2 * size:
        sizes.append(_size_class(sizes[-1] + 1))
    return tuple(sizes)


def _default_limit() -> int:
    """Return an eighth of the memory that this process may use."""
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
