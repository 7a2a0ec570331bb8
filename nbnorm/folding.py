"""Inference as scale and shift, and folded into the preceding linear or convolution layer."""

import numpy as np

from nbnorm._arrays import home_of, on_its_device, take_floating
from nbnorm._typing import Array, NDArray
from nbnorm.moments import rstd_of


@on_its_device("var")
def fold_batch_norm(
    gamma: Array | None, beta: Array | None, mean: Array, var: Array, *, eps: float = 1e-5
) -> tuple[Array, Array]:
    """Return batch normalization at inference as ``y = scale * x + shift``.

    Implements the last line of Algorithm 2 of Ioffe & Szegedy (2015):
    scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, computed in float64 and rounded
    once. If ``|mean|`` is much greater than the standard deviation, scale * x + shift loses digits
    to cancellation in float32; `batch_norm_inference` does not.

    Parameters
    ----------
    gamma, beta : array shaped like `var`, or None
        Scale and shift of the layer, any floating dtype. None means 1 and 0.
    mean, var : array of one shape
        Population statistics, any floating dtype.
    eps : float, default 1e-5
        Added to the variance; finite and not negative. If var + eps is 0, the scale is 0.

    Returns
    -------
    scale, shift : array shaped like `var`
        Arrays with the library and dtype of `gamma`, or of `var` if `gamma` is None.

    Raises
    ------
    TypeError
        An argument is not a floating array.
    ValueError
        An argument does not have the shape of `var`; `eps` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.folding import fold_batch_norm
    >>> fold_batch_norm(None, np.array([1.0]), np.array([3.0]), np.array([4.0]), eps=0.0)
    (array([0.5]), array([-0.5]))
    """
    expected = take_floating(var, "var").shape
    scale, shift = _scale_and_shift(
        gamma, beta, mean, var, eps, expected, f"for var of shape {expected}"
    )
    like = var if gamma is None else gamma
    return _cast(scale, like), _cast(shift, like)


