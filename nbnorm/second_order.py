"""Second derivatives, forward mode, and the gradients of given statistics.

All checks precede the first kernel, as in functional.py.
"""

from __future__ import annotations

from typing import Generic, NamedTuple

import numpy as np

from nbnorm._arrays import home_of, on_its_device, take_float64, take_floating
from nbnorm._frame import Frame
from nbnorm._typing import Array, Axis, NDArray, X


class BatchNormDoubleBackward(NamedTuple, Generic[X]):
    """Result of `batch_norm_double_backward`.

    Attributes
    ----------
    ddy : array
        Gradient with respect to dy, with the shape, dtype and memory order of x.
    dx : array
        Gradient with respect to x, with the shape, dtype and memory order of x.
    dgamma : array
        Gradient with respect to gamma, with the shape of the channel axes and the dtype of gamma.
    """

    ddy: X
    dx: X
    dgamma: Array


@on_its_device("x")
def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    *,
    training: bool = True,
    axis: Axis = 1,
) -> BatchNormDoubleBackward[X]:
    """Compute the gradients of `batch_norm_backward`, the second derivative of batch normalization.

    `batch_norm_backward` maps dy, x and gamma to dx, dgamma and dbeta. This function maps gradients
    of these three, ddx, ddgamma and ddbeta, to gradients of dy, x and gamma: a gradient penalty or
    a product with the Hessian back-propagates through it.

    Parameters
    ----------
    ddx : array of x's shape and dtype, or None
        Gradient of `batch_norm_backward`'s dx. None means 0. As dy, it may be float32 if x is
        float16 or bfloat16.
    ddgamma, ddbeta : array of the shape of the channel axes, or None
        Gradients of its dgamma and dbeta, any floating dtype. None means 0.
    dy : array of x's shape and dtype
        Gradient of y, as given to `batch_norm_backward`.
    x : array, at least 2-d
        Input of the forward call, any dtype that `batch_norm_forward` accepts.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        As returned by the forward call.
    training : bool, default True
        If False, mean and rstd are constants (frozen statistics).
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.

    Returns
    -------
    BatchNormDoubleBackward
        (ddy, dx, dgamma), arrays of x's library: the gradients of dy, x and gamma. dgamma is a
        float64 sum rounded once to gamma's dtype, or to x's if gamma is None.

    Raises
    ------
    TypeError
        ddx, dy or x is not floating, or their dtypes differ; parameters or statistics are not
        floating.
    ValueError
        A shape or axis is invalid.

    Notes
    -----
    With d = ddx, g = dy, the means of the channel written as mean(.), and
    Q = sum d (g - mean(g) - x_hat mean(g x_hat)):

    ddy = gamma rstd (d - mean(d) - x_hat mean(d x_hat)) + ddgamma x_hat + ddbeta

    dgamma = rstd Q

    dx = -gamma rstd² [mean(g x_hat) (d - mean(d)) + mean(d x_hat) (g - mean(g))
    + x_hat (Q / m - 2 mean(d x_hat) mean(g x_hat))]
    + ddgamma rstd (g - mean(g) - x_hat mean(g x_hat))

    docs/math.md derives them from section 3 of Ioffe & Szegedy (2015). One sweep over ddx, dy and
    x computes five sums, a second writes ddy and dx. If ReLU follows, set dy and the resulting ddy
    to 0 wherever y > 0 is false, but not ddx. Sums are accurate relative to the sums of their
    absolute terms.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> mean, rstd = np.array([2.0]), np.array([0.5])
    >>> ddx = np.array([[1.0], [0.0]])
    >>> found = nbnorm.batch_norm_double_backward(ddx, None, None, dy, x, None, mean, rstd)
    >>> found.ddy
    array([[ 0.1875],
           [-0.1875]])
    >>> found.dgamma
    array([0.09375])
    """
    frame = Frame(x, axis)
    ddx_, dy_ = frame.like_x(ddx, "ddx"), frame.required_like_x(dy, "dy")
    ddgamma_, ddbeta_ = frame.per_channel(ddgamma, "ddgamma"), frame.per_channel(ddbeta, "ddbeta")
    gamma_ = frame.per_channel(gamma, "gamma")
    mean_, rstd_ = (
        frame.required_per_channel(mean, "mean"),
        frame.required_per_channel(rstd, "rstd"),
    )
    ddy, dx = frame.target(), frame.target()
    total: NDArray = frame.memory.zeros(frame.channels)
    if not frame.empty:
        g, x_ = frame.view(dy_), frame.view(frame.x)
        statistics = frame.statistic(mean_), frame.statistic(rstd_)
        backend = frame.backend
        if ddx_ is not None:
            total = backend.double_backward(
                frame.view(ddx_), g, x_, frame.statistic_or(gamma_, 1.0), *statistics,
                frame.statistic_or(ddgamma_, 0.0), frame.statistic_or(ddbeta_, 0.0), training,
                ddy.written, dx.written,
            )  # fmt: skip
        else:  # what is left is linear: ddgamma takes the place of gamma
            e, b = _scale_and_shift(frame, ddgamma_, ddbeta_)
            backend.apply(x_, e, b, *statistics, None, None, ddy.written)
            if training:
                backend.backward(g, x_, e, *statistics, None, None, dx.written, None)
            else:
                backend.backward_apply(
                    g, x_, e, *statistics, None, frame.m, None, None, dx.written, None
                )
    return BatchNormDoubleBackward(
        frame.settle(ddy), frame.settle(dx), frame.parameter_gradient(total, gamma_)
    )


