"""All argument checks of the public functions. Messages give the actual and expected values."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from nbnorm._typing import Array, Axis, NDArray
from nbnorm.activations import NAMES, RELU, TABLE, Activation, Fused
from nbnorm.activations import activation as named

Shape = tuple[int, ...]


def axes(axis: Any) -> Shape:
    """Return the channel axes as a tuple of ints, in the given order."""
    try:
        return tuple(map(operator.index, axis if isinstance(axis, tuple) else (axis,)))
    except TypeError:
        raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}") from None


def channel_axes(shape: Shape, given: Shape, name: str = "x") -> tuple[Shape, Shape, int]:
    """Return sorted nonnegative channel axes, their shape, and the number of values per channel."""
    ndim = len(shape)
    axis = given[0] if len(given) == 1 else given
    if ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {shape}")
    if not all(-ndim <= i < ndim for i in given):
        raise ValueError(f"axis {axis} is out of range for {name} of shape {shape}")
    axes = sorted(i % ndim for i in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} names an axis of {name} of shape {shape} twice")
    if not axes:
        raise ValueError("axis is an empty tuple, expected at least one channel axis")
    if len(axes) == ndim:
        raise ValueError(f"axis {axis} leaves no axis of {name} of shape {shape} to reduce")
    m = prod(n for i, n in enumerate(shape) if i not in axes)
    return tuple(axes), tuple(shape[i] for i in axes), m


def channel_shape(
    array: NDArray, name: str, expected: tuple[int, ...], x: NDArray, axis: Axis
) -> None:
    """Raise if a parameter or statistic does not have the shape of the channel axes."""
    if array.shape != expected:
        message = (
            f"{name} has shape {array.shape}, expected {expected} "
            f"for x of shape {x.shape} and axis {axis}"
        )
        channels = {i % x.ndim for i in axes(axis)}
        others = tuple(i for i in range(x.ndim) if i not in channels)
        if array.shape == tuple(x.shape[i] for i in others):
            message += kept_not_reduced(axis, others)
        raise ValueError(message)


def kept_not_reduced(axis: int | Shape, others: Shape) -> str:
    """Return advice for a caller who passed the axes to reduce as `axis`."""
    instead = others[0] if len(others) == 1 else others
    return (
        f"; axis names the channel axes, which are kept: to reduce over {axis}, pass axis={instead}"
    )


def same_shape(array: NDArray, name: str, x: NDArray, of: str = "x") -> None:
    """Raise if an array does not have x's shape; `of` is the name of the argument x."""
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {x.shape}, the shape of {of}")


def same_dtype(array: NDArray, name: str, x: NDArray, of: str = "x") -> None:
    """Raise if an array does not have x's dtype; `of` is the name of the argument x."""
    if array.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {x.dtype}, the dtype of {of}")


def dtype_of_result(dtype: Any, expected: Any) -> None:
    """Raise if `dtype` differs from the result's: only integer x is converted."""
    if dtype != expected:
        raise ValueError(
            f"dtype is {dtype}, expected {expected}, the dtype of x: only integers are converted"
        )


def same_place(place: str, name: str, expected: str) -> None:
    """Raise if an array is not in the same place as x; both places are given in words."""
    if place != expected:
        raise ValueError(f"{name} is in {place}, expected {expected}, where x is")


def same_device(array: Array, name: str, x: Array) -> None:
    """Raise if an array of x's library is on another of the library's devices than x."""
    if type(array) is not type(x) or not hasattr(x, "device"):
        return
    if array.device != x.device:
        raise ValueError(f"{name} is on {array.device}, expected {x.device}, where x is")


def writable(array: NDArray, name: str, instead: str) -> None:
    """Raise if an array is read-only or its elements share memory with each other."""
    array = _mirror(array)
    if array.flags.carray:  # fast path for most arrays
        return
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only; {instead}")
    if not array.flags.forc and _shares_with_itself(array.shape, array.strides):
        raise ValueError(f"{name} is an array whose elements share memory; {instead}")


@lru_cache(maxsize=1024)
def _shares_with_itself(shape: Shape, strides: Shape) -> bool:
    """Return True if two elements share memory."""
    if 0 in shape:
        return False
    steps = sorted((abs(step), n) for step, n in zip(strides, shape, strict=True) if n > 1)
    inside = 0
    for step, n in steps:
        if step <= inside:
            break
        inside += step * (n - 1)
    else:  # each stride exceeds the extent of all smaller strides
        return False
    unit = math.gcd(*(step for step, _ in steps)) or 1
    if sum(step * (n - 1) for step, n in steps) // unit + 1 < prod(shape):
        return True  # fewer places than elements
    places = np.zeros(1, np.int64)
    for step, n in steps:
        places = np.unique(np.add.outer(places, step * np.arange(n)))
    return len(places) < prod(shape)


