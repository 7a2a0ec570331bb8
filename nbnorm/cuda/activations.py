"""Activations in CUDA kernels, built from the same table as the CPU's.

Each activation has kernels of its own, with its parameters as constants.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numba import cuda
from numba.cuda import types

from nbnorm.activations import TAIL, Activation, Inverse, Math
from nbnorm.cuda.jit import device
from nbnorm.cuda.values import masked, normalised, rectified


def polynomial(coefficients: tuple[float, ...], real: Any) -> Any:
    """Return a polynomial, by Horner's rule: a function within a function for each coefficient."""
    *lower, highest = map(real, coefficients)

    @device
    def total(t):
        return highest

    for coefficient in reversed(lower):
        total = _with(coefficient, total)
    return total


def _with(coefficient: Any, higher: Any) -> Any:
    """Return the function higher(t) t + coefficient."""

    @device
    def total(t):
        return cuda.fma(higher(t), t, coefficient)

    return total


@lru_cache(maxsize=2)
def math_of(real: Any) -> Math:
    """Return functions of one dtype; CUDA's library errs by 2 units in the last place at most.

    `tail` is the CPU's: CUDA's erfc has two branches, so a loop over it would not be unrolled, and
    its arrays would be in local memory.
    """
    half, one = real(0.5), real(1)
    middle, r = TAIL["float32" if real == types.float32 else "float64"]
    middle, slope, rest_of = real(middle), real(1.25), polynomial(r, real)

    @device
    def multiply_add(a, b, c):
        return cuda.fma(a, b, c)

    @device
    def decay(a):
        return real(math.exp(-a))

    @device
    def tanh(v):
        return real(math.tanh(v))

    @device
    def bell(a):
        square = a * a
        rest = cuda.fma(a, a, -square)
        return real(math.exp(-half * square)) * cuda.fma(-half, rest, one)

    @device
    def tail(a):
        t = (a - middle) / (a + middle)
        return bell(a) * (rest_of(t) / cuda.fma(slope, a, one))

    return Math(real, multiply_add, decay, tanh, bell, tail, device)


@device
def unchanged(value):
    """The value itself."""
    return value


def activation_functions(activation: Activation | None, real: Any) -> tuple[Any, Any, Any]:
    """Return `activate` (v to y), `through` (dy to g) and `taken` (of what is loaded as x).

    Without activation these are `rectified`, `masked` and `unchanged`.
    """
    if activation is None:
        return rectified, masked, unchanged
    functions = (getattr(f, "py_func", f) for f in activation.on(math_of(real)))
    value, derivative = map(device, functions)

    @device
    def activate(v, floor):
        """act(v); `floor` is not read."""
        return real(value(v))

    @device
    def through(g, x, y, hi, u, a, b, mask, threshold, zero):
        """dy act'(v), v recomputed from x (mask = 1), or from x and the residual y (mask = 2)."""
        v = normalised(x, hi, u, a, b)
        if mask == 2:
            v += y
        return g * real(derivative(v))

    if not isinstance(activation, Inverse):
        return activate, through, unchanged

    @device
    def taken(y):
        """v from y, which stands in for x."""
        return real(value(y))

    @device
    def through_of(g, v, y, hi, u, a, b, mask, threshold, zero):
        """dy act'(v)."""
        return g * real(derivative(v))

    return activate, through_of, taken
