"""What the page shows: statistics of all values, and histograms of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod, ulp
from typing import Any

import numpy as np

from nbnorm._demo.data import Data
from nbnorm._demo.findings import EPS, Findings
from nbnorm._demo.times import Timing, batch, time
from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_inference
from nbnorm.population import population_stats

LISTED = 1000  # channels in the table
SAMPLED = 1 << 22  # values in histograms, about
BINS = 32
REACH = 4.0  # standard deviations on either side of 0 in histograms of floating y
NARROW = 1e-300  # distances below this are not drawn: a scale for them would overflow


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges at equal distances from low to high."""

    counts: NDArray
    low: float
    high: float


@dataclass(frozen=True)
class Channel:
    """Statistics of all values of a channel; histograms of its sample, if that has numbers."""

    index: int
    label: str
    mean: float
    std: float
    std_after: float
    flags: tuple[str, ...]
    before: Histogram | None
    after: Histogram | None


@dataclass(frozen=True)
class Report:
    """All that is on the page."""

    data: Data
    number: int  # of channels, listed or not
    count: int  # values per channel
    sampled: int  # of these in the histograms
    channels: tuple[Channel, ...]  # those listed, the most notable first
    summary: tuple[str, ...]
    timed: str  # what was timed
    timings: tuple[Timing, ...]  # the copy first


def report_of(data: Data) -> Report:
    """Return the statistics, histograms and times of `data`."""
    moments = population_stats((item() for item in data.items), axis=data.axes)
    found = Findings(data, moments)
    listed = found.order()[:LISTED]
    found.count_bad(listed)
    with np.errstate(all="ignore"):
        var = moments.var()
        given = moments.mean, np.where(np.isfinite(var), var, np.nan)  # as in training
    before, after = [], []
    for x in _sample(data):
        y = batch_norm_inference(x, None, None, *given, eps=EPS, axis=data.axes)
        before.append(_by_channel(x, data.axes)[listed])
        after.append(_by_channel(y, data.axes)[listed])
    sampled = np.concatenate(before, axis=1), np.concatenate(after, axis=1)
    channels = []
    for i, c in enumerate(listed):
        mean, std = float(found.mean[c]), float(found.std[c])
        histograms = _histograms(sampled[0][i], sampled[1][i], mean, std)
        channels.append(
            Channel(
                c, data.label(c), mean, std, float(found.std_after[c]), found.flags(c),
                *histograms,
            )
        )  # fmt: skip
    x, timed = batch(data)
    return Report(
        data,
        prod(data.channels),
        int(moments.count),
        sampled[0].shape[1],
        tuple(channels),
        found.summary(),
        timed,
        time(x, data.axes),
    )


def ends_of(low: float, high: float) -> tuple[float, float]:
    """Return low and high, moved apart if they are too close to draw."""
    if high - low >= NARROW:
        return low, high
    half, most = max(0.5, ulp(low)), float(np.finfo(np.float64).max)
    return max(low - half, -most), min(high + half, most)


def _sample(data: Data) -> list[NDArray]:
    """Return parts of the arrays, evenly spaced, of about SAMPLED values together."""
    step = ceil(len(data.items) / 64)
    chosen = data.items[::step]
    return [_thinned(item(), data.axes, SAMPLED // len(chosen)) for item in chosen]


def _thinned(array: Any, axes: tuple[int, ...], most: int) -> NDArray:
    """Return at most `most` values, or one per channel, evenly spaced.

    The outermost axes in memory are thinned first, so that a memory map reads whole stretches.
    """
    size, index = prod(array.shape), [slice(None)] * len(array.shape)
    strides = getattr(array, "strides", None) or range(len(array.shape), 0, -1)
    for a in sorted(set(range(len(index))) - set(axes), key=lambda a: -abs(strides[a])):
        step = min(ceil(size / max(most, 1)), array.shape[a])
        index[a] = slice(None, None, step)
        size = size // array.shape[a] * ceil(array.shape[a] / step)
    return np.array(array[tuple(index)])


def _by_channel(array: NDArray, axes: tuple[int, ...]) -> NDArray:
    """Return an array's values in two axes, channels and what is reduced."""
    moved = np.moveaxis(array, axes, range(len(axes)))
    return moved.reshape(prod(moved.shape[: len(axes)]), -1)


def _histograms(
    x: NDArray, y: NDArray, mean: float, std: float
) -> tuple[Histogram | None, Histogram | None]:
    """Return the histograms of x and y, None where there is no number."""
    finite = x[np.isfinite(x)].astype(np.float64) if x.dtype.kind == "f" else x
    if not finite.size:
        return None, None
    low, high, bins = float(finite.min()), float(finite.max()), BINS
    if x.dtype.kind in "iu":  # a bin has as many integers as any other, so that there are no gaps
        width = ceil((high - low + 1) / BINS)
        bins = ceil((high - low + 1) / width)
        low, high = low - 0.5, low - 0.5 + width * bins
    else:
        low, high = ends_of(low, high)
    before = Histogram(_counts(finite, low, high, bins), low, high)
    if not np.isfinite(y).all():
        return before, None
    if x.dtype.kind in "iu":
        rstd = 1 / np.sqrt(std * std + EPS)
        low, high = (low - mean) * rstd, (high - mean) * rstd
    else:
        low, high, bins = -REACH, REACH, BINS
    return before, Histogram(_counts(y.astype(np.float64), low, high, bins), low, high)


def _counts(values: NDArray, low: float, high: float, bins: int) -> NDArray:
    """Return how many values are in each bin; those beyond the ends are in the outermost."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.nan_to_num((values - low) * (bins / (high - low)))
    return np.bincount(np.clip(scaled, 0, bins - 1).astype(np.intp), minlength=bins)
