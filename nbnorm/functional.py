"""The public functions: they check arguments, allocate results and call the backend's kernels.

All checks precede the first kernel, so an error leaves every array unchanged.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

import numpy as np

from nbnorm import _checks, _shortcut
from nbnorm._arrays import on_host, on_its_device, result_dtype, untraced
from nbnorm._checks import NOT_GIVEN
from nbnorm._frame import Frame, Out, Target
from nbnorm._integers import integer_frame
from nbnorm._segments import frame_of
from nbnorm._typing import Activation, Array, Axis, Mask, NDArray, OrNone, X
from nbnorm.activations import Fused, inverse_of, with_own_kernels
from nbnorm.moments import Moments


class BatchNormForward(NamedTuple, Generic[X]):
    """Result of `batch_norm_forward`.

    Attributes
    ----------
    y : array
        Normalised x, with the shape, dtype and memory order of x.
    mean, rstd : array of float64
        The statistics that normalised x, needed by the backward pass: the mean and
        1 / sqrt(biased variance + eps), with the shape of the channel axes.
    """

    y: X
    mean: Array
    rstd: Array


class BatchNormBackward(NamedTuple, Generic[X]):
    """Result of `batch_norm_backward`; gradients that were not requested are None.

    Attributes
    ----------
    dx : array or None
        Gradient of x, with the shape, dtype and memory order of x.
    dgamma, dbeta : array or None
        Gradients of gamma and beta, with the shape of the channel axes and the dtype of gamma. With
        segments they have gamma's shape; if gamma is None, dbeta has beta's.
    dresidual : array or None
        Gradient of the residual, with the shape and dtype of x. None if neither `y` nor `residual`
        was given.
    """

    dx: X | OrNone
    dgamma: Array | OrNone
    dbeta: Array | OrNone
    dresidual: X | OrNone


@untraced
def batch_norm_forward(
    x: X,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
    fill: float | None = 0.0,
    out: Array | None = None,
) -> BatchNormForward[X]:
    """Normalise every channel of x to mean 0 and variance 1, then scale and shift it.

    Computes y = act(gamma (x - mean) rstd + beta [+ residual]) with rstd = 1 / sqrt(var + eps).
    In training, mean and var are the batch's mean and biased variance; with ``training=False``
    they are the running statistics.

    Parameters
    ----------
    x : array, at least 2-d
        float32, float64, float16 or bfloat16 (ml_dtypes). float16 and bfloat16 are computed in
        float32 and rounded once. A NumPy array, a CuPy array, or any object with ``__dlpack__``,
        in CPU memory or, with the ``cuda`` extra, on a GPU. Strides are arbitrary; an array
        without an (N, C, S) view (cropped images, negative steps) is copied once.
    gamma, beta : array of the shape of the channel axes, optional
        Scale and shift: float32, float64, float16 or bfloat16. None means 1 and 0.
    running_mean, running_var : array of the shape of the channel axes, optional
        Population statistics; pass both or neither. In training they are updated **in place**,
        with the variance M2 / (m - correction), and must not share memory with any other array of
        the call. With ``training=False`` they normalise x and do not change.
    training : bool, default True
        Normalise with the batch's statistics (True) or the running ones.
    momentum : float, default 0.1
        Weight of the new statistic: running = (1 - momentum) running + momentum batch. This is
        PyTorch's convention; Keras's momentum is 1 minus this one. Any finite number is valid.
        Values outside [0, 1] extrapolate and can make a running variance negative, which yields
        NaN at inference.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        1 updates running_var with the unbiased variance (PyTorch, cuDNN, Caffe, the paper), 0
        with the biased one (Keras, ONNX, Flax).
    axis : int or tuple of int, default 1
        Channel axes. Each index along them **keeps** its own statistics; all other axes are
        reduced. Use 1 for NCHW and NC, -1 for channels-last, (1, 2, 3) to normalise every
        activation separately. ``axis=1`` here is ``axis=(0, 2, 3)`` in `numpy.var`,
        `jax.nn.standardize` or `keras.ops.moments`.
    residual : array of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last: "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh",
        "sigmoid", "tanh", or a result of `nbnorm.activation`. NaN passes through.
    groups : int, optional
        Divide x into this many equal consecutive parts along its first reduced axis, each with
        statistics of its own: mean and rstd have the shape ``(parts, *channel axes)``, gamma and
        beta that or the shape of the channel axes.
    offsets : array of int, optional
        The same for parts of any length: part i is from offsets[i] to offsets[i + 1].
    mask : array of bool, optional
        False where x does not count: it is then in no statistic and may be anything, NaN included.
        Any shape that broadcasts to x; length 1 along the channel axes if all channels share it.
        At most one of mask, lengths and weights may be given.
    lengths : array of int, shape (x.shape[0],), optional
        Of x[n], the first lengths[n] along `length_axis` count; the rest is padding.
    length_axis : int, optional
        By default the last axis that is not a channel axis.
    weights : array of float, optional
        How often each value counts: mean = sum(w x) / sum(w), var = sum(w (x - mean)^2) / sum(w).
        Finite, nonnegative, of any shape that broadcasts to x. Weight 0 acts as mask False.
    fill : float or None, default 0
        y where x does not count. None normalises x there like the rest.
    out : array of x's shape and dtype, optional
        Array to write y to. It may be x itself, which is then **overwritten**: pass
        ``None, ..., y=y`` to `batch_norm_backward` instead of x. It must not overlap an input in
        any other way.

    Returns
    -------
    BatchNormForward
        (y, mean, rstd), arrays of x's library. y is `out` itself if given.

    Raises
    ------
    TypeError
        x is not a floating array, is masked, or has non-native byte order; residual has another
        dtype; parameters or statistics are not floating; a mask is not bool, lengths or offsets are
        not integers, weights are not floating; groups or length_axis is not an int, fill not a
        number.
    ValueError
        A shape, axis, eps, activation or out is invalid; momentum is not finite; only one running
        statistic is given, or none with ``training=False``; in training, a running statistic is
        read-only or shares memory with another array of the call, or a channel has a single value
        and ``correction=1``. groups does not divide its axis, or offsets do not go from 0 to its
        length or decrease. More than one of mask, lengths and weights is given; a mask or weights
        do not broadcast to x; a length is beyond its axis; a weight is negative or not finite.

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015), with a moving average in place of Algorithm 2.
    With segments, running statistics move once, with the parts' means and variances averaged by
    count. Weights are frequencies: running_var moves to M2 / (sum(w) - correction). In a channel
    where nothing counts, mean and rstd are 0, and the running statistics do not change.
    Statistics are summed around a shift and merged in float64 with the formula of Chan, Golub &
    LeVeque (1983), so a mean of 1e6 standard deviations costs no digits. Results are bitwise
    independent of the number of threads. An empty batch does not change the running statistics. A
    NaN or Inf stays in its channel.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)  # 2 samples, 2 channels
    >>> y, mean, rstd = nbnorm.batch_norm_forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean
    array([ 2., 20.])
    """
    plain = groups is offsets is mask is lengths is weights is length_axis is None
    if type(x) is np.ndarray and plain:
        done = _shortcut.forward(
            x, gamma, beta, running_mean, running_var, training, momentum, eps, correction, axis,
            residual, activation, out,
        )  # fmt: skip
        if done is not None:
            return BatchNormForward(*done)
    return _forward(
        x, gamma, beta, running_mean, running_var, training, momentum, eps, correction, axis,
        residual, activation, out, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
        length_axis=length_axis, weights=weights, fill=fill,
    )  # fmt: skip


@on_its_device("x")
def _forward(x: X, *arguments: Any, **parts: Any) -> BatchNormForward[X]:
    """`batch_norm_forward` for arrays of any library; arguments in `check_forward`'s order."""
    call = check_forward(x, *arguments, **parts)
    frame = call.frame
    if not call.training:
        assert call.running is not None
        running_mean, running_var = call.running
        mean = frame.statistic(running_mean.astype(np.float64))
        rstd = frame.backend.rstd(frame.statistic(running_var), call.eps)
        y = call.apply(mean, rstd)
    elif frame.empty:
        mean, rstd = frame.memory.zeros(frame.channels), frame.memory.zeros(frame.channels)
        y = frame.target(call.out)
    else:
        y = frame.target(call.out)
        mean, m2, rstd = frame.backend.forward(
            frame.view(frame.x),
            *frame.scale_and_shift(call.gamma, call.beta),
            call.eps,
            frame.view(call.residual),
            call.activation,
            y.written,
        )
        if call.running is not None:
            frame.move(call.running, mean, m2, call.momentum, call.correction)
    return BatchNormForward(
        frame.settle(y),
        frame.home(frame.unflat(mean)),
        frame.home(frame.unflat(rstd)),
    )


