"""The CUDA backend: functions over (N, C, S) device arrays, signature by signature the CPU's.

x, dy, y, residual, dx and dresidual are CuPy arrays of shape (N, C, S), none of it 0, of one dtype,
in the layout that `_layout` promises. Everything of shape (C,) is contiguous and float64; gamma and
beta may both be float32. Nothing is checked here, nothing waits for the device, and all memory is
CuPy's, of its current stream.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numba_cuda  # noqa: F401  # else Numba's own, older `numba.cuda` would be found

from nbnorm import _running
from nbnorm._layout import PLANE, Axes
from nbnorm._typing import Array
from nbnorm.cuda import kernels, launch
from nbnorm.cuda import memory as memory
from nbnorm.cuda.plan import THREADS, VECTOR, plan, residence
from nbnorm.cuda.values import WARP


def stats(x: Array) -> tuple[Array, Array]:
    """Mean and M2 of every channel."""
    mean, m2, _ = _stats(x, 0.0)
    return mean, m2


def _stats(x: Array, eps: float) -> tuple[Array, Array, Array]:
    N, C, S = x.shape
    empty = memory.empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    ready = _pass("stats", x, mean, x)
    partial = empty((2, C, ready.chunks))
    args = partial, C, ready.chunks, float(N * S), eps, mean, m2, rstd
    # float64 has no digits to lose to a first value far from the mean: once more, around the mean.
    for again in (False, True) if ready.dtype == "float64" else (False,):
        _run(ready, x, (x,), partial, mean, again)
        launch.run(kernels.finish, "float64", "float64", _warps(C), THREADS, *args)
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
    tensors = x, residual, y
    ready = _pass("apply", x, gamma, *tensors)
    floor = 0.0 if relu else -inf
    _run(ready, x, tensors, mean, rstd, gamma, beta, floor, residual is not None)


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
    tensors = x, residual, y
    kept = _kept("forward", x, gamma, *tensors, keeps=1)
    if kept is None:
        mean, m2, rstd = _stats(x, eps)
        apply(x, gamma, beta, mean, rstd, residual, relu, y)
        return mean, m2, rstd
    N, C, S = x.shape
    empty = memory.empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    partial = empty((2, C, kept.chunks))
    floor = 0.0 if relu else -inf
    _run(
        kept, x, tensors, float(N * S), eps, partial, mean, m2, rstd, gamma, beta, floor,
        residual is not None,
    )  # fmt: skip
    return mean, m2, rstd


def rstd(var: Array, eps: float) -> Array:
    """1 / sqrt(var + eps), 0 where that is 1/0, as `forward` has it."""
    result = memory.empty(var.size)
    if var.size:  # a grid of no blocks is an error
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
    compiled = _name(dtype) in ("float32", "float64") and dtype == running_var.dtype
    if compiled and running_mean.flags.c_contiguous and running_var.flags.c_contiguous:
        args = running_mean, running_var, mean, m2, momentum, divisor, mean.size
        blocks = _ceil(mean.size, THREADS)
        launch.run(kernels.move, _name(dtype), _name(dtype), blocks, THREADS, *args)
        return
    _running.move((running_mean, running_var), (mean, m2 / divisor), momentum)


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
    empty = memory.empty
    tensors = dy, x, y
    ready = _pass("reduce", x, gamma, *tensors)
    partial, sums = empty((2, C, ready.chunks)), empty((2, C))
    masked, shift = _mask(gamma, beta, y)
    _run(ready, x, tensors, mean, rstd, gamma, shift, masked, partial)
    dtype = ready.dtype
    args = partial, C, ready.chunks, mean, rstd, sums
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
    tensors = dy, x, y, dx, dresidual
    ready = _pass("differentiate", x, gamma, *tensors)
    masked, shift = _mask(gamma, beta, y)
    outs = (dx is not None) + 2 * (dresidual is not None)
    training = sums is not None
    _run(
        ready, x, tensors, mean, rstd, gamma, shift,
        sums if training else mean, float(count), masked, training, outs,
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
    N, C, S = x.shape
    tensors = dy, x, y, dx, dresidual
    kept = _kept("backward", x, gamma, *tensors, keeps=2)
    if kept is None:
        sums = backward_reduce(dy, x, gamma, mean, rstd, beta, y)
        backward_apply(dy, x, gamma, mean, rstd, sums, N * S, beta, y, dx, dresidual)
        return sums
    empty = memory.empty
    partial, sums = empty((2, C, kept.chunks)), empty((2, C))
    masked, shift = _mask(gamma, beta, y)
    outs = (dx is not None) + 2 * (dresidual is not None)
    _run(
        kept, x, tensors, mean, rstd, gamma, shift, partial, sums, float(N * S), masked, outs,
    )  # fmt: skip
    return sums


def _mask(gamma: Array, beta: Array | None, y: Array | None) -> tuple[int, Array]:
    """How ReLU's mask comes about: 0 none, 1 recomputed, 2 read from y; and a beta to point to."""
    if y is not None:
        return 2, gamma
    return (0, gamma) if beta is None else (1, beta)


