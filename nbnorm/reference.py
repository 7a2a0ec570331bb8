"""Reference implementation: batch normalization in plain NumPy, one line per equation of the paper.

Implements the array functions of nbnorm under the same names and arguments, after S. Ioffe
& C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015). Comments cite the equations: Algorithm 1 is the transform of a mini-batch,
Algorithm 2 trains a network and then freezes it, section 3 has the gradients. docs/math.md derives
them.

The module is meant for reading and testing. It is slow, takes only NumPy arrays, hardly checks
arguments, and shares only the table of activations with the kernels. It computes in float64, or in
longdouble if x is float64 or there is no x (folding, running statistics, backward from y), and
returns results in that dtype. Only `out` and running statistics updated in place are rounded to
their own dtypes.

Examples
--------
>>> import numpy as np
>>> from nbnorm import reference
>>> x = np.array([[1.0], [3.0]], dtype=np.float32)
>>> y, mean, rstd = reference.batch_norm_forward(x, eps=0.0)
>>> y
array([[-1.],
       [ 1.]])
>>> reference.batch_norm_backward(np.array([[1.0], [0.0]], np.float32), x, None, mean, rstd)
BatchNormBackward(dx=array([[0.],
       [0.]]), dgamma=array([-1.]), dbeta=array([1.]), dresidual=None)
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm._checks import NOT_GIVEN, given
from nbnorm._typing import Activation, Axis, NDArray
from nbnorm.activations import Activation as Activation_
from nbnorm.activations import Math
from nbnorm.functional import BatchNormBackward, BatchNormForward
from nbnorm.moments import Moments
from nbnorm.renorm import BatchRenormForward
from nbnorm.second_order import BatchNormDoubleBackward

OptArray = NDArray | None

# NaN and Inf are valid data: they pass through without a warning.
_quiet = np.errstate(all="ignore")


@_quiet
def batch_norm_forward(
    x: NDArray, gamma: OptArray = None, beta: OptArray = None, running_mean: OptArray = None,
    running_var: OptArray = None, *, training: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, correction: int = 1, axis: Axis = 1, residual: OptArray = None,
    activation: Activation = None, groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None, fill: float | None = 0.0,
    out: OptArray = None,
) -> BatchNormForward[NDArray]:  # fmt: skip
    """Algorithm 1; with ``training=False``, the same map with the running statistics.

    Returns y, with x's shape, and mean and rstd = 1/sqrt(var + eps), with that of the channel axes.
    """
    parts: Any = {"groups": groups, "offsets": offsets}
    parts |= {"weights": _what_counts(x, axis, mask, lengths, length_axis, weights)}
    if training:
        batch = batch_norm_stats(x, axis=axis, **parts)
        mean, var = batch.mean, _ratio(batch.m2, np.asarray(batch.count), 0)
        rstd = np.where(np.equal(batch.count, 0), 0, _rstd(var, eps))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = _wide(running_mean, x), _rstd(_wide(running_var, x), eps)
        if groups is not None or offsets is not None:  # the same for each part
            number = len(_ends(x, axis, groups, offsets)) - 1
            mean, rstd = np.stack([mean] * number), np.stack([rstd] * number)
    y = batch_norm_apply(
        x,
        gamma,
        beta,
        mean,
        rstd,
        axis=axis,
        residual=residual,
        activation=activation,
        **parts,
        fill=fill,
        out=out,
    )
    if training and running_mean is not None and running_var is not None:
        update_running_stats(
            running_mean, running_var, batch, momentum=momentum, correction=correction
        )
    return BatchNormForward(y, mean, rstd)


@_quiet
def batch_norm_inference(
    x: NDArray, gamma: OptArray, beta: OptArray, mean: NDArray, var: NDArray, *, eps: float = 1e-5,
    axis: Axis = 1, residual: OptArray = None, activation: Activation = None,
    groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None,
    fill: float | None = 0.0, dtype: Any = None, out: OptArray = None,
) -> NDArray:  # fmt: skip
    """Algorithm 2, line 11, before rearranging it to scale and shift (`fold_batch_norm`).

    Returns y, with x's shape, in float64 if x holds integers, whatever `dtype` is asked for.
    """
    rstd = _rstd(_wide(var, x), eps)
    return batch_norm_apply(
        x, gamma, beta, mean, rstd, axis=axis, residual=residual, activation=activation,
        groups=groups, offsets=offsets, mask=mask, lengths=lengths, length_axis=length_axis,
        weights=weights, fill=fill, out=out,
    )  # fmt: skip


@_quiet
def batch_norm_backward(
    dy: NDArray, x: OptArray, gamma: OptArray, mean: NDArray, rstd: NDArray, *,
    beta: OptArray = NOT_GIVEN, y: OptArray = None, residual: OptArray = None,
    training: bool = True, axis: Axis = 1, activation: Activation = None,
    groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None,
    output_mask: tuple[bool, bool, bool, bool] = (True, True, True, True), out: OptArray = None,
) -> BatchNormBackward[NDArray]:  # fmt: skip
    """Section 3, "the gradients of loss l": the six equations in the order of the paper.

    Returns dx and dresidual, with x's shape, and dgamma and dbeta, with that of the channel axes.
    Gradients not in `output_mask` are None, as is dresidual unless `y` is given with x, or
    `residual`. With weights, the m in 1/m is sum_i w_i, and value i enters mean and var w_i times.
    """
    w = weights = _what_counts(_either(x, y), axis, mask, lengths, length_axis, weights)
    mask = lengths = length_axis = None
    if groups is not None or offsets is not None:
        parts = _each(batch_norm_backward, locals())
        dgamma = _gradient(parts, "dgamma", gamma)
        dbeta = _gradient(parts, "dbeta", gamma if beta is NOT_GIVEN or gamma is not None else beta)
        dx, dresidual = (_joined(parts, name, x, y, axis) for name in ("dx", "dresidual"))
        return BatchNormBackward(dx, dgamma, dbeta, dresidual)
    dy = _through_activation(dy, x, gamma, beta, mean, rstd, y, residual, activation, axis)
    x, mean, y = _input(x, gamma, beta, mean, rstd, y, activation, axis)
    m, over, _ = _reduction(x, axis)
    deviation = _wide(x, x) - _spread(mean, x, axis)
    if w is not None:
        dy, deviation = _counted(dy, w), _counted(deviation, w)
        m = np.sum(w, axis=over, keepdims=True)
    r = _spread(rstd, x, axis)  # 1 / sqrt(var + eps)
    dxhat = dy * _spread(gamma, x, axis)  # dl/dx_hat_i = dl/dy_i gamma
    if training:
        # dl/dvar = sum_i dl/dx_hat_i (x_i - mean) (-1/2) (var + eps)^(-3/2)
        dvar = np.sum(dxhat * deviation, axis=over, keepdims=True) * (-(r**3) / 2)
        # dl/dmean = sum_i dl/dx_hat_i (-1) / sqrt(var + eps) + dl/dvar 1/m sum_i -2 (x_i - mean)
        dmean = -np.sum(dxhat, axis=over, keepdims=True) * r  # sum_i (x_i - mean) is 0
        # dl/dx_i = dl/dx_hat_i / sqrt(var + eps) + dl/dvar 2 (x_i - mean) / m + dl/dmean / m
        dx = dxhat * r + (1 if w is None else w) * (dvar * 2 * deviation / m + dmean / m)
    else:
        dx = dxhat * r  # mean and var are constants
    dx = _counted(dx, w)
    dgamma = np.sum(dy * (deviation * r), axis=over)  # dl/dgamma = sum_i dl/dy_i x_hat_i
    dbeta = np.sum(dy, axis=over)  # dl/dbeta = sum_i dl/dy_i
    return BatchNormBackward(
        _store(dx, out) if output_mask[0] else None,
        dgamma if output_mask[1] else None,
        dbeta if output_mask[2] else None,
        dy if output_mask[3] and (y is not None or residual is not None) else None,
    )


@_quiet
def batch_norm_stats(
    x: NDArray, *, axis: Axis = 1, groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None,
) -> Moments:  # fmt: skip
    """Algorithm 1, lines 1 and 2: mean and M2 = m var; both 0 if there are no values.

    Returns the count m and two arrays with the shape of the channel axes. With weights,
    m = sum_i w_i, mean = 1/m sum_i w_i x_i and M2 = sum_i w_i (x_i - mean)^2; m is an array, too.
    """
    w = weights = _what_counts(x, axis, mask, lengths, length_axis, weights)
    mask = lengths = length_axis = None
    if groups is not None or offsets is not None:
        parts = _each(batch_norm_stats, locals())
        means = np.stack([part.mean for part in parts])
        counts = np.stack(
            [np.broadcast_to(np.float64(part.count), means.shape[1:]) for part in parts]
        )
        count: Any = parts[0].count if offsets is None and w is None else counts
        return Moments(count, means, np.stack([part.m2 for part in parts]))
    m, over, kept = _reduction(x, axis)
    values = _wide(x, x)
    if w is not None:
        values, m = _counted(values, w), np.sum(w, axis=over, keepdims=True)
        mean = _ratio(np.sum(w * values, axis=over, keepdims=True), m, 0)
        mean = mean + _ratio(np.sum(w * (values - mean), axis=over, keepdims=True), m, 0)
        m2 = np.sum(w * (values - mean) ** 2, axis=over)
        return Moments(m.reshape(kept), mean.reshape(kept), m2)
    mean = np.sum(values, axis=over, keepdims=True) / max(m, 1)  # mean = 1/m sum_i x_i
    # Adding the mean of the deviations corrects the rounding of a long sum: the mean of equal
    # values is then exactly that value.
    mean = mean + np.sum(values - mean, axis=over, keepdims=True) / max(m, 1)
    m2 = np.sum((values - mean) ** 2, axis=over)  # var = 1/m sum_i (x_i - mean)^2
    return Moments(m, mean.reshape(kept), m2)


@_quiet
def update_running_stats(
    running_mean: NDArray, running_var: NDArray, moments: Moments, *, momentum: float = 0.1,
    correction: int = 1, inplace: bool = True, num_batches_tracked: int | None = None,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Section 3.1, the moving average in place of Algorithm 2, line 10.

    Averages the variance m/(m - 1) var if ``correction=1``. Returns the arrays passed in or, with
    ``inplace=False``, new ones that are not rounded. An empty batch does not change the values,
    nor does a channel change in which nothing counts. With `num_batches_tracked`, the average
    divided by 1 - (1 - momentum)^t (Kingma & Ba, 2014).
    """
    new_mean, new_var = _long(running_mean), _long(running_var)
    count, mean, m2 = np.asarray(moments.count), _long(moments.mean), _long(moments.m2)
    if np.any(count > 0):
        var = np.where(count > 0, m2 / (count - correction), 0)
        some = np.broadcast_to(count > 0, mean.shape)
        if mean.ndim > running_mean.ndim:  # segments: mean and var averaged by count
            counts = _long(np.broadcast_to(count, mean.shape))
            share, some = _ratio(counts, np.sum(counts, axis=0), 0), np.any(some, axis=0)
            mean, var = np.sum(share * mean, axis=0), np.sum(share * var, axis=0)
        weight, before, after = np.longdouble(momentum), np.longdouble(1), np.longdouble(1)
        if num_batches_tracked is not None:
            before = 1 - (1 - weight) ** num_batches_tracked
            after = 1 - (1 - weight) ** (num_batches_tracked + 1)
        moved = ((1 - weight) * (new_mean * before) + weight * mean) / after
        new_mean = np.where(some, moved, new_mean)
        moved = ((1 - weight) * (new_var * before) + weight * var) / after
        new_var = np.where(some, moved, new_var)
    if not inplace:
        return new_mean, new_var
    return _store(new_mean, running_mean), _store(new_var, running_var)