class ForwardCall(NamedTuple):
    """Checked arguments of a function that computes y, with NumPy or CuPy arrays.

    Inference and apply do not set the fields after `out`; `running` is (mean, variance).
    """

    frame: Frame
    gamma: NDArray | None
    beta: NDArray | None
    residual: NDArray | None
    activation: Fused
    out: Out | None
    training: bool = False
    running: tuple[NDArray, NDArray] | None = None
    momentum: float = 0.0
    eps: float = 0.0
    correction: float = 0.0

    def apply(self, mean: NDArray, rstd: NDArray) -> Target:
        """Normalise x with float64 statistics of shape (C,)."""
        frame = self.frame
        y = frame.target(self.out)
        if not frame.empty:
            frame.backend.apply(
                frame.view(frame.x),
                *frame.scale_and_shift(self.gamma, self.beta),
                mean,
                rstd,
                frame.view(self.residual),
                self.activation,
                y.written,
            )
        return y


def check_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    correction: int,
    axis: Axis,
    residual: Array | None,
    activation: Activation,
    out: Array | None,
    *,
    alone: bool = True,
    **parts: Any,
) -> ForwardCall:
    """Check and convert the arguments of a forward call; compute nothing.

    `parts` are segments and what counts, for `frame_of`. With ``alone=False``, the caller checks
    the number of values, as x may be only part of the batch.
    """
    frame = frame_of(x, axis, **parts)
    gamma_, beta_ = frame.per_channel(gamma, "gamma"), frame.per_channel(beta, "beta")
    _checks.running_pair(running_mean, running_var, training)
    mean_ = frame.per_channel(running_mean, "running_mean")
    var_ = frame.per_channel(running_var, "running_var")
    residual_ = frame.like_x(residual, "residual")
    eps, momentum = _checks.epsilon(eps), _checks.finite(momentum, "momentum")
    correction_ = _checks.finite(correction, "correction")
    activation = _checks.activation(activation)
    running = None if mean_ is None or var_ is None else (mean_, var_)
    if training:
        if alone:
            _checks.enough_values(frame.m, correction_, frame.described, frame.x.shape)
        if running is not None:
            instead = _UPDATE_BY_HAND if alone else _UPDATED_IN_PLACE
            _checks.mutable(running_mean, "running_mean", instead)
            _checks.mutable(running_var, "running_var", instead)
            _checks.running_to_update(frame.inputs, instead)
    out_ = frame.out(out, inplace="x")
    return ForwardCall(
        frame=frame,
        gamma=gamma_,
        beta=beta_,
        residual=residual_,
        activation=activation,
        out=out_,
        training=training,
        running=running,
        momentum=momentum,
        eps=eps,
        correction=correction_,
    )


