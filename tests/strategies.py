"""Hypothesis strategies that draw a small recipe; arrays are generated from its seed.

Drawing elements one by one is slow and shrinks poorly; a recipe prints as one line, and rebuilding
it gives the same arrays.
"""

from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from tolerances import axes_of, channels_of, reduced_axes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ("float32", "float64", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
drawn = list(DTYPES)  # `pytest` alone leaves halves out

# 1, primes, and lengths at and next to those of vectors (4 to 32) and tiles (128 to 4096).
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 255, 256, 257)
LENGTHS += (1021, 1023, 1025, 2047, 2048, 2049, 4095, 4096, 4097)

OFFSETS = (0.0, 1.0, 1e2, 1e4, 1e6)
SCALES = (1.0, 1e-30, 1e-25, 1e25, 1e30)
KINDS = ("normal", "constant channels", "outlier first", "drift", "zero tiles", "mixed scales")

DENSE_LAYOUTS = ("C", "channels last", "Fortran", "read-only", "unaligned", "off a cache line")
STRIDED_LAYOUTS = ("reversed", "reversed rows", "every second", "every second row", "padded rows")
LAYOUTS = DENSE_LAYOUTS + STRIDED_LAYOUTS


def dtype_of(name):
    """Return a dtype by name; NumPy alone does not know bfloat16."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def lay_out(values, layout):
    """Return the same values in another memory layout."""
    if layout == "C":
        return np.array(values, order="C")
    if layout == "Fortran":
        return np.array(values, order="F")
    if layout == "channels last":
        return np.moveaxis(np.array(np.moveaxis(values, 1, -1), order="C"), -1, 1)
    if layout == "read-only":
        out = np.array(values, order="C")
        out.flags.writeable = False
        return out
    if layout in ("unaligned", "off a cache line"):
        start = 1 if layout == "unaligned" else values.itemsize
        memory = np.empty(values.nbytes + start, np.uint8)
        out = memory[start:].view(values.dtype).reshape(values.shape)
    elif layout == "reversed":
        out = np.empty_like(values, order="C")[(slice(None, None, -1),) * values.ndim]
    elif layout == "reversed rows":
        out = np.empty_like(values, order="C")[..., ::-1]
    elif layout == "every second":
        out = np.empty((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)[..., 1::2]
    elif layout == "every second row":
        out = np.empty((2 * values.shape[0], *values.shape[1:]), values.dtype)[::2]
    elif layout == "padded rows":
        wide = np.empty((*values.shape[:-1], values.shape[-1] + 3), values.dtype)
        out = wide[..., : values.shape[-1]]
    else:
        raise ValueError(layout)
    out[...] = values
    return out


@dataclass(frozen=True)
class Recipe:
    """All parameters that the arrays of an example depend on."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    dtype: str = "float32"
    layout: str = "C"
    kind: str = "normal"
    offset: float = 0.0
    scale: float = 1.0
    gamma_dtype: str | None = "float32"
    beta_dtype: str | None = "float32"
    eps: float = 1e-5
    seed: int = 0

    @property
    def with_extras(self):
        """Return whether to test residuals and masks: each needs another kernel per dtype."""
        return self.dtype == "float32"

    @property
    def channels(self):
        """Return the shape of parameters and statistics."""
        return channels_of(self.shape, self.axis)

    @property
    def count(self):
        """Return the number of values per channel."""
        return prod(self.shape[a] for a in reduced_axes(len(self.shape), self.axis))

    def _rng(self, stream):
        return np.random.default_rng([self.seed, stream])

    def _parameter(self, dtype, stream, values):
        if dtype is None:
            return None
        return np.asarray(values(self._rng(stream))).astype(dtype_of(dtype))

    def gamma(self):
        """Return nonzero factors of both signs around 1."""
        return self._parameter(
            self.gamma_dtype,
            1,
            lambda rng: rng.choice([-1, 1], self.channels) * rng.uniform(0.25, 2, self.channels),
        )

    def beta(self):
        """Return shifts."""
        return self._parameter(self.beta_dtype, 2, lambda rng: rng.normal(size=self.channels))

    def running(self, dtype="float32"):
        """Return a running mean and a running variance."""
        rng = self._rng(3)
        mean, var = rng.normal(size=self.channels), rng.uniform(0.5, 2, self.channels)
        return np.asarray(mean).astype(dtype_of(dtype)), np.asarray(var).astype(dtype_of(dtype))

    def x(self):
        """Return the input."""
        rng = self._rng(0)
        over = reduced_axes(len(self.shape), self.axis)
        kept = axes_of(len(self.shape), self.axis)
        per_channel = [n if a in kept else 1 for a, n in enumerate(self.shape)]
        offset = self.offset * rng.choice([-1, 1], per_channel)
        values = rng.normal(size=self.shape)
        first = tuple(slice(None) if a in kept else slice(0, 1) for a in range(len(self.shape)))
        along = [n if a == over[0] else 1 for a, n in enumerate(self.shape)]
        if self.kind == "constant channels":
            constant = rng.random(per_channel) < 0.5
            values = np.where(constant, rng.normal(size=per_channel), values)
        elif self.kind == "outlier first":
            values[first] += rng.choice([1e3, 1e4] if self.dtype == "float16" else [1e3, 1e4, 1e6])
        elif self.kind == "drift":
            values += np.linspace(0, 5, self.shape[over[0]]).reshape(along)
        elif self.kind == "zero tiles":
            values *= (np.arange(self.shape[over[0]]) >= self.shape[over[0]] // 2).reshape(along)
        values = (values + offset) * self.scale
        if self.kind == "mixed scales":
            values *= 10.0 ** -rng.integers(0, 4, per_channel)
        return lay_out(values.astype(dtype_of(self.dtype)), self.layout)

    def like_x(self, stream, layout="C"):
        """Return standard normal values of x's shape and dtype: a dy or a residual."""
        if layout == "broadcast":  # stride 0 along the last axis, as in the gradient of a sum
            column = (
                self._rng(stream).normal(size=(*self.shape[:-1], 1)).astype(dtype_of(self.dtype))
            )
            return np.broadcast_to(column, self.shape)
        values = self._rng(stream).normal(size=self.shape)
        return lay_out(values.astype(dtype_of(self.dtype)), layout)


@st.composite
def shapes_and_axes(draw, *, most=100_000, least_count=2):
    """Draw a shape of 2 to 5 axes and its channel axis or axes, with enough values per channel."""
    ndim = draw(st.integers(2, 5))
    kept = draw(
        st.one_of(
            st.just((1,)),
            st.just((ndim - 1,)),
            st.sets(st.integers(0, ndim - 1), min_size=1, max_size=ndim - 1).map(sorted),
        )
    )
    shape = [1] * ndim
    budget = most
    for a in draw(st.permutations(range(ndim))):
        shape[a] = draw(st.sampled_from([n for n in LENGTHS if n <= budget]))
        budget //= shape[a]
    over = [a for a in range(ndim) if a not in kept]
    if prod(shape[a] for a in over) < least_count:
        shape[over[0]] = least_count
    axis = tuple(a - ndim if draw(st.booleans()) else a for a in kept)
    if len(axis) == 1 and draw(st.booleans()):
        return tuple(shape), axis[0]
    return tuple(shape), tuple(draw(st.permutations(axis)))


@st.composite
def empty_shapes_and_axes(draw):
    """Draw a shape with no samples, no channels or no positions."""
    ndim = draw(st.integers(2, 4))
    axis = draw(st.integers(0, ndim - 1))
    shape = [draw(st.sampled_from((1, 3, 8))) for _ in range(ndim)]
    for a in draw(st.sets(st.integers(0, ndim - 1), min_size=1)):
        shape[a] = 0
    return tuple(shape), axis


@st.composite
def recipes(draw, *, layouts=LAYOUTS, most=100_000, least_count=2, dtypes=drawn):
    """Draw a recipe whose values all fit into the storage dtype."""
    shape, axis = draw(shapes_and_axes(most=most, least_count=least_count))
    kind = draw(st.sampled_from(KINDS))
    # A constant channel has zero standard deviation; other tests cover eps = 0.
    eps = draw(st.sampled_from((1e-5, 1e-3) if kind == "constant channels" else (1e-5, 1e-3, 0.0)))
    dtype = draw(st.sampled_from(dtypes))
    # With a larger offset, the values of a half-precision type hardly differ.
    offset = draw(st.sampled_from(OFFSETS[:3] if dtype in HALVES else OFFSETS))
    scale = draw(st.sampled_from(SCALES[:1] if dtype == "float16" else SCALES))
    parameters = st.sampled_from((None, *drawn))
    return Recipe(
        shape=shape,
        axis=axis,
        dtype=dtype,
        layout=draw(st.sampled_from(layouts)),
        kind=kind,
        offset=offset,
        scale=scale,
        gamma_dtype=draw(parameters),
        beta_dtype=draw(parameters),
        eps=eps,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def other_layouts():
    """Draw the layout of dy or a residual: any of x's, or broadcast."""
    return st.sampled_from((*LAYOUTS, "broadcast"))


def writable_layouts():
    """Draw the layout of an output."""
    return st.sampled_from([layout for layout in LAYOUTS if layout != "read-only"])
