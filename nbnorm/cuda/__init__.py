"""The CUDA backend: functions over (N, C, S) device arrays, signature by signature the CPU's.

x, dy, y, residual, dx and dresidual are CuPy arrays of shape (N, C, S), none of it 0, of one dtype,
in the layout that `_layout` promises. Everything of shape (C,) is contiguous and float64; gamma and
beta may both be float32. Nothing is checked here, nothing waits for the device, and all memory is
CuPy's, of its current stream.
"""

from __future__ import annotations

import sys
from math import inf
from typing import Any

import numba_cuda  # noqa: F401  # else Numba's own, older `numba.cuda` would be found

from nbnorm import moments
from nbnorm._layout import PLANE
from nbnorm.cuda import kernels, launch
from nbnorm.cuda import memory as memory
from nbnorm.cuda.plan import THREADS, VECTOR, Plan, plan
from nbnorm.cuda.values import WARP

Array = Any


def stats(x: Array) -> tuple[Array, Array]:
    """Mean and M2 of every channel."""
    mean, m2, _ = _stats(x, 0.0)
    return mean, m2


def _stats(x: Array, eps: float) -> tuple[Array, Array, Array]:
    N, C, S = x.shape
    empty = _library(x).empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    cut = _cut(x)
    partial = empty((2, C, cut.chunks))
    _run(x, cut, "stats", [x], partial, mean)
    dtype = x.dtype.name
    args = partial, C, cut.chunks, float(N * S), eps, mean, m2, rstd
    launch.run(kernels.finish, dtype, dtype, _warps(C), THREADS, *args)
    return mean, m2, rstd


def apply(
    x: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    rstd: Array,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> None:
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    cut = _cut(x, residual, y)
    added = residual is not None
    floor = 0.0 if relu else -inf
    _run(
        x, cut, "apply", [x, residual, y], mean, rstd, gamma, beta, floor, added,
        parameters=gamma.dtype.name,
    )  # fmt: skip


def forward(
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> tuple[Array, Array, Array]:
    """Normalise x with its own statistics into y; return mean, M2 and rstd."""
    mean, m2, rstd = _stats(x, eps)
    apply(x, gamma, beta, mean, rstd, residual, relu, y)
    return mean, m2, rstd


def rstd(var: Array, eps: float) -> Array:
    """1 / sqrt(var + eps), 0 where that is 1/0, as `forward` has it."""
    result = _library(var).empty(var.size)
    args = var, eps, result, var.size
    launch.run(kernels.rstd_all, "float64", "float64", _ceil(var.size, THREADS), THREADS, *args)
    return result


def move(
    running_mean: Array,
    running_var: Array,
    mean: Array,
    m2: Array,
    momentum: float,
    divisor: float,
) -> None:
    """Move running statistics, of any strides, towards a batch's; its variance is M2 / divisor.

    running = (1 - momentum) running + momentum batch, rounded once to running's dtype.
    """
    dtype = running_mean.dtype
    compiled = dtype.name in ("float32", "float64") and dtype == running_var.dtype
    if compiled and running_mean.flags.c_contiguous and running_var.flags.c_contiguous:
        args = running_mean, running_var, mean, m2, momentum, divisor, mean.size
        blocks = _ceil(mean.size, THREADS)
        launch.run(kernels.move, dtype.name, dtype.name, blocks, THREADS, *args)
        return
    batch = (values.reshape(running_mean.shape) for values in (mean, m2 / divisor))
    moments.move((running_mean, running_var), tuple(batch), momentum)


def backward_reduce(
    dy: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    beta: Array | None,
    y: Array | None,
) -> Array:
    """Sum dy and sum dy x_hat of every channel, shape (2, C)."""
    C = x.shape[1]
    empty = _library(x).empty
    cut = _cut(x, dy, y)
    partial, sums = empty((2, C, cut.chunks)), empty((2, C))
    masked, shift = _mask(gamma, beta, y)
    _run(
        x, cut, "reduce", [dy, x, y], mean, rstd, gamma, shift, masked, partial,
        parameters=gamma.dtype.name,
    )  # fmt: skip
    dtype = x.dtype.name
    args = partial, C, cut.chunks, mean, rstd, sums
    launch.run(kernels.finish_sums(dtype), dtype, dtype, _warps(C), THREADS, *args)
    return sums


def backward_apply(
    dy: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    sums: Array | None,
    count: int,
    beta: Array | None,
    y: Array | None,
    dx: Array | None,
    dresidual: Array | None,
) -> None:
    """Write dx and dresidual, each where given; sums None: mean and rstd are constants."""
    cut = _cut(x, dy, y, dx, dresidual)
    masked, shift = _mask(gamma, beta, y)
    outs = (dx is not None) + 2 * (dresidual is not None)
    training = sums is not None
    _run(
        x, cut, "differentiate", [dy, x, y, dx, dresidual], mean, rstd, gamma, shift,
        sums if training else mean, float(count), masked, training, outs,
        parameters=gamma.dtype.name,
    )  # fmt: skip


def backward(
    dy: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    beta: Array | None,
    y: Array | None,
    dx: Array | None,
    dresidual: Array | None,
) -> Array:
    """`backward_reduce`, then `backward_apply` with its sums, which are returned."""
    sums = backward_reduce(dy, x, gamma, mean, rstd, beta, y)
    count = x.shape[0] * x.shape[2]
    backward_apply(dy, x, gamma, mean, rstd, sums, count, beta, y, dx, dresidual)
    return sums


def _mask(gamma: Array, beta: Array | None, y: Array | None) -> tuple[int, Array]:
    """How ReLU's mask comes about: 0 none, 1 recomputed, 2 read from y; and a beta to point to."""
    if y is not None:
        return 2, gamma
    return (0, gamma) if beta is None else (1, beta)


def _cut(x: Array, *others: Array | None) -> Plan:
    """Plan of a pass over x and others of its shape."""
    divisible = VECTOR
    planes = x.shape[2] >= PLANE
    for array in (x, *others):
        if array is not None:
            divisible |= launch.address(array)
            if array.shape[0] > 1:
                divisible |= array.strides[0]
            if planes and array.shape[1] > 1:
                divisible |= array.strides[1]
    return plan(*x.shape, x.itemsize, divisible & -divisible)


def _run(
    x: Array, cut: Plan, name: str, tensors: list[Array | None], *args: Any, parameters: str = ""
) -> None:
    """Launch a kernel of the traversal; an absent tensor, which it will not touch, is x."""
    N, C, S = x.shape
    dtype, itemsize = x.dtype.name, x.itemsize
    views: list[Any] = []
    for tensor in tensors:
        array = x if tensor is None else tensor
        views += array, array.strides[0] // itemsize
        if cut.traversal == "rows":
            views.append(array.strides[1] // itemsize)
    if cut.traversal == "rows":
        vectors = S // cut.width
        geometry: tuple[int, ...] = (C, vectors, N * vectors, cut.per, cut.chunks)
    else:
        geometry = (C, S, N, cut.group, cut.lanes, cut.per, cut.chunks)
    kernel = getattr(kernels.build(cut.traversal, dtype, cut.width), name)
    launch.run(kernel, dtype, parameters or dtype, cut.blocks, THREADS, *views, *geometry, *args)


def _warps(C: int) -> int:
    """Blocks for one warp a channel."""
    return _ceil(C, THREADS // WARP)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _library(array: Array) -> Any:
    """The module that arrays of this class come from."""
    return sys.modules[type(array).__module__.partition(".")[0]]