@on_its_device("weight")
def fold_into_linear(
    weight: Array,
    bias: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Fold batch normalization at inference into the preceding linear layer.

    With s = gamma / sqrt(var + eps), computes W' = s W and b' = beta + (b - mean) s, so that
    W' u + b' = BN(W u + b). Computes in float64 and rounds once.

    Parameters
    ----------
    weight : array of shape (out, in)
        Weight of the layer, any floating dtype.
    bias : array of shape (out,), or None
        Bias of the layer. None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift. None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics.
    eps : float, default 1e-5
        Added to the variance; finite and not negative.

    Returns
    -------
    weight, bias : array
        New arrays of shapes (out, in) and (out,), with the library and dtype of the arguments. If
        `bias` is None, the new bias has those of `weight`.

    Raises
    ------
    TypeError
        An argument is not a floating array.
    ValueError
        A shape is wrong; `eps` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.folding import fold_into_linear
    >>> weight, mean, var = np.array([[2.0, 4.0]]), np.array([3.0]), np.array([4.0])
    >>> fold_into_linear(weight, None, None, None, mean, var, eps=0.0)
    (array([[1., 2.]]), array([-1.5]))
    """
    taken = take_floating(weight, "weight")
    if taken.ndim != 2:
        raise ValueError(f"weight has shape {taken.shape}, expected (out, in)")
    expected = taken.shape[:1]
    of = f"for weight of shape {taken.shape}"
    scale, shift = _scale_and_shift(gamma, beta, mean, var, eps, expected, of)
    shift = _folded_bias(bias, scale, shift, expected, of)
    with np.errstate(all="ignore"):
        folded = taken * scale[:, None]
    return _cast(folded, weight), _cast(shift, weight if bias is None else bias)


@on_its_device("weight")
def fold_into_conv(
    weight: Array,
    bias: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch normalization at inference into the preceding convolution.

    Like `fold_into_linear`, but scales the kernel of every output channel. Weights have PyTorch's
    layout, with any number of kernel axes.

    Parameters
    ----------
    weight : array of shape ``(out, in / groups, *kernel)`` or ``(in, out / groups, *kernel)``
        Weight of the convolution, any floating dtype. The second form applies if `transposed`.
    bias : array of shape (out,), or None
        Bias of the layer. None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift. None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics.
    eps : float, default 1e-5
        Added to the variance; finite and not negative.
    transposed : bool, default False
        Whether the layer is a transposed convolution.
    groups : int, default 1
        Number of groups of the convolution.

    Returns
    -------
    weight, bias : array
        New arrays of the shape of `weight` and (out,), with the library and dtype of the arguments.
        If `bias` is None, the new bias has those of `weight`.

    Raises
    ------
    TypeError
        An argument is not a floating array.
    ValueError
        A shape is wrong; `eps` is negative or not finite; `groups` is not a positive integer or
        does not divide the length of the first axis of `weight`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.folding import fold_into_conv
    >>> weight, bias = np.ones((2, 1, 3)), np.array([0.0, 1.0])
    >>> mean, var = np.array([0.0, 1.0]), np.array([1.0, 4.0])
    >>> weight, bias = fold_into_conv(weight, bias, None, None, mean, var, eps=0.0)
    >>> weight[:, 0, 0], bias
    (array([1. , 0.5]), array([0., 0.]))
    """
    taken = take_floating(weight, "weight")
    if taken.ndim < 3:
        layout = "(in, out/groups, *kernel)" if transposed else "(out, in/groups, *kernel)"
        raise ValueError(f"weight has shape {taken.shape}, expected {layout}")
    _check_groups(groups, taken.shape, "in" if transposed else "out")
    # View both layouts as (groups, a, b, *kernel). The output channels are (groups, a) or,
    # transposed, (groups, b).
    grouped = taken.reshape(groups, taken.shape[0] // groups, *taken.shape[1:])
    channels = 2 if transposed else 1
    expected = (groups * grouped.shape[channels],)
    of = f"for weight of shape {taken.shape}"
    if groups > 1:
        of += f" and groups {groups}"
    scale, shift = _scale_and_shift(gamma, beta, mean, var, eps, expected, of)
    shift = _folded_bias(bias, scale, shift, expected, of)
    per_kernel = [1] * grouped.ndim
    per_kernel[0], per_kernel[channels] = groups, grouped.shape[channels]
    with np.errstate(all="ignore"):
        folded = (grouped * scale.reshape(per_kernel)).reshape(taken.shape)
    return _cast(folded, weight), _cast(shift, weight if bias is None else bias)


def _scale_and_shift(
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    expected: tuple[int, ...],
    of: str,
) -> tuple[NDArray, NDArray]:
    """Check the arguments and return scale and shift in float64."""
    scale = rstd_of(_float64(var, "var", expected, of), eps)
    center = _float64(mean, "mean", expected, of)
    with np.errstate(all="ignore"):  # NaN and Inf pass through to their channel
        if gamma is not None:
            scale = _float64(gamma, "gamma", expected, of) * scale
        shift = -center * scale
        if beta is not None:
            shift = _float64(beta, "beta", expected, of) + shift
    return scale, shift


def _folded_bias(
    bias: Array | None, scale: NDArray, shift: NDArray, expected: tuple[int, ...], of: str
) -> NDArray:
    """Return bias * scale + shift in float64; None means a bias of 0."""
    if bias is None:
        return shift
    with np.errstate(all="ignore"):
        return _float64(bias, "bias", expected, of) * scale + shift


def _float64(obj: Array, name: str, expected: tuple[int, ...], of: str) -> NDArray:
    """Convert a parameter or statistic to float64; raise if its shape is not as expected."""
    array = take_floating(obj, name)
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected} {of}")
    return array.astype(np.float64)


def _check_groups(groups: int, shape: tuple[int, ...], role: str) -> None:
    """Raise if `groups` does not divide the first axis of the weight."""
    if isinstance(groups, bool | np.bool) or not isinstance(groups, int | np.integer) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if shape[0] % groups != 0:
        raise ValueError(
            f"groups is {groups}, which does not divide the {shape[0]} {role} channels "
            f"of weight of shape {shape}"
        )


def _cast(array: NDArray, like: Array) -> Array:
    """Round a float64 result once, to the dtype and library of `like`."""
    with np.errstate(all="ignore"):
        return home_of(like)(array.astype(take_floating(like, "like").dtype))