def mutable(given: Array, name: str, instead: str) -> None:
    """Raise if an array's library does not allow writing to its memory.

    JAX arrays are immutable, and torch tensors with the negative bit are read from a copy.
    """
    if type(given) is np.ndarray:
        return
    if type(given).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise ValueError(f"{name} is read-only; {instead}")
    if has_lazy_sign(given):
        raise ValueError(
            f"{name} is a tensor with the negative bit (is_neg()), which cannot be written to; "
            f"pass {name}.resolve_neg()"
        )


def has_lazy_sign(obj: Array) -> bool:
    """Return True for a torch tensor with the negative bit, such as conj().imag."""
    negative = getattr(obj, "is_neg", None)
    return negative is not None and bool(negative())


def running_to_update(arrays: Mapping[str, NDArray], instead: str) -> None:
    """Raise if running statistics cannot be updated in place; `arrays` has all of the call's.

    One that shares memory with them would change between the forward and the backward pass.
    """
    mean, var = arrays["running_mean"], arrays["running_var"]
    writable(mean, "running_mean", instead)
    writable(var, "running_var", instead)
    apart(mean, "running_mean", var, "running_var")
    # Fast path for arrays that own their memory, as most do. CuPy arrays always claim to.
    owned = type(mean) is np.ndarray and mean.flags.owndata and var.flags.owndata
    for name, other in arrays.items():
        if name in _RUNNING:
            continue
        if owned and other.flags.owndata and other is not mean and other is not var:
            continue
        apart(mean, "running_mean", other, name)
        apart(var, "running_var", other, name)


_RUNNING = frozenset(("running_mean", "running_var"))


def apart(written: NDArray, name: str, other: NDArray, other_name: str) -> None:
    """Raise if an array that will be written shares memory with another."""
    distinct = written is not other
    # CuPy arrays claim to own even memory imported through DLPack; a mirror never does.
    written, other = _mirror(written), _mirror(other)
    if distinct and written.flags.owndata and other.flags.owndata:
        return
    if np.may_share_memory(written, other) and _overlap(written, other):
        raise ValueError(f"{name} and {other_name} share memory, and {name} is written")


def output(
    out: NDArray, x: NDArray, dtype: Any, inputs: Iterable[tuple[str, NDArray]], inplace: str
) -> None:
    """Raise if `out` does not have x's shape and this dtype, or if it overlaps an input.

    The input named `inplace` may be `out` itself: the same memory with the same strides.
    """
    same_shape(out, "out", x)
    if out.dtype != dtype:
        of = "x" if dtype == x.dtype else "the result"
        raise ValueError(f"out has dtype {out.dtype}, expected {dtype}, the dtype of {of}")
    writable(out, "out", "pass a writable array, or omit out")
    out = _mirror(out)
    for name, array in inputs:
        other = _mirror(array)
        if not np.may_share_memory(out, other):
            continue
        if name == inplace and _same_view(out, other):
            continue
        if _overlap(out, other):
            raise ValueError(
                f"out overlaps {name} in memory but is not {name}"
                if name == inplace
                else f"out overlaps {name} in memory"
            )


def _mirror(array: NDArray) -> NDArray:
    """Return a NumPy array with `array`'s address and strides, for overlap tests; never read it."""
    return array if isinstance(array, np.ndarray) else np.asarray(_Mirror(array))


class _Mirror:
    """Address, shape and strides of an array on a GPU."""

    def __init__(self, array: NDArray) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (array.data.ptr, False),  # type: ignore[attr-defined]
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
        }


def _same_view(a: NDArray, b: NDArray) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.shape == b.shape
        and a.itemsize == b.itemsize
        and all(i == j or n <= 1 for i, j, n in zip(a.strides, b.strides, a.shape, strict=True))
    )


def _overlap(a: NDArray, b: NDArray) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=1 << 16))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:  # not settled within bounds: refuse rather than corrupt
        return True


class _NotGiven:
    """Default of an argument for which None has its own meaning."""

    def __repr__(self) -> str:
        return "<not given>"


NOT_GIVEN: Any = _NotGiven()


