"""Moments merged part by part, saved to a file from which a later call resumes."""

import os
import time
import zlib
from contextlib import suppress
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np

from nbnorm import _files
from nbnorm._arrays import home_of, moved_to, on_host, take
from nbnorm._pairwise import Pairwise
from nbnorm._typing import Array
from nbnorm.moments import Moments

_CONTENT = "nbnorm.population_stats 1"  # the format of files; a new number where it changes
_KEYS = ("number", "sum", "count", "mean", "m2")  # of parts; their checksum; the waiting moments
# The file is rewritten once the last write has cost less than this share of the time since then.
SHARE = 1 / 50


class Checkpoint:
    """Moments merged in pairs; with a path, resumed from that file and saved to it.

    As a context manager it deletes the file if the block completes, and brings it up to date if an
    exception ends the block.
    """

    def __init__(self, path: Any) -> None:
        self._merged, self._checksum = Pairwise(), 0
        # The number of parts in the file that were not yet passed to `has_next`; its checksum.
        self._ahead, self._expected_checksum = 0, 0
        self._path = None if path is None else _checked(path)
        if self._path is not None and os.path.exists(self._path):
            self._read(self._path)
        self._restored = self._ahead > 0
        # One object, replaced in one assignment, so an interrupt cannot leave it half updated.
        self._state = self._saved = (len(self._merged), tuple(self._merged.waiting), 0)
        self._cost, self._time = 0.0, time.perf_counter()

    def __len__(self) -> int:
        return len(self._merged)

    def values(self) -> int:
        """Return the number of values in the moments."""
        return sum(map(values_of, self._merged.waiting))

    def has_next(self, *part: Any) -> bool:
        """Return True if the file has this part; call once per part, in order.

        `part` identifies it, and its checksum must agree with the file's.
        """
        if self._path is None:
            return False
        self._checksum = zlib.crc32(repr(part).encode(), self._checksum)
        if self._ahead == 0:
            return False
        self._ahead -= 1
        if self._ahead == 0 and self._checksum != self._expected_checksum:
            raise self._of_other_data()
        return True

    def add(self, moments: Moments) -> None:
        """Merge the moments of the part that `has_next` was called for."""
        if self._restored:  # from NumPy to the data's library and device
            self._merged.waiting = [_like(moments, part) for part in self._merged.waiting]
            self._restored = False
        self._merged.add(moments)
        if self._path is None:
            return
        self._state = (len(self._merged), tuple(self._merged.waiting), self._checksum)
        if self._cost <= SHARE * (time.perf_counter() - self._time):
            self._write(self._path)

    def total(self) -> Moments:
        """Return the moments of all parts; requires at least one."""
        if self._ahead:
            raise self._of_other_data()
        total: Moments = self._merged.total()
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._path is None:
            return
        if kind is None:
            with suppress(FileNotFoundError):
                os.remove(self._path)
        elif self._state is not self._saved:
            self._write(self._path)

    def _read(self, path: str) -> None:
        stored = _files.read(path, _CONTENT, _KEYS, "checkpoint")
        counts, means, m2 = stored["count"].tolist(), stored["mean"], stored["m2"]
        waiting = map(Moments, counts, means, m2)
        self._ahead, self._expected_checksum = int(stored["number"]), int(stored["sum"])
        self._merged = Pairwise(self._ahead, waiting)

    def _write(self, path: str) -> None:
        state = number, waiting, checksum = self._state
        begin = time.perf_counter()
        counts = np.array([part.count for part in waiting])
        means = np.stack([on_host(take(part.mean, "mean")) for part in waiting])
        m2 = np.stack([on_host(take(part.m2, "m2")) for part in waiting])
        arrays = dict(zip(_KEYS, (number, checksum, counts, means, m2), strict=True))
        _files.write(path, _CONTENT, arrays)
        self._saved, self._time = state, time.perf_counter()
        self._cost = self._time - begin

    def _of_other_data(self) -> ValueError:
        return ValueError(
            f"checkpoint {self._path!r} holds {len(self)} parts of other data: a shape, dtype, "
            "axis or chunk differs; delete the file to start over"
        )


def values_of(moments: Moments) -> int:
    """Return the number of values: count times the number of channels."""
    values: int = int(moments.count) * prod(moments.mean.shape)
    return values


def _checked(path: Any) -> str:
    """Return a path that no change of the working directory affects, or raise."""
    try:
        absolute = os.path.abspath(os.fsdecode(path))
    except TypeError:
        raise TypeError(f"checkpoint must be a path or None, got {path!r}") from None
    if not os.fsdecode(path):  # abspath("") is the working directory
        raise ValueError("checkpoint is empty, expected a path or None")
    if os.path.isdir(absolute):
        raise IsADirectoryError(f"checkpoint {absolute!r} is a folder, expected a file")
    folder = os.path.dirname(os.path.realpath(absolute))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint {absolute!r}: {folder!r} is not a folder")
    return absolute


def _like(moments: Moments, part: Moments) -> Moments:
    """Return a part with arrays of the library and device of other moments."""
    home = home_of(moments.mean)

    def given(array: Array) -> Array:
        return home(moved_to(moments.mean, array))

    return Moments(part.count, given(part.mean), given(part.m2))