class _Pass(NamedTuple):
    """A kernel of the traversal, ready for tensors of one shape, dtype, strides and alignment."""

    kernel: Any
    dtype: str
    parameters: str
    blocks: int
    cluster: int
    shared: int
    chunks: int
    views: tuple[int, ...]  # what stands for the tensors: their strides, a gap for each address
    step: int  # from gap to gap
    geometry: tuple[int, ...]


def _pass(name: str, x: Array, parameters: Array, *tensors: Array | None) -> _Pass:
    """Prepare a kernel for these tensors, which are in the order of its arguments."""
    ready = _prepared(name, x.shape, x.dtype, parameters.dtype, *_placed(tensors))
    assert ready is not None
    return ready


def _kept(
    name: str, x: Array, parameters: Array, *tensors: Array | None, keeps: int
) -> _Pass | None:
    """Prepare a kernel that reads memory once and keeps so many tensors, if they fit.

    Not in float64, whose statistics are taken twice, and only where all tensors are read in
    vectors: one that is not would change the sums of the others, which are to be those of `stats`.
    """
    resident = keeps, *launch.limits()
    if not _may_keep(x.shape, x.dtype.itemsize, *resident):
        return None
    return _prepared(name, x.shape, x.dtype, parameters.dtype, *_placed(tensors), resident=resident)


@lru_cache(maxsize=4096)
def _may_keep(shape: Axes, itemsize: int, keeps: int, shared: int, clusters: bool) -> bool:
    """Whether tensors fit, wherever they lie: what does not is not looked at any further."""
    cut = plan(*shape, itemsize, VECTOR)
    return itemsize < 8 and residence(cut, keeps, shared, clusters) is not None


def _placed(tensors: tuple[Array | None, ...]) -> tuple[Any, ...]:
    """Whether all tensors begin at a multiple of a vector; their strides, None of one absent."""
    address, addresses = launch.address, 0
    strides: list[Axes | None] = []
    for tensor in tensors:
        if tensor is None:
            strides.append(None)
        else:
            addresses |= address(tensor)
            strides.append(tensor.strides)
    return addresses % VECTOR == 0, *strides


@lru_cache(maxsize=4096)
def _prepared(
    name: str,
    shape: Axes,
    dtype: Any,
    parameters: Any,
    aligned: bool,
    *strides: Axes | None,
    resident: tuple[int, int, bool] | None = None,
) -> _Pass | None:
    """Prepare a kernel; the strides of an absent tensor, which it will not touch, are 0.

    `resident`: how many tensors it keeps, and what the device's limits are; None if it cannot.
    """
    N, C, S = shape
    itemsize = dtype.itemsize
    divisible = VECTOR if aligned else 1
    for n_stride, c_stride, _ in filter(None, strides):
        if N > 1:
            divisible |= n_stride
        if S >= PLANE and C > 1:
            divisible |= c_stride
    cut = plan(N, C, S, itemsize, divisible & -divisible)
    views: list[int] = []
    if cut.traversal == "rows":
        step, vectors = 3, S // cut.width
        geometry: tuple[int, ...] = (C, vectors, N * vectors, cut.per, cut.chunks)
    else:
        step = 2
        geometry = (C, S, N, cut.group, cut.lanes, cut.per, cut.chunks)
    for stride in strides:
        views += 0, *(s // itemsize for s in (stride or (0, 0))[: step - 1])
    blocks, cluster, shared = cut.blocks, 1, 0
    of = cut.traversal, dtype.name, cut.width
    if resident is None:
        source = kernels.build(*of)
    else:
        kept = None if divisible % VECTOR else residence(cut, *resident)
        if kept is None:
            return None
        cluster, each, blocks, shared = kept
        source = kernels.resident(*of, cluster > 1)
        geometry += cluster, each
    return _Pass(
        getattr(source, name), dtype.name, parameters.name, blocks, cluster, shared, cut.chunks,
        tuple(views), step, geometry,
    )  # fmt: skip


def _run(ready: _Pass, x: Array, tensors: tuple[Array | None, ...], *args: Any) -> None:
    """Launch; in place of an absent tensor, which the kernel will not touch, stands x."""
    kernel, dtype, parameters, blocks, cluster, shared, _, strides, step, geometry = ready
    views: list[Any] = list(strides)
    views[::step] = [x if tensor is None else tensor for tensor in tensors]
    launch.run(
        kernel, dtype, parameters, blocks, THREADS, *views, *geometry, *args,
        cluster=cluster, shared=shared,
    )  # fmt: skip


def _warps(C: int) -> int:
    """Blocks for one warp a channel."""
    return _ceil(C, THREADS // WARP)


@lru_cache(maxsize=16)
def _name(dtype: Any) -> str:
    return str(dtype.name)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
