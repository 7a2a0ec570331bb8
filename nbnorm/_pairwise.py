"""`Pairwise`: merging many parts in an order that costs few roundings."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from nbnorm.moments import Moments, merged


class Pairwise:
    """Merge moments in pairs, then pairs of pairs, and so on; leftovers at the end.

    Its whole state is the number of parts and `waiting`, from which it can be rebuilt.
    """

    def __init__(self, number: int = 0, waiting: Iterable[Any] = ()) -> None:
        self._number = number
        self.waiting = list(waiting)  # a merge of 2^k parts for each bit k set in the number

    def __len__(self) -> int:
        return self._number

    def copy(self) -> Self:
        """Return an independent copy."""
        return type(self)(self._number, self.waiting)

    def add(self, moments: Any) -> None:
        """Add moments, or any object with a compatible `merge` method, such as a dask delayed."""
        self._add(moments, 1)

    def extend(self, parts: Moments) -> None:
        """Add parts given as one `Moments` of float64 arrays with a row per part.

        The result has the same bits as `add` row by row, but rows are merged at once.
        """
        rows: Any = np.stack(parts)
        while rows.shape[1]:
            # The most rows that merge with each other before any other part.
            number = 1 << (rows.shape[1].bit_length() - 1)
            if self._number:
                number = min(number, self._number & -self._number)
            these, rows = rows[:, :number], rows[:, number:]
            with np.errstate(all="ignore"):
                while these.shape[1] > 1:
                    these = np.stack(merged(*these[:, 0::2], *these[:, 1::2]))
            self._add(Moments(*these[:, 0]), number)

    def _add(self, moments: Any, number: int) -> None:
        """Add moments of `number` parts: a power of two that divides the parts so far."""
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
