"""Activations: one table of functions of one value and their derivatives.

The kernels of both backends and the reference are built from the table, each with its own exp(-a),
tanh and normal distribution (`Math`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

Scalar = Any
Function = Callable[..., Any]


class Math(NamedTuple):
    """Primitives from which the functions of the table are built, for one dtype and one target.

    `real` converts a constant, `multiply_add(a, b, c)` is a b + c, `decay(a)` is exp(-a) for
    a >= 0, `bell(a)` is exp(-a^2 / 2), `tail(a)` is the probability that a standard normal variable
    exceeds a, from 0 to 40, and `compiled` compiles a function for the target.
    """

    real: Callable[[float], Scalar]
    multiply_add: Function
    decay: Function
    tanh: Function
    bell: Function
    tail: Function
    compiled: Callable[[Function], Function]


class Pair(NamedTuple):
    """A function of v, the value before the activation, and its derivative."""

    value: Function
    derivative: Function


def _leaky_relu(m: Math) -> Pair:
    """max(v, 0) + slope min(v, 0)."""
    zero, one = m.real(0), m.real(1)

    def value(v: Scalar, slope: Scalar) -> Scalar:
        return v * slope if v <= zero else v

    def derivative(v: Scalar, slope: Scalar) -> Scalar:
        return one if v > zero else slope

    return Pair(value, derivative)


def _leaky_relu_inverse(m: Math) -> Function:
    """Return v of y = leaky_relu(v), for a slope > 0: y has the sign of v."""
    zero = m.real(0)

    def before(y: Scalar, slope: Scalar) -> Scalar:
        return y / slope if y <= zero else y

    return before


def _relu6(m: Math) -> Pair:
    """min(max(v, 0), 6)."""
    zero, one, six = m.real(0), m.real(1), m.real(6)

    def value(v: Scalar) -> Scalar:
        v = zero if v <= zero else v
        return six if v >= six else v

    def derivative(v: Scalar) -> Scalar:
        return one if (v > zero) & (v < six) else zero

    return Pair(value, derivative)


def _hardswish(m: Math) -> Pair:
    """v min(max(v + 3, 0), 6) / 6 (Howard et al. 2019)."""
    zero, half, one, three, six = (m.real(c) for c in (0, 0.5, 1, 3, 6))
    third, sixth = m.real(1 / 3), m.real(1 / 6)

    def value(v: Scalar) -> Scalar:
        u = v + three
        gate = zero if u <= zero else u
        gate = six if gate >= six else gate
        below = zero if u <= zero else v  # no Inf times 0
        return below * (gate * sixth)

    def derivative(v: Scalar) -> Scalar:
        d = v * third + half
        d = zero if v <= -three else d
        return one if v >= three else d

    return Pair(value, derivative)


def _sigmoid(m: Math) -> Pair:
    """1 / (1 + exp(-v)), from e = exp(-|v|), which does not overflow."""
    zero, one, decay = m.real(0), m.real(1), m.decay

    def value(v: Scalar) -> Scalar:
        e = decay(abs(v))
        return (e if v < zero else one) / (one + e)

    def derivative(v: Scalar) -> Scalar:
        e = decay(abs(v))
        return e / ((one + e) * (one + e))

    return Pair(value, derivative)


def _tanh(m: Math) -> Pair:
    """tanh(v), and 1 - tanh(v)^2 without cancellation."""
    one, two, four, decay, tanh = m.real(1), m.real(2), m.real(4), m.decay, m.tanh

    def value(v: Scalar) -> Scalar:
        return tanh(v)

    def derivative(v: Scalar) -> Scalar:
        e = decay(two * abs(v))
        return four * e / ((one + e) * (one + e))

    return Pair(value, derivative)


def _silu(m: Math) -> Pair:
    """v sigmoid(v), or swish (Elfwing, Uchibe & Doya 2018)."""
    value_of, derivative_of = map(m.compiled, _sigmoid(m))
    far = m.real(800)

    def value(v: Scalar) -> Scalar:
        return (-far if v < -far else v) * value_of(v)  # no Inf times 0

    def derivative(v: Scalar) -> Scalar:
        w = far if v > far else (-far if v < -far else v)
        return value_of(w) + w * derivative_of(w)

    return Pair(value, derivative)


def _gelu(m: Math) -> Pair:
    """v P(Z <= v) for a standard normal Z (Hendrycks & Gimpel 2016)."""
    zero, one, far = m.real(0), m.real(1), m.real(40)
    density, bell, tail = m.real(1 / np.sqrt(2 * np.pi)), m.bell, m.tail

    def size(v: Scalar) -> Scalar:
        a = abs(v)
        return far if a > far else a

    size = m.compiled(size)

    def probability(v: Scalar) -> Scalar:
        above = tail(size(v))
        return above if v < zero else one - above

    probability = m.compiled(probability)

    def value(v: Scalar) -> Scalar:
        return (-far if v < -far else v) * probability(v)  # no Inf times 0

    def derivative(v: Scalar) -> Scalar:
        a = size(v)
        w = -a if v < zero else a
        return probability(v) + w * (density * bell(a))  # shares its exp with the tail

    return Pair(value, derivative)


def _gelu_tanh(m: Math) -> Pair:
    """v (1 + tanh(u / 2)) / 2 = v sigmoid(u) with u = sqrt(8 / pi) (v + 0.044715 v^3)."""
    value_of, derivative_of = map(m.compiled, _sigmoid(m))
    far, root = m.real(40), np.sqrt(8 / np.pi)
    scale, cubic, cubic3 = m.real(root), m.real(root * 0.044715), m.real(3 * root * 0.044715)
    multiply_add = m.multiply_add

    def value(v: Scalar) -> Scalar:
        w = far if v > far else (-far if v < -far else v)
        return (w if v < w else v) * value_of(w * multiply_add(cubic, w * w, scale))

    def derivative(v: Scalar) -> Scalar:
        w = far if v > far else (-far if v < -far else v)
        u = w * multiply_add(cubic, w * w, scale)
        return value_of(u) + w * multiply_add(cubic3, w * w, scale) * derivative_of(u)

    return Pair(value, derivative)


class Definition(NamedTuple):
    """A row of the table: `of` builds the functions; `parameters` are names and defaults.

    `inverse`, if any, builds the function that returns v from y.
    """

    of: Callable[[Math], Pair]
    parameters: dict[str, float]
    inverse: Callable[[Math], Function] | None = None

    def inverted(self, math: Math) -> Pair:
        """Return the functions of an `Inverse`: v from y, and the derivative at that v."""
        assert self.inverse is not None
        return Pair(self.inverse(math), self.of(math).derivative)


# ReLU has no row: in kernels it is a lower bound of y, and its derivative a mask.

# middle and r of the upper tail of the normal distribution, exp(-a^2 / 2) r(t) / (1 + 1.25 a) with
# t = (a - middle) / (a + middle). The polynomials interpolate at the Chebyshev nodes, computed
# with 40 digits; lowest coefficient first.
TAIL = {
    "float32": (
        3.5,
        (0.5716052008, -0.07535580425, -0.03048027466, 0.06296985745, -0.04258637033,
         0.01336183563, 0.0006734500783, -0.0018650007, 0.0001523933259, 0.0002559495443,
         -2.774279217e-5, -2.791354151e-5, 2.268827809e-6),
    ),
    "float64": (
        5.0,
        (0.557664961068795646, -0.0785759634765081645, 0.00977075756095271807,
         0.032723909797554296, -0.0449651417788754292, 0.0365246791769622632,
         -0.0212108618917760721, 0.00874721191758869455, -0.00214997810553825656,
         -0.0000238296634216931527, 0.000243024497326302196, -0.0000672500544351151836,
         -0.0000140310286786287342, 0.0000116431164702879189, 8.0362239709403769e-8,
         -1.69693129015937474e-6, 1.41322561819503152e-7, 2.57779632690586752e-7,
         -3.08880475270242815e-8, -4.2720638813177341e-8, 4.57975362889795204e-9,
         7.28715736886612332e-9, -4.73119998380536542e-10, -1.07067691558379395e-9,
         2.53015116649280576e-11, 9.25006840171799923e-11),
    ),
}  # fmt: skip


TABLE = {
    "leaky_relu": Definition(_leaky_relu, {"slope": 0.01}, _leaky_relu_inverse),
    "relu6": Definition(_relu6, {}),
    "hardswish": Definition(_hardswish, {}),
    "silu": Definition(_silu, {}),
    "gelu": Definition(_gelu, {}),
    "gelu_tanh": Definition(_gelu_tanh, {}),
    "sigmoid": Definition(_sigmoid, {}),
    "tanh": Definition(_tanh, {}),
}
NAMES = ("relu", *TABLE)


class Activation:
    """A function that batch normalization applies last, made by `activation`.

    Attributes
    ----------
    name : str
        Name in the table, or of the user's function.
    parameters : tuple of float
        For example the slope of leaky_relu.
    functions : Pair or None
        The user's functions; None for a function of the table.
    """

    __slots__ = ("functions", "name", "parameters")

    def __init__(
        self, name: str, parameters: tuple[float, ...] = (), functions: Pair | None = None
    ) -> None:
        self.name, self.parameters, self.functions = name, parameters, functions

    def __repr__(self) -> str:
        of_table = self.functions is None and self.name in TABLE
        names = TABLE[self.name].parameters if of_table else ()
        given = (f"{name}={value:g}" for name, value in zip(names, self.parameters, strict=True))
        return f"activation({', '.join([repr(self.name), *given])})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Activation):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return type(self), self.name, self.parameters, self.functions

    def _made(self, math: Math) -> Pair:
        """Return the functions of the table, with parameters."""
        return TABLE[self.name].of(math)

    def on(self, math: Math) -> Pair:
        """Return the functions of v alone, for one target."""
        if self.functions is not None:
            return self.functions
        value, derivative = self._made(math)
        given = tuple(map(math.real, self.parameters))
        if not given:
            return Pair(value, derivative)
        value, derivative = math.compiled(value), math.compiled(derivative)
        return Pair(lambda v: value(v, *given), lambda v: derivative(v, *given))


class Inverse(Activation):
    """Activation for a backward pass that reads y in place of x: `value` returns v from y.

    `derivative` is that of the activation, at this v.
    """

    __slots__ = ()

    def _made(self, math: Math) -> Pair:
        return TABLE[self.name].inverted(math)


def inverse_of(activation: Activation) -> Inverse | None:
    """Return the inverse of an activation, or None if it has none."""
    if activation.functions is not None or activation.name not in TABLE:
        return None
    if TABLE[activation.name].inverse is None or not all(p > 0 for p in activation.parameters):
        return None
    return Inverse(activation.name, activation.parameters)


RELU = Activation("relu")

# What backends take: no activation, ReLU, or one of the table or of the user.
Fused = Activation | Literal["relu"] | None


def with_own_kernels(activation: Fused) -> Activation | None:
    """Return the activation if it needs kernels of its own; None for none and for ReLU."""
    return activation if isinstance(activation, Activation) else None


def activation(
    value: str | Callable[[Any], Any],
    derivative: Callable[[Any], Any] | None = None,
    **parameters: float,
) -> Activation:
    """Return an activation to pass as ``activation=``: one by name, or of your own functions.

    Parameters
    ----------
    value : str or function
        "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu" (exact), "gelu_tanh", "sigmoid"
        or "tanh"; or a function of one number v, the value before the activation, compiled by
        `numba.njit`.
    derivative : function, optional
        The derivative of your function, compiled too. Kernels call both with v in the dtype that
        they compute in, float32 or float64.
    **parameters : float
        Of an activation by name: `slope` of "leaky_relu", default 0.01.

    Returns
    -------
    Activation
        Activations with the same name and parameters, or the same functions, compare equal.

    Raises
    ------
    TypeError
        A function is not compiled by `numba.njit`; a parameter is unknown or not a number.
    ValueError
        The name is unknown; a parameter is not finite.

    Notes
    -----
    v is gamma (x - mean) rstd + beta [+ residual]. The backward pass computes it again from x, so
    nothing but x is stored. With functions of your own, kernels are compiled in each process: only
    those of the table are kept on disk. They run fastest if they consist of arithmetic and
    ``a if c else b`` on `numpy.float32` constants, which LLVM vectorises.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.activation("leaky_relu", slope=0.2)
    activation('leaky_relu', slope=0.2)
    """
    if isinstance(value, str):
        if derivative is not None:
            raise TypeError(f"derivative is only for functions of your own, got value={value!r}")
        if value not in NAMES:
            raise ValueError(f"activation must be one of {', '.join(NAMES)}, got {value!r}")
        known = {} if value == "relu" else TABLE[value].parameters
        for name, number in parameters.items():
            if name not in known:
                raise TypeError(f"activation {value!r} has no parameter {name!r}")
            if isinstance(number, bool) or not isinstance(number, (int, float, np.number)):
                raise TypeError(f"{name} must be a real number, got {number!r}")
            if not np.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number}")
        return Activation(value, tuple(float(parameters.get(n, known[n])) for n in known))
    for name, function in (("value", value), ("derivative", derivative)):
        if not hasattr(function, "py_func"):
            raise TypeError(f"{name} must be a function compiled by numba.njit, got {function!r}")
    if parameters:
        raise TypeError(f"functions of your own have no parameters, got {', '.join(parameters)}")
    return Activation(value.py_func.__name__, (), Pair(value, derivative))  # type: ignore[attr-defined, arg-type]