def given(array: Any, name: str, activation: Fused, y: Any, from_y: bool = False) -> Any:
    """Return a parameter, or None if it was omitted; raise if the gradient depends on it.

    It does if the derivative of the activation is recomputed from x, or x_hat from y.
    """
    if array is not NOT_GIVEN:
        return array
    if from_y or (activation == "relu" and y is None):
        what = "x_hat, without x," if from_y else "the mask of activation='relu'"
        instead = "x" if from_y else "y"
        raise ValueError(
            f"{name} is not given, and {what} depends on it; "
            f"pass the forward's {name}= ({name}=None if it had none), or its {instead}="
        )
    if isinstance(activation, Activation):
        raise ValueError(
            f"{name} is not given, and the derivative of {activation!r} depends on it; "
            f"pass the forward's {name}= ({name}=None if it had none)"
        )
    return None


def for_derivative(activation: Fused, y: Any, residual: Any) -> None:
    """Raise if y is given in place of residual or vice versa: only ReLU reads y."""
    if isinstance(activation, Activation) and y is not None and residual is None:
        raise ValueError(
            f"y does not give the derivative of {activation!r}; "
            "omit it, or pass the forward's residual="
        )
    if activation == "relu" and residual is not None and y is None:
        raise ValueError(
            "residual does not give the mask of activation='relu'; pass the forward's y= too"
        )


def invertible(given: Any, remedy: str = "pass x", dtype: np.dtype[Any] | None = None) -> None:
    """Raise if `given` has no inverse, so that y, of this dtype, does not determine x_hat.

    Parameters must be from 2^-b to 2^b, with b from `_bits`, or 1022 without a dtype.
    """
    found = activation(given)
    if found is None:
        return
    why = "cannot be inverted"
    if isinstance(found, Activation) and found.functions is None and TABLE[found.name].inverse:
        names = TABLE[found.name].parameters
        bits = 1022 if dtype is None else _bits(dtype)
        wrong = [
            f"{name}={value:g}"
            for name, value in zip(names, found.parameters, strict=True)
            if not 2.0**-bits <= value <= 2.0**bits
        ]
        if not wrong:
            return
        why = f"{why} with {', '.join(wrong)}"
    raise ValueError(f"activation={given!r} {why}, so y does not determine x_hat; {remedy}")


def divisor(gamma: NDArray, dtype: np.dtype[Any], rstd: NDArray | None = None) -> None:
    """Raise if x_hat = (y - beta) / gamma cannot be computed; arrays are in CPU memory.

    The magnitudes of gamma and gamma rstd must be from 2^-b to 2^b, with b from `_bits(dtype)`.
    NaN and Inf pass. Where rstd is 0, only gamma is checked.
    """
    bits = _bits(dtype)
    scale = gamma.astype(np.float64)
    _check_range(scale, "gamma", scale, bits)
    if rstd is not None:
        with np.errstate(invalid="ignore"):  # Inf times 0
            _check_range(np.where(rstd == 0, 1, scale * rstd), "rstd", rstd, bits)


def _bits(dtype: np.dtype[Any]) -> int:
    """Return b, such that factors from 2^-b to 2^b, and gamma^2 rstd, stay in range."""
    return 510 if dtype == np.float64 else 126


def _check_range(factor: NDArray, name: str, values: NDArray, bits: int) -> None:
    """Raise for the first finite factor whose magnitude is not in [2^-bits, 2^bits]."""
    size, values = np.abs(factor), np.broadcast_to(values, factor.shape)
    wrong = np.argwhere((size < 2.0**-bits) | ((size > 2.0**bits) & (size < np.inf)))
    if wrong.size:
        where = tuple(map(int, wrong[0]))
        channel = where[0] if len(where) == 1 else where
        raise ValueError(
            f"{name} is {values[where]:g} in channel {channel}, for which "
            "x_hat = (y - beta) / gamma cannot be computed from y; pass x"
        )


def not_overwritten(x: NDArray, y: NDArray) -> None:
    """Raise if x and y overlap: the forward pass has written y over x."""
    x, y = _mirror(x), _mirror(y)
    if np.may_share_memory(x, y) and _overlap(x, y):
        raise ValueError(
            "x and y share memory, so y was written over x; pass a copy of x made before, or x=None"
        )


def epsilon(eps: float) -> float:
    """Return eps as a float; raise if it is negative, NaN or infinite."""
    value = number(eps, "eps")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return value


