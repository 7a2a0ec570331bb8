"""Activations in kernels: exp(-a), tanh and the normal distribution, which LLVM vectorises.

In the loops of kernels a call of the C library would compute one value at a time. All functions are
made for float32 and float64 from one source; `Constants` holds what differs. NaN gives NaN.

A kernel gets an activation as a named tuple of its parameters, and is compiled for the tuple's
class. `value_at` and `derivative_at` find the functions by that class. An activation whose inverse
a backward pass computes has a second class.
"""

import marshal
import zlib
from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from nbnorm.activations import TABLE, TAIL, Activation, Inverse, Math, Pair
from nbnorm.cpu.disk import OF_A_USER
from nbnorm.cpu.jit import inlined, inlined_by_types


class Constants(NamedTuple):
    """Numbers of one dtype, whose bits are `integer`.

    exp(f) = 1 + f + f^2 q(f) for |f| <= log(2) / 2. middle and r are those of `TAIL`. Polynomials
    interpolate at Chebyshev nodes, computed with 40 digits; lowest coefficient first.
    """

    integer: type
    shift: float  # 1.5 * 2^mantissa: adding it rounds to an integer
    mantissa: int  # bits
    bias: int
    log2_high: float  # leading bits of log(2): small multiples are exact
    log2_low: float
    most: float  # beyond it exp(-a) would be subnormal, and is set to 0
    flat: float  # beyond it tanh is 1
    q: tuple[float, ...]
    middle: float
    r: tuple[float, ...]


CONSTANTS = {
    np.float32: Constants(
        np.int32, 1.5 * 2.0**23, 23, 127, 0.693359375, -2.12194440e-4, 87.0, 10.0,
        (0.50000000134658092, 0.166666666816232314, 0.0416664649252859054,
         0.00833331092548090083, 0.00139336499963092504, 0.000198909908246736538),
        *TAIL["float32"],
    ),
    np.float64: Constants(
        np.int64, 1.5 * 2.0**52, 52, 1023, 0.6931471803691238, 1.9082149292705877e-10,
        708.0, 22.0,
        (0.5, 0.16666666666666671, 0.0416666666666666698, 0.00833333333332613513,
         0.00138888888888837483, 0.000198412698748206253, 0.0000248015873255477412,
         2.75572554002064244e-6, 2.75572736431102953e-7, 2.51052170047207452e-8,
         2.09146869680868772e-9),
        *TAIL["float64"],
    ),
}  # fmt: skip


def _multiply_add(builder, a, b, c):
    """a b + c, rounded once where the processor can."""
    function = ir.FunctionType(a.type, [a.type] * 3)
    fused = builder.module.declare_intrinsic("llvm.fmuladd", [a.type], function)
    return builder.call(fused, [a, b, c])


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a b + c, rounded once where the processor can."""
    return a(a, b, c), lambda context, builder, signature, args: _multiply_add(builder, *args)


@intrinsic
def _reinterpreted(typing_context, value, like):
    """The bits of a value as a number of the type of `like`."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(like))

    return like(value, like), codegen


def _polynomial(coefficients, real):
    """Return a compiled polynomial, by Horner's rule, each product and sum one multiply-add."""

    @intrinsic
    def polynomial(typing_context, v):
        def codegen(context, builder, signature, args):
            kind = args[0].type
            total = kind(float(real(coefficients[-1])))
            for c in reversed(coefficients[:-1]):
                total = _multiply_add(builder, total, args[0], kind(float(real(c))))
            return total

        return v(v), codegen

    return polynomial


