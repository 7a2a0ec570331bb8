"""Inference as scale and shift, folded into an adjacent linear or convolution layer."""

import numpy as np

from nbnorm._arrays import home_of, on_its_device, take_float64, take_floating
from nbnorm._kernel_axes import Padding, View, is_padded, view_of
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
    norm_first: bool = False,
    layout: str = "OI",
) -> tuple[Array, Array]:
    """Fold batch normalization at inference into the linear layer before or after it.

    With s = gamma / sqrt(var + eps) and t = beta - mean s, computes W' = s W and b' = s b + t, so
    that W' u + b' = BN(W u + b). With `norm_first`, computes W' = W s and b' = b + W t, so that
    W' u + b' = W BN(u) + b. Computes in float64 and rounds once.

    Parameters
    ----------
    weight : array of shape (out, in), or (in, out)
        Weight of the layer, any floating dtype. `layout` says which.
    bias : array of shape (out,), or None
        Bias of the layer. None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift; of shape (in,) with `norm_first`. None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics; of shape (in,) with `norm_first`.
    eps : float, default 1e-5
        Added to the variance; finite and not negative.
    norm_first : bool, default False
        Whether batch normalization comes before the layer: it normalises the layer's input.
    layout : {"OI", "IO"}, default "OI"
        Axes of `weight`: (out, in), as in PyTorch, or (in, out), as in Keras and Flax.

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
        A shape is wrong; `eps` is negative or not finite; `layout` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.folding import fold_into_linear
    >>> weight, mean, var = np.array([[2.0, 4.0]]), np.array([3.0]), np.array([4.0])
    >>> fold_into_linear(weight, None, None, None, mean, var, eps=0.0)
    (array([[1., 2.]]), array([-1.5]))

    Batch normalization of the two inputs, before the layer:

    >>> mean, var = np.array([3.0, 0.0]), np.array([4.0, 1.0])
    >>> fold_into_linear(weight, None, None, None, mean, var, eps=0.0, norm_first=True)
    (array([[1., 4.]]), array([-3.]))
    """
    taken = take_floating(weight, "weight")
    if layout not in ("OI", "IO"):
        raise ValueError(f"layout is {layout!r}, expected 'OI' (out, in) or 'IO' (in, out)")
    if taken.ndim != 2:
        names = "(out, in)" if layout == "OI" else "(in, out)"
        raise ValueError(f"weight has shape {taken.shape}, expected {names}")
    of = f"for weight of shape {taken.shape}" + " and layout 'IO'" * (layout == "IO")
    view = View((layout.index("O"), layout.index("I")), groups=1, inputs_whole=False)
    return _fold(weight, bias, (gamma, beta, mean, var), eps, view, norm_first, of)


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
    norm_first: bool = False,
    padding: Padding | None = None,
    layout: str | None = None,
) -> tuple[Array, Array]:
    """Fold batch normalization at inference into the convolution before or after it.

    Like `fold_into_linear`, but scales the kernel of every output channel or, with `norm_first`, of
    every input channel. Kernels have any number of axes.

    Parameters
    ----------
    weight : array of shape ``(out, in / groups, *kernel)`` or ``(in, out / groups, *kernel)``
        Weight of the convolution, any floating dtype. The second form applies if `transposed`.
        `layout` names any other order of these axes.
    bias : array of shape (out,), or None
        Bias of the layer. None means 0.
    gamma, beta : array of shape (out,), or None
        Scale and shift; of shape (in,) with `norm_first`. None means 1 and 0.
    mean, var : array of shape (out,)
        Population statistics; of shape (in,) with `norm_first`.
    eps : float, default 1e-5
        Added to the variance; finite and not negative.
    transposed : bool, default False
        Whether the layer is a transposed convolution.
    groups : int, default 1
        Number of groups of the convolution.
    norm_first : bool, default False
        Whether batch normalization comes before the layer: it normalises the layer's input.
    padding : int, str, or sequence or array of int, optional
        Zeros around the input of the convolution: 1, (0, 1), ((1, 1), (2, 2)), an array of
        integers, or a word, in letters of any case: "valid", "same", "same_upper", "same_lower",
        "causal". Padding that repeats or reflects the input counts as 0, and so do "circular" and
        "reflect". Needed with `norm_first` unless `transposed`; otherwise padding does not matter.
    layout : str, optional
        Axes of `weight`, a letter each: "O" for out, "I" for in, and others for the kernel. By
        default PyTorch's, "OIHW" (transposed: "IOHW"). Keras, TensorFlow and Flax have "HWIO";
        Keras's and TensorFlow's transposed convolutions "HWOI". "M" in place of "O" is the
        multiplier of a depthwise convolution, "HWIM" in Keras and TensorFlow: output channel
        ``i * M + m`` belongs to input channel i.

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
        does not divide the channels; `layout` does not fit `weight`, or is depthwise together with
        `groups` or `transposed`. With `norm_first`: `padding` is missing, `padding` adds zeros, or
        the layer is transposed; the last two are allowed if the shift is 0 in every channel.

    Notes
    -----
    A convolution that pads after batch normalization has zeros at the border. The folded layer
    pads the input of batch normalization instead, where 0 would become the shift. To fold such a
    layer, pad its input with the value that becomes 0, -shift / scale of `fold_batch_norm` in each
    channel, and fold with padding=0. In a transposed convolution the number of kernel elements that
    reach an output, and so their share of the shift, depends on its position.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.folding import fold_into_conv
    >>> weight, bias = np.ones((2, 1, 3)), np.array([0.0, 1.0])
    >>> mean, var = np.array([0.0, 1.0]), np.array([1.0, 4.0])
    >>> weight, bias = fold_into_conv(weight, bias, None, None, mean, var, eps=0.0)
    >>> weight[:, 0, 0], bias
    (array([1. , 0.5]), array([0., 0.]))

    A Keras layer, of shape (kernel, in, out), after batch normalization:

    >>> weight, one = np.ones((3, 1, 2)), np.ones(1)
    >>> options = {"eps": 0.0, "norm_first": True, "padding": "valid", "layout": "WIO"}
    >>> fold_into_conv(weight, bias, 2 * one, None, one, one, **options)[1]
    array([-6., -6.])
    """
    taken = take_floating(weight, "weight")
    if taken.ndim < 3:
        axes = "(in, out/groups, *kernel)" if transposed else "(out, in/groups, *kernel)"
        expected = axes if layout is None else f"axes {layout!r}"
        raise ValueError(f"weight has shape {taken.shape}, expected {expected}")
    view = view_of(taken.shape, layout, groups, transposed)
    of = f"for weight of shape {taken.shape}"
    if layout is not None:
        of += f" and layout {layout!r}"
    if groups > 1:
        of += f" and groups {groups}"
    padded = padding is not None and is_padded(padding, view.kernel(taken.shape))
    obstacle = ""
    if norm_first and transposed:
        obstacle = _REACHED_UNEVENLY
    elif norm_first and padding is None:
        raise ValueError("padding is None, expected the layer's padding (0 if none) for norm_first")
    elif norm_first and padded:
        obstacle = _PADDED_AFTER.format(padding)
    return _fold(weight, bias, (gamma, beta, mean, var), eps, view, norm_first, of, obstacle)