@on_its_device("x")
def batch_norm_jvp(
    tx: Array | None,
    tgamma: Array | None,
    tbeta: Array | None,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    *,
    training: bool = True,
    axis: Axis = 1,
) -> X:
    """Compute the derivative of y along tangents of x, gamma and beta (forward mode).

    ty = gamma rstd (tx - mean(tx) - x_hat mean(tx x_hat)) + tgamma x_hat + tbeta.

    Parameters
    ----------
    tx : array of x's shape and dtype, or None
        Tangent of x. None means 0.
    tgamma, tbeta : array of the shape of the channel axes, or None
        Tangents of gamma and beta, any floating dtype. None means 0.
    x : array, at least 2-d
        Input of the forward call, any dtype that `batch_norm_forward` accepts.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        As returned by the forward call.
    training : bool, default True
        If False, mean and rstd are constants (frozen statistics), and the two means are not
        subtracted.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.

    Returns
    -------
    array
        ty, with the shape, dtype, memory order and library of x.

    Raises
    ------
    TypeError
        tx or x is not floating, or their dtypes differ; parameters or statistics are not floating.
    ValueError
        A shape or axis is invalid.

    Notes
    -----
    The product of the Jacobian, whose transpose is the gradient in section 3 of Ioffe & Szegedy
    (2015), and the tangents; docs/math.md derives it. If ReLU follows, set ty to 0
    wherever y > 0 is false.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, tx = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> mean, rstd = np.array([2.0]), np.array([0.5])
    >>> nbnorm.batch_norm_jvp(tx, None, np.array([1.0]), x, None, mean, rstd)
    array([[1.1875],
           [0.8125]])
    """
    frame = Frame(x, axis)
    tx_ = frame.like_x(tx, "tx")
    tgamma_, tbeta_ = frame.per_channel(tgamma, "tgamma"), frame.per_channel(tbeta, "tbeta")
    gamma_ = frame.per_channel(gamma, "gamma")
    mean_, rstd_ = (
        frame.required_per_channel(mean, "mean"),
        frame.required_per_channel(rstd, "rstd"),
    )
    ty = frame.target()
    if not frame.empty:
        x_, statistics = frame.view(frame.x), (frame.statistic(mean_), frame.statistic(rstd_))
        if tx_ is not None:
            frame.backend.jvp(
                frame.view(tx_), x_, frame.statistic_or(gamma_, 1.0), *statistics,
                frame.statistic_or(tgamma_, 0.0), frame.statistic_or(tbeta_, 0.0), training,
                ty.written,
            )  # fmt: skip
        else:
            a, b = _scale_and_shift(frame, tgamma_, tbeta_)
            frame.backend.apply(x_, a, b, *statistics, None, None, ty.written)
    result: X = frame.settle(ty)
    return result


@on_its_device("rstd")
def batch_norm_backward_statistics(
    sum_dy: Array, sum_dy_xhat: Array, gamma: Array | None, rstd: Array
) -> tuple[Array, Array]:
    """Compute the gradients of a given mean and variance.

    y = gamma (x - mean) / sqrt(var + eps) + beta depends on mean and var where these are inputs of
    the call (`batch_norm_inference`, or `batch_norm_backward` with ``training=False``):
    dmean = -gamma rstd sum dy and dvar = -gamma rstd² sum dy x_hat / 2.

    Parameters
    ----------
    sum_dy, sum_dy_xhat : array shaped like `rstd`
        As `batch_norm_backward_reduce` returns them; also dbeta and dgamma of
        `batch_norm_backward`. Any floating dtype.
    gamma : array shaped like `rstd`, or None
        As in the forward call. None means 1.
    rstd : array
        1 / sqrt(var + eps), with the shape of the channel axes.

    Returns
    -------
    dmean, dvar : array of float64
        Gradients of mean and var, shaped like `rstd`.

    Raises
    ------
    TypeError
        An argument is not a floating array.
    ValueError
        An argument does not have the shape of `rstd`.

    Notes
    -----
    Section 3 of Ioffe & Szegedy (2015), dl/dmean and dl/dvar, for a mean that does not depend on
    x; as Chainer's ``fixed_batch_normalization``. Where rstd is 0, both are 0.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> mean, rstd = np.array([1.0]), np.array([0.5])
    >>> sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd)
    >>> nbnorm.batch_norm_backward_statistics(*sums, None, rstd)
    (array([-0.75]), array([-0.0625]))
    """
    expected = take_floating(rstd, "rstd").shape
    of_rstd = "like rstd"
    rstd_ = take_float64(rstd, "rstd", expected, of_rstd)
    sum_dy_ = take_float64(sum_dy, "sum_dy", expected, of_rstd)
    sum_dy_xhat_ = take_float64(sum_dy_xhat, "sum_dy_xhat", expected, of_rstd)
    scale = rstd_ if gamma is None else take_float64(gamma, "gamma", expected, of_rstd) * rstd_
    home = home_of(rstd)
    with np.errstate(all="ignore"):  # NaN and Inf pass through to their channel
        return home(-scale * sum_dy_), home(-scale * rstd_ * sum_dy_xhat_ / 2)


def _scale_and_shift(
    frame: Frame, scale: NDArray | None, shift: NDArray | None
) -> tuple[NDArray, NDArray]:
    """Return `Frame.scale_and_shift` of arguments for which None means 0."""
    zero = frame.memory.zeros(frame.channel_shape, np.dtype("float32"))
    return frame.scale_and_shift(zero if scale is None else scale, shift)
