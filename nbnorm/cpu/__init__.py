"""CPU backend: batch normalization of (N, C, S) NumPy arrays.

x, dy, y, residual, dx and dresidual have shape (N, C, S), no axis of length 0 and one dtype
(float32, float64, float16 or bfloat16), in a layout that `_layout` accepts. Per-channel arrays
have shape (C,) and are contiguous float64; gamma and beta may both be float32 instead. Nothing is
checked here. `nbnorm.cuda` has the same functions with the same signatures.

z is the value before the activation, and g = dy act'(z). For ReLU the backward functions recompute
the mask from x if they get beta, and read it (y > 0) if they get y; with neither g is dy. For
another activation they get beta, and the residual or None as y, and recompute z.
`double_backward` and `jvp` have no activation.

`weights`, where a function has it, says how often each value of x counts: see `nbnorm._weights`.
x of `stats` and `apply` may also be 8- or 16-bit integers, without weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Imported before any kernel: it takes a digest of the source that kernels are compiled from.
from nbnorm.cpu import sources as sources  # isort: split

from nbnorm import _running
from nbnorm._typing import NDArray
from nbnorm.activations import Activation, Fused
from nbnorm.cpu import functions, integers, kernels, second_order
from nbnorm.cpu import memory as memory
from nbnorm.cpu.caches import caches
from nbnorm.cpu.plan import SERIAL_BELOW, Plan, plan
from nbnorm.cpu.threads import count as thread_count
from nbnorm.cpu.threads import pool, turn
from nbnorm.cpu.weights import WEIGHTED_PLANE

_CACHES = caches()
_COMPILED = (np.dtype("float32"), np.dtype("float64"))


def stats(x: NDArray, *, weights: Any = None) -> tuple[NDArray, NDArray]:
    """Return mean and M2 = sum (x - mean)^2 of each channel, shape (C,) each."""
    if x.dtype.kind in "iu":
        return _integer_stats(x)
    cut, run = _cut(x, 1, weights)
    C = cut.grid.C
    partial = np.empty((4, cut.chunks, C))
    mean, m2, rstd = np.empty(C), np.empty(C), np.empty(C)
    with turn(cut.parallel):
        run.stats(
            _x(x, cut, weights),
            tuple(cut.grid),
            kernels.work_for(cut),
            0.0,
            partial,
            mean,
            m2,
            rstd,
        )
    return mean, m2


def _integer_stats(x: NDArray) -> tuple[NDArray, NDArray]:
    cut, _ = _cut(x, 1)
    sums = integers.rows_sums if cut.traversal == "rows" else integers.columns_sums
    partial = np.zeros((2, cut.chunks, cut.grid.C), np.int64)
    with turn(cut.parallel):
        sums(_strided(x), tuple(cut.grid), kernels.work_for(cut), partial)
    return integers.moments(partial, x.shape[0] * x.shape[2])


def apply(
    x: NDArray,
    gamma: NDArray,
    beta: NDArray,
    mean: NDArray,
    rstd: NDArray,
    residual: NDArray | None,
    activation: Fused,
    y: NDArray,
    *,
    weights: Any = None,
) -> None:
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    # Plan for y: x may be integers, and writing takes longer than reading.
    cut, run = _cut(y, 2 + (residual is not None), weights)
    x_, residual_, y_ = _x(x, cut, weights), _view(residual), _view(y)
    norm = mean, rstd, gamma, beta
    with turn(cut.parallel):
        run.apply(x_, residual_, tuple(cut.grid), kernels.work_for(cut), norm, _act(activation), y_)


def forward(
    x: NDArray,
    gamma: NDArray,
    beta: NDArray,
    eps: float,
    residual: NDArray | None,
    activation: Fused,
    y: NDArray,
    *,
    weights: Any = None,
) -> tuple[NDArray, NDArray, NDArray]:
    """Normalise x with its own statistics into y; return mean, M2 and rstd, shape (C,) each."""
    C = x.shape[1]
    mean, m2, rstd = np.empty(C), np.empty(C), np.empty(C)
    _forward(x, (mean, rstd, gamma, beta), m2, eps, residual, activation, y, weights)
    return mean, m2, rstd


def _forward(
    x: NDArray,
    norm: tuple[Any, ...],
    m2: NDArray,
    eps: float,
    residual: NDArray | None,
    activation: Fused,
    y: NDArray,
    weights: Any = None,
) -> None:
    """Normalise x into y; write m2, and norm's mean, rstd and results of renorm (see `channel`)."""
    cut, run = _cut(x, 2 + (residual is not None), weights)
    x_, residual_, y_ = _x(x, cut, weights), _view(residual), _view(y)
    partial = np.empty((4, cut.chunks, cut.grid.C))
    with turn(cut.parallel):
        run.forward(
            x_,
            residual_,
            tuple(cut.grid),
            kernels.work_for(cut),
            norm,
            eps,
            _act(activation),
            partial,
            m2,
            y_,
        )


