"""Map shape, strides and channel axes to a layout (N, C, S), with integer arithmetic only.

Axes are sorted by their order in memory, outermost first. Axes outside the channel axes become N,
the channel axes C, and axes inside them S. Kernels need the plane of each sample and channel to be
contiguous, small planes to be packed, and tiny samples to be packed as well. An array without such
a view is copied once.
"""

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

Axes = tuple[int, ...]

# Planes of at least this many values are read one by one, so channels may lie apart. For smaller
# planes whole samples are read. Summing down the samples is faster at 14 x 14, along the plane at
# 28 x 28.
PLANE = 256
# Samples with fewer values are read several at a time, so they must be adjacent.
SAMPLE = 256


class Layout(NamedTuple):
    """View of x: transposed to `order`, then reshaped to `shape` = (N, C, S).

    `natural` is True if `order` is C order. `groups` are the axes longer than 1 that form N, C and
    S. `dense` is the order of x's axes in memory, or None if x has gaps, repeats values or has
    negative strides; results are then in C order.
    """

    order: Axes
    natural: bool
    groups: tuple[Axes, Axes, Axes]
    shape: tuple[int, int, int]
    dense: Axes | None


def layout_of(shape: Axes, strides: Axes, itemsize: int, channel_axes: Axes) -> Layout:
    """Return the layout of x or, if x itself does not fit one (see `fits`), that of its copy."""
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


@lru_cache(maxsize=1024)
def layout_beginning(layout: Layout, shape: Axes, channel_axes: Axes, first: int) -> Layout:
    """Return a layout of x, or of its copy, in which the reduced axis `first` is outermost."""
    if layout.groups[0][:1] == (first,):
        return layout
    inside = tuple(i for i in range(len(shape)) if i != first and i not in channel_axes)
    order = (first, *channel_axes, *inside)
    channels, planes = (tuple(i for i in axes if shape[i] > 1) for axes in (channel_axes, inside))
    groups = (first,), channels, planes
    N, C, S = (prod(shape[i] for i in axes) for axes in groups)
    return Layout(order, order == tuple(range(len(shape))), groups, (N, C, S), layout.dense)


@lru_cache(maxsize=4096)
def fits(layout: Layout, shape: Axes, strides: Axes, itemsize: int) -> bool:
    """Return True if an array with these strides, viewed by `layout`, is what kernels need."""
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
    """Return the layout for this order; None if channel axes are not adjacent and in order."""
    long = tuple(i for i in order if shape[i] != 1)
    channels = tuple(i for i in channel_axes if shape[i] != 1)
    # A single channel has no extent in memory: split at the position of its axis.
    begin = long.index(channels[0]) if channels else sum(i < channel_axes[0] for i in long)
    end = begin + len(channels)
    if long[begin:end] != channels:
        return None
    groups = long[:begin], channels, long[end:]
    N, C, S = (prod(shape[i] for i in axes) for axes in groups)
    return Layout(order, order == tuple(range(len(shape))), groups, (N, C, S), dense)


def _merged_stride(shape: Axes, strides: Axes, axes: Axes) -> int | None:
    """Return the stride in bytes of axes merged into one; None if impossible, 0 for no axes."""
    for outer, inner in pairwise(axes):
        if strides[outer] != strides[inner] * shape[inner]:
            return None
    return strides[axes[-1]] if axes else 0


def _is_dense(shape: Axes, strides: Axes, itemsize: int, order: Axes) -> bool:
    """Return True if an array, traversed in this order of axes, fills its memory without gaps."""
    expected = itemsize
    for i in reversed(order):
        if shape[i] > 1 and strides[i] != expected:
            return False
        expected *= shape[i]
    return True
