"""Batch normalization of a batch in parts (micro-batches) that need not all fit in memory.

Each pass reads the parts twice: for the statistics (or sums) of the whole batch, and for y (or dx),
which is computed part by part while the caller iterates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import on_its_device
from nbnorm._pairwise import Pairwise
from nbnorm._sweeps import Kind, Parts, Recomputed, Sweeps, kind_of
from nbnorm._typing import Activation, Array, Axis, NDArray, X
from nbnorm.functional import (
    batch_norm_apply,
    batch_norm_backward_apply,
    check_backward,
    check_forward,
    flat_stats,
)
from nbnorm.moments import Moments, update_running_stats

__all__ = [
    "MicroBatchNormBackward",
    "MicroBatchNormForward",
    "micro_batch_norm_backward",
    "micro_batch_norm_forward",
]

# Forward


class MicroBatchNormForward(NamedTuple, Generic[X]):
    """Result of `micro_batch_norm_forward`.

    Attributes
    ----------
    ys : Recomputed
        Normalised parts, each with the shape, dtype and memory order of its x.
    mean, rstd : array of float64
        Statistics of all parts together, with the shape of the channel axes.
    count : int
        Number of values per channel in all parts together, needed by the backward pass.
    """

    ys: Recomputed[X]
    mean: Array
    rstd: Array
    count: int  # type: ignore[assignment]  # shadows tuple.count, on purpose


def micro_batch_norm_forward(
    xs: Parts[X],
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    activation: Activation = None,
) -> MicroBatchNormForward[X]:
    """Compute `batch_norm_forward` in training for a batch that comes in parts.

    Reads all parts once for the statistics of the whole batch. The parts of y are computed while
    the caller iterates over them: ``for y in forward.ys``.

    Parameters
    ----------
    xs : iterable of arrays that can be read twice, or function that returns an iterable
        Parts of the batch (a list of memory maps, ``lambda: map(np.load, files)``): arrays that
        `batch_norm_forward` accepts, of one dtype, which may differ in size and may be empty.
        Every reading must yield the same parts in the same order.
    gamma, beta : array of the shape of the channel axes, optional
        Scale and shift. None means 1 and 0. They must not change until `ys` has been read.
    running_mean, running_var : array of the shape of the channel axes, optional
        Population statistics; pass both or neither. They are updated **in place**, once, with the
        statistics of the whole batch.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        The running variance averages M2 / (m - correction), with m the count of all parts.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    activation : None, str or Activation, default None
        Applied last.

    Returns
    -------
    MicroBatchNormForward
        (ys, mean, rstd, count).

    Raises
    ------
    TypeError
        `xs` is an array or can be read only once (an iterator, such as a generator); a part has
        another dtype than the first, or is not an array; or as in `batch_norm_forward`.
    ValueError
        `xs` has no parts, or they differ in the shape of the channel axes; all parts together have
        too few values per channel for `correction`; or as in `batch_norm_forward`. Nothing has been
        written then. While reading `ys`: `xs` yields other parts than before.

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015) over all parts. Their moments are merged
    in pairs, then pairs of pairs, as in `population_stats`, with the formula of Chan, Golub &
    LeVeque (1983). The same parts always give the same bits; one part gives those of
    `batch_norm_forward`, two or three those of ranks with the same parts (`nbnorm.distributed`).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> parts = [np.array([[1.0], [3.0]]), np.array([[8.0]])]
    >>> forward = nbnorm.micro_batch_norm_forward(parts)
    >>> forward.mean, forward.count
    (array([4.]), 3)
    >>> for y in forward.ys:
    ...     print(y.round(2).tolist())
    [[-1.02], [-0.34]]
    [[1.36]]
    """
    sweeps = Sweeps(xs=xs)
    statistics = partial(
        _statistics, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var,
        momentum=momentum, eps=eps, correction=correction, axis=axis, activation=activation,
    )  # fmt: skip
    merged = Pairwise()
    for moments in sweeps.first(statistics):
        merged.add(moments)
    count, mean, _ = moments = merged.total()
    _checks.enough_values(count, correction, "{} in all parts together", count)
    rstd = moments.rstd(eps)
    if running_mean is not None:
        update_running_stats(
            running_mean, running_var, moments, momentum=momentum, correction=correction
        )
    normalise = partial(
        batch_norm_apply, gamma=gamma, beta=beta, mean=mean, rstd=rstd, axis=axis,
        activation=activation,
    )  # fmt: skip
    return MicroBatchNormForward(sweeps.again(normalise), mean, rstd, count)


@on_its_device("x")
def _statistics(
    x: Array, *, gamma: Any, beta: Any, running_mean: Any, running_var: Any, **options: Any
) -> tuple[Moments, Kind]:
    """Check all arguments with a part of x; return its moments and what all parts must share."""
    call = check_forward(
        x, gamma, beta, running_mean, running_var, True, **options, residual=None, out=None,
        alone=False,
    )  # fmt: skip
    frame = call.frame
    mean, m2 = (frame.home(frame.unflat(array)) for array in flat_stats(frame))
    return Moments(frame.m, mean, m2), kind_of(frame)


# Backward


class MicroBatchNormBackward(NamedTuple, Generic[X]):
    """Result of `micro_batch_norm_backward`.

    Attributes
    ----------
    dxs : Recomputed
        Gradients of the parts of x, each with the shape, dtype and memory order of its x.
    dgamma, dbeta : array
        Gradients over all parts, with the shape of the channel axes and the dtype of gamma.
    """

    dxs: Recomputed[X]
    dgamma: Array
    dbeta: Array


def micro_batch_norm_backward(
    dys: Parts[Array],
    xs: Parts[X],
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    count: int,
    *,
    beta: Array | None,
    axis: Axis = 1,
    activation: Activation = None,
) -> MicroBatchNormBackward[X]:
    """Compute the gradients of `micro_batch_norm_forward`.

    Reads all parts once for dgamma and dbeta, on which every dx depends. The parts of dx are
    computed while the caller iterates over them: ``for dx in backward.dxs``.

    Parameters
    ----------
    dys : iterable of arrays that can be read twice, or function that returns an iterable
        Gradients of the parts of y, with the shapes and dtype of `xs`, in the same order. They must
        come from one loss over the whole batch, such as the mean over all samples.
    xs : iterable of arrays that can be read twice, or function that returns an iterable
        The parts of x, as in the forward call.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        As returned by the forward call.
    count : int
        As returned by the forward call: number of values per channel in all parts together.
    beta : array of the shape of the channel axes, or None
        As in the forward call.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    activation : None, str or Activation, default None
        As in the forward call.

    Returns
    -------
    MicroBatchNormBackward
        (dxs, dgamma, dbeta). dgamma and dbeta are float64 sums over all parts, rounded once to
        gamma's dtype, or to x's if gamma is None.

    Raises
    ------
    TypeError
        `dys` or `xs` is an array or can be read only once (an iterator, such as a generator); a
        part has another dtype than the first; count is not an int; or as in
        `batch_norm_backward`.
    ValueError
        There are no parts, or not as many of `dys` as of `xs`; count is not the number of values
        per channel in all parts; or as in `batch_norm_backward`. While reading `dxs`: the
        parts have changed.

    Notes
    -----
    Implements section 3 of Ioffe & Szegedy (2015), with both sums over all parts. The sums of parts
    are added in float64, in pairs, then pairs of pairs.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> xs = [np.array([[1.0], [3.0]]), np.array([[5.0]])]
    >>> dys = [np.array([[1.0], [0.0]]), np.array([[0.0]])]
    >>> ys, *saved = nbnorm.micro_batch_norm_forward(xs)
    >>> grads = nbnorm.micro_batch_norm_backward(dys, xs, None, *saved, beta=None)
    >>> grads.dgamma.round(3), grads.dbeta
    (array([-1.225]), array([1.]))
    >>> abs(sum(dx.sum() for dx in grads.dxs)) < 1e-12  # a shift of the whole batch changes nothing
    np.True_
    """
    sweeps = Sweeps(dys=dys, xs=xs)
    options: dict[str, Any] = {
        "gamma": gamma, "mean": mean, "rstd": rstd, "beta": beta, "axis": axis,
        "activation": activation,
    }  # fmt: skip
    added = Pairwise()
    for sums in sweeps.first(partial(_sums, count=count, **options)):
        added.add(sums)
    total: _Sums = added.total()
    if total.count != count:
        raise ValueError(
            f"count is {count}, but all parts of xs have {total.count} values per channel"
        )
    sum_dy, sum_dy_xhat = total.rounded(np.float64)
    dbeta, dgamma = total.rounded(total.dtype)
    differentiate = partial(
        batch_norm_backward_apply, sum_dy=sum_dy, sum_dy_xhat=sum_dy_xhat, count=count, **options
    )
    return MicroBatchNormBackward(sweeps.again(differentiate), dgamma, dbeta)


class _Sums(NamedTuple):
    """Sum dy and sum dy x_hat of parts, float64 of shape (2, C), and what `rounded` needs."""

    count: int  # type: ignore[assignment]  # shadows tuple.count, on purpose
    flat: NDArray
    shape: tuple[int, ...]  # of the channel axes
    dtype: np.dtype[Any]  # of the gradients
    home: Callable[[NDArray], Array]

    def merge(self, other: _Sums) -> _Sums:
        """Return both, added."""
        return self._replace(count=self.count + other.count, flat=_added(self.flat, other.flat))

    def rounded(self, dtype: Any) -> tuple[Array, Array]:
        """Return both sums in a dtype, as arrays of x's library."""
        first, second = _cast(self.flat, dtype)
        return self.home(first.reshape(self.shape)), self.home(second.reshape(self.shape))


@on_its_device("a")
def _added(a: NDArray, b: NDArray) -> NDArray:
    with np.errstate(all="ignore"):  # a NaN or Inf in one channel is not worth a warning
        return a + b


@on_its_device("a")
def _cast(a: NDArray, dtype: Any) -> NDArray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # IEEE results
        return a.astype(dtype)


@on_its_device("x")
def _sums(
    dy: Array,
    x: Array,
    *,
    gamma: Any,
    mean: Any,
    rstd: Any,
    count: Any,
    beta: Any,
    axis: Axis,
    activation: Activation,
) -> tuple[_Sums, Kind]:
    """Check all arguments with a part of dy and x; return its sums and what parts must share."""
    call = check_backward(dy, x, gamma, mean, rstd, beta, axis, activation, y=None)
    frame = call.frame
    _checks.whole_count(count, frame.x)
    flat: NDArray = frame.memory.zeros((2, frame.channels))
    if not frame.empty:
        operands, mask = call.operands()
        flat = frame.backend.backward_reduce(*operands, *mask, call.recomputed)
    dtype = frame.x.dtype if call.gamma is None else call.gamma.dtype
    return _Sums(frame.m, flat, frame.channel_shape, dtype, frame.home), kind_of(frame)
