"""Batch renormalization (Ioffe 2017): training that normalises almost as inference does.

r and d are constants per channel, so gamma (x_hat r + d) + beta is batch normalization with
gamma' = gamma r and beta' = beta + gamma d. Forward computes these between the two steps of its
pass, and backward has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import on_host, on_its_device
from nbnorm._checks import NOT_GIVEN
from nbnorm._frame import Frame
from nbnorm._typing import Activation, Array, Axis, Mask, NDArray, X
from nbnorm.functional import (
    BackwardCall,
    BatchNormBackward,
    ForwardCall,
    check_backward,
    check_forward,
)

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class Ramp:
    """A number that changes linearly between two batches, and is constant before and after.

    Attributes
    ----------
    begin, end : int
        Numbers of batches between which it changes.
    first, last : float
        Value up to batch `begin`, and from batch `end` on.

    Examples
    --------
    >>> from nbnorm import Ramp
    >>> r_max = Ramp(5_000, 40_000, 1.0, 3.0)
    >>> r_max(0), r_max(22_500), r_max(1_000_000)
    (1.0, 2.0, 3.0)
    """

    begin: int
    end: int
    first: float
    last: float

    def __call__(self, batch: int) -> float:
        """Return the value at a batch."""
        if batch <= self.begin:
            return self.first
        if batch >= self.end:
            return self.last
        return self.first + (self.last - self.first) * (batch - self.begin) / (
            self.end - self.begin
        )


class Renorm(NamedTuple):
    """Bounds of batch renormalization, for the option `renorm` of `BatchNorm`.

    Attributes
    ----------
    r_max : float, or callable of int
        r is clipped to [1 / r_max, r_max]: a number >= 1, or a function that returns one for the
        number of batches that the layer has seen (``num_batches_tracked``).
    d_max : float, or callable of int
        d is clipped to [-d_max, d_max]: a number >= 0, or such a function.

    Notes
    -----
    The defaults follow section 4 of Ioffe (2017): batch normalization for 5,000 batches, then
    bounds that grow to r_max = 3 at 40,000 batches and d_max = 5 at 25,000. Scale these numbers
    with the length of the training.

    Examples
    --------
    >>> from nbnorm import BatchNorm, Ramp, Renorm
    >>> layer = BatchNorm(64, renorm=Renorm(r_max=Ramp(100, 800, 1, 3), d_max=Ramp(100, 500, 0, 5)))
    >>> layer.renorm.bounds(450)
    {'r_max': 2.0, 'd_max': 4.375}
    """

    r_max: Schedule = Ramp(5_000, 40_000, 1.0, 3.0)
    d_max: Schedule = Ramp(5_000, 25_000, 0.0, 5.0)

    def bounds(self, batch: int) -> dict[str, Any]:
        """Return r_max and d_max at a batch, as keywords of `batch_renorm_forward`."""
        return {
            name: value(batch) if callable(value) else value
            for name, value in self._asdict().items()
        }


class BatchRenormForward(NamedTuple, Generic[X]):
    """Result of `batch_renorm_forward`.

    Attributes
    ----------
    y : array
        Result, with the shape, dtype and memory order of x.
    mean, rstd : array of float64
        Statistics of the batch, as in `BatchNormForward`.
    r, d : array of float64
        Corrections of scale and shift, with the shape of the channel axes.
    """

    y: X
    mean: Array
    rstd: Array
    r: Array
    d: Array


@on_its_device("x")
def batch_renorm_forward(
    x: X,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
    out: Array | None = None,
) -> BatchRenormForward[X]:
    """Normalise x with the batch's statistics, corrected towards the running ones.

    Computes y = act(gamma x_hat + beta [+ residual]) with x_hat = (x - mean) rstd r + d. The
    corrections r = clip(std / running_std, 1 / r_max, r_max) and
    d = clip((mean - running_mean) / running_std, -d_max, d_max) lead to the running statistics
    where they are not clipped: x_hat is then (x - running_mean) / running_std, as at inference.

    Parameters
    ----------
    x : array, at least 2-d
        Any dtype that `batch_norm_forward` accepts.
    gamma, beta : array of the shape of the channel axes, or None
        Scale and shift. None means 1 and 0.
    running_mean, running_var : array of the shape of the channel axes
        Population statistics, which determine r and d and are then updated **in place**, as by
        `batch_norm_forward`. Their standard deviation is sqrt(running_var + eps).
    r_max : float, default 3.0
        At least 1; infinity does not clip. ``r_max=1`` and ``d_max=0`` make this
        `batch_norm_forward`.
    d_max : float, default 5.0
        Not negative; infinity does not clip.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variances.
    correction : int, default 1
        1 updates running_var with the unbiased variance, 0 with the biased one.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    residual : array of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last.
    out : array of x's shape and dtype, optional
        As in `batch_norm_forward`.

    Returns
    -------
    BatchRenormForward
        (y, mean, rstd, r, d), arrays of x's library. y is `out` itself if given.

    Raises
    ------
    TypeError
        As in `batch_norm_forward`; r_max or d_max is not a number.
    ValueError
        As in `batch_norm_forward`; a running statistic is None; r_max is less than 1, d_max
        negative, or one is NaN.

    Notes
    -----
    Implements Algorithm 1 of S. Ioffe, *Batch Renormalization* (2017), with running averages of the
    variance instead of the standard deviation. gamma r and beta + gamma d are computed in float64,
    between the statistics of a block of channels and its y. Inference is `batch_norm_inference`. If
    a standard deviation and the running one are both 0, r is 1; likewise d is 0 for equal means. An
    empty batch has r = 1 and d = 0.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0], [3.0]])
    >>> mean, var = np.array([1.0]), np.array([4.0])
    >>> y, *_, r, d = nbnorm.batch_renorm_forward(x, None, None, mean, var, eps=0.0)
    >>> y  # (x - 1) / 2: both bounds are wide enough
    array([[0.],
           [1.]])
    >>> r, d
    (array([0.5]), array([0.5]))
    """
    for name, statistic in ("running_mean", running_mean), ("running_var", running_var):
        if statistic is None:
            raise ValueError(f"{name} is None; batch renormalization requires both statistics")
    bounds = checked_bounds(r_max, d_max)
    call = check_forward(
        x, gamma, beta, running_mean, running_var, True, momentum, eps, correction, axis,
        residual, activation, out, alone=False,
    )  # fmt: skip
    frame, running = call.frame, call.running
    assert running is not None
    _checks.enough_values(frame.m, call.correction, "x of shape {}", frame.x.shape)
    y = frame.target(call.out)
    if frame.empty:
        mean, rstd = frame.memory.zeros(frame.channels), frame.memory.zeros(frame.channels)
        r, d = _none(frame)
    else:
        mean, m2, rstd, r, d = frame.backend.renorm_forward(
            frame.view(frame.x),
            *parameters(call),
            *bounds,
            call.eps,
            frame.view(call.residual),
            call.activation,
            y.written,
        )
        frame.backend.move(*running, mean, m2, call.momentum, frame.m - call.correction)
    return BatchRenormForward(
        frame.settle(y), *(frame.home(frame.unflat(array)) for array in (mean, rstd, r, d))
    )


@on_its_device("x", instead="y")
def batch_renorm_backward(
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    r: Array,
    d: Array,
    *,
    beta: Array | None = NOT_GIVEN,
    y: Array | None = None,
    residual: Array | None = None,
    axis: Axis = 1,
    activation: Activation = None,
    output_mask: Mask = (True, True, True, True),
    out: Array | None = None,
) -> BatchNormBackward[X]:
    """Compute the gradients of `batch_renorm_forward`, with r and d as constants.

    dx = gamma r rstd (dy - mean(dy) - x_hat mean(dy x_hat)), with x_hat = (x - mean) rstd;
    dgamma = r sum dy x_hat + d sum dy, dbeta = sum dy.

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of y. Any strides, including broadcast ones. May be float32 if x is float16 or
        bfloat16.
    x : array, at least 2-d, or None
        Input of the forward call. If that wrote y over it (``out=x``), pass None and `y`; see
        `batch_norm_backward` for the conditions.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd, r, d : array of the shape of the channel axes
        As returned by the forward call.
    beta : array of the shape of the channel axes, or None
        As in the forward call. With ``activation="relu"`` pass it or `y`; without, it may be
        omitted, unless x is None.
    y : array of x's shape and dtype, optional
        Result of the forward call, required with ReLU if that added a residual, or if x is None.
    residual : array of x's shape and dtype, optional
        Residual of the forward call, required with another activation; see `batch_norm_backward`.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    activation : None, str or Activation, default None
        As in the forward call.
    output_mask : 4 bools, default all True
        Which of dx, dgamma, dbeta, dresidual to compute; the others are None.
    out : array of x's shape and dtype, optional
        Array to write dx to, if dx is requested. It may be dy itself; it must not overlap an input
        in any other way.

    Returns
    -------
    BatchNormBackward
        (dx, dgamma, dbeta, dresidual), as from `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`, also for r and d.

    Notes
    -----
    Implements the gradients in section 3 of Ioffe (2017).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> mean, rstd, r, d = (np.array([value]) for value in (2.0, 1.0, 0.5, 0.5))
    >>> grads = nbnorm.batch_renorm_backward(dy, x, None, mean, rstd, r, d)
    >>> grads.dgamma, grads.dbeta
    (array([0.5]), array([1.5]))
    """
    call = check_backward(dy, x, gamma, mean, rstd, beta, axis, activation, y=y, residual=residual)
    frame, wanted = call.frame, call.wanted(output_mask)
    r_, d_ = (
        frame.statistic(frame.required_per_channel(a, name)) for a, name in ((r, "r"), (d, "d"))
    )
    out_ = frame.out(out, inplace="dy")
    folded = with_r_and_d(call, r_, d_)
    dx, sums, dresidual = folded.gradients(wanted, True, out_)
    return BatchNormBackward(
        dx and frame.settle(dx),
        frame.parameter_gradient(gamma_sum(sums, r_, d_), call.gamma) if wanted.dgamma else None,
        frame.parameter_gradient(sums[0], call.gamma) if wanted.dbeta else None,
        dresidual and frame.settle(dresidual),
    )


def checked_bounds(r_max: Any, d_max: Any) -> tuple[float, float]:
    """Return both bounds as floats; raise if r_max < 1, d_max < 0 or one is NaN."""
    return _at_least(1, r_max, "r_max"), _at_least(0, d_max, "d_max")


def parameters(call: ForwardCall) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return gamma, beta and the running statistics as `renorm_forward` takes them."""
    frame, running = call.frame, call.running
    assert running is not None
    return (
        frame.statistic_or(call.gamma, 1.0),
        frame.statistic_or(call.beta, 0.0),
        frame.statistic(running[0]),
        frame.statistic(running[1]),
    )