_UPDATE_BY_HAND = (
    "it is updated in place; use batch_norm_stats and update_running_stats(..., inplace=False)"
)
_UPDATED_IN_PLACE = "it is updated in place; pass one that can be written to"


@untraced
def batch_norm_inference(
    x: X,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
    fill: float | None = 0.0,
    dtype: Any = None,
    out: Array | None = None,
) -> X:
    """Normalise x with population statistics.

    Computes y = act(gamma (x - mean) / sqrt(var + eps) + beta [+ residual]).

    Parameters
    ----------
    x : array, at least 2-d
        Any dtype that `batch_norm_forward` accepts, or uint8, int8, uint16 or int16, such as the
        bytes of images. These need no floating copy; they take no residual, segments or masks.
    gamma, beta : array of the shape of the channel axes, or None
        Scale and shift. None means 1 and 0.
    mean, var : array of the shape of the channel axes
        Population mean and variance, any floating dtype.
    eps : float, default 1e-5
        Added to the variance.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    residual : array of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last, as in `batch_norm_forward`.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights, fill : optional
        Which values count, and y elsewhere, as in `batch_norm_forward`.
    dtype : dtype, optional
        dtype of y if x holds integers: float32 (the default), float64, float16 or bfloat16. The
        arithmetic is in float32, for float64 in float64. If x is floating, y has its dtype.
    out : array of x's shape and y's dtype, optional
        Array to write y to. It may be x itself; it must not overlap an input in any other way.

    Returns
    -------
    array
        y, with the shape, memory order and library of x; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_forward`; x holds integers and is on a GPU; dtype is none of those above,
        or not that of a floating x.

    Notes
    -----
    Implements line 11 of Algorithm 2 of Ioffe & Szegedy (2015). `fold_into_linear` and
    `fold_into_conv` fold the same map into the weights of an adjacent layer.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0], [5.0]])
    >>> nbnorm.batch_norm_inference(x, None, None, np.array([3.0]), np.array([4.0]), eps=0.0)
    array([[-1.],
           [ 1.]])

    Pixels of an image, to float32 in one pass:

    >>> image = np.array([[[0, 128, 255]]], dtype=np.uint8)  # height, width, colour
    >>> mean, std = np.full(3, 127.5), np.full(3, 63.75)
    >>> nbnorm.batch_norm_inference(image, None, None, mean, std**2, eps=0.0, axis=-1).round(3)
    array([[[-2.   ,  0.008,  2.   ]]], dtype=float32)
    """
    plain = groups is offsets is mask is lengths is weights is length_axis is None
    if type(x) is np.ndarray and plain and dtype is None:
        done = _shortcut.inference(x, gamma, beta, mean, var, eps, axis, residual, activation, out)
        if done is not None:
            y: X = done[0]
            return y
    return _inference(
        x, gamma, beta, mean, var, eps, axis, residual, activation, dtype, out,
        groups=groups, offsets=offsets, mask=mask, lengths=lengths, length_axis=length_axis,
        weights=weights, fill=fill,
    )  # fmt: skip