def number(value: Any, name: str) -> float:
    """Return a real number as a float."""
    if type(value) is float:
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None


def finite(value: Any, name: str) -> float:
    """Return a real number as a float; raise if it is NaN or infinite."""
    number_ = number(value, name)
    if not -math.inf < number_ < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return number_


def integer(value: Any, name: str, kind: str = "an int") -> int:
    """Return an int or 0-d integer array as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, got {value!r}") from None


def at_least_one(value: Any, name: str) -> int:
    """Return an integer as an int; raise if it is less than 1."""
    found = integer(value, name)
    if found < 1:
        raise ValueError(f"{name} must be at least 1, got {found}")
    return found


def batches(value: Any) -> int:
    """Return num_batches_tracked, an integer or a 0-d integer array, as an int."""
    count = integer(value, "num_batches_tracked", "an integer")
    if count < 0:
        raise ValueError(f"num_batches_tracked must not be negative, got {count}")
    return count


def activation(given: Any) -> Fused:
    """Return None, "relu" or an `Activation`; raise if `given` is not known."""
    if isinstance(given, str) and given in NAMES:
        given = named(given)
    if isinstance(given, Activation):
        return "relu" if given == RELU else given
    if given is None:
        return None
    raise ValueError(
        f"activation must be None, an `nbnorm.activation` or one of {', '.join(NAMES)}, "
        f"got {given!r}"
    )


def output_mask(mask: Any) -> tuple[bool, bool, bool, bool]:
    """Return the four booleans that select the gradients; raise if there are not four."""
    if (
        not isinstance(mask, tuple | list)
        or len(mask) != 4
        or not all(isinstance(wanted, bool | np.bool_) for wanted in mask)
    ):
        raise ValueError(
            f"output_mask must be 4 booleans (dx, dgamma, dbeta, dresidual), got {mask!r}"
        )
    dx, dgamma, dbeta, dresidual = (bool(wanted) for wanted in mask)
    return dx, dgamma, dbeta, dresidual


def enough_values(m: float, correction: float, got: str, *of_what: object) -> None:
    """Raise if a batch has too few values per channel for the corrected variance.

    The error message describes the batch by `got`, formatted with `of_what`.
    """
    if 0 < m <= correction:
        raise ValueError(
            f"expected more than {correction:g} value{'s' * (correction != 1)} per channel "
            f"when training, got {got.format(*of_what)}"
        )


def running_pair(running_mean: Any, running_var: Any, training: bool) -> None:
    """Raise if only one running statistic is given, or neither with training=False."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is None; pass both running_mean and running_var, or neither")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must not be None with training=False")


