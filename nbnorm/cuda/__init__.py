"""CUDA backend: batch normalization of (N, C, S) device arrays, same functions as `nbnorm.cpu`.

x, dy, y, residual, dx and dresidual are CuPy arrays of shape (N, C, S), with no axis of length 0
and one dtype (but dy, tx, ddx, residual and backward's y may be float32 if x is half precision), in
a layout that `_layout` accepts. Per-channel arrays have shape (C,) and are contiguous float64;
gamma and beta may both be float32 instead. Nothing is checked here, and nothing waits for the
device. CuPy allocates all memory, on its current stream.

z, g, beta and y are as in `nbnorm.cpu`; `double_backward` and `jvp` have no activation. `weights`,
where a function has it, says how often each value of x counts: see `nbnorm._weights`. Calls with
weights have kernels of their own, which read memory twice.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numba_cuda  # noqa: F401  # replaces Numba's own, older `numba.cuda`

from nbnorm import _running
from nbnorm._layout import PLANE, Axes
from nbnorm._typing import Array
from nbnorm.activations import Activation, Fused, Inverse, with_own_kernels
from nbnorm.cuda import kernels, launch
from nbnorm.cuda import memory as memory
from nbnorm.cuda.plan import THREADS, VECTOR, WARP, Names, plan, residence


def stats(x: Array, *, weights: Any = None) -> tuple[Array, Array]:
    """Return mean and M2 = sum (x - mean)^2 of each channel, shape (C,) each."""
    mean, m2, _ = _stats(x, 0.0) if weights is None else _weighted_stats(x, 0.0, weights)
    return mean, m2


def _stats(x: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return mean, M2 and rstd of each channel, shape (C,) each."""
    N, C, S = x.shape
    empty = memory.empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    ready = _pass("stats", x, mean, x)
    partial = empty((2, C, ready.chunks))
    args = partial, C, ready.chunks, float(N * S), eps, mean, m2, rstd
    # In float64 a first value K far from the mean costs digits: sum again, around the mean.
    for again in (False, True) if ready.dtype == "float64" else (False,):
        _run(ready, x, (x,), partial, mean, again)
        launch.run(kernels.finish_moments, "float64", "float64", _warps(C), THREADS, *args)
    return mean, m2, rstd


def apply(
    x: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    rstd: Array,
    residual: Array | None,
    activation: Fused,
    y: Array,
    *,
    weights: Any = None,
) -> None:
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    tensors = x, residual, y
    own, wide = with_own_kernels(activation), _wide(x, residual=residual)
    if weights is not None:
        fills = weights.fill is not None
        _run_weighted(
            "apply", x, gamma, tensors, weights, mean, rstd, gamma, beta,
            0.0 if activation == "relu" else -inf, residual is not None,
            weights.fill if fills else 0.0, fills, activation=own, wide=wide,
        )  # fmt: skip
        return
    ready = _pass("apply", x, gamma, *tensors, activation=own, wide=wide)
    floor = 0.0 if activation == "relu" else -inf
    _run(ready, x, tensors, mean, rstd, gamma, beta, floor, residual is not None)


def forward(
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None,
    activation: Fused,
    y: Array,
    *,
    weights: Any = None,
) -> tuple[Array, Array, Array]:
    """Normalise x with its own statistics into y, as `apply`; return mean, M2, rstd, (C,) each."""
    if weights is not None:
        mean, m2, rstd = _weighted_stats(x, eps, weights)
        apply(x, gamma, beta, mean, rstd, residual, activation, y, weights=weights)
        return mean, m2, rstd
    tensors = x, residual, y
    own = with_own_kernels(activation)
    wide = _wide(x, residual=residual)
    fused = _fused("forward", x, gamma, *tensors, keeps=1, activation=own, wide=wide)
    if fused is None:
        mean, m2, rstd = _stats(x, eps)
        apply(x, gamma, beta, mean, rstd, residual, activation, y)
        return mean, m2, rstd
    N, C, S = x.shape
    empty = memory.empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    partial = empty((2, C, fused.chunks))
    floor = 0.0 if activation == "relu" else -inf
    _run(
        fused, x, tensors, float(N * S), eps, partial, mean, m2, rstd, gamma, beta, floor,
        residual is not None,
    )  # fmt: skip
    return mean, m2, rstd


def renorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    r_max: float,
    d_max: float,
    eps: float,
    residual: Array | None,
    activation: Fused,
    y: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """y = act(gamma (x_hat r + d) + beta [+ residual]); return mean, M2, rstd, r and d, each (C,).

    gamma, beta and the running statistics are float64.
    """
    mean, m2, rstd = _stats(x, eps)
    count = x.shape[0] * x.shape[2]
    r, d = renorm_factors(mean, m2, count, eps, running_mean, running_var, r_max, d_max)
    # CuPy folds r and d, as for backward: a compiler might fuse the product and the sum, and then
    # backward's mask would not be that of y.
    apply(x, gamma * r, beta + gamma * d, mean, rstd, residual, activation, y)
    return mean, m2, rstd, r, d


def renorm_factors(
    mean: Array,
    m2: Array,
    count: int,
    eps: float,
    running_mean: Array,
    running_var: Array,
    r_max: float,
    d_max: float,
) -> tuple[Array, Array]:
    """Return r and d of batch renormalization, shape (C,) each; all arrays are float64."""
    C = mean.size
    r, d = memory.empty(C), memory.empty(C)
    if C:  # CUDA refuses a grid without blocks
        args = mean, m2, float(count), eps, running_mean, running_var, r_max, d_max, C, r, d
        launch.run(kernels.renorm_factors, "float64", "float64", _ceil(C, THREADS), THREADS, *args)
    return r, d


