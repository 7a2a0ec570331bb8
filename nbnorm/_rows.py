"""Moments of the rows of a table, summed in fixed blocks, so that they do not depend on the calls.

The moments of a block depend on its rows alone, and blocks are merged in an order that depends on
their places alone.
"""

from __future__ import annotations

import numpy as np

from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_apply, batch_norm_stats
from nbnorm.moments import Moments, Pairwise

BLOCK = 1000  # rows of a block; the first begins at the first row
SLAB = 1 << 20  # float64 values that are shifted at a time, and summed before they leave the cache


class Rows:
    """Moments of the rows added so far; NaN does not count.

    Means are kept relative to `origin`, the first row. They then have the size of a standard
    deviation, and keep the digits that a mean of 1e8 standard deviations would lose to rounding
    at every merge: merging 1e5 float64 rows, the variance would be off by 1e-11.

    `tail` has the `rows` after the last complete block.
    """

    def __init__(self, origin: NDArray) -> None:
        self.origin = np.where(np.isfinite(origin), origin, 0).astype(np.float64)
        self.blocks = Pairwise()
        self._begin()

    def moments(self, x: NDArray, weights: NDArray | None = None) -> list[Moments]:
        """Return what `add` takes: moments of the next rows, cut where blocks end.

        x has shape (rows, columns), weights, if given, shape (rows,). Inf makes a mean Inf or NaN.
        """
        begun = min(len(x), -self.rows % BLOCK)
        rest = (len(x) - begun) % BLOCK
        cuts = (0, begun, begun), (begun, len(x) - rest, BLOCK), (len(x) - rest, len(x), rest)
        return [
            self._of_parts(x[begin:end], size, None if weights is None else weights[begin:end])
            for begin, end, size in cuts
        ]

    def add(self, begun: Moments, blocks: Moments, rest: Moments, rows: int) -> None:
        """Add so many rows, by their `moments`."""
        completing = min(rows, -self.rows % BLOCK)
        self._prolong(begun, completing)
        self.blocks.extend(blocks)
        self._prolong(rest, (rows - completing) % BLOCK)

    def total(self) -> Moments:
        """Return the moments of all rows, with a count for each column."""
        complete = [self.blocks.total()] if self.blocks else []
        count, mean, m2 = _nothing(self.origin.size).merge(*complete, self.tail)
        return Moments(count, self.origin + mean, m2)

    def _begin(self) -> None:
        self.tail, self.rows = _nothing(self.origin.size), 0

    def _prolong(self, part: Moments, rows: int) -> None:
        """Merge so many rows, the only part, into the tail, which may then be a complete block."""
        if rows:
            self.tail = self.tail.merge(Moments(*(array[0] for array in part)))
            self.rows += rows
        if self.rows == BLOCK:
            self.blocks.add(self.tail)
            self._begin()

    def _of_parts(self, x: NDArray, size: int, weights: NDArray | None) -> Moments:
        """Return the moments of parts of so many rows; arrays have a row for each part."""
        parts, columns = len(x) // (size or 1), x.shape[1]
        if parts == 0:
            return Moments(*np.empty((3, 0, columns)))
        if x.dtype != np.float64:  # no digits that the rounding of a float64 mean could cost
            count, mean, m2 = _measured(x, size, weights)
            mean -= self.origin
            return Moments(count, mean, m2)
        found = np.empty((3, parts, columns))
        step = max(1, SLAB // (size * columns))
        shifted, one = np.empty_like(x[: step * size]), np.ones(columns)
        for part in range(0, parts, step):
            rows = slice(part * size, (part + step) * size)
            piece, of_piece = x[rows], None if weights is None else weights[rows]
            out = shifted[: len(piece)]
            piece = batch_norm_apply(piece, None, None, self.origin, one, out=out)
            found[:, part : part + step] = _measured(piece, size, of_piece)
        return Moments(*found)


def _measured(x: NDArray, size: int, weights: NDArray | None) -> NDArray:
    """Return count, mean and M2 of parts of so many rows, shape (3, parts, columns)."""
    parts, columns = len(x) // size, x.shape[1]
    found = np.empty((3, parts, columns))
    in_rows, alone = x.strides[0] >= x.strides[1], range(parts)
    if not in_rows and columns < parts and weights is None:  # read columns as they lie in memory
        for column in range(columns):
            found[..., column] = _stats(x[:, column].reshape(parts, size), 0, None)
        return found
    if in_rows and parts > 1 and weights is None:
        found[0], found[1], found[2] = batch_norm_stats(x, groups=parts)
        alone = np.flatnonzero(~np.isfinite(found[1]).all(axis=1))
    for part in alone:
        rows = slice(part * size, (part + 1) * size)
        found[:, part] = _stats(x[rows], 1, None if weights is None else weights[rows, None])
    return found


def _stats(x: NDArray, axis: int, weights: NDArray | None) -> NDArray:
    """Return count, mean and M2 of each channel, shape (3, channels); NaN does not count."""
    counting = {} if weights is None else {"weights": weights}
    found = _array(batch_norm_stats(x, axis=axis, **counting))
    unknown = ~np.isfinite(found[1])
    if unknown.any():
        there = ~np.isnan(x)
        counting = {"mask": there}
        if weights is not None:
            counting = {"weights": np.where(there, weights, weights.dtype.type(0))}
        known = _array(batch_norm_stats(x, axis=axis, **counting))
        found[:, unknown] = known[:, unknown]
    return found


def _array(moments: Moments) -> NDArray:
    """Return moments as an array of shape (3, channels)."""
    return np.stack([np.broadcast_to(a, moments.mean.shape) for a in moments], dtype=np.float64)


def _nothing(columns: int) -> Moments:
    return Moments(*np.zeros((3, columns)))
