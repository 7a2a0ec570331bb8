"""Moments of the rows of a table, summed in fixed blocks, so that they do not depend on the calls.

The moments of a block depend on its rows alone, and blocks are merged in an order that depends on
their places alone.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_stats
from nbnorm.moments import Moments, Pairwise

BLOCK = 1000  # rows of a block; the first begins at the first row
# Standard deviations. To round a mean this far off to float64 costs the variance less than 1e-13.
FAR = 1000.0


class Rows:
    """Moments of the rows added so far; NaN does not count.

    Means are kept relative to `origin`, the first finite value of each column. They then have the
    size of a standard deviation, and keep the digits that a mean of 1e8 standard deviations would
    lose to rounding at every merge: after 1e5 float64 rows, the variance would be off by 1e-11.

    `tail` has the `rows` after the last complete block.
    """

    def __init__(self, columns: int) -> None:
        self.origin = np.full(columns, np.nan)
        self.blocks = Pairwise()
        self._begin()

    def copy(self) -> Rows:
        """Return other rows with these moments."""
        other = copy(self)
        other.origin, other.blocks = self.origin.copy(), self.blocks.copy()
        return other

    def add(self, x: NDArray, weights: NDArray | None = None) -> None:
        """Add rows of shape (rows, columns), with weights of shape (rows,) if they have any."""
        self._find_origin(x)
        head = min(len(x), -self.rows % BLOCK)
        rest = (len(x) - head) % BLOCK
        cuts = (0, head, head), (head, len(x) - rest, BLOCK), (len(x) - rest, len(x), rest)
        for begin, end, size in cuts:
            if begin == end:
                continue
            of_parts = None if weights is None else weights[begin:end]
            parts = self._of_parts(x[begin:end], size, of_parts)
            if size == BLOCK:
                self.blocks.extend(parts)
            else:
                self._prolong(parts, size)

    def total(self) -> Moments:
        """Return the moments of all rows, with a count for each column; Inf makes a mean NaN."""
        complete = [self.blocks.total()] if self.blocks else []
        count, mean, m2 = _nothing(self.origin.size).merge(*complete, self.tail)
        return Moments(count, np.nan_to_num(self.origin) + mean, m2)

    def _find_origin(self, x: NDArray) -> None:
        """Set the origin of columns that have had no value yet."""
        columns = np.flatnonzero(np.isnan(self.origin))
        for begin in range(0, len(x), BLOCK):
            if columns.size == 0:
                break
            piece = x[begin : begin + BLOCK, columns]
            finite = np.isfinite(piece)
            found, first = finite.any(axis=0), piece[finite.argmax(axis=0), range(columns.size)]
            self.origin[columns[found]] = first[found]
            columns = columns[~found]

    def _begin(self) -> None:
        self.tail, self.rows = _nothing(self.origin.size), 0

    def _prolong(self, part: Moments, rows: int) -> None:
        """Merge so many rows, the only part, into the tail, which may then be a complete block."""
        count, mean, m2 = np.stack(part)[:, 0]
        self.tail = self.tail.merge(Moments(count, mean, m2))
        self.rows += rows
        if self.rows == BLOCK:
            self.blocks.add(self.tail)
            self._begin()

    def _of_parts(self, x: NDArray, size: int, weights: NDArray | None) -> Moments:
        """Return the moments of parts of so many rows; arrays have a row for each part."""
        found = np.empty((3, len(x) // size, x.shape[1]))
        _measure(x, size, weights, found)
        doubtful, origin = _doubtful(x, *found), np.nan_to_num(self.origin)
        found[1] -= origin
        for part in np.flatnonzero(doubtful.any(axis=1)):
            rows, columns = slice(part * size, (part + 1) * size), doubtful[part]
            again = _again(x[rows], origin, None if weights is None else weights[rows, None])
            found[:, part, columns] = again[:, columns]
        return Moments(*found)


def _measure(x: NDArray, size: int, weights: NDArray | None, found: NDArray) -> None:
    """Write count, mean and M2 of parts of so many rows to `found`, shape (3, parts, columns)."""
    _, parts, columns = found.shape
    in_columns = x.strides[0] < x.strides[1]
    if weights is None and parts > 1 and not in_columns:
        found[0], found[1], found[2] = batch_norm_stats(x, groups=parts)
    elif weights is None and parts > columns:  # read columns one by one, as they lie in memory
        for c in range(columns):
            found[..., c] = _array(batch_norm_stats(x[:, c].reshape(parts, size), axis=0))
    else:
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            counting = _counting(None if weights is None else weights[rows, None])
            found[:, part] = _array(batch_norm_stats(x[rows], **counting))


def _doubtful(x: NDArray, count: NDArray, mean: NDArray, m2: NDArray) -> NDArray:
    """Where a part has NaN or Inf, or float64 values whose mean is FAR standard deviations off."""
    doubtful = ~np.isfinite(mean)
    if x.dtype == np.float64:
        with np.errstate(all="ignore"):
            doubtful |= (m2 > 0) & (count * mean * mean > FAR**2 * m2)
    return doubtful


def _again(x: NDArray, origin: NDArray, weights: NDArray | None) -> NDArray:
    """Return count, mean - origin and M2 of rows, shape (3, columns), without what is NaN."""
    there, counting = ~np.isnan(x), _counting(weights)
    if not there.all():
        counting = _counting(None if weights is None else np.where(there, weights, 0))
        counting = counting or {"mask": there}
    if x.dtype == np.float64:
        with np.errstate(all="ignore"):
            return _array(batch_norm_stats(x - origin, **counting))
    found = _array(batch_norm_stats(x, **counting))
    found[1] -= origin
    return found


def _counting(weights: NDArray | None) -> dict[str, Any]:
    return {} if weights is None else {"weights": weights}


def _array(moments: Moments) -> NDArray:
    """Return moments as an array of shape (3, channels)."""
    return np.stack([np.broadcast_to(a, moments.mean.shape) for a in moments], dtype=np.float64)


def _nothing(columns: int) -> Moments:
    return Moments(*np.zeros((3, columns)))
