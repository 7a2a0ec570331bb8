"""The floor: the fastest sweep over a tensor that reads every x and writes every y once.

A sweep reads one tensor and writes one. The smallest number of sweeps that an op needs is

- training forward and inference: 1, to read x and write y (a second read of x may hit a cache);
- backward: 1.5, to read dy and x and write dx;
- a step of BN + ReLU: 2.5, the sum of forward and backward, since ReLU's mask follows from x;
- a step of BN + residual + ReLU: 4. Forward reads x and the residual and writes y: 1.5. Backward
  reads dy, x and y, which determines the mask, and writes dx and the residual's gradient: 2.5.

If x does not fit into a cache, no op can be faster; otherwise the floor is only a unit. Which sweep
is fastest depends on size and machine: starting threads takes longer than a tiny sweep, and
non-temporal stores, which do not read the memory that they overwrite, are faster only if y is
larger than the last-level cache. A virtual machine often reports a cache that it does not have, so
all sweeps are timed and the fastest is used.
"""

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

FLOORS = {"forward": 1.0, "backward": 1.5, "inference": 1.0, "relu": 2.5, "add+relu": 4.0}
LINE = 64  # bytes of a cache line and of the widest vector; non-temporal stores fill whole lines


def sweeps(x: np.ndarray, y: np.ndarray) -> dict[str, Callable[[], None]]:
    """Return the sweeps from x to y, both dense in the same order of axes.

    float16 and bfloat16 are swept as integers, since Numba has no arithmetic for them.
    """
    x, y = x.ravel(order="K"), y.ravel(order="K")
    if x.itemsize == 2:
        x, y = x.view(np.uint16), y.view(np.uint16)
    # Arguments, not constants: otherwise the compiler would turn y = 1 x + 0 into a memcpy.
    a, b = x.dtype.type(1), x.dtype.type(0)
    slices = numba.get_num_threads()
    return {
        "one thread": lambda: _sweep(x, y, a, b),
        "threads": lambda: _parallel(x, y, a, b, slices),
        "threads, non-temporal": lambda: _parallel_streaming(x, y, a, b, slices),
    }


@njit
def _sweep(x, y, a, b):
    for i in range(x.size):
        y[i] = a * x[i] + b


@njit(parallel=True)
def _parallel(x, y, a, b, slices):
    for k in prange(slices):
        begin, end = x.size * k // slices, x.size * (k + 1) // slices
        _sweep(x[begin:end], y[begin:end], a, b)


@njit(parallel=True)
def _parallel_streaming(x, y, a, b, slices):
    for k in prange(slices):
        begin, end = x.size * k // slices, x.size * (k + 1) // slices
        _sweep_streaming(x[begin:end], y[begin:end], a, b)


@njit
def _sweep_streaming(x, y, a, b):
    # Whole lines of y in the middle, parts of lines before and after them.
    head = min(y.size, -y.ctypes.data % LINE // y.itemsize)
    lines = (y.size - head) * y.itemsize // LINE
    tail = head + lines * LINE // y.itemsize
    _sweep(x[:head], y[:head], a, b)
    _stream(x[head:tail], y[head:tail], a, b)
    _sweep(x[tail:], y[tail:], a, b)


@intrinsic
def _stream(typingctx, x, y, a, b):
    """y = a x + b with non-temporal stores; y begins and ends at cache lines."""

    def codegen(context, builder, signature, arguments):
        x, y = (
            context.make_array(array_type)(context, builder, array)
            for array_type, array in zip(signature.args[:2], arguments[:2], strict=True)
        )
        itemsize = context.get_abi_sizeof(x.data.type.pointee)
        vector = ir.VectorType(x.data.type.pointee, LINE // itemsize)
        a, b = (_splat(builder, vector, scalar) for scalar in arguments[2:])
        halves = isinstance(vector.element, ir.IntType)
        mul, add = (builder.mul, builder.add) if halves else (builder.fmul, builder.fadd)
        source = builder.bitcast(x.data, vector.as_pointer())
        target = builder.bitcast(y.data, vector.as_pointer())
        lines = builder.udiv(y.nitems, y.nitems.type(vector.count))
        with cgutils.for_range(builder, lines) as loop:
            value = builder.load(builder.gep(source, [loop.index]), align=itemsize)
            value = add(mul(a, value), b)
            store = builder.store(value, builder.gep(target, [loop.index]), align=LINE)
            hint = builder.module.add_metadata([ir.IntType(32)(1)])
            store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return types.void(x, y, a, b), codegen


def _splat(builder, vector, scalar):
    """Return a vector with the same value in every lane."""
    one = builder.insert_element(vector(ir.Undefined), scalar, ir.IntType(32)(0))
    lanes = ir.VectorType(ir.IntType(32), vector.count)
    return builder.shuffle_vector(one, vector(ir.Undefined), lanes([0] * vector.count))