_PADDED_AFTER = (
    "padding is {!r}, but zeros that are padded after batch normalization are not zeros before it: "
    "pad the input with -shift / scale of fold_batch_norm instead, and pass padding=0"
)
_REACHED_UNEVENLY = (
    "norm_first is True, but a transposed convolution adds the shift of batch normalization to "
    "outputs unequally often, which no bias can express: keep the batch normalization"
)


def _fold(
    weight: Array,
    bias: Array | None,
    norm: tuple[Array | None, Array | None, Array, Array],
    eps: float,
    view: View,
    norm_first: bool,
    of: str,
    obstacle: str = "",
) -> tuple[Array, Array]:
    """Return weight and bias; raise `obstacle` if there is one and a shift is not 0."""
    taken = take_floating(weight, "weight")
    grouped = view.of(taken)
    # Batch normalization acts on one side: axes 0 (group) and `side` (channel in it).
    side = 2 if norm_first else 1
    outs = (view.groups * grouped.shape[1],)
    channels = (view.groups * grouped.shape[side],)
    per_kernel = [1] * grouped.ndim
    per_kernel[0], per_kernel[side] = view.groups, grouped.shape[side]

    expected_for = of + " and norm_first=True" * norm_first
    scale, shift = _scale_and_shift(*norm, eps, channels, expected_for)
    if obstacle and (shift != 0).any():
        raise ValueError(obstacle)
    factor = None if norm_first else scale
    with np.errstate(all="ignore"):
        folded = grouped * scale.reshape(per_kernel)
        if norm_first:
            terms = grouped * shift.reshape(per_kernel)
            shift = terms.sum(axis=tuple(range(2, terms.ndim))).reshape(outs)
    shift = _folded_bias(bias, factor, shift, outs, of)
    folded = view.back(folded, taken.shape)
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
    scale = rstd_of(take_float64(var, "var", expected, of), eps)
    center = take_float64(mean, "mean", expected, of)
    with np.errstate(all="ignore"):  # NaN and Inf pass through to their channel
        if gamma is not None:
            scale = take_float64(gamma, "gamma", expected, of) * scale
        shift = -center * scale
        if beta is not None:
            shift = take_float64(beta, "beta", expected, of) + shift
    return scale, shift


def _folded_bias(
    bias: Array | None, scale: NDArray | None, shift: NDArray, expected: tuple[int, ...], of: str
) -> NDArray:
    """Return bias * scale + shift in float64; None means a bias of 0 and a scale of 1."""
    if bias is None:
        return shift
    with np.errstate(all="ignore"):
        scaled = take_float64(bias, "bias", expected, of)
        return (scaled if scale is None else scaled * scale) + shift


def _cast(array: NDArray, like: Array) -> Array:
    """Round a float64 result once, to the dtype and library of `like`, in C order."""
    with np.errstate(all="ignore"):
        return home_of(like)(array.astype(take_floating(like, "like").dtype, order="C"))