def segments(groups: Any, offsets: Any, shape: Shape, first: int, name: str) -> list[int]:
    """Return the beginnings of the parts along axis `first`, and the last end."""
    length, where = shape[first], f"the length of axis {first} of {name} of shape {shape}"
    if groups is not None and offsets is not None:
        raise ValueError("groups and offsets are both given, expected one of them")
    if offsets is None:
        number = integer(groups, "groups")
        if number < 1 or length % number:
            raise ValueError(f"groups is {number}, expected a divisor of {length}, {where}")
        return list(range(0, length + 1, length // number)) if length else [0] * (number + 1)
    if offsets.dtype.kind not in "iu":
        raise TypeError(f"offsets has dtype {offsets.dtype}, expected integers")
    if offsets.ndim != 1 or offsets.size < 2:
        raise ValueError(f"offsets has shape {offsets.shape}, expected (parts + 1,)")
    ends = [int(end) for end in offsets]
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(
            f"offsets go from {ends[0]} to {ends[-1]}, expected 0 to {length}, {where}"
        )
    if any(end < begin for begin, end in pairwise(ends)):
        raise ValueError("offsets decrease, expected the beginnings of parts, in order")
    return ends


def counts(values: NDArray, expected: Shape, own: list[int]) -> list[int]:
    """Return an int per part; raise unless the channels of a part share one positive count."""
    if values.shape != expected:
        raise ValueError(f"count has shape {values.shape}, expected {expected}, or an int")
    found = []
    for row, m in zip(values.reshape(len(own), -1), own, strict=True):
        value = float(row[0]) if row.size else 1.0
        if (row != value).any() or value != int(value) or value < (m > 0):
            raise ValueError(
                f"count must be a positive integer, the same for all channels of a part, got {row}"
            )
        found.append(int(value))
    return found


def same_parts(gamma: NDArray | None, beta: NDArray | None) -> None:
    """Raise if only one of gamma and beta has a row for each part: dbeta has gamma's shape."""
    if gamma is not None and beta is not None and gamma.shape != beta.shape:
        raise ValueError(f"beta has shape {beta.shape}, expected {gamma.shape}, the shape of gamma")


def at_most_one(given: list[str]) -> None:
    """Raise if more than one of mask, lengths, weights is given."""
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, expected one of mask, lengths, weights")


def boolean(mask: NDArray) -> None:
    """Raise if a mask is not of dtype bool."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool; use weights= for numbers")


def broadcastable(array: NDArray, name: str, x: NDArray, of: str) -> None:
    """Raise if an array does not broadcast to x's shape."""
    trailing = x.shape[max(x.ndim - array.ndim, 0) :]
    fits = all(n in (1, m) for n, m in zip(array.shape, trailing, strict=False))
    if array.ndim > x.ndim or not fits:
        raise ValueError(
            f"{name} has shape {array.shape}, which does not broadcast to {of} of shape {x.shape}"
        )


def lengths(values: NDArray, axis: Any, shape: Shape, channels: list[int], name: str) -> int:
    """Check `lengths`; return the axis of x they count along."""
    if values.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {values.dtype}, expected integers")
    if values.shape != shape[:1]:
        raise ValueError(
            f"lengths has shape {values.shape}, expected {shape[:1]} for {name} of shape {shape}"
        )
    others = [i for i in range(1, len(shape)) if i not in channels]
    if axis is None:
        if not others:
            raise ValueError(f"lengths has no axis to count along in {name} of shape {shape}")
        along = others[-1]
    else:
        along = integer(axis, "length_axis")
        if not -len(shape) <= along < len(shape) or along % len(shape) not in others:
            raise ValueError(
                f"length_axis is {axis}, expected one of {others}: axes of {name} of shape {shape} "
                "that are neither the first nor channel axes"
            )
        along %= len(shape)
    wrong = np.flatnonzero((values < 0) | (values > shape[along]))
    if wrong.size:
        n = int(wrong[0])
        raise ValueError(
            f"lengths[{n}] is {values[n]}, expected 0 to {shape[along]}, "
            f"the length of axis {along} of {name}"
        )
    return along


def weights(least: float, most: float) -> None:
    """Raise unless the least and greatest weight are finite and not negative."""
    if not (least >= 0 and most < math.inf):
        worst = least if not least >= 0 else most
        raise ValueError(f"weights must be finite and not negative, got {worst:g}")


def finite_sums(totals: NDArray) -> None:
    """Raise if the sum of a channel's weights is beyond float64."""
    if (totals == np.inf).any():
        raise ValueError("weights must have a finite sum")


def weight(value: Any, m: float) -> float:
    """Return `count` as a float; raise unless it is positive (or 0 if m is 0) and finite."""
    count = number(value, "count")
    if not (count > 0 or (m == 0 and count == 0)) or count == math.inf:
        raise ValueError(f"count must be positive and finite, got {value!r}")
    return count


def weight_each(values: NDArray, own: NDArray) -> None:
    """Raise unless the count of each channel is finite, and positive where anything counts."""
    if not ((values > 0) | ((values == 0) & (own == 0))).all() or (values == np.inf).any():
        raise ValueError(f"count must be finite, and positive where values count, got {values}")


def count(value: Any, x: NDArray) -> float:
    """Return `count`, an int or float; raise if it is not positive although x is not empty."""
    try:
        m: float = operator.index(value)
    except TypeError:
        if not isinstance(value, float | np.floating) or not float(value).is_integer():
            raise TypeError(f"count must be an int, got {value!r}") from None
        m = float(value)
    if not (m > 0 or (m == 0 and x.size == 0)):
        raise ValueError(f"count must be positive for x of shape {x.shape}, got {m}")
    return m


def whole_count(value: Any, x: NDArray) -> int:
    """Return `count`, which must be an int."""
    if isinstance(value, float | np.floating):
        raise TypeError(f"count must be an int, got {value!r}")
    return int(count(value, x))


def single_count(values: NDArray, x: NDArray) -> float:
    """Return the count that all channels have; raise if they differ."""
    if values.size == 0 or (values != values.flat[0]).any():
        raise ValueError(
            f"count differs by channel, got {values}; pass mask=np.ones({(1,) * x.ndim}, bool) too"
        )
    return count(values.flat[0].item(), x)