@on_its_device("x")
def _inference(
    x: X,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    axis: Axis,
    residual: Array | None,
    activation: Activation,
    dtype: Any,
    out: Array | None,
    **parts: Any,
) -> X:
    """`batch_norm_inference` for arrays of any library."""
    frame = integer_frame(x, axis, dtype, out, **parts) or frame_of(x, axis, **parts)
    if dtype is not None:
        _checks.dtype_of_result(result_dtype(dtype, "dtype"), frame.dtype)
    gamma_, beta_ = frame.per_channel(gamma, "gamma"), frame.per_channel(beta, "beta")
    mean_, var_ = frame.required_per_channel(mean, "mean"), frame.required_per_channel(var, "var")
    residual_ = frame.like_x(residual, "residual")
    eps, activation = _checks.epsilon(eps), _checks.activation(activation)
    call = ForwardCall(frame, gamma_, beta_, residual_, activation, frame.out(out, inplace="x"))
    rstd = frame.backend.rstd(frame.statistic(var_), eps)
    y: X = frame.settle(call.apply(frame.statistic(mean_), rstd))
    return y


@on_its_device("x")
def batch_norm_apply(
    x: X,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    rstd: Array,
    *,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
    fill: float | None = 0.0,
    out: Array | None = None,
) -> X:
    """Normalise x with a given mean and rstd: the second half of the training forward pass.

    Parameters
    ----------
    x : array, at least 2-d
        Any dtype that `batch_norm_forward` accepts.
    gamma, beta : array of the shape of the channel axes, or None
        Scale and shift. None means 1 and 0.
    mean, rstd : array of the shape of the channel axes
        Mean and 1 / sqrt(biased variance + eps), any floating dtype. float64 keeps the accuracy
        of `batch_norm_forward` if the mean is large.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    residual : array of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last, as in `batch_norm_forward`.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights, fill : optional
        What counts, and y where x does not, as in `batch_norm_forward`.
    out : array of x's shape and dtype, optional
        Array to write y to. It may be x itself, which is then **overwritten**: pass
        ``None, ..., y=y`` to the backward functions instead of x. It must not overlap an input in
        any other way.

    Returns
    -------
    array
        y, with the shape, dtype, memory order and library of x; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_forward`.

    Notes
    -----
    Implements the last two lines of Algorithm 1 of Ioffe & Szegedy (2015).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0], [3.0]])
    >>> moments = nbnorm.batch_norm_stats(x)
    >>> nbnorm.batch_norm_apply(x, None, None, moments.mean, moments.rstd(eps=0.0))
    array([[-1.],
           [ 1.]])
    """
    frame = frame_of(
        x, axis, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
        length_axis=length_axis, weights=weights, fill=fill,
    )  # fmt: skip
    gamma_, beta_ = frame.per_channel(gamma, "gamma"), frame.per_channel(beta, "beta")
    mean_, rstd_ = (
        frame.required_per_channel(mean, "mean"),
        frame.required_per_channel(rstd, "rstd"),
    )
    residual_ = frame.like_x(residual, "residual")
    activation = _checks.activation(activation)
    call = ForwardCall(frame, gamma_, beta_, residual_, activation, frame.out(out, inplace="x"))
    y: X = frame.settle(call.apply(frame.statistic(mean_), frame.statistic(rstd_)))
    return y