@_quiet
def batch_norm_apply(
    x: NDArray, gamma: OptArray, beta: OptArray, mean: NDArray, rstd: NDArray, *, axis: Axis = 1,
    residual: OptArray = None, activation: Activation = None, groups: int | None = None,
    offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None, fill: float | None = 0.0,
    out: OptArray = None,
) -> NDArray:  # fmt: skip
    """Algorithm 1, lines 3 and 4, then the residual and the activation; returns y.

    y is `fill` where x does not count, unless that is None.
    """
    w = weights = _what_counts(x, axis, mask, lengths, length_axis, weights)
    mask = lengths = length_axis = None
    if groups is not None or offsets is not None:
        y = _joined(_each(batch_norm_apply, locals()), None, x, None, axis)
        return y if out is None else out
    xhat = _normalise(x, mean, rstd, axis)  # x_hat_i = (x_i - mean) / sqrt(var + eps)
    y = _scaled(xhat, x, gamma, beta, axis, residual, activation)
    return _store(y if w is None or fill is None else np.where(w > 0, y, fill), out)


@_quiet
def batch_norm_backward_reduce(
    dy: NDArray, x: OptArray, mean: NDArray, rstd: NDArray, *, gamma: OptArray = NOT_GIVEN,
    beta: OptArray = NOT_GIVEN, y: OptArray = None, residual: OptArray = None,
    activation: Activation = None, axis: Axis = 1,
    groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Section 3: dl/dbeta = sum_i dl/dy_i and dl/dgamma = sum_i dl/dy_i x_hat_i.

    Returns (sum_dy, sum_dy_xhat), with the shape of the channel axes. The sums are over what
    counts, not weighted.
    """
    w = weights = _what_counts(_either(x, y), axis, mask, lengths, length_axis, weights)
    mask = lengths = length_axis = None
    if groups is not None or offsets is not None:
        sum_dy, sum_dy_xhat = zip(*_each(batch_norm_backward_reduce, locals()), strict=True)
        return np.stack(sum_dy), np.stack(sum_dy_xhat)
    dy = _through_activation(dy, x, gamma, beta, mean, rstd, y, residual, activation, axis)
    x, mean, y = _input(x, gamma, beta, mean, rstd, y, activation, axis)
    _, over, _ = _reduction(x, axis)
    dy, xhat = _counted(dy, w), _counted(_normalise(x, mean, rstd, axis), w)
    return np.sum(dy, axis=over), np.sum(dy * xhat, axis=over)


@_quiet
def batch_norm_backward_apply(
    dy: NDArray, x: OptArray, gamma: OptArray, mean: NDArray, rstd: NDArray, sum_dy: NDArray,
    sum_dy_xhat: NDArray, count: int, *, beta: OptArray = NOT_GIVEN, y: OptArray = None,
    residual: OptArray = None, activation: Activation = None, axis: Axis = 1,
    groups: int | None = None, offsets: OptArray = None,
    mask: OptArray = None, lengths: OptArray = None,
    length_axis: int | None = None, weights: OptArray = None, out: OptArray = None,
) -> NDArray:  # fmt: skip
    """Section 3, the three equations for dl/dx_i combined (docs/math.md); returns dx."""
    w = weights = _what_counts(_either(x, y), axis, mask, lengths, length_axis, weights)
    mask = lengths = length_axis = None
    if groups is not None or offsets is not None:
        dx = _joined(_each(batch_norm_backward_apply, locals()), None, x, y, axis)
        return dx if out is None else out
    dy = _through_activation(dy, x, gamma, beta, mean, rstd, y, residual, activation, axis)
    x, mean, y = _input(x, gamma, beta, mean, rstd, y, activation, axis)
    xhat = _normalise(x, mean, rstd, axis)
    m = _spread(np.asarray(count), x, axis) if np.ndim(count) else count
    mean_dy = _spread(sum_dy, x, axis) / m
    mean_dy_xhat = _spread(sum_dy_xhat, x, axis) / m
    factor = _spread(gamma, x, axis) * _spread(rstd, x, axis)
    # dl/dx_i = gamma / sqrt(var + eps) (dl/dy_i - mean of dl/dy - x_hat_i mean of dl/dy x_hat)
    dx = factor * (dy - (1 if w is None else w) * (mean_dy + xhat * mean_dy_xhat))
    return _store(_counted(dx, w), out)


@_quiet
def batch_norm_jvp(
    tx: OptArray, tgamma: OptArray, tbeta: OptArray, x: NDArray, gamma: OptArray, mean: NDArray,
    rstd: NDArray, *, training: bool = True, axis: Axis = 1,
) -> NDArray:  # fmt: skip
    """Derivative of y along (tx, tgamma, tbeta), by the product rule (docs/math.md); returns ty."""
    xhat = _normalise(x, mean, rstd, axis)
    txhat = _tangent(tx, x, rstd, xhat, training, axis)
    # dy_i = gamma dx_hat_i + dgamma x_hat_i + dbeta
    ty: NDArray = _spread(gamma, x, axis) * txhat + _or_zero(tgamma, x, axis) * xhat
    return ty + _or_zero(tbeta, x, axis)


@_quiet
def batch_norm_double_backward(
    ddx: OptArray, ddgamma: OptArray, ddbeta: OptArray, dy: NDArray, x: NDArray, gamma: OptArray,
    mean: NDArray, rstd: NDArray, *, training: bool = True, axis: Axis = 1,
) -> BatchNormDoubleBackward[NDArray]:  # fmt: skip
    """Gradients of sum ddx dx + sum ddgamma dgamma + sum ddbeta dbeta (docs/math.md).

    The gradient is linear in dy, so ddy is its transpose: the directional derivative. The others
    follow from sum_i ddx_i dx_i = gamma sum_i dy_i dx_hat_i, where dx_hat is the derivative of
    x_hat along ddx.
    """
    m, over, _ = _reduction(x, axis)
    dy, xhat, r = _wide(dy, x), _normalise(x, mean, rstd, axis), _spread(rstd, x, axis)
    e, factor = _or_zero(ddgamma, x, axis), _spread(gamma, x, axis)
    ddy = batch_norm_jvp(ddx, ddgamma, ddbeta, x, gamma, mean, rstd, training=training, axis=axis)
    txhat = _tangent(ddx, x, rstd, xhat, training, axis)
    dgamma = np.sum(dy * txhat, axis=over)
    if not training:
        return BatchNormDoubleBackward(ddy, e * r * dy, dgamma)
    d = np.zeros_like(xhat) if ddx is None else _wide(ddx, x)
    mean_xhat = np.sum(d * xhat, axis=over, keepdims=True) / max(m, 1)
    # The loss is gamma r sum_i dy_i (d_i - mean(d) - x_hat_i mean(d x_hat)) + e sum_i dy_i x_hat_i.
    # Its derivatives with respect to x_hat_j and r; dr/dx_j = -r^2 x_hat_j / m:
    g_xhat = np.sum(dy * xhat, axis=over, keepdims=True) / max(m, 1)
    of_xhat = (e - factor * r * mean_xhat) * dy - factor * r * g_xhat * d
    of_r_times_r = factor * np.sum(dy * txhat, axis=over, keepdims=True)
    # dx_hat_j/dx_i = r (delta_ij - 1/m - x_hat_i x_hat_j / m), as in the gradient itself.
    dx = _tangent(of_xhat, x, rstd, xhat, training, axis) - of_r_times_r * r * xhat / max(m, 1)
    return BatchNormDoubleBackward(ddy, dx, dgamma)


@_quiet
def batch_norm_backward_statistics(
    sum_dy: NDArray, sum_dy_xhat: NDArray, gamma: OptArray, rstd: NDArray,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Section 3, dl/dmean and dl/dvar, with mean and var as arguments of their own."""
    scale = _long(rstd) if gamma is None else _long(gamma) * _long(rstd)
    # dl/dmean = sum_i dl/dx_hat_i (-1) / sqrt(var + eps)
    # dl/dvar = sum_i dl/dx_hat_i (x_i - mean) (-1/2) (var + eps)^(-3/2)
    return -scale * _long(sum_dy), -scale * _long(rstd) * _long(sum_dy_xhat) / 2


@_quiet
def batch_renorm_forward(
    x: NDArray, gamma: OptArray, beta: OptArray, running_mean: NDArray, running_var: NDArray, *,
    r_max: float = 3.0, d_max: float = 5.0, momentum: float = 0.1, eps: float = 1e-5,
    correction: int = 1, axis: Axis = 1, residual: OptArray = None, activation: Activation = None,
    out: OptArray = None,
) -> BatchRenormForward[NDArray]:  # fmt: skip
    """Algorithm 1 of Ioffe (2017), "Batch Renormalization"; returns (y, mean, rstd, r, d)."""
    batch = batch_norm_stats(x, axis=axis)
    mean, var = batch.mean, batch.m2 / max(batch.count, 1)
    rstd, r, d = np.zeros_like(var), np.ones_like(var), np.zeros_like(var)
    if batch.count > 0:
        rstd, std = _rstd(var, eps), np.sqrt(var + eps)
        running_std = np.sqrt(_wide(running_var, x) + eps)
        # r = clip_[1/r_max, r_max](std / running_std), d = clip_d_max((mean - running_mean) / ...)
        r = np.clip(_ratio(std, running_std, 1), 1 / r_max, r_max)
        d = np.clip(_ratio(mean - _wide(running_mean, x), running_std, 0), -d_max, d_max)
    xhat = _normalise(x, mean, rstd, axis) * _spread(r, x, axis) + _spread(d, x, axis)
    y = _scaled(xhat, x, gamma, beta, axis, residual, activation)  # y_i = gamma x_hat_i + beta
    update_running_stats(running_mean, running_var, batch, momentum=momentum, correction=correction)
    return BatchRenormForward(_store(y, out), mean, rstd, r, d)


@_quiet
def batch_renorm_backward(
    dy: NDArray, x: OptArray, gamma: OptArray, mean: NDArray, rstd: NDArray, r: NDArray,
    d: NDArray, *, beta: OptArray = NOT_GIVEN, y: OptArray = None, residual: OptArray = None,
    axis: Axis = 1, activation: Activation = None,
    output_mask: tuple[bool, bool, bool, bool] = (True, True, True, True), out: OptArray = None,
) -> BatchNormBackward[NDArray]:  # fmt: skip
    """Section 3 of Ioffe (2017), "the gradients of loss l", in the order of the paper."""
    if x is None:  # y = act(gamma r (x - mean) rstd + beta + gamma d)
        scale = _long(np.ones_like(r) if gamma is None else gamma)
        shift = scale * d if given(beta, "beta", None, y, True) is None else scale * d + beta
        x, mean, y = _input(None, scale * r, shift, mean, rstd, y, activation, axis)
    m, over, _ = _reduction(x, axis)
    deviation, r_ = _wide(x, x) - _spread(mean, x, axis), _spread(r, x, axis)
    xhat = deviation * _spread(rstd, x, axis) * r_ + _spread(d, x, axis)
    dy = _wide(dy, x)
    act = _checks.activation(activation)
    if act == "relu" and y is not None:
        dy = np.where(y > 0, dy, 0)
    elif act is not None:
        v = _scaled(xhat, x, gamma, given(beta, "beta", act, None), axis, residual, None)
        dy = dy * _activate(v, act, derivative=True)
    dxhat = dy * _spread(gamma, x, axis)  # dl/dx_hat_i = dl/dy_i gamma
    s = _spread(rstd, x, axis)  # 1 / sigma_B
    # dl/dsigma_B = sum_i dl/dx_hat_i (x_i - mean) (-r) / sigma_B^2
    dsigma = np.sum(dxhat * deviation, axis=over, keepdims=True) * (-r_ * s**2)
    # dl/dmean = sum_i dl/dx_hat_i (-r) / sigma_B
    dmean = np.sum(dxhat, axis=over, keepdims=True) * (-r_ * s)
    # dl/dx_i = dl/dx_hat_i r / sigma_B + dl/dsigma_B (x_i - mean) / (m sigma_B) + dl/dmean / m
    dx = dxhat * r_ * s + dsigma * deviation * s / m + dmean / m
    return BatchNormBackward(
        _store(dx, out) if output_mask[0] else None,
        np.sum(dy * xhat, axis=over) if output_mask[1] else None,  # sum_i dl/dy_i x_hat_i
        np.sum(dy, axis=over) if output_mask[2] else None,  # sum_i dl/dy_i
        dy if output_mask[3] and (y is not None or residual is not None) else None,
    )


@_quiet
def fold_batch_norm(
    gamma: OptArray, beta: OptArray, mean: NDArray, var: NDArray, *, eps: float = 1e-5,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Algorithm 2, line 11, as y = scale x + shift; returns (scale, shift), shaped like `var`."""
    scale = _rstd(_long(var), eps)
    if gamma is not None:
        scale = _long(gamma) * scale  # scale = gamma / sqrt(var + eps)
    shift = -_long(mean) * scale
    if beta is not None:
        shift = _long(beta) + shift  # shift = beta - gamma mean / sqrt(var + eps)
    return scale, shift


@_quiet
def fold_into_linear(
    weight: NDArray, bias: OptArray, gamma: OptArray, beta: OptArray, mean: NDArray, var: NDArray,
    *, eps: float = 1e-5, norm_first: bool = False, layout: str = "OI",
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Return W and b of scale (W u + b) + shift or, `norm_first`, of W (scale u + shift) + b."""
    scale, shift = fold_batch_norm(gamma, beta, mean, var, eps=eps)
    W = _long(weight) if layout == "OI" else _long(weight).T
    b = np.zeros(len(W)) if bias is None else _long(bias)
    W, b = (W * scale, b + W @ shift) if norm_first else (scale[:, None] * W, scale * b + shift)
    return W if layout == "OI" else W.T, b


@_quiet
def fold_into_conv(
    weight: NDArray, bias: OptArray, gamma: OptArray, beta: OptArray, mean: NDArray, var: NDArray,
    *, eps: float = 1e-5, transposed: bool = False, groups: int = 1, norm_first: bool = False,
    padding: Any = None, layout: str | None = None,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Return the weight and bias of the convolution with scale and shift after or before it.

    Weights have shape ``(out, in / groups, *kernel)`` or, transposed,
    ``(in, out / groups, *kernel)``, or what `layout` says. In the former, weight[o, i] takes input
    channel i of the group of output channel o; in the latter, weight[i, o] contributes to output
    channel o of the group of input channel i. `padding` is ignored.
    """
    scale, shift = fold_batch_norm(gamma, beta, mean, var, eps=eps)
    layout = layout or ("IO" if transposed else "OI") + "K" * (weight.ndim - 2)
    length = dict(zip(layout, weight.shape, strict=True))
    index = dict(zip(layout, np.indices(weight.shape), strict=True))  # of each element
    if "M" in layout:
        i, o, outs = index["I"], index["I"] * length["M"] + index["M"], length["I"] * length["M"]
    elif transposed:
        i, outs = index["I"], groups * length["O"]
        o = i // (length["I"] // groups) * length["O"] + index["O"]
    else:
        o, outs = index["O"], length["O"]
        i = o // (length["O"] // groups) * length["I"] + index["I"]
    b = np.zeros(outs, np.longdouble) if bias is None else _long(bias)
    if not norm_first:
        return _long(weight) * scale[o], scale * b + shift
    added = np.zeros_like(b)
    np.add.at(added, o, _long(weight) * shift[i])  # sum of W shift over i and the kernel
    return _long(weight) * scale[i], b + added


def _reduction(x: NDArray, axis: Axis) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return m, the axes to sum over, and the shape of the channel axes."""
    channels = {a % x.ndim for a in np.atleast_1d(axis)}
    over = tuple(a for a in range(x.ndim) if a not in channels)
    kept = tuple(x.shape[a] for a in range(x.ndim) if a in channels)
    return math.prod(x.shape[a] for a in over), over, kept


def _spread(values: OptArray, x: NDArray, axis: Axis) -> NDArray:
    """Return parameters or statistics (1 for None), shaped to broadcast against x."""
    if values is None:
        return _wide(np.ones(()), x)
    _, over, _ = _reduction(x, axis)
    return np.expand_dims(_wide(values, x), over)


def _wide(values: NDArray, x: NDArray) -> NDArray:
    """Return values in the dtype used to compute with x."""
    return values.astype(np.float64 if x.itemsize < 8 else np.longdouble)


def _long(values: NDArray) -> NDArray:
    """Return values as longdouble."""
    return values.astype(np.longdouble)


def _ratio(a: NDArray, b: NDArray, neither: float) -> NDArray:
    """Return a / b, or `neither` where both are 0."""
    return np.where((a == 0) & (b == 0), neither, a / b)


def _rstd(var: NDArray, eps: float) -> NDArray:
    """Return 1 / sqrt(var + eps), or 0 where var + eps is 0."""
    return np.where(var + eps == 0, 0, 1 / np.sqrt(var + eps))


def _normalise(x: NDArray, mean: NDArray, rstd: NDArray, axis: Axis) -> NDArray:
    """Return x_hat = (x - mean) rstd."""
    return (_wide(x, x) - _spread(mean, x, axis)) * _spread(rstd, x, axis)


def _tangent(
    tx: OptArray, x: NDArray, rstd: NDArray, xhat: NDArray, training: bool, axis: Axis
) -> NDArray:
    """Return the derivative of x_hat along tx: r (tx - mean(tx) - x_hat mean(tx x_hat))."""
    if tx is None:
        return np.zeros_like(xhat)
    _, over, _ = _reduction(x, axis)
    t = _wide(tx, x)
    if training and x.size:
        t_xhat = np.mean(t * xhat, axis=over, keepdims=True)
        t = t - np.mean(t, axis=over, keepdims=True) - xhat * t_xhat
    return t * _spread(rstd, x, axis)


def _or_zero(values: OptArray, x: NDArray, axis: Axis) -> NDArray:
    """Return `_spread` of an argument for which None means 0."""
    return _wide(np.zeros(()), x) if values is None else _spread(values, x, axis)


# The normal distribution is that of the C library, in float64.
_MATH = Math(
    np.longdouble, lambda a, b, c: a * b + c, lambda a: np.exp(-a), np.tanh,
    lambda a: np.exp(-a * a / 2), lambda a: np.longdouble(math.erfc(a / math.sqrt(2)) / 2),
    lambda function: function,
)  # fmt: skip


def _activate(v: NDArray, activation: Activation, derivative: bool = False) -> NDArray:
    """Return act(v) or act'(v), in v's dtype, from the table that kernels are built from."""
    act = _checks.activation(activation)
    if act is None:
        return np.ones_like(v) if derivative else v
    if act == "relu":
        return np.where(v > 0, 1, 0) if derivative else np.maximum(v, 0)  # NaN passes
    assert isinstance(act, Activation_)
    function = act.on(_MATH)[derivative]
    function = getattr(function, "py_func", function)
    result = np.vectorize(function, otypes=[np.longdouble])(v.astype(np.longdouble))
    return np.asarray(result.astype(v.dtype))


def _before(y: NDArray, activation: Activation) -> NDArray:
    """Return v of y = act(v), for None and leaky_relu."""
    act = _checks.activation(activation)
    if act is None:
        return y
    assert isinstance(act, Activation_)
    (slope,) = act.parameters
    return np.where(y > 0, y, y / slope)


def _scaled(
    xhat: NDArray, x: NDArray, gamma: OptArray, beta: OptArray, axis: Axis, residual: OptArray,
    activation: Activation,
) -> NDArray:  # fmt: skip
    """Return y_i = gamma x_hat_i + beta, then the residual and the activation."""
    y = _spread(gamma, x, axis) * xhat
    if beta is not None:
        y = y + _spread(beta, x, axis)
    if residual is not None:
        y = y + _wide(residual, x)
    return _activate(y, activation)


def _input(
    x: OptArray, gamma: OptArray, beta: OptArray, mean: NDArray, rstd: NDArray, y: OptArray,
    activation: Activation, axis: Axis,
) -> tuple[NDArray, NDArray, OptArray]:  # fmt: skip
    """Return x, mean and y; without x, x - mean solved from y, a mean of 0, and None.

    y = act(gamma (x - mean) rstd + beta). Where rstd is 0, x - mean is 0.
    """
    if x is not None:
        return x, mean, y
    assert y is not None
    gamma, beta = (given(a, n, None, y, True) for a, n in ((gamma, "gamma"), (beta, "beta")))
    v = _before(_long(y), activation)
    r = _spread(rstd, v, axis)
    xhat = (v if beta is None else v - _spread(beta, v, axis)) / _spread(gamma, v, axis)
    return np.where(r == 0, 0, xhat / r), np.zeros_like(mean), None


def _through_activation(
    dy: NDArray, x: OptArray, gamma: OptArray, beta: OptArray, mean: NDArray, rstd: NDArray,
    y: OptArray, residual: OptArray, activation: Activation, axis: Axis,
) -> NDArray:  # fmt: skip
    """Return dl/dv, v being the value before the activation: dl/dy act'(v); ReLU reads y > 0."""
    act = _checks.activation(activation)
    if x is None:
        assert y is not None
        return _long(dy) * _activate(_before(_long(y), act), act, derivative=True)
    dy = _wide(dy, x)
    if act is None:
        return dy
    if act == "relu" and y is not None:
        return np.where(y > 0, dy, 0)
    gamma, beta = (given(a, name, act, None) for a, name in ((gamma, "gamma"), (beta, "beta")))
    v = batch_norm_apply(x, gamma, beta, mean, rstd, axis=axis, residual=residual)
    slope = _activate(v, act, derivative=True)
    return np.where(slope, dy, 0) if act == "relu" else dy * slope


def _either(x: OptArray, y: OptArray) -> NDArray:
    """Return x, or y if there is no x."""
    large = y if x is None else x
    assert large is not None
    return large


def _what_counts(
    x: NDArray, axis: Axis, mask: OptArray, lengths: OptArray, length_axis: int | None,
    weights: OptArray,
) -> OptArray:  # fmt: skip
    """Return the weight of every value of x, in x's shape; None if all count once."""
    if lengths is not None:
        along = _reduction(x, axis)[1][-1] if length_axis is None else length_axis % x.ndim
        position = np.indices(x.shape)[along]
        mask = position < lengths.reshape((-1,) + (1,) * (x.ndim - 1))
    given = mask if weights is None else weights
    return None if given is None else np.broadcast_to(_wide(given, x), x.shape)


def _counted(values: NDArray, w: OptArray) -> NDArray:
    """Return values, 0 where their weight is 0."""
    return values if w is None else np.where(w > 0, values, 0)


# Segments: every function calls itself for each part of x, as for a batch of its own.
_LIKE_X = ("dy", "x", "residual", "y", "out", "weights", "w")


def _ends(x: NDArray, axis: Axis, groups: int | None, offsets: Any) -> list[int]:
    """Return where the parts of the first reduced axis begin, and the end of the last."""
    length = x.shape[_reduction(x, axis)[1][0]]
    return [length * g // groups for g in range(groups + 1)] if groups else list(offsets)


def _each(function: Any, arguments: dict[str, Any]) -> list[Any]:
    """Call a function for each part of x; parameters may have a row for each part.

    `arguments` are the caller's locals(), in which `weights` stand for mask and lengths.
    """
    axis = arguments["axis"]
    x: NDArray = arguments["x"] if arguments["x"] is not None else arguments["y"]
    first, kept = _reduction(x, axis)[1][0], x.ndim - len(_reduction(x, axis)[1])
    results = []
    for g, ends in enumerate(pairwise(_ends(x, axis, arguments["groups"], arguments["offsets"]))):
        part = {}
        for name, value in arguments.items():
            if name in ("groups", "offsets", "w"):
                continue
            if name in _LIKE_X and value is not None:
                value = value[(slice(None),) * first + (slice(*ends),)]
            elif isinstance(value, np.ndarray) and value.ndim > kept:
                value = value[g]
            part[name] = value
        results.append(function(**part))
    return results


def _joined(parts: list[Any], name: str | None, x: OptArray, y: OptArray, axis: Axis) -> Any:
    """Concatenate the parts' results, or their field `name`, in x's shape; None if None."""
    arrays = [part if name is None else getattr(part, name) for part in parts]
    large = y if x is None else x
    assert large is not None
    return None if arrays[0] is None else np.concatenate(arrays, _reduction(large, axis)[1][0])


def _gradient(parts: list[Any], name: str, like: OptArray) -> OptArray:
    """Return the parts' gradients of a parameter, added unless `like` has a row for each part."""
    rows = [getattr(part, name) for part in parts]
    if rows[0] is None:
        return None
    return np.stack(rows) if like is not None and like.ndim > rows[0].ndim else sum(rows)


def _store(values: NDArray, out: OptArray) -> NDArray:
    """Round values to `out` and return it; if `out` is None, return the values."""
    if out is None:
        return values
    out[...] = values
    return out