def renorm_forward(
    x: NDArray,
    gamma: NDArray,
    beta: NDArray,
    running_mean: NDArray,
    running_var: NDArray,
    r_max: float,
    d_max: float,
    eps: float,
    residual: NDArray | None,
    activation: Fused,
    y: NDArray,
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """y = act(gamma (x_hat r + d) + beta [+ residual]); return mean, M2, rstd, r and d, each (C,).

    gamma, beta and the running statistics are float64.
    """
    mean, m2, rstd, r, d, gamma_, beta_ = (np.empty(x.shape[1]) for _ in range(7))
    renorm = (running_mean, running_var, r_max, d_max), gamma, beta, r, d
    _forward(x, (mean, rstd, gamma_, beta_, renorm), m2, eps, residual, activation, y)
    return mean, m2, rstd, r, d


def renorm_factors(
    mean: NDArray,
    m2: NDArray,
    count: int,
    eps: float,
    running_mean: NDArray,
    running_var: NDArray,
    r_max: float,
    d_max: float,
) -> tuple[NDArray, NDArray]:
    """Return r and d of batch renormalization, shape (C,) each; all arrays are float64."""
    r, d = np.empty(mean.size), np.empty(mean.size)
    population = running_mean, running_var, r_max, d_max
    kernels.renorm_factors_all(mean, m2, float(count), eps, population, r, d)
    return r, d


def rstd(var: NDArray, eps: float) -> NDArray:
    """Return 1 / sqrt(var + eps), shape (C,); 0 where var + eps is 0, as in `forward`."""
    result = np.empty(var.size)
    kernels.rstd_all(var, eps, result)
    return result


def move(
    running_mean: NDArray,
    running_var: NDArray,
    mean: NDArray,
    m2: NDArray,
    momentum: float,
    divisor: float,
) -> None:
    """Update running statistics in place from a batch's mean and its variance M2 / divisor.

    running = (1 - momentum) running + momentum batch, rounded once to running's dtype. The running
    arrays may have any strides.
    """
    compiled = running_mean.dtype in _COMPILED and running_var.dtype in _COMPILED
    if compiled and running_mean.flags.carray and running_var.flags.carray:
        if running_mean.ndim > 1:
            running_mean, running_var = running_mean.reshape(-1), running_var.reshape(-1)
        kernels.move(running_mean, running_var, mean, m2, momentum, divisor)
        return
    _running.move((running_mean, running_var), (mean, m2 / divisor), momentum)


def backward_reduce(
    dy: NDArray,
    x: NDArray,
    gamma: NDArray,
    mean: NDArray,
    rstd: NDArray,
    beta: NDArray | None,
    y: NDArray | None,
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> NDArray:
    """Return sum g and sum g x_hat of each channel, shape (2, C), where g = dy act'(z)."""
    cut, run = _cut(x, 2 + (y is not None), weights)
    dy_, x_, y_ = _view(dy), _x(x, cut, weights), _view(y)
    norm = _norm(activation, mean, rstd, gamma, beta)
    partial, sums = np.empty((2, cut.chunks, cut.grid.C)), np.empty((2, cut.grid.C))
    with turn(cut.parallel):
        run.backward_reduce(
            dy_, x_, y_, tuple(cut.grid), kernels.work_for(cut), norm, partial, sums
        )
    return sums


def backward_apply(
    dy: NDArray,
    x: NDArray,
    gamma: NDArray,
    mean: NDArray,
    rstd: NDArray,
    sums: NDArray | None,
    count: int,
    beta: NDArray | None,
    y: NDArray | None,
    dx: NDArray | None,
    dresidual: NDArray | None,
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> None:
    """Write dresidual = g = dy act'(z) and dx; either may be None.

    dx = gamma rstd (g - w (sums[0] + x_hat sums[1]) / count), where w is the value's weight, or 1;
    dx = gamma rstd g if sums is None (mean and rstd are constants). Both are 0 where w is 0.
    """
    cut, run = _cut(x, 2 + (y is not None) + (dx is not None) + (dresidual is not None), weights)
    norm = _norm(activation, mean, rstd, gamma, beta)
    dy_, x_, y_, dx_, dresidual_ = (
        _view(dy), _x(x, cut, weights), _view(y), _view(dx), _view(dresidual),
    )  # fmt: skip
    m: Any = float(count) if weights is None else np.full(cut.grid.C, count, np.float64)
    with turn(cut.parallel):
        run.backward_apply(
            dy_,
            x_,
            y_,
            tuple(cut.grid),
            kernels.work_for(cut),
            norm,
            sums,
            m,
            dx_,
            dresidual_,
        )


def backward(
    dy: NDArray,
    x: NDArray,
    gamma: NDArray,
    mean: NDArray,
    rstd: NDArray,
    beta: NDArray | None,
    y: NDArray | None,
    dx: NDArray | None,
    dresidual: NDArray | None,
    activation: Activation | None = None,
    *,
    weights: Any = None,
) -> NDArray:
    """Call `backward_reduce`, then `backward_apply` with its sums; return the sums."""
    cut, run = _cut(x, 2 + (y is not None) + (dx is not None) + (dresidual is not None), weights)
    norm = _norm(activation, mean, rstd, gamma, beta)
    dy_, x_, y_, dx_, dresidual_ = (
        _view(dy), _x(x, cut, weights), _view(y), _view(dx), _view(dresidual),
    )  # fmt: skip
    count = float(x.shape[0] * x.shape[2]) if weights is None else weights.count
    partial, sums = np.empty((2, cut.chunks, cut.grid.C)), np.empty((2, cut.grid.C))
    with turn(cut.parallel):
        run.backward(
            dy_,
            x_,
            y_,
            tuple(cut.grid),
            kernels.work_for(cut),
            norm,
            count,
            partial,
            sums,
            dx_,
            dresidual_,
        )
    return sums


def jvp(
    tx: NDArray,
    x: NDArray,
    gamma: NDArray,
    mean: NDArray,
    rstd: NDArray,
    tgamma: NDArray,
    tbeta: NDArray,
    training: bool,
    ty: NDArray,
) -> None:
    """ty = gamma rstd (tx - mean(tx) - x_hat mean(tx x_hat)) + tgamma x_hat + tbeta.

    Both means are 0 unless `training`. gamma, tgamma and tbeta are float64.
    """
    cut, _ = _cut(x, 3)
    run = second_order.rows if cut.traversal == "rows" else second_order.columns
    tx_, x_, ty_ = _view(tx), _view(x), _view(ty)
    count = float(x.shape[0] * x.shape[2]) if training else np.inf
    partial, sums = np.empty((2, cut.chunks, cut.grid.C)), np.zeros((2, cut.grid.C))
    with turn(cut.parallel):
        run.jvp(
            tx_,
            x_,
            tuple(cut.grid),
            kernels.work_for(cut),
            (mean, rstd, gamma, None),
            (tgamma, tbeta),
            count,
            partial,
            sums,
            ty_,
        )


def double_backward(
    ddx: NDArray,
    dy: NDArray,
    x: NDArray,
    gamma: NDArray,
    mean: NDArray,
    rstd: NDArray,
    ddgamma: NDArray,
    ddbeta: NDArray,
    training: bool,
    ddy: NDArray,
    dx: NDArray,
) -> NDArray:
    """Differentiate `backward` (docs/math.md): write ddy and dx, return gamma's gradient, (C,).

    gamma, ddgamma and ddbeta are float64. Statistics are constants if not `training`.
    """
    cut, _ = _cut(x, 5)
    run = second_order.rows if cut.traversal == "rows" else second_order.columns
    ddx_, dy_, x_, ddy_, dx_ = _view(ddx), _view(dy), _view(x), _view(ddy), _view(dx)
    count = float(x.shape[0] * x.shape[2]) if training else np.inf
    partial, sums = np.empty((5, cut.chunks, cut.grid.C)), np.empty((5, cut.grid.C))
    with turn(cut.parallel):
        run.double_backward(
            ddx_,
            dy_,
            x_,
            tuple(cut.grid),
            kernels.work_for(cut),
            (mean, rstd, gamma, None),
            (ddgamma, ddbeta),
            count,
            partial,
            sums,
            ddy_,
            dx_,
        )
    dgamma: NDArray = rstd * sums[4]
    return dgamma


def _cut(x: NDArray, tensors: int, weights: Any = None) -> tuple[Plan, Any]:
    """Return the plan of a pass over `tensors` arrays of x's size, and its traversal's kernels."""
    # Small passes are serial. Asking for the number of threads would start them.
    threads = 1 if x.size < SERIAL_BELOW else thread_count()
    if weights is None:
        cut = plan(*x.shape, x.itemsize, threads, _CACHES, tensors)
        return cut, kernels.rows if cut.traversal == "rows" else kernels.columns
    cut = plan(*x.shape, x.itemsize, threads, _CACHES, tensors, WEIGHTED_PLANE)
    return cut, kernels.weighted_rows if cut.traversal == "rows" else kernels.weighted_columns


def _x(x: NDArray, cut: Plan, weights: Any) -> Any:
    """Return x as kernels take it, with the weights if there are any."""
    if weights is None:
        return _view(x)
    _, C, S = x.shape
    w = weights.values
    if w.shape[1] < C and cut.traversal == "columns":
        if S == 1 and cut.grid.fold == 1:
            return _view(x), (_row(w), 1), weights.fill
        w = np.ascontiguousarray(np.broadcast_to(w, x.shape))
    shared = w.shape[1] == 1
    along_c = None if shared and cut.traversal == "rows" else S
    return _view(x), (_row(w), S if shared else C * S, along_c), weights.fill


def weigh(values: NDArray, C: int) -> NDArray:
    """Return the sum of weights of each channel, float64 of shape (C,).

    `values` have shape (N, C, S), or (N, 1, S) if all channels share them, in C order.
    """
    N, channels, S = values.shape
    if channels == 1 or values.size == 0:
        mask = values.dtype == np.uint8
        shared = np.count_nonzero(values) if mask else values.sum(dtype=np.float64)
        return np.full(C, shared, np.float64)
    parts = min(N, 64) if values.size >= SERIAL_BELOW else 1  # for any number of threads
    partial = np.zeros((parts, channels))
    parallel = parts > 1
    workers = (pool(), thread_count()) if parallel else (0, 1)
    with turn(parallel):
        kernels.weigh(_row(values), N, S, partial, *workers)
    total: NDArray = partial.sum(axis=0)
    return total


def _act(activation: Fused) -> Any:
    """Return what kernels take; for None and ReLU a lower bound of y, so one kernel serves both."""
    if activation is None:
        return -np.inf
    return 0.0 if activation == "relu" else functions.argument(activation)


def _norm(activation: Activation | None, *norm: NDArray | None) -> tuple[Any, ...]:
    """Return (mean, rstd, gamma, beta), followed by an activation other than ReLU."""
    return norm if activation is None else (*norm, functions.argument(activation))


def _view(array: NDArray | None) -> tuple[NDArray, int, int] | None:
    """Return (memory, stride of n, stride of c), strides in values, as kernels take an array.

    Memory is typed as one-dimensional, contiguous and writeable, so one compiled kernel serves
    every layout and read-only inputs too; kernels write to no input. Half precision is passed as
    its bits (uint16, int16), integers of 16 bits as records: see `storage`.
    """
    if array is None:
        return None
    if array.itemsize != 2:
        return _strided(array)
    if array.dtype.kind in "iu":
        memory, n, c = _strided(array)
        return memory.view([("integer", memory.dtype)]), n, c
    return _strided(array.view(np.uint16 if array.dtype == np.float16 else np.int16))


def _strided(array: NDArray) -> tuple[NDArray, int, int]:
    """`_view` of an array whose dtype kernels take directly."""
    N, C, S = array.shape
    if array.flags.carray:
        return array.reshape(-1), C * S, S
    n, c = (stride // array.itemsize for stride in array.strides[:2])
    extent = (N - 1) * n + (C - 1) * c + S
    return np.asarray(_Memory(array, extent)), n, c


def _row(array: NDArray) -> NDArray:
    """Return an array in C order as one row, typed as writeable; see `_view`."""
    return array.reshape(-1) if array.flags.writeable else np.asarray(_Memory(array, array.size))


class _Memory:
    """The memory that an array spans, exposed to NumPy as one writeable row."""

    def __init__(self, array: NDArray, extent: int) -> None:
        self.owner = array
        self.__array_interface__ = {
            "version": 3,
            "data": (array.__array_interface__["data"][0], False),
            "shape": (extent,),
            "typestr": array.dtype.str,
        }