@on_its_device("x")
def batch_norm_stats(
    x: Array,
    *,
    axis: Axis = 1,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
) -> Moments:
    """Compute count, mean and M2 per channel: the first half of the training forward pass.

    Parameters
    ----------
    x : array, at least 2-d
        Any dtype that `batch_norm_forward` accepts, or uint8, int8, uint16 or int16, such as the
        bytes of images, whose sums are exact. These take no segments or masks.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights : optional
        What counts, as in `batch_norm_forward`.

    Returns
    -------
    Moments
        (count, mean, m2): an int and two float64 arrays with the shape of the channel axes. With
        segments the arrays have a row for each part. count is a float with weights, and an array
        shaped like mean with offsets, or if what counts may differ by channel or segment.
        Merging the moments of several chunks, ``first.merge(second, third)``, is as accurate as
        one pass over all of them.

    Raises
    ------
    TypeError, ValueError
        x or axis is invalid, as in `batch_norm_forward`.

    Notes
    -----
    Implements the first two lines of Algorithm 1 of Ioffe & Szegedy (2015), with M2 = m var. Takes
    one pass over x (Chan, Golub & LeVeque, 1983).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> nbnorm.batch_norm_stats(np.array([[1.0], [3.0]]))
    Moments(count=2, mean=array([2.]), m2=array([2.]))
    """
    parts: dict[str, Any] = {
        "groups": groups, "offsets": offsets, "mask": mask, "lengths": lengths,
        "length_axis": length_axis, "weights": weights,
    }  # fmt: skip
    frame = integer_frame(x, axis, **parts) or frame_of(x, axis, **parts)
    mean, m2 = flat_stats(frame)
    return Moments(frame.count(), frame.home(frame.unflat(mean)), frame.home(frame.unflat(m2)))


def flat_stats(frame: Frame) -> tuple[NDArray, NDArray]:
    """Return mean and M2 of frame.x, of shape (C,); zeros if x is empty."""
    if frame.empty:
        return frame.memory.zeros(frame.channels), frame.memory.zeros(frame.channels)
    mean, m2 = frame.backend.stats(frame.view(frame.x))
    return mean, m2 if frame.unit == 1 else m2 * frame.unit


@untraced
def batch_norm_backward(
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    *,
    beta: Array | None = NOT_GIVEN,
    y: Array | None = None,
    residual: Array | None = None,
    training: bool = True,
    axis: Axis = 1,
    activation: Activation = None,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
    output_mask: Mask = _shortcut.ALL,
    out: Array | None = None,
) -> BatchNormBackward[X]:
    """Compute the gradients of `batch_norm_forward`.

    dx = gamma rstd (dy - mean(dy) - x_hat mean(dy x_hat)), dgamma = sum dy x_hat, dbeta = sum dy,
    with x_hat = (x - mean) rstd or, without x, x_hat = (y - beta) / gamma. With an activation, dy
    is first multiplied by its derivative; ReLU sets it to 0 wherever y > 0 is false. With weights,
    dx = gamma rstd (dy - w (sum dy + x_hat sum dy x_hat) / sum(w)) where w > 0, else 0, and the
    sums are over what counts.

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of y. Any strides, including broadcast ones. May be float32 if x is float16 or
        bfloat16.
    x : array, at least 2-d, or None
        Input of the forward call. If that wrote y over it (``out=x``), pass None and `y`: the
        overwritten x would yield wrong gradients, and no check can detect that. Without x, no gamma
        may be 0, and the forward call had neither residual nor activation, except "leaky_relu" with
        a slope > 0.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        As returned by the forward call.
    beta : array of the shape of the channel axes, or None
        As in the forward call. The derivative of an activation depends on it, so pass it (None if
        the forward call had none); with ReLU `y` will do. Without activation it may be omitted,
        unless x is None.
    y : array of x's shape and dtype, optional
        Result of the forward call, required with ReLU if that added a residual: the mask is then
        y > 0, and dresidual is returned. Without `y` the mask is recomputed from x. If x is None,
        x_hat is computed from `y`.
    residual : array of x's shape and dtype, optional
        Residual of the forward call, required with another activation, whose derivative is
        recomputed from x; dresidual is then returned.
    training : bool, default True
        If False, mean and rstd are constants (frozen statistics) and dx = gamma rstd dy.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    activation : None, str or Activation, default None
        As in the forward call.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights : optional
        What counts, as in `batch_norm_forward`.
    output_mask : 4 bools, default all True
        Which of dx, dgamma, dbeta, dresidual to compute; the others are None.
    out : array of x's shape and dtype, optional
        Array to write dx to, if dx is requested. It may be dy itself; it must not overlap an input
        in any other way.

    Returns
    -------
    BatchNormBackward
        (dx, dgamma, dbeta, dresidual), arrays of x's library. dgamma and dbeta are float64 sums
        rounded once to gamma's dtype, or to x's if gamma is None. With segments they are those of
        all parts together, unless gamma has a row for each part.

    Raises
    ------
    TypeError
        dy, x or y is not floating, or their dtypes differ; parameters or statistics are not
        floating.
    ValueError
        A shape, axis, activation, output_mask or out is invalid; the activation needs beta (ReLU:
        or y) or residual; x and y share memory. x is None, and a gamma is 0, an activation cannot
        be inverted, a residual is given or beta is omitted; or gamma, gamma rstd or a slope is not
        from 2^-126 to 2^126 in magnitude (2^-510 to 2^510 if y is float64).

    Notes
    -----
    Implements section 3 of Ioffe & Szegedy (2015), with the sums over the batch combined. Sums
    that overflow the dtype of the computation are taken again in float64.

    Backward from y follows Rota Bulo, Porzi & Kontschieder, "In-Place Activated BatchNorm for
    Memory-Optimized Training of DNNs" (2018). y is rounded to its dtype, which leaves x_hat an
    error of half a unit in the last place of y, divided by gamma: if gamma is small against beta,
    digits are lost. On a GPU this form waits for the device, to check gamma.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0], [3.0], [5.0]])
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> gamma = np.array([2.0])
    >>> y, mean, rstd = nbnorm.batch_norm_forward(x, gamma)
    >>> grads = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd)
    >>> grads.dgamma.round(3), grads.dbeta
    (array([-1.225]), array([1.]))
    >>> abs(grads.dx.sum()) < 1e-12  # a shift of the whole batch changes nothing
    np.True_

    In place: y is written over x, and backward needs only y.

    >>> y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, out=x)
    >>> same = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=None, y=y)
    >>> np.allclose(same.dx, grads.dx)
    True
    """
    plain = groups is offsets is mask is lengths is weights is length_axis is None
    shown = beta is not NOT_GIVEN or activation is None or y is not None
    if type(x) is np.ndarray and plain and shown:
        done = _shortcut.backward(
            dy, x, gamma, mean, rstd, None if beta is NOT_GIVEN else beta, y, residual, training,
            axis, activation, output_mask, out,
        )  # fmt: skip
        if done is not None:
            return BatchNormBackward(*done)
    return _backward(
        training, output_mask, out, dy, x, gamma, mean, rstd, beta, axis, activation,
        y=y, residual=residual, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
        length_axis=length_axis, weights=weights,
    )  # fmt: skip


