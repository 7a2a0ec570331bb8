"""How values lie in memory: as they are, or as 16 bits that kernels widen and round themselves.

Numba has no half precision on the CPU. Kernels receive float16 as uint16, bfloat16 as int16. `load`
converts either to float32, exactly. `store` rounds to nearest, ties to even; values that are too
large become Inf, and NaN stays NaN.

Integers are loaded as float32, exactly: those of 8 bits directly, those of 16 bits from records of
one field, since uint16 and int16 mean half precision.
"""

import numpy as np
from numba import types

from nbnorm.cpu.intrinsics import half_from_float, half_to_float, new
from nbnorm.cpu.jit import by_types, ordered


@ordered
def bfloat16_to_float(bits):
    """float32 of the bits of a bfloat16, its upper half."""
    return np.int32(np.int32(bits) << 16).view(np.float32)


@ordered
def bfloat16_from_float(value):
    """Bits of the bfloat16 nearest to a float32; the carry of an overflow makes Inf."""
    bits = np.float32(value).view(np.int32)
    rounded = bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))
    quiet = bits | np.int32(0x400000)  # NaN stays NaN, whatever is cut off its payload
    return np.int16((quiet if value != value else rounded) >> 16)


@by_types
def load(values, j):
    """values[j] in the compute dtype; None for None."""
    if isinstance(values, types.NoneType):
        return lambda values, j: None
    if values.dtype == types.uint16:
        return lambda values, j: half_to_float(values[j])
    if values.dtype == types.int16:
        return lambda values, j: bfloat16_to_float(values[j])
    if isinstance(values.dtype, types.Record):
        return lambda values, j: np.float32(values[j].integer)
    if isinstance(values.dtype, types.Integer):
        return lambda values, j: np.float32(values[j])
    return lambda values, j: values[j]


@by_types
def store(values, j, value):
    """values[j] = value, rounded once; nothing if `values` is None."""
    if isinstance(values, types.NoneType):
        return lambda values, j, value: None

    def store_half(values, j, value):
        values[j] = half_from_float(value)

    def store_bfloat16(values, j, value):
        values[j] = bfloat16_from_float(value)

    def store_value(values, j, value):
        values[j] = value

    special = {types.uint16: store_half, types.int16: store_bfloat16}
    return special.get(values.dtype, store_value)


@by_types
def stored_as_zero(values):
    """Greatest value that `store` rounds to 0: in 16 bits half the least number, a tie; else 0."""
    if values.dtype == types.uint16:
        return lambda values: np.float32(2.0**-25)
    if values.dtype == types.int16:
        return lambda values: np.float32(2.0**-134)
    if values.dtype == types.float64:
        return lambda values: np.float64(0)
    return lambda values: np.float32(0)


@by_types
def computed(view):
    """Empty array of the dtype that a view's values are computed in, weighted or not."""
    if isinstance(view.types[0], types.BaseTuple):
        return lambda view: computed(view[0])
    if view.types[0].dtype in (types.float32, types.float64):
        return lambda view: view[0][:0]
    return lambda view: new(0, np.float32)


@by_types
def limits(like):
    """Least normal and greatest number of an array's dtype, in float64.

    `np.finfo` in a kernel would be two more functions to compile.
    """
    found = np.finfo(like.dtype.name)
    tiny, most = float(found.tiny), float(found.max)
    return lambda like: (tiny, most)


@by_types
def epsilon(like):
    """Distance from 1 to the next number of an array's dtype, in float64."""
    eps = float(np.finfo(like.dtype.name).eps)
    return lambda like: eps
