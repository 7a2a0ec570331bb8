"""Moments of the rows of a table, summed in fixed blocks: how calls divide them does not matter.

The moments of a block depend on its rows and their order in memory, and blocks are merged in an
order that depends only on their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from nbnorm._pairwise import Pairwise
from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_stats
from nbnorm.moments import Moments

BLOCK = 1000  # rows of a block; the first begins at the first row
# Standard deviations. To round a mean this far off to float64 costs the variance less than 1e-13.
FAR = 1000.0
SLAB = 1 << 21  # values that are copied at a time


class Rows:
    """Moments of the rows added so far; NaN does not count.

    Means are kept relative to `origin`, the median of the first values of each column that count.
    They then have the size of a standard deviation, and keep the digits that a mean of 1e8 standard
    deviations would lose to rounding at every merge: after 1e5 float64 rows, the variance would be
    off by 1e-11. A first value alone may be an outlier, or a placeholder of weight 0.

    `tail` is of the `rows` rows after the last full block.
    """

    def __init__(self, columns: int) -> None:
        self.origin = np.full(columns, np.nan)
        self.blocks = Pairwise()
        self._begin()

    def copy(self) -> Rows:
        """Return an independent copy."""
        other = copy(self)
        other.origin, other.blocks = self.origin.copy(), self.blocks.copy()
        return other

    def add(self, x: NDArray, weights: NDArray | None = None) -> None:
        """Add rows of shape (rows, columns), with weights of shape (rows,) if they have any."""
        self._find_origin(x, weights)
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

    def _find_origin(self, x: NDArray, weights: NDArray | None) -> None:
        """Set the origin of columns that have had no value that counts yet."""
        columns = np.flatnonzero(np.isnan(self.origin))
        for begin in range(0, len(x), BLOCK):
            if columns.size == 0:
                break
            piece = x[begin : begin + BLOCK, columns].T
            counts = np.isfinite(piece)
            if weights is not None:
                counts &= weights[begin : begin + BLOCK] > 0
            number = counts.sum(axis=1)
            in_order = np.sort(np.where(counts, piece, np.nan), axis=1)  # NaN comes last
            median = in_order[range(columns.size), np.maximum(number - 1, 0) // 2]
            self.origin[columns] = median
            columns = columns[number == 0]

    def _begin(self) -> None:
        self.tail, self.rows = _nothing(self.origin.size), 0

    def _prolong(self, part: Moments, rows: int) -> None:
        """Merge `part`, one part of `rows` rows, into the tail; move a full tail to the blocks."""
        count, mean, m2 = np.stack(part)[:, 0]
        self.tail = self.tail.merge(Moments(count, mean, m2))
        self.rows += rows
        if self.rows == BLOCK:
            self.blocks.add(self.tail)
            self._begin()

    def _of_parts(self, x: NDArray, size: int, weights: NDArray | None) -> Moments:
        """Return the moments of every `size` rows, as rows of arrays; means less the origin.

        Far parts and NaN are summed again, which depends on each part alone.
        """
        origin = np.nan_to_num(self.origin)
        in_rows, parts = x.strides[0] >= x.strides[1], len(x) // size
        if weights is None and in_rows:
            found = _together(x, size)
            far = np.flatnonzero(_far(*found).any(axis=1) & (x.dtype == np.float64))
            found[1] -= origin
            found[:, far] = _shifted(x, size, origin, far)
        elif weights is None and parts > x.shape[1] and x.dtype != np.float64:
            found = _by_column(x, size)  # same bits as `_apart`, without its copy
            found[1] -= origin
        else:
            found = _apart(x, size, origin, range(parts), weights)
        unknown = np.flatnonzero(~np.isfinite(found[1]).all(axis=1))
        found[:, unknown] = _apart(x, size, origin, unknown, weights, masked=True)
        return Moments(*found)


def _together(x: NDArray, size: int) -> NDArray:
    """Return count, mean and M2 of every `size` rows, shape (3, parts, columns)."""
    parts = len(x) // size
    if parts == 1:
        return _array(batch_norm_stats(x))[:, None]
    found = np.empty((3, parts, x.shape[1]))
    found[0], found[1], found[2] = batch_norm_stats(x, groups=parts)
    return found


def _by_column(x: NDArray, size: int) -> NDArray:
    """Like `_together`, for x in Fortran order: column by column, without a copy."""
    parts, columns = len(x) // size, x.shape[1]
    found = np.empty((3, parts, columns))
    for c in range(columns):
        found[..., c] = _array(batch_norm_stats(x[:, c].reshape(parts, size), axis=0))
    return found


def _far(count: NDArray, mean: NDArray, m2: NDArray) -> NDArray:
    """Where the mean is FAR standard deviations from 0."""
    with np.errstate(all="ignore"):
        far: NDArray = (m2 > 0) & (count * mean * mean > FAR**2 * m2)
    return far


def _shifted(x: NDArray, size: int, origin: NDArray, parts: NDArray) -> NDArray:
    """Return count, mean - origin and M2 of some parts, shape (3, parts, columns)."""
    columns = x.shape[1]
    found = np.empty((3, len(parts), columns))
    step = max(1, SLAB // (size * columns))
    for begin in range(0, len(parts), step):
        some = parts[begin : begin + step]
        with np.errstate(all="ignore"):
            near = [x[part * size : (part + 1) * size] - origin for part in some]
        found[:, begin : begin + step] = _together(np.concatenate(near), size)
    return found


def _apart(
    x: NDArray,
    size: int,
    origin: NDArray,
    parts: Sequence[int] | NDArray,
    weights: NDArray | None = None,
    masked: bool = False,
) -> NDArray:
    """Return count, mean - origin and M2 of some parts, shape (3, parts, columns).

    Copies x so that every part and column is a channel; float64 x less the origin. If `masked`,
    NaN does not count.
    """
    columns, relative = x.shape[1], x.dtype == np.float64
    found = np.empty((3, len(parts), columns))
    step = max(1, SLAB // (size * columns))
    for begin in range(0, len(parts), step):
        some = np.array(parts[begin : begin + step])
        if len(some) == columns == 1:  # a single channel's weights are summed in another order
            some = some.repeat(2)
        turned = np.empty((len(some), columns, size), x.dtype)
        for values, part in zip(turned, some, strict=True):
            rows = x[part * size : (part + 1) * size].T
            with np.errstate(all="ignore"):
                np.subtract(rows, origin[:, None] if relative else x.dtype.type(0), out=values)
        counting: dict[str, NDArray] = {}
        if masked and weights is None:
            counting["mask"] = ~np.isnan(turned)
        elif weights is not None:  # per value, so that one part sums as many do
            of_rows = np.broadcast_to(weights.reshape(-1, 1, size)[some], turned.shape)
            there = ~np.isnan(turned) if masked else True
            counting["weights"] = np.where(there, of_rows, weights.dtype.type(0))
        moments = batch_norm_stats(turned, axis=(0, 1), **counting)  # type: ignore[arg-type]
        found[:, begin : begin + step] = _array(moments)[:, : len(parts) - begin]
    if not relative:
        found[1] -= origin
    return found


def _array(moments: Moments) -> NDArray:
    """Return moments as an array of shape (3, channels)."""
    return np.stack([np.broadcast_to(a, moments.mean.shape) for a in moments], dtype=np.float64)


def _nothing(columns: int) -> Moments:
    return Moments(*np.zeros((3, columns)))