@on_its_device("x", instead="y")
def _backward(
    training: bool,
    output_mask: Mask,
    out: Array | None,
    dy: Array,
    x: X,
    *arguments: Any,
    y: Array | None,
    residual: Array | None,
    **parts: Any,
) -> BatchNormBackward[X]:
    """`batch_norm_backward` for arrays of any library; from `dy` on in `check_backward`'s order."""
    call = check_backward(dy, x, *arguments, y=y, residual=residual, **parts)
    frame, wanted = call.frame, call.wanted(output_mask)
    dx, sums, dresidual = call.gradients(wanted, training, frame.out(out, inplace="dy"))
    return BatchNormBackward(
        dx and frame.settle(dx),
        frame.parameter_gradient(sums[1], call.gamma) if wanted.dgamma else None,
        frame.parameter_gradient(sums[0], call.gamma, call.beta) if wanted.dbeta else None,
        dresidual and frame.settle(dresidual),
    )


class Wanted(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    dgamma: bool
    dbeta: bool
    dresidual: bool


class BackwardCall(NamedTuple):
    """Checked arguments common to all backward functions, with NumPy or CuPy arrays.

    With `from_y`, there is no x: the frame is y's, and x_hat = (y - beta) / gamma.
    """

    frame: Frame
    dy: NDArray
    gamma: NDArray | None
    mean: NDArray
    rstd: NDArray
    beta: NDArray | None
    y: NDArray | None
    residual: NDArray | None
    activation: Fused
    from_y: bool = False

    def wanted(self, output_mask: Mask) -> Wanted:
        """Check `output_mask` and return it; dresidual also requires y or the residual."""
        dx, dgamma, dbeta, dresidual = _checks.output_mask(output_mask)
        added = self.y is not None or self.residual is not None
        return Wanted(dx, dgamma, dbeta, dresidual and added)

    @property
    def recomputed(self) -> Fused:
        """The activation whose derivative is recomputed (from y: its inverse); None for ReLU."""
        own = with_own_kernels(self.activation)
        return inverse_of(own) if own is not None and self.from_y else own

    def operands(self) -> tuple[tuple[NDArray | None, ...], tuple[NDArray | None, ...]]:
        """Return (dy, x, gamma, mean, rstd) and the derivative's (beta, y), for the backend."""
        frame = self.frame
        if self.from_y:
            return (frame.view(self.dy), frame.view(frame.x), *self._inverse()), (None, None)
        gamma, *mask = frame.scale_and_mask(
            self.activation, self.gamma, self.beta, self.y, self.residual
        )
        statistics = frame.statistic(self.mean), frame.statistic(self.rstd)
        return (frame.view(self.dy), frame.view(frame.x), gamma, *statistics), tuple(mask)

    def gradients(
        self, wanted: Wanted, training: bool, out: Out | None
    ) -> tuple[Target | None, Any, Target | None]:
        """Compute dx, the two sums and dresidual, each if it is wanted."""
        frame = self.frame
        dx = frame.target(out) if wanted.dx else None
        dresidual = frame.target() if wanted.dresidual else None
        if frame.empty:
            return dx, frame.memory.zeros((2, frame.channels)), dresidual
        (operands, mask), act, sums = self.operands(), self.recomputed, None
        written = dx and dx.written, dresidual and dresidual.written
        if wanted.dx and training:
            sums = frame.backend.backward(*operands, *mask, *written, act)
        else:
            if wanted.dgamma or wanted.dbeta:
                sums = frame.backend.backward_reduce(*operands, *mask, act)
            if wanted.dx or wanted.dresidual:
                frame.backend.backward_apply(*operands, None, frame.m, *mask, *written, act)
        return dx, sums, dresidual

    def _inverse(self) -> tuple[NDArray, NDArray, NDArray]:
        """Return gamma, mean and rstd that make the kernels compute with y in place of x.

        x_hat = (y - mean) rstd is (y - beta) / gamma with beta as mean and 1 / gamma as rstd;
        gamma rstd keeps its value with gamma^2 rstd as gamma. Where rstd is 0, x_hat is 0.
        """
        frame, rstd = self.frame, self.frame.statistic(self.rstd)
        gamma, beta = (
            array.astype(np.float64) for array in frame.scale_and_shift(self.gamma, self.beta)
        )
        with np.errstate(invalid="ignore"):  # NaN and Inf in a channel are not worth a warning
            return gamma * gamma * rstd, beta, (rstd != 0) / gamma


def check_backward(
    dy: Array,
    x: Array,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    beta: Array | None,
    axis: Axis,
    activation: Activation,
    *,
    y: Array | None,
    residual: Array | None = None,
    **parts: Any,
) -> BackwardCall:
    """Check and convert the arguments common to all backward functions; compute nothing.

    `parts` are segments and what counts, for `frame_of`.
    """
    from_y = x is None and y is not None
    large, name = (y, "y") if from_y else (x, "x")
    frame = frame_of(large, axis, name, **parts)
    if from_y:
        _checks.invertible(activation, dtype=frame.x.dtype)
        if residual is not None:
            raise ValueError("residual is given, and y does not determine x_hat; pass x")
    activation = _checks.activation(activation)
    if not from_y:
        _checks.for_derivative(activation, y, residual)
    gamma = _checks.given(gamma, "gamma", activation, y, from_y)
    beta = _checks.given(beta, "beta", activation, y, from_y)
    dy_, y_ = frame.required_like_x(dy, "dy"), None if from_y else frame.like_x(y, "y")
    residual_ = frame.like_x(residual, "residual")
    gamma_, beta_ = frame.per_channel(gamma, "gamma"), frame.per_channel(beta, "beta")
    mean_, rstd_ = (
        frame.required_per_channel(mean, "mean"),
        frame.required_per_channel(rstd, "rstd"),
    )
    _checks.same_parts(gamma_, beta_)
    if y_ is not None:
        _checks.not_overwritten(frame.x, y_)
    if from_y:
        scale = np.ones(rstd_.shape) if gamma_ is None else on_host(gamma_)
        _checks.divisor(scale, frame.x.dtype, on_host(rstd_))
    return BackwardCall(frame, dy_, gamma_, mean_, rstd_, beta_, y_, residual_, activation, from_y)


@on_its_device("x", instead="y")
def batch_norm_backward_reduce(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    *,
    gamma: Array | None = NOT_GIVEN,
    beta: Array | None = NOT_GIVEN,
    y: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    axis: Axis = 1,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
) -> tuple[Array, Array]:
    """Compute sum dy and sum dy x_hat per channel: the first half of the training backward pass.

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of y. May be float32 if x is float16 or bfloat16.
    x : array, at least 2-d, or None
        Input of the forward call. If that wrote y over it (``out=x``), pass None and `y`, as in
        `batch_norm_backward`.
    mean, rstd : array of the shape of the channel axes
        Statistics that normalised x.
    gamma, beta : array of the shape of the channel axes, or None
        As in the forward call. The derivative of an activation depends on them, so pass both (None
        if the forward call had none); with ReLU `y` will do. Without activation they may be
        omitted, unless x is None.
    y : array of x's shape and dtype, optional
        Result of the forward call, required for the ReLU mask if that added a residual, and for
        x_hat if x is None.
    residual : array of x's shape and dtype, optional
        Residual of the forward call, required with an activation other than ReLU.
    activation : None, str or Activation, default None
        As in the forward call.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights : optional
        What counts, as in `batch_norm_forward`.

    Returns
    -------
    sum_dy, sum_dy_xhat : array of float64
        dbeta and dgamma, with the shape of the channel axes. Sums of ranks or chunks can be added.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`.

    Notes
    -----
    Implements the gradients of beta and gamma in section 3 of Ioffe & Szegedy (2015).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> nbnorm.batch_norm_backward_reduce(dy, x, np.array([2.0]), np.array([1.0]))
    (array([1.5]), array([-0.5]))
    """
    call = check_backward(
        dy, x, gamma, mean, rstd, beta, axis, activation,
        y=y, residual=residual, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
        length_axis=length_axis, weights=weights,
    )  # fmt: skip
    frame = call.frame
    if frame.empty:
        sums = frame.memory.zeros((2, frame.channels))
    else:
        operands, mask = call.operands()
        sums = frame.backend.backward_reduce(*operands, *mask, call.recomputed)
    return frame.home(frame.unflat(sums[0])), frame.home(frame.unflat(sums[1]))


@on_its_device("x", instead="y")
def batch_norm_backward_apply(
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    sum_dy: Array,
    sum_dy_xhat: Array,
    count: int,
    *,
    beta: Array | None = NOT_GIVEN,
    y: Array | None = None,
    residual: Array | None = None,
    activation: Activation = None,
    axis: Axis = 1,
    groups: int | None = None,
    offsets: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    length_axis: int | None = None,
    weights: Array | None = None,
    out: Array | None = None,
) -> X:
    """Compute the gradient of x from the two sums: the second half of the training backward pass.

    dx = gamma rstd (dy - sum_dy / count - x_hat sum_dy_xhat / count).

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of y. May be float32 if x is float16 or bfloat16.
    x : array, at least 2-d, or None
        Input of the forward call. If that wrote y over it (``out=x``), pass None and `y`, as in
        `batch_norm_backward`.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        Statistics that normalised x.
    sum_dy, sum_dy_xhat : array of the shape of the channel axes
        Sums returned by `batch_norm_backward_reduce`, added over all parts of the batch.
    count : int, float or array
        Number of values per channel in the whole batch, or the sum of their weights; with segments,
        in each segment. An array like `sum_dy` if it differs.
    beta : array of the shape of the channel axes, or None
        As in the forward call. The derivative of an activation depends on it, so pass it (None if
        the forward call had none); with ReLU `y` will do. Without activation it may be omitted,
        unless x is None.
    y : array of x's shape and dtype, optional
        Result of the forward call, required for the ReLU mask if that added a residual, and for
        x_hat if x is None.
    residual : array of x's shape and dtype, optional
        Residual of the forward call, required with an activation other than ReLU.
    activation : None, str or Activation, default None
        As in the forward call.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    groups, offsets : int, or array of int, optional
        Parts of x with statistics of their own, as in `batch_norm_forward`.
    mask, lengths, length_axis, weights : optional
        What counts, as in `batch_norm_forward`.
    out : array of x's shape and dtype, optional
        Array to write dx to. It may be dy itself; it must not overlap an input in any other way.

    Returns
    -------
    array
        dx, with the shape, dtype, memory order and library of x; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_backward`; count is not positive although x is not empty.

    Notes
    -----
    Implements the gradient of x in section 3 of Ioffe & Szegedy (2015).

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> mean, rstd = np.array([2.0]), np.array([0.5])
    >>> sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd)
    >>> nbnorm.batch_norm_backward_apply(dy, x, None, mean, rstd, *sums, 2)
    array([[ 0.09375],
           [-0.09375]])
    """
    call = check_backward(
        dy, x, gamma, mean, rstd, beta, axis, activation,
        y=y, residual=residual, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
        length_axis=length_axis, weights=weights,
    )  # fmt: skip
    frame = call.frame
    sum_dy_ = frame.required_per_channel(sum_dy, "sum_dy")
    sum_dy_xhat_ = frame.required_per_channel(sum_dy_xhat, "sum_dy_xhat")
    m = frame.counted(count)
    target = frame.target(frame.out(out, inplace="dy"))
    if not frame.empty:
        operands, mask = call.operands()
        sums = np.stack([frame.statistic(sum_dy_), frame.statistic(sum_dy_xhat_)])
        frame.backend.backward_apply(
            *operands, sums, m, *mask, target.written, None, call.recomputed
        )
    dx: X = frame.settle(target)
    return dx
