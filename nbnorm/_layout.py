"""Shape, strides and channel axes to one (N, C, S): integers only.

Axes are put in their order in memory, outermost first; those outside the channel axes become N,
the channel axes C, those inside S. Kernels need each sample's plane contiguous, small planes packed
and tiny samples packed too; an array that offers no such view is copied once.
"""

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

Axes = tuple[int, ...]

# Planes from this size on are read one by one, so channels may lie apart; below, whole samples
# are read. Summing down the samples is the faster way at 14 x 14, along the plane at 28 x 28.
PLANE = 256
# Samples of fewer values are read several at a time, so they must lie side by side.
SAMPLE = 256


class Layout(NamedTuple):
    """How x is seen: transposed to `order`, reshaped to `shape` = (N, C, S).

    `natural` says that `order` is C order. `groups` are the axes of more than one value that N, C
    and S are made of. `dense` is x's order in memory; None where x has gaps, repeats or runs
    backwards: results are then in C order.
    """

    order: Axes
    natural: bool
    groups: tuple[Axes, Axes, Axes]
    shape: tuple[int, int, int]
    dense: Axes | None


def layout_of(shape: Axes, strides: Axes, itemsize: int, channel_axes: Axes) -> Layout:
    """Return how x is seen. Where x itself `fits` no view, it is how x's copy will be seen."""
    natural = tuple(range(len(shape)))
    if _is_dense(shape, strides, itemsize, natural):
        memory = natural
    else:
        memory = tuple(sorted(natural, key=lambda i: -strides[i]))
    dense = memory if _is_dense(shape, strides, itemsize, memory) else None
    layout = _grouped(shape, memory, channel_axes, dense)
    if layout is not None and fits(layout, shape, strides, itemsize):
        return layout
    before = tuple(i for i in natural if i < channel_axes[0])
    after = tuple(i for i in natural if i > channel_axes[0] and i not in channel_axes)
    layout = _grouped(shape, before + channel_axes + after, channel_axes, dense)
    assert layout is not None
    return layout


@lru_cache(maxsize=4096)
def fits(layout: Layout, shape: Axes, strides: Axes, itemsize: int) -> bool:
    """Whether an array of these strides, seen by `layout`, is what the kernels need."""
    if any(stride % itemsize for stride in strides):
        return False
    merged = [_merged_stride(shape, strides, axes) for axes in layout.groups]
    n, c, s = (None if stride is None else stride // itemsize for stride in merged)
    if n is None or c is None or s is None:
        return False
    N, C, S = layout.shape
    return (
        (S == 1 or s == 1)
        and (C == 1 or c == S or (c > S and S >= PLANE))
        and (N == 1 or n == C * S or (n > 0 and C * S >= SAMPLE))
    )


def _grouped(shape: Axes, order: Axes, channel_axes: Axes, dense: Axes | None) -> Layout | None:
    """Layout of axes in this order; None where the channel axes are apart or out of order."""
    long = tuple(i for i in order if shape[i] != 1)
    channels = tuple(i for i in channel_axes if shape[i] != 1)
    # A single channel takes no room in memory: split where its axis stands.
    begin = long.index(channels[0]) if channels else sum(i < channel_axes[0] for i in long)
    end = begin + len(channels)
    if long[begin:end] != channels:
        return None
    groups = long[:begin], channels, long[end:]
    N, C, S = (prod(shape[i] for i in axes) for axes in groups)
    return Layout(order, order == tuple(range(len(shape))), groups, (N, C, S), dense)


def _merged_stride(shape: Axes, strides: Axes, axes: Axes) -> int | None:
    """Stride in bytes of these axes walked as one, None where they cannot be; 0 of no axes."""
    for outer, inner in pairwise(axes):
        if strides[outer] != strides[inner] * shape[inner]:
            return None
    return strides[axes[-1]] if axes else 0


def _is_dense(shape: Axes, strides: Axes, itemsize: int, order: Axes) -> bool:
    """Whether an array fills its memory without gaps when it is walked in this order."""
    expected = itemsize
    for i in reversed(order):
        if shape[i] > 1 and strides[i] != expected:
            return False
        expected *= shape[i]
    return True