def rstd(var: Array, eps: float) -> Array:
    """Return 1 / sqrt(var + eps), shape (C,); 0 where var + eps is 0, as in `forward`."""
    result = memory.empty(var.size)
    if var.size:  # CUDA refuses a grid without blocks
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
    """Update running statistics in place from a batch's mean and its variance M2 / divisor.

    running = (1 - momentum) running + momentum batch, rounded once to running's dtype. The running
    arrays may have any strides.
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
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> Array:
    """Return sum g and sum g x_hat of each channel, shape (2, C), where g = dy act'(z)."""
    C, dtype = x.shape[1], _name(x.dtype)
    empty = memory.empty
    tensors = dy, x, y
    wide = _wide(x, dy=dy, y=y)
    mask, beta_ = _mask(gamma, beta, y, activation)
    if weights is None:
        ready = _pass("backward_reduce", x, gamma, *tensors, activation=activation, wide=wide)
        partial, chunks = empty((2, C, ready.chunks)), ready.chunks
        _run(ready, x, tensors, mean, rstd, gamma, beta_, mask, partial)
    else:
        partial, chunks = _partial(x, 2)
        _run_weighted(
            "backward_reduce", x, gamma, tensors, weights, mean, rstd, gamma, beta_, mask, partial,
            activation=activation, wide=wide,
        )  # fmt: skip
    sums = empty((2, C))
    args = partial, C, chunks, mean, rstd, sums
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
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> None:
    """Write dresidual = g = dy act'(z) and dx; either may be None.

    dx = gamma rstd (g - w (sums[0] + x_hat sums[1]) / count), where w is the value's weight, or 1;
    dx = gamma rstd g if sums is None (mean and rstd are constants). Both are 0 where w is 0. With
    weights `count` may have shape (C,).
    """
    tensors = dy, x, y, dx, dresidual
    wide = _wide(x, dy=dy, y=y)
    mask, beta_ = _mask(gamma, beta, y, activation)
    wanted = (dx is not None) + 2 * (dresidual is not None)
    training = sums is not None
    if weights is not None:
        counts: Any = count
        if not getattr(count, "shape", ()):
            counts = memory.empty(x.shape[1])
            counts.fill(count)
        _run_weighted(
            "backward_apply", x, gamma, tensors, weights, mean, rstd, gamma, beta_,
            sums if training else mean, counts, mask, training, wanted, activation=activation,
            wide=wide,
        )  # fmt: skip
        return
    ready = _pass("backward_apply", x, gamma, *tensors, activation=activation, wide=wide)
    _run(
        ready, x, tensors, mean, rstd, gamma, beta_,
        sums if training else mean, float(count), mask, training, wanted,
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
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> Array:
    """Call `backward_reduce`, then `backward_apply` with its sums; return the sums."""
    N, C, S = x.shape
    tensors = dy, x, y, dx, dresidual
    fused, count = None, N * S if weights is None else weights.count
    if weights is None:
        wide = _wide(x, dy=dy, y=y)
        fused = _fused("backward", x, gamma, *tensors, keeps=2, activation=activation, wide=wide)
    if fused is None:
        norm = gamma, mean, rstd
        sums = backward_reduce(dy, x, *norm, beta, y, activation, weights=weights)
        backward_apply(
            dy, x, *norm, sums, count, beta, y, dx, dresidual, activation, weights=weights
        )
        return sums
    empty = memory.empty
    partial, sums = empty((2, C, fused.chunks)), empty((2, C))
    mask, beta_ = _mask(gamma, beta, y, activation)
    wanted = (dx is not None) + 2 * (dresidual is not None)
    _run(
        fused, x, tensors, mean, rstd, gamma, beta_, partial, sums, float(N * S), mask, wanted,
    )  # fmt: skip
    return sums


def jvp(
    tx: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    tgamma: Array,
    tbeta: Array,
    training: bool,
    ty: Array,
) -> None:
    """ty = gamma rstd (tx - mean(tx) - x_hat mean(tx x_hat)) + tgamma x_hat + tbeta.

    Both means are 0 unless `training`. gamma, tgamma and tbeta are float64.
    """
    if training:
        sums = backward_reduce(tx, x, gamma, mean, rstd, None, None)
    else:
        sums = memory.empty((2, x.shape[1]))
        sums.fill(0.0)
    statistics = mean, rstd, gamma, tgamma, tbeta
    table, _ = _second_table(statistics, sums, _count(x, training), False)
    tensors = tx, None, x, ty, None
    ready = _pass("second_apply", x, gamma, *tensors, wide=_wide(x, ddx=tx))
    _run(ready, x, tensors, mean, table, False)


def double_backward(
    ddx: Array,
    dy: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    rstd: Array,
    ddgamma: Array,
    ddbeta: Array,
    training: bool,
    ddy: Array,
    dx: Array,
) -> Array:
    """Differentiate `backward` (docs/math.md): write ddy and dx, return gamma's gradient, (C,).

    gamma, ddgamma and ddbeta are float64. Statistics are constants if not `training`.
    """
    C = x.shape[1]
    read, count = (ddx, dy, x), _count(x, training)
    wide = _wide(x, ddx=ddx, dy=dy)
    ready = _pass("second_reduce", x, gamma, *read, wide=wide)
    partial, sums = memory.empty((5, C, ready.chunks)), memory.empty((5, C))
    _run(ready, x, read, mean, rstd, partial)
    dtype = ready.dtype
    args = partial, C, ready.chunks, count, mean, rstd, sums
    launch.run(kernels.finish_second_sums(dtype), dtype, dtype, _warps(C), THREADS, *args)
    table, dgamma = _second_table((mean, rstd, gamma, ddgamma, ddbeta), sums, count, True)
    tensors = ddx, dy, x, ddy, dx
    _run(_pass("second_apply", x, gamma, *tensors, wide=wide), x, tensors, mean, table, True)
    return dgamma


def weigh(values: Array, C: int) -> Array:
    """Return the sum of weights of each channel, float64 of shape (C,).

    `values` have shape (N, C, S), or (N, 1, S) if all channels share them, in C order.
    """
    totals = values.sum(axis=(0, 2), dtype="float64")
    return totals if totals.size == C else totals.repeat(C)


def _weighted_stats(x: Array, eps: float, weights: Any) -> tuple[Array, Array, Array]:
    """Return mean, M2 and rstd of each channel, shape (C,) each."""
    C, empty = x.shape[1], memory.empty
    mean, m2, rstd = empty(C), empty(C), empty(C)
    partial, chunks = _partial(x, 3)
    # Every merge rounds the mean, which costs float64 digits: merge again, around the mean.
    for again in (False, True) if _name(x.dtype) == "float64" else (False,):
        _run_weighted("stats", x, mean, (x,), weights, partial, mean, again)
        args = partial, C, chunks, eps, again, mean, m2, rstd
        launch.run(kernels.finish_weighted, "float64", "float64", _warps(C), THREADS, *args)
    return mean, m2, rstd


def _partial(x: Array, number: int) -> tuple[Array, int]:
    """Return memory (number, C, chunks) for the sums of a pass with weights, and its chunks."""
    chunks = plan(*x.shape, x.dtype.itemsize, 1).chunks
    return memory.empty((number, x.shape[1], chunks)), chunks


def _run_weighted(
    name: str,
    x: Array,
    parameters: Array,
    tensors: tuple[Array | None, ...],
    weights: Any,
    *args: Any,
    activation: Activation | None = None,
    wide: Names = (),
) -> None:
    """Launch a kernel for values with weights; x stands in for an absent tensor."""
    N, C, S = x.shape
    cut, dtype, values = plan(N, C, S, x.dtype.itemsize, 1), _name(x.dtype), weights.values
    views: list[Any] = []
    for tensor in tensors:
        array = x if tensor is None else tensor
        views += array, *(stride // array.itemsize for stride in array.strides[:2])
    shared = values.shape[1] == 1
    views += values, S if shared else C * S, 0 if shared else S
    launch.run(
        getattr(kernels.weighted(dtype, activation, wide), name), dtype, _name(parameters.dtype),
        cut.blocks, THREADS, *views, C, S, N, cut.group, cut.length, cut.chunks, *args,
        weights=_name(values.dtype),
    )  # fmt: skip


def _count(x: Array, training: bool) -> float:
    """Return the number of values per channel; Inf if statistics are constants."""
    return float(x.shape[0] * x.shape[2]) if training else inf


def _second_table(
    statistics: tuple[Array, ...], sums: Array, count: float, curved: bool
) -> tuple[Array, Array]:
    """Return the `table` of `second_apply`, shape (7, C), and gamma's gradient if `curved`."""
    C = statistics[0].size
    table, dgamma = memory.empty((7, C)), memory.empty(C)
    args = *statistics, sums, count, curved, C, table, dgamma
    blocks = _ceil(C, THREADS)
    launch.run(kernels.second_table, "float64", "float64", blocks, THREADS, *args)
    return table, dgamma


def _mask(
    gamma: Array, beta: Array | None, y: Array | None, activation: Activation | None
) -> tuple[int, Array]:
    """Return `mask`, which says what g depends on beside dy, and the array to pass as beta.

    0: nothing (no activation). 1: x. 2: ReLU's y; with another activation x and the residual, which
    is y. gamma stands in for a beta that is not read (mask 0, ReLU with mask 2, an inverse).
    """
    if isinstance(activation, Inverse):
        return 1, gamma
    if activation is not None:
        assert beta is not None
        return (1 if y is None else 2), beta
    if y is not None:
        return 2, gamma
    return (0, gamma) if beta is None else (1, beta)


class _Pass(NamedTuple):
    """A kernel of a traversal, ready for tensors of one shape, dtype, strides and alignment."""

    kernel: Any
    dtype: str
    parameters: str
    blocks: int
    cluster: int
    shared: int
    chunks: int
    views: tuple[int, ...]  # arguments of the tensors: a gap for the address, then the strides
    step: int  # distance between two gaps
    geometry: tuple[int, ...]


def _pass(
    name: str,
    x: Array,
    parameters: Array,
    *tensors: Array | None,
    activation: Activation | None = None,
    wide: Names = (),
) -> _Pass:
    """Prepare a kernel for these tensors, given in the order of its arguments."""
    placed, how = _placed(tensors), {"activation": activation, "wide": wide}
    ready = _prepared(name, x.shape, x.dtype, parameters.dtype, *placed, **how)
    assert ready is not None
    return ready


def _fused(
    name: str,
    x: Array,
    parameters: Array,
    *tensors: Array | None,
    keeps: int,
    activation: Activation | None = None,
    wide: Names = (),
) -> _Pass | None:
    """Prepare a kernel that reads memory once and keeps `keeps` tensors on chip; None if it cannot.

    It cannot for float64, whose statistics take two passes, nor if a tensor is not read in vectors:
    its sums would then be added in another order than those of `stats`, with other bits.
    """
    resident = keeps, *launch.limits()
    if not _may_keep(x.shape, x.dtype.itemsize, *resident):
        return None
    return _prepared(
        name, x.shape, x.dtype, parameters.dtype, *_placed(tensors),
        resident=resident, activation=activation, wide=wide,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _may_keep(shape: Axes, itemsize: int, keeps: int, shared: int, clusters: bool) -> bool:
    """Whether tensors fit on chip if they are aligned, a quick test that rules out most."""
    cut = plan(*shape, itemsize, VECTOR)
    return itemsize < 8 and residence(cut, keeps, shared, clusters) is not None


def _placed(tensors: tuple[Array | None, ...]) -> tuple[Any, ...]:
    """Return whether all addresses are multiples of VECTOR, and each tensor's strides and itemsize.

    None stands for those of an absent tensor.
    """
    address, addresses = launch.address, 0
    strides: list[Axes | None] = []
    for tensor in tensors:
        if tensor is None:
            strides.append(None)
        else:
            addresses |= address(tensor)
            strides.append((*tensor.strides, tensor.itemsize))
    return addresses % VECTOR == 0, *strides


def _wide(x: Array, **tensors: Array | None) -> Names:
    """Return the names of tensors that are float32 although x is float16 or bfloat16."""
    if x.itemsize > 2:
        return ()
    return tuple(name for name, t in tensors.items() if t is not None and t.itemsize > 2)


@lru_cache(maxsize=4096)
def _prepared(
    name: str,
    shape: Axes,
    dtype: Any,
    parameters: Any,
    aligned: bool,
    *strides: Axes | None,
    resident: tuple[int, int, bool] | None = None,
    activation: Activation | None = None,
    wide: Names = (),
) -> _Pass | None:
    """Prepare a kernel; an absent tensor, which the kernel does not touch, has strides 0.

    `strides` are those of n, c and s in bytes, followed by the itemsize.

    `resident` is None or, for a kernel that reads memory once, how many tensors it keeps on chip,
    followed by the device's limits. Returns None if they do not fit.
    """
    N, C, S = shape
    itemsize = dtype.itemsize
    divisible = VECTOR if aligned else 1
    for n_stride, c_stride, *_ in filter(None, strides):
        if N > 1:
            divisible |= n_stride
        if S >= PLANE and C > 1:
            divisible |= c_stride
    cut = plan(N, C, S, itemsize, divisible & -divisible)
    views: list[int] = []
    if cut.traversal == "rows":
        step, vectors = 3, S // cut.width
        geometry: tuple[int, ...] = (C, vectors, N * vectors, cut.length, cut.chunks)
    else:
        step = 2
        geometry = (C, S, N, cut.group, cut.readers, cut.length, cut.chunks)
    for stride in strides:
        *of_axes, size = stride or (0, 0, 1)
        views += 0, *(s // size for s in of_axes[: step - 1])
    blocks, cluster, shared = cut.blocks, 1, 0
    of = cut.traversal, dtype.name, cut.width
    if resident is None:
        source = kernels.build(*of, activation, wide)
    else:
        kept = None if divisible % VECTOR else residence(cut, *resident)
        if kept is None:
            return None
        cluster, each, blocks, shared = kept
        source = kernels.fused(*of, cluster > 1, activation, wide)
        geometry += cluster, each
    return _Pass(
        getattr(source, name), dtype.name, parameters.name, blocks, cluster, shared, cut.chunks,
        tuple(views), step, geometry,
    )  # fmt: skip


def _run(ready: _Pass, x: Array, tensors: tuple[Array | None, ...], *args: Any) -> None:
    """Launch a kernel; x stands in for an absent tensor, which the kernel does not touch."""
    kernel, dtype, parameters, blocks, cluster, shared, _, strides, step, geometry = ready
    views: list[Any] = list(strides)
    views[::step] = [x if tensor is None else tensor for tensor in tensors]
    launch.run(
        kernel, dtype, parameters, blocks, THREADS, *views, *geometry, *args,
        cluster=cluster, shared=shared,
    )  # fmt: skip


def _warps(C: int) -> int:
    """Return the number of blocks for one warp per channel."""
    return _ceil(C, THREADS // WARP)


@lru_cache(maxsize=16)
def _name(dtype: Any) -> str:
    return str(dtype.name)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
