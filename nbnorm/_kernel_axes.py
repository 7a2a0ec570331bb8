"""Axis order of a layer's weight in any framework, and whether a convolution pads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nbnorm._typing import NDArray

Padding = int | str | Sequence[Any] | NDArray


class View(NamedTuple):
    """How to see a weight as (groups, out, in, *kernel)."""

    order: tuple[int, ...]  # axes of (the side with all channels, the other's group, *kernel)
    groups: int
    inputs_whole: bool  # whether the inputs are the side with all channels

    def kernel(self, shape: tuple[int, ...]) -> list[int]:
        """Return the lengths of the kernel of a weight of this shape."""
        return [shape[axis] for axis in self.order[2:]]

    def of(self, weight: NDArray) -> NDArray:
        """Return the weight as (groups, out, in, *kernel)."""
        whole, *rest = (weight.shape[axis] for axis in self.order)
        share = whole // max(self.groups, 1)  # groups is 0 if depthwise without channels
        grouped = weight.transpose(self.order).reshape(self.groups, share, *rest)
        return grouped.swapaxes(1, 2) if self.inputs_whole else grouped

    def back(self, grouped: NDArray, shape: tuple[int, ...]) -> NDArray:
        """Undo `of`: return the weight, of this shape."""
        moved = grouped.swapaxes(1, 2) if self.inputs_whole else grouped
        moved = moved.reshape([shape[axis] for axis in self.order])
        return moved.transpose([self.order.index(axis) for axis in range(len(shape))])


def view_of(shape: tuple[int, ...], layout: str | None, groups: int, transposed: bool) -> View:
    """Check `layout` and `groups`, and return how to see a weight of a convolution."""
    order = tuple(range(len(shape)))
    depthwise = isinstance(layout, str) and "M" in layout
    if layout is not None:
        sides = "IM" if depthwise else "IO" if transposed else "OI"
        letters = set(layout) if isinstance(layout, str) else set()
        distinct = len(letters) == len(shape) and len(layout) == len(shape)
        if not distinct or not letters >= set(sides) or letters >= set("OM"):
            raise ValueError(
                f"layout is {layout!r}, expected {len(shape)} different letters for weight of "
                f"shape {shape}: 'O' and 'I' (depthwise 'I' and 'M'), and one for each axis of the "
                "kernel, such as 'OIHW', 'HWIO' or 'HWIM'"
            )
        whole, other = map(layout.index, sides)
        order = (whole, other, *(axis for axis in order if axis not in (whole, other)))
    if depthwise:
        if groups != 1 or transposed:
            raise ValueError(
                f"layout is {layout!r}, which is depthwise and excludes groups (got {groups!r}) "
                f"and transposed (got {transposed!r})"
            )
        return View(order, shape[order[0]], inputs_whole=True)
    _check_groups(groups, shape[order[0]], "in" if transposed else "out", shape)
    return View(order, groups, inputs_whole=transposed)


def is_padded(padding: Padding, kernel: list[int]) -> bool:
    """Return whether a convolution with a kernel of these lengths pads its input with zeros."""
    word = padding.lower() if isinstance(padding, str) else None
    if word in ("same", "same_upper", "same_lower", "causal"):
        return any(length > 1 for length in kernel)
    if word in ("valid", "circular", "reflect"):
        return False
    amounts = _amounts(padding)
    if not all(map(_is_amount, amounts)):
        raise ValueError(
            "padding must be nonnegative integers, 'valid', 'same' (also 'same_upper', "
            f"'same_lower'), 'causal', 'circular' or 'reflect', got {padding!r}"
        )
    return any(amount > 0 for amount in amounts)


def _amounts(padding: Any) -> list[Any]:
    """Return a flat list of nested sequences and arrays; [None] for an empty one."""
    if isinstance(padding, np.ndarray):
        padding = padding.tolist()
    if isinstance(padding, str) or not isinstance(padding, Sequence):
        return [padding]
    return [amount for each in padding for amount in _amounts(each)] or [None]


def _is_amount(padding: Any) -> bool:
    """Return whether this is a nonnegative int."""
    integer = isinstance(padding, int | np.integer) and not isinstance(padding, bool | np.bool)
    return bool(integer and padding >= 0)


def _check_groups(groups: int, channels: int, role: str, shape: tuple[int, ...]) -> None:
    """Raise if `groups` does not divide the channels that share one axis of the weight."""
    if isinstance(groups, bool | np.bool) or not isinstance(groups, int | np.integer) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if channels % groups != 0:
        raise ValueError(
            f"groups is {groups}, which does not divide the {channels} {role} channels "
            f"of weight of shape {shape}"
        )
