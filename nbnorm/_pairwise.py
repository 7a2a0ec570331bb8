"""`Pairwise`: merging many parts in an order that costs few roundings."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from nbnorm.moments import Moments, merged


class Pairwise:
    """Merge moments in pairs, then pairs of pairs, and so on; leftovers at the end.

    The number of parts and `waiting`, from which it can be made anew, are all of its state.
    """

    def __init__(self, number: int = 0, waiting: Iterable[Any] = ()) -> None:
        self._number = number
        self.waiting = list(waiting)  # a merge of 2^k parts for each bit k set in the number

    def __len__(self) -> int:
        return self._number

    def copy(self) -> Self:
        """Return another one with the same parts."""
        return type(self)(self._number, self.waiting)

    def add(self, moments: Any) -> None:
        """Add moments, or any object with a compatible `merge` method, such as a dask delayed."""
        self._add(moments, 1)

    def extend(self, parts: Moments) -> None:
        """Add moments in float64 arrays that have a row for each part, counts too.

        The result has the same bits as `add` row by row, but rows are merged all at once.
        """
        rows: Any = np.stack(parts)
        while rows.shape[1]:
            # As many as are merged in pairs of pairs before any other is.
            number = 1 << (rows.shape[1].bit_length() - 1)
            if self._number:
                number = min(number, self._number & -self._number)
            these, rows = rows[:, :number], rows[:, number:]
            with np.errstate(all="ignore"):
                while these.shape[1] > 1:
                    these = np.stack(merged(*these[:, 0::2], *these[:, 1::2]))
            self._add(Moments(*these[:, 0]), number)

    def _add(self, moments: Any, number: int) -> None:
        """Add the merge of so many parts, a power of two that divides their number so far."""
        self._number += number
        number = self._number // number
        while number % 2 == 0:
            moments = self.waiting.pop().merge(moments)
            number //= 2
        self.waiting.append(moments)

    def total(self) -> Any:
        """Return the moments of all parts; requires at least one part."""
        *earlier, total = self.waiting
        for part in reversed(earlier):
            total = part.merge(total)
        return total
