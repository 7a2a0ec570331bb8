"""Memory for large results, used again once the last array on it is gone.

A fresh 100 MB from the system costs more than batch normalization: its pages are mapped and zeroed
one by one while they are first written (32 x 256 x 56 x 56 forward: 6.4 ms into memory at hand,
11.0 ms into new memory). A result is a plain ndarray whose base is a block of the pool; the memory
comes back when the array and all views of it have been collected.

A block can be collected, and a signal handler can raise, at any line of any thread. So there is no
lock here and no code of ours that runs at a collection: the interpreter appends the block's record
to a queue, which is one operation in C. What is known about memory is kept in containers whose
operations happen whole or not at all, and totals are summed from them rather than kept in counters.
An interrupt can drop memory, which then goes back to the system, but neither lose track of it nor
hand it out twice.
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

# Bytes. Smaller results come from malloc's own store, without new pages. Results of one size, one
# at a time, took 1.05 of their time without the pool at 1 MiB, 1.03 at 2 and 1.01 at 4.
LEAST = 1 << 21
LINE = 64  # bytes: results begin at a cache line, as streaming stores like it


def set_pool_limit(nbytes: int | None) -> int:
    """Set how much memory the pool may hold for results; 0 turns it off.

    Large results live in memory that is kept when they are gone, and used for later results of
    about their size: a loop of ``y = batch_norm_forward(x, ...)`` costs what it costs with
    ``out=``. The pool never keeps more idle than results had in use at once, drops first what has
    been idle longest, and holds at most `nbytes`, in use and idle; results beyond that are ordinary
    arrays. The environment variable ``NBNORM_POOL_LIMIT`` sets the limit at import.

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
        nbytes is not an integer.
    ValueError
        nbytes is negative.

    Notes
    -----
    A result from the pool has a ``base``, does not own its data and so cannot be resized in place.
    Otherwise it is an ndarray like any other. Threads may share the pool; those that need new
    memory at the same moment may together exceed the limit by what they need.

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
    """`numpy.empty` in C order, in pooled memory where the array is large."""
    try:
        return _empty(shape, dtype)
    except MemoryError:  # dropping what is idle may free enough
        _pool.shrink(0)
        return _empty(shape, dtype)


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    nbytes = prod(shape) * dtype.itemsize
    block = _pool.take(nbytes) if nbytes >= LEAST and _pool.limit else None
    if block is None:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, np.asarray(block))  # quicker than view and reshape


def idle() -> tuple[int, int]:
    """Bytes that are idle in the pool, and the limit."""
    return _pool.idle(), _pool.limit


class _Memory(NamedTuple):
    """`size` bytes that begin at a cache line, and the array that they are part of."""

    size: int
    interface: dict[str, Any]
    array: NDArray


def _memory(size: int) -> _Memory:
    """New memory, which the system takes some time to prepare."""
    array = np.empty(size + LINE, np.uint8)
    start = array.__array_interface__["data"][0]
    where = {"data": (start + -start % LINE, False), "shape": (size,)}
    return _Memory(size, {"version": 3, "typestr": "|u1", **where}, array)


class _Block:
    """Base of a result: what lives as long as the result and all views of it do."""

    __slots__ = ("__array_interface__", "__weakref__", "_memory")

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self.__array_interface__ = memory.interface

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "the memory of a result cannot be copied or pickled by itself: copy the array on it"
        )


class _Loan(weakref.ref[_Block]):
    """Record of a block's memory; the interpreter queues it when the block is gone."""

    memory: _Memory | None = None  # an interrupt may come before it is set


class _Pool:
    """Memory in use and idle, by size.

    There are four sizes to each power of two: new memory wastes a fifth at most. Idle memory also
    serves results of half its size, so that sizes that take turns share it: 60 results of
    (8, 16, 60..120, 60..120), one at a time, took 0.4 of their time without the pool, and 1.3 where
    each had to find memory of its own size.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._peak = 0  # most bytes in use at once; since the limit was set last
        self._lent: dict[int, dict[int, _Loan]] = {}  # by size, by id
        self._idle: dict[int, deque[tuple[int, _Memory]]] = {}  # by size, oldest first, numbered
        self._returned: deque[_Loan] = deque()
        self._numbers = count()

    def take(self, nbytes: int) -> _Block | None:
        """A block of `nbytes` or more; None where the pool may not grow that much.

        Every step counts: a kernel drives all of this out of the caches, and what takes 7 us in a
        loop by itself then takes 30.
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
        """Drop idle memory until `size` bytes may be added; return whether they may."""
        self._lent.setdefault(size, {})
        self._idle.setdefault(size, deque())
        in_use, limit = self._in_use() + size, self.limit
        if in_use > limit:
            return False
        self.shrink(min(max(self._peak, in_use), limit) - in_use)
        return True

    def idle(self) -> int:
        """Bytes that are idle."""
        self._collect()
        return sum(size * len(waiting) for size, waiting in self._idle.copy().items())

    def set_limit(self, limit: int) -> int:
        """Set the limit, keep to it, return the one before."""
        before, self.limit = self.limit, limit
        self._collect()
        self.shrink(max(limit - self._in_use(), 0))
        self._peak = self._in_use() + self.idle()
        return before

    def _collect(self) -> None:
        """Move returned memory to what is idle.

        An interrupt, or another thread, may come between any two steps. A loan therefore stays
        queued until all is done, and whoever takes it out of `_lent` alone passes its memory on.
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
        """Bytes of all results that live."""
        return sum(size * len(lent) for size, lent in self._lent.copy().items())

    def shrink(self, nbytes: int) -> None:
        """Drop what has been idle longest until at most `nbytes` are idle."""
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
    """nbytes rounded up to a power of two in quarters: 4, 5, 6 or 7 times a power of two."""
    step = 1 << max(nbytes.bit_length() - 3, 0)
    return -(-nbytes // step) * step


@cache
def _sizes_from(size: int) -> tuple[int, ...]:
    """A class and those up to twice its size, ascending."""
    sizes = [size]
    while sizes[-1] < 2 * size:
        sizes.append(_size_class(sizes[-1] + 1))
    return tuple(sizes)


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
