"""Inference is linear in x: as scale and shift, and folded into the layer before it."""

import numpy as np

from nbnorm._arrays import home_of, on_its_device, take_floating
from nbnorm._typing import Array, NDArray
from nbnorm.moments import rstd_of


@on_its_device("var")
def fold_batch_norm(
    gamma: Array | None, beta: Array | None, mean: Array, var: Array, *, eps: float = 1e-5
) -> tuple[Array, Array]:
    """Return batch normalization at inference as ``y = scale * x + shift``.

    The last line of Algorithm 2 of Ioffe & Szegedy (2015): scale = gamma / sqrt(var + eps) and
    shift = beta - mean * scale, in float64 and rounded once. Where ``|mean|`` is much greater than
    the standard deviation, scale * x + shift cancels in float32; `batch_norm_inference` does not.

    Parameters
    ----------
    gamma, beta : array shaped like `var`, or None
        Scale and shift of the layer, any floating dtype; None means 1 and 0.
    mean, var : array of one shape
        Population statistics, any floating dtype.
    eps : float, default 1e-5
        Added to the variance; finite, not negative. Where var + eps is 0 the scale is 0.

    Returns
    -------
    scale, shift : array shaped like `var`
        Of gamma's library and dtype, or of var's where `gamma` is None.

    Raises
    ------
    TypeError
        An argument that is not a floating array.
    ValueError
        Another shape than var's; `eps` negative or not finite.

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
    """Fold batch normalization at inference into the linear layer before it.

    With s = gamma / sqrt(var + eps), W' = s W and b' = beta + (b - mean) s, so that
    W' u + b' = BN(W u + b); in float64, rounded once.

    Parameters
    ----------
    weight : array of shape (out, in)
        Weight of the layer, any floating dtype.
    bias : array of shape (out,), or None
        Bias of the layer; None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift; None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics.
    eps : float, default 1e-5
        Added to the variance; finite, not negative.

    Returns
    -------
    weight, bias : array
        New arrays of the shapes (out, in) and (out,), each of the library and dtype of the one
        passed in; a bias where there was none is like `weight`.

    Raises
    ------
    TypeError
        An argument that is not a floating array.
    ValueError
        A wrong shape; `eps` negative or not finite.

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
    """Fold batch normalization at inference into the convolution before it.

    As `fold_into_linear`, with every output channel's kernel scaled. Weights are laid out as in
    PyTorch, with any number of kernel axes.

    Parameters
    ----------
    weight : array of shape ``(out, in / groups, *kernel)`` or ``(in, out / groups, *kernel)``
        Weight of the convolution, any floating dtype; the second form where `transposed`.
    bias : array of shape (out,), or None
        Bias of the layer; None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift; None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics.
    eps : float, default 1e-5
        Added to the variance; finite, not negative.
    transposed : bool, default False
        Whether it is a transposed convolution.
    groups : int, default 1
        Groups of the convolution.

    Returns
    -------
    weight, bias : array
        New arrays of the shape of `weight` and (out,), each of the library and dtype of the one
        passed in; a bias where there was none is like `weight`.

    Raises
    ------
    TypeError
        An argument that is not a floating array.
    ValueError
        A wrong shape; `eps` negative or not finite; `groups` not a positive integer or not a
        divisor of the first axis of `weight`.

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
    # One view for both layouts, (groups, a, b, *kernel), whose output channels are (groups, a)
    # or, transposed, (groups, b).
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
    """Return scale and shift in float64 after checking what they are made of."""
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
    """Return bias * scale + shift in float64; no bias is 0."""
    if bias is None:
        return shift
    with np.errstate(all="ignore"):
        return _float64(bias, "bias", expected, of) * scale + shift


def _float64(obj: Array, name: str, expected: tuple[int, ...], of: str) -> NDArray:
    """Take a parameter or statistic of the expected shape as float64."""
    array = take_floating(obj, name)
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected} {of}")
    return array.astype(np.float64)


def _check_groups(groups: int, shape: tuple[int, ...], role: str) -> None:
    """Refuse groups that do not split the first axis of the weight evenly."""
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