def corrected(
    call: ForwardCall, mean: NDArray, m2: NDArray, count: int, bounds: tuple[float, float]
) -> tuple[ForwardCall, NDArray, NDArray]:
    """Return (call, r, d), with gamma r as the call's gamma and beta + gamma d as its beta."""
    frame = call.frame
    if count == 0:
        r, d = _none(frame)
    else:
        population = parameters(call)[2:]
        r, d = frame.backend.renorm_factors(mean, m2, count, call.eps, *population, *bounds)
    gamma_, beta_ = _folded(frame, call.gamma, call.beta, r, d)
    return call._replace(gamma=gamma_, beta=beta_), r, d


def with_r_and_d(call: BackwardCall, r: NDArray, d: NDArray) -> BackwardCall:
    """Return the call of batch normalization that has the same dx."""
    gamma_, beta_ = _folded(call.frame, call.gamma, call.beta, r, d)
    if call.from_y:
        rstd = call.frame.statistic(call.rstd)
        _checks.divisor(on_host(gamma_), call.frame.x.dtype, on_host(rstd))
    return call._replace(gamma=gamma_, beta=beta_)


def gamma_sum(sums: NDArray, r: NDArray, d: NDArray) -> NDArray:
    """Return dgamma in float64, of shape (C,), from sum dy and sum dy x_hat."""
    with np.errstate(all="ignore"):  # NaN and Inf stay in their channel
        total: NDArray = r * sums[1] + d * sums[0]
        return total


def _none(frame: Frame) -> tuple[NDArray, NDArray]:
    """Return r = 1 and d = 0, for an empty batch."""
    return frame.memory.zeros(frame.channels) + 1.0, frame.memory.zeros(frame.channels)


def _folded(
    frame: Frame, gamma: NDArray | None, beta: NDArray | None, r: NDArray, d: NDArray
) -> tuple[NDArray, NDArray]:
    """Return gamma r and beta + gamma d in float64, of shape (C,)."""
    gamma_, beta_ = r, d
    with np.errstate(all="ignore"):  # NaN and Inf stay in their channel
        if gamma is not None:
            wide = frame.statistic(gamma)
            gamma_, beta_ = wide * r, wide * d
        return gamma_, beta_ if beta is None else frame.statistic(beta) + beta_


def _at_least(least: float, value: Any, name: str) -> float:
    """Return a bound as a float; raise if it is NaN or too small."""
    bound = _checks.number(value, name)
    if not bound >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return bound