@cache
def math_of(real: Any) -> Math:
    """Functions of one dtype, float32 or float64."""
    k = CONSTANTS[real]
    integer, mantissa, bias = k.integer, k.integer(k.mantissa), k.integer(k.bias)
    per_log2, log2_high, log2_low = real(1 / np.log(2.0)), real(k.log2_high), real(k.log2_low)
    shift, most = real(k.shift), real(k.most)
    zero, one, two, half = real(0), real(1), real(2), real(0.5)
    shift_bits = shift.view(integer)
    q, r = _polynomial(k.q, real), _polynomial(k.r, real)
    middle, slope = real(k.middle), real(1.25)
    flat = real(k.flat)

    @inlined
    def power(n):
        """2^n for an n from 1 - bias to bias."""
        return _reinterpreted(integer((n + bias) << mantissa), one)

    @inlined
    def parts(v):
        """n and f for which v = n log(2) + f and |f| <= log(2) / 2."""
        rounded = multiply_add(v, per_log2, shift)
        n = integer(_reinterpreted(rounded, bias) - shift_bits)
        m = shift - rounded
        return n, multiply_add(m, log2_low, multiply_add(m, log2_high, v))

    @inlined
    def decay(a):
        n, f = parts(-(most if a > most else a))
        e = (one + multiply_add(f * f, q(f), f)) * power(n)
        return zero if a > most else e

    @inlined
    def tanh(v):
        a = abs(v)
        a = flat if a > flat else a
        n, f = parts(a + a)
        s = power(n)
        e = multiply_add(s, multiply_add(f * f, q(f), f), s - one)  # exp(2 a) - 1
        t = e / (e + two)
        return -t if v < zero else t

    @inlined
    def bell(a):
        square = a * a
        rest = multiply_add(a, a, -square)  # what rounding took from the square
        return decay(half * square) * multiply_add(-half, rest, one)

    @inlined
    def tail(a):
        t = (a - middle) / (a + middle)
        return bell(a) * (r(t) / multiply_add(slope, a, one))

    return Math(real, multiply_add, decay, tanh, bell, tail, inlined)


# Part of the classes' names, as the table is outside the folder whose source is part of the key of
# a kernel on disk: a kernel compiled from another table must not be loaded.
_MAKERS = [maker for row in TABLE.values() for maker in (row.of, row.inverse) if maker is not None]
_CODE = b"".join(marshal.dumps(maker.__code__) for maker in _MAKERS)
_STATE = f"{zlib.crc32(_CODE + repr(TAIL).encode()):08x}"


_NONE = ("nothing",)


def _class_of(name: str, parameters: tuple[str, ...]) -> Any:
    """Return a named tuple; Numba cannot take an empty one."""
    return namedtuple(name, parameters or _NONE, module=__name__)  # noqa: PYI024


CLASSES = {
    name: _class_of(f"{name}_{_STATE}", tuple(row.parameters)) for name, row in TABLE.items()
}
INVERSES = {
    name: _class_of(f"{name}_inverse_{_STATE}", tuple(row.parameters))
    for name, row in TABLE.items()
    if row.inverse is not None
}
_MADE = {of: TABLE[name].of for name, of in CLASSES.items()}
_MADE |= {of: TABLE[name].inverted for name, of in INVERSES.items()}
globals().update((of.__name__, of) for of in _MADE)  # for kernels that are loaded from disk

_of_users: dict[Any, Pair] = {}


@cache
def _class_for(functions: Pair) -> Any:
    found = _class_of(f"activation_{OF_A_USER}_{len(_of_users)}", ())
    _of_users[found] = functions
    return found


def argument(activation: Activation) -> Any:
    """Return what kernels take for an activation of the table or of the user."""
    if activation.functions is not None:
        return _class_for(activation.functions)(0.0)
    classes = INVERSES if isinstance(activation, Inverse) else CLASSES
    return classes[activation.name](*activation.parameters or (0.0,))


@cache
def _functions(of: Any, real: type) -> tuple[Pair, int]:
    """Return the compiled functions of a class, and how many parameters they take."""
    if of in _of_users:
        return _of_users[of], 0
    count = 0 if of._fields == _NONE else len(of._fields)
    return Pair(*map(inlined, _MADE[of](math_of(real)))), count


_CHEAP = {CLASSES[name] for name in ("leaky_relu", "relu6", "hardswish")} | {*INVERSES.values()}


def costs(act: Any) -> bool:
    """Return True for the type of an activation whose derivative takes longer than loading g."""
    return act.instance_class not in _CHEAP


def inverts(act: Any) -> bool:
    """Return True for the type of an argument that stands for an `Inverse`."""
    return getattr(act, "instance_class", None) in INVERSES.values()


def _called(function: Any, count: int, real: type) -> Any:
    if count:
        return lambda v, act: function(v, real(act[0]))
    return lambda v, act: real(function(v))


@inlined_by_types
def value_at(v, act):
    """act(v), in the dtype of v."""
    real = getattr(np, v.name)
    functions, count = _functions(act.instance_class, real)
    return _called(functions.value, count, real)


@inlined_by_types
def derivative_at(v, act):
    """act'(v), in the dtype of v."""
    real = getattr(np, v.name)
    functions, count = _functions(act.instance_class, real)
    return _called(functions.derivative, count, real)
