"""What is notable about channels: NaN, constants, scales and means that differ widely."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nbnorm._demo.data import Data, pieces
from nbnorm._typing import NDArray
from nbnorm.moments import Moments
from nbnorm.population import CHUNK

EPS = 1e-5  # the default of all functions
FAR = 10.0  # a ratio of scales, or a mean in standard deviations, that is worth a word
SHRUNK = 0.9  # as is a standard deviation of y below this
NAMED = 8  # channels in a sentence


class Findings:
    """Statistics of all channels in one dimension, and which of them are worth a look."""

    def __init__(self, data: Data, moments: Moments) -> None:
        self.data = data
        self.mean: NDArray = moments.mean.ravel()
        with np.errstate(all="ignore"):  # the point is to find NaN and Inf
            variance = moments.var().ravel()
            self.std: NDArray = np.sqrt(variance)
            self.std_after: NDArray = np.sqrt(variance / (variance + EPS))
            self.broken = ~np.isfinite(self.mean) | ~np.isfinite(variance)
            self.constant = variance == 0
            ordinary = ~self.broken & ~self.constant
            self.typical = float(np.median(self.std[ordinary])) if ordinary.any() else 1.0
            self.scale: NDArray = np.where(ordinary, self.std / self.typical, 1.0)
            self.offset: NDArray = np.where(ordinary, np.abs(self.mean) / self.std, 0.0)
            self.badness = np.abs(np.log(self.scale))
        self.uneven = self.badness >= np.log(FAR)
        self.far = self.offset >= FAR
        self.shrunk = ordinary & (self.std_after < SHRUNK)
        self._ordinary = ordinary
        self._bad: dict[int, tuple[int, int]] = {}

    def order(self) -> list[int]:
        """Return the channels, most notable first, ties by number."""
        badness = np.maximum(self.badness, np.log(np.maximum(self.offset, 1)))
        rank = np.where(self.broken, 0, np.where(self.constant, 1, 2))
        order: list[int] = np.lexsort((-badness, rank)).tolist()
        return order

    def count_bad(self, channels: Sequence[int]) -> None:
        """Count NaN and Inf in those of `channels` that have any."""
        found = [c for c in channels if self.broken[c]]
        counts = {c: np.zeros(2, np.int64) for c in found}
        for item in self.data.items if found else ():
            for piece in pieces(item(), self.data.axes, CHUNK):
                values = np.moveaxis(piece, self.data.axes, range(len(self.data.axes)))
                for c, count in counts.items():
                    channel = values[np.unravel_index(c, self.data.channels)]
                    count += np.isnan(channel).sum(), np.isinf(channel).sum()
        self._bad = {c: (int(count[0]), int(count[1])) for c, count in counts.items()}

    def flags(self, c: int) -> tuple[str, ...]:
        """Return what is notable about a channel, in a few words each."""
        if c in self._bad:
            nan, inf = self._bad[c]
            flags = [f"{n:,} {name}" for n, name in ((nan, "NaN"), (inf, "Inf")) if n]
            return tuple(flags or ["squares overflow"])
        if self.constant[c]:
            return ("constant",)
        flags = []
        if self.uneven[c]:
            flags.append(f"std {self.scale[c]:.3g} times the median")
        if self.far[c]:
            flags.append(f"mean {self.offset[c]:.3g} std from 0")
        if self.shrunk[c]:
            flags.append("variance near eps")
        return tuple(flags)

    def summary(self) -> tuple[str, ...]:
        """Return what is notable about all channels, in sentences."""
        told = (
            (
                self.broken,
                "NaN, Inf, or values whose squares overflow",
                "Such a channel becomes NaN.",
            ),
            (self.constant, "one value only", "A constant channel becomes 0."),
            (
                self.far,
                f"a mean of {FAR:.0f} standard deviations or more",
                "Formulas that subtract squares lose digits there; nbnorm does not.",
            ),
            (
                self.shrunk,
                f"a variance that is not large beside eps ({EPS:g})",
                "The standard deviation of y stays below 1; scale x first, or use a smaller eps.",
            ),
        )
        sentences = [
            f"{self._who(which)} {what}. {then}" for which, what, then in told if which.any()
        ]
        spread = self._spread()
        if spread:
            sentences.append(spread)
        if not sentences:
            sentences.append(
                "Nothing stands out: no NaN, Inf or constant channel, and similar scales."
            )
        return tuple(sentences)

    def _who(self, which: NDArray) -> str:
        found = np.flatnonzero(which)
        labels = ", ".join(self.data.label(c) for c in found[:NAMED])
        more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        verb = "has" if len(found) == 1 else "have"
        return f"{len(found):,} of {which.size:,} channels ({labels}{more}) {verb}"

    def _spread(self) -> str | None:
        """Return a sentence about scales that differ, None if they do not or none is left."""
        found = np.flatnonzero(self._ordinary)
        if not found.size:
            return None
        least, most = (int(found[pick(self.std[found])]) for pick in _ENDS)
        if self.std[most] < FAR * self.std[least]:
            return None
        return (
            f"Scales differ: the standard deviation ranges from {self.std[least]:.4g} "
            f"(channel {self.data.label(least)}) to {self.std[most]:.4g} "
            f"(channel {self.data.label(most)}), {self.std[most] / self.std[least]:.3g} times."
        )


_ENDS: tuple[Callable[[NDArray], np.intp], ...] = (np.argmin, np.argmax)
