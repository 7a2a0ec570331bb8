"""Conversion of other frameworks' batch norm checkpoints and hyperparameters to nbnorm and back.

All frameworks compute gamma (x - mean) / sqrt(var + eps) + beta. They differ in the names of the
arrays, in eps, in the statistic that momentum weights, and in the correction of the running
variance. `CONVENTIONS` lists these differences. `load` and `dump` use it and import no framework.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import take_floating
from nbnorm._typing import Array, Axis, NDArray
from nbnorm.layer import BatchNorm

__all__ = ["CONVENTIONS", "Convention", "dump", "load"]

_IDENTITY = {"weight": 1, "bias": 0}
_AFFINE: dict[tuple[str, ...], bool | Literal["gamma", "beta"]] = {
    ("weight", "bias"): True, ("weight",): "gamma", ("bias",): "beta", (): False,
}  # fmt: skip
_STATISTICS = ("running_mean", "running_var")
_OURS = (*_IDENTITY, *_STATISTICS, "num_batches_tracked")


class Convention(NamedTuple):
    """A framework's names for the parts of its batch norm, and their meaning.

    Attributes
    ----------
    name : str
        Name of the framework in `load` and `dump`.
    arrays : mapping of str to str
        The framework's names of the arrays, in its order, and their names in
        `BatchNorm.state_dict`. "factor" is not in it: Caffe divides its stored sums by it.
    eps : tuple of str and float
        Keyword and default.
    momentum : tuple of str and float
        Keyword and default.
    weighs : "new" or "old"
        Which statistic momentum multiplies. In nbnorm it is the new one.
    correction : int
        The running variance averages M2 / (m - correction): 1 is unbiased, 0 biased.
    axis : int, default 1
        Default channel axis.
    takes_axis : bool, default False
        Whether there is a hyperparameter `axis`, with nbnorm's meaning.
    several_axes : bool, default False
        Whether parameters may span more than one axis.
    leaves_out : mapping of str to tuple of str
        Keywords, True by default, and the arrays (nbnorm's names) that are absent if they are
        False.
    fixes_gamma : tuple of str and bool, or None
        Keyword, True by default, and the value for which the framework uses 1 for gamma and
        ignores the array.
    tags : tuple of str
        Strings that may precede names, and any prefix, in saved files.

    Examples
    --------
    >>> from nbnorm.conventions import CONVENTIONS
    >>> keras = CONVENTIONS["keras"]
    >>> list(keras.arrays)
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    >>> keras.momentum, keras.weighs
    (('momentum', 0.99), 'old')
    """

    name: str
    arrays: Mapping[str, str]
    eps: tuple[str, float]
    momentum: tuple[str, float]
    weighs: Literal["new", "old"]
    correction: int
    axis: int = 1
    takes_axis: bool = False
    several_axes: bool = False
    leaves_out: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    fixes_gamma: tuple[str, bool] | None = None
    tags: tuple[str, ...] = ()

    def hyperparameters(self) -> dict[str, Any]:
        """Return the keywords that `load` accepts, with the framework's defaults."""
        return dict([self.eps, self.momentum]) | dict.fromkeys(self.switches(), True)

    def switches(self) -> list[str]:
        """Return the hyperparameters that determine which arrays exist or are used."""
        return [*self.leaves_out, *(self.fixes_gamma or ())[:1]]


def _in_our_order(*names: str) -> dict[str, str]:
    """Map names, given in nbnorm's order of arrays, to nbnorm's names."""
    return dict(zip(names, _OURS, strict=False))


_ALL = (
    Convention(
        "torch",
        arrays=_in_our_order(*_OURS),
        eps=("eps", 1e-5),
        momentum=("momentum", 0.1),
        weighs="new",
        correction=1,
        leaves_out={"affine": _OURS[:2], "bias": ("bias",), "track_running_stats": _OURS[2:]},
    ),
    Convention(
        "keras",
        arrays=_in_our_order("gamma", "beta", "moving_mean", "moving_variance"),
        eps=("epsilon", 1e-3),
        momentum=("momentum", 0.99),
        weighs="old",
        correction=0,
        axis=-1,
        takes_axis=True,
        leaves_out={"scale": ("weight",), "center": ("bias",)},
    ),
    Convention(
        "flax",
        arrays=_in_our_order("scale", "bias", "mean", "var"),
        eps=("epsilon", 1e-5),
        momentum=("momentum", 0.99),
        weighs="old",
        correction=0,
        axis=-1,
        takes_axis=True,
        leaves_out={"use_scale": ("weight",), "use_bias": ("bias",)},
    ),
    Convention(
        "onnx",
        arrays=_in_our_order("scale", "B", "input_mean", "input_var"),
        eps=("epsilon", 1e-5),
        momentum=("momentum", 0.9),
        weighs="old",
        correction=0,
    ),
    Convention(
        "caffe",
        arrays={
            "mean": "running_mean",
            "variance": "running_var",
            "factor": "factor",
            "scale": "weight",
            "bias": "bias",
        },
        eps=("eps", 1e-5),
        momentum=("moving_average_fraction", 0.999),
        weighs="old",
        correction=1,
        leaves_out={"scale": ("weight", "bias"), "bias_term": ("bias",)},
    ),
    Convention(
        "chainer",
        arrays=_in_our_order("gamma", "beta", "avg_mean", "avg_var", "N"),
        eps=("eps", 2e-5),
        momentum=("decay", 0.9),
        weighs="old",
        correction=1,
        several_axes=True,
        leaves_out={"use_gamma": ("weight",), "use_beta": ("bias",)},
    ),
    Convention(
        "mxnet",
        arrays=_in_our_order("gamma", "beta", "moving_mean", "moving_var"),
        eps=("eps", 1e-3),
        momentum=("momentum", 0.9),
        weighs="old",
        correction=0,
        takes_axis=True,
        fixes_gamma=("fix_gamma", True),
        tags=("arg:", "aux:"),
    ),
    Convention(
        "gluon",
        arrays=_in_our_order("gamma", "beta", "running_mean", "running_var"),
        eps=("epsilon", 1e-5),
        momentum=("momentum", 0.9),
        weighs="old",
        correction=0,
        takes_axis=True,
        fixes_gamma=("scale", False),
        tags=("arg:", "aux:"),
    ),
)
CONVENTIONS: Mapping[str, Convention] = {convention.name: convention for convention in _ALL}


def load(
    framework: str,
    arrays: Mapping[str, Array] | Sequence[Array],
    *,
    prefix: str = "",
    axis: Axis | None = None,
    **hyperparameters: Any,
) -> BatchNorm:
    """Return a layer with the parameters and statistics of another framework's batch norm.

    Parameters
    ----------
    framework : str
        "torch", "keras", "flax", "onnx", "caffe", "chainer", "mxnet" (the operator and its symbol)
        or "gluon" (MXNet's layer).
    arrays : mapping of str to array, or sequence of arrays
        Parameters and statistics under the framework's names, or in its order; see
        ``CONVENTIONS[framework].arrays``. NumPy arrays or any objects with ``__dlpack__``, of any
        floating dtype. The number of batches (torch, chainer) may be absent.
    prefix : str, default ""
        Prefix of the names of this layer's arrays. Other names in the mapping are ignored.
    axis : int or tuple of int, optional
        Channel axes of the inputs, one per dimension of the arrays: the axes that **keep** their
        statistics, not the axes to reduce. Defaults to the framework's: -1 for keras and flax, 1
        for the others.
    **hyperparameters
        The framework's keywords, with the framework's defaults:
        ``CONVENTIONS[framework].hyperparameters()``.

    Returns
    -------
    BatchNorm
        Layer in training mode, like every new layer. It has the dtype of the arrays, or the widest
        if they differ, and the parameters of the framework's layer: ``affine`` is "gamma" or "beta"
        if that has only one. A gamma that the framework ignores (``fix_gamma``) is 1. The layer has
        no activation; set ``layer.activation`` if needed.

    Raises
    ------
    TypeError
        A hyperparameter is unknown to the framework; arrays is neither a mapping nor a sequence, or
        an array is not floating; momentum is not a number.
    ValueError
        The framework is unknown; a name is missing or unexpected; shapes differ or do not fit
        `axis`; eps or Caffe's factor is negative or not finite; momentum is not finite.

    Notes
    -----
    Caffe stores running statistics as weighted sums, and the sum of the weights as "factor". The
    running mean is mean / factor, or 0 if the factor is 0. ``moving_average_fraction=1`` weights
    all batches equally, which is ``momentum=None`` in nbnorm.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm import conventions
    >>> checkpoint = {
    ...     "bn/gamma": np.ones(2, np.float32),
    ...     "bn/beta": np.zeros(2, np.float32),
    ...     "bn/moving_mean": np.array([1, 2], np.float32),
    ...     "bn/moving_variance": np.array([3, 4], np.float32),
    ... }
    >>> layer = conventions.load("keras", checkpoint, prefix="bn/", epsilon=0.0)
    >>> layer.running_var, layer.correction, layer.axis
    (array([3., 4.], dtype=float32), 0, -1)
    >>> layer.eval().forward(np.array([[1, 4]], np.float32))
    array([[0., 1.]], dtype=float32)
    """
    convention = _convention(framework)
    _refuse_unknown(convention, hyperparameters, convention.hyperparameters())
    options = convention.hyperparameters() | hyperparameters
    switches = {keyword: bool(options[keyword]) for keyword in convention.switches()}
    eps = _checks.epsilon(options[convention.eps[0]])
    momentum = _weight_of_new(convention, options[convention.momentum[0]])
    names, given = _named(convention, switches, arrays, prefix)
    count, factor = given.pop("num_batches_tracked", 0), given.pop("factor", None)
    values = {ours: take_floating(array, names[ours]) for ours, array in given.items()}
    if not values:
        raise ValueError(
            f"{_title(convention, switches)} stores no arrays, so nothing can be loaded"
        )
    axis = convention.axis if axis is None else axis
    shape = _common_shape(values, names, axis)
    dtypes = {array.dtype for array in values.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else _widest(dtypes)
    if factor is not None:
        divisor = _divisor(factor, names["factor"])
        for name in _STATISTICS:
            sums = values[name].astype(np.float64)
            values[name] = sums / divisor if divisor > 0 else np.zeros_like(sums)
        if momentum == 0:  # sums never decay: all batches have the same weight
            momentum, count = None, round(divisor)

    layer = BatchNorm(
        shape if isinstance(axis, tuple) else shape[0],
        eps=eps,
        momentum=momentum,
        affine=_AFFINE[tuple(name for name in _IDENTITY if name in values)],
        track_running_stats=not values.keys().isdisjoint(_STATISTICS),
        correction=convention.correction,
        axis=axis,
        dtype=dtype,
    )
    unused = _unused(convention, switches)
    state: dict[str, Any] = layer.state_dict()
    state |= {name: array for name, array in values.items() if name not in unused}
    if layer.track_running_stats:
        state["num_batches_tracked"] = count
    layer.load_state_dict(state)
    return layer


def dump(
    framework: str, layer: BatchNorm, *, prefix: str = "", **switches: bool
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Return a layer's arrays and hyperparameters in another framework's convention.

    ``load(framework, arrays, **hyperparameters)`` is the inverse.

    Parameters
    ----------
    framework : str
        As in `load`.
    layer : BatchNorm
        Layer whose parameters and running statistics are copied.
    prefix : str, default ""
        Prefix for every name.
    **switches
        The framework's keywords that select the arrays of its layer: `affine` and
        `track_running_stats` (torch), `scale` and `center` (keras), `use_scale` and `use_bias`
        (flax), `scale` and `bias_term` (caffe), `use_gamma` and `use_beta` (chainer); or that
        determine whether gamma is used: `fix_gamma` (mxnet), `scale` (gluon). They default to
        those that match the layer.

    Returns
    -------
    arrays : dict of str to ndarray
        Copies under the framework's names, in its order, with the layer's dtype; for caffe at
        least float32.
    hyperparameters : dict of str to object
        Keywords of the framework's layer: eps, momentum, `switches`, and `axis` if it has one.

    Raises
    ------
    TypeError
        `layer` is not a `BatchNorm`; a switch is unknown to the framework.
    ValueError
        The framework is unknown; it does not support the layer's parameters of several axes,
        ``momentum=None`` or lack of running statistics; a switch drops parameters that are not 1
        and 0.

    Notes
    -----
    The running variance does not change, so outputs at inference are the same. If the layer's
    `correction` differs from the framework's, further training there uses the framework's. The
    layer's activation, renorm and debias are not included.

    For Caffe the statistics are multiplied by a factor of 1 / momentum, so that Caffe weights the
    next batch as the layer does. The factor 1, which some converters write, would give the next
    batch as much weight as all previous ones together.

    Examples
    --------
    >>> from nbnorm import BatchNorm, conventions
    >>> arrays, options = conventions.dump("keras", BatchNorm(3, axis=-1))
    >>> list(arrays)
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    >>> options
    {'epsilon': 1e-05, 'momentum': 0.9, 'axis': -1, 'scale': True, 'center': True}
    """
    convention = _convention(framework)
    _refuse_unknown(convention, switches, convention.switches())
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be an nbnorm.BatchNorm, got {type(layer).__qualname__}")
    shape = layer.num_features if isinstance(layer.num_features, tuple) else (layer.num_features,)
    if len(shape) > 1 and not convention.several_axes:
        raise ValueError(f"{framework} has one channel axis, but the layer has axis={layer.axis}")
    state = layer.state_dict()
    chosen = {
        keyword: not state.keys().isdisjoint(names)
        for keyword, names in convention.leaves_out.items()
    }
    if convention.fixes_gamma is not None:
        keyword, fixed = convention.fixes_gamma
        chosen[keyword] = fixed if "weight" not in state else not fixed
    chosen |= {keyword: bool(value) for keyword, value in switches.items()}
    _refuse_loss(convention, chosen, state)
    absent = _absent(convention, chosen)
    if not layer.track_running_stats and "running_mean" not in absent:
        raise ValueError(f"{framework} stores running statistics, but the layer has none")

    state = {name: np.full(shape, value, layer.dtype) for name, value in _IDENTITY.items()} | state
    momentum = layer.momentum
    if "factor" in convention.arrays.values():
        state = _sums(layer, state)
        momentum = momentum or 0.0  # None: all batches have the same weight
    if convention.weighs == "old":
        if momentum is None:
            raise ValueError(
                f"{framework} has no cumulative average, but the layer has momentum=None"
            )
        momentum = 1 - momentum
    hyperparameters = {convention.eps[0]: layer.eps, convention.momentum[0]: momentum}
    if convention.takes_axis:
        hyperparameters["axis"] = _checks.axes(layer.axis)[0]
    return {
        prefix + theirs: state[ours]
        for theirs, ours in convention.arrays.items()
        if ours not in absent
    }, hyperparameters | chosen


def _convention(framework: str) -> Convention:
    """Return the convention of a framework."""
    if framework not in CONVENTIONS:
        raise ValueError(f"framework must be one of {', '.join(CONVENTIONS)}, got {framework!r}")
    return CONVENTIONS[framework]


def _refuse_unknown(convention: Convention, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise if a keyword is not known."""
    for keyword in given:
        if keyword not in known:
            listed = ", ".join(known) or "none"
            raise TypeError(
                f"{keyword!r} is not a keyword of {convention.name}, which accepts: {listed}"
            )


def _refuse_loss(
    convention: Convention, switches: Mapping[str, bool], state: Mapping[str, NDArray]
) -> None:
    """Raise if dropping the unused arrays would change what the layer computes."""
    for name in _unused(convention, switches) & state.keys():
        if name not in _IDENTITY:
            raise ValueError(
                f"{_title(convention, switches)} stores no {name}, but the layer has it"
            )
        if np.any(state[name] != _IDENTITY[name]):
            raise ValueError(
                f"{_title(convention, switches)} fixes {name} at {_IDENTITY[name]}, "
                "but the layer has other values"
            )


def _absent(convention: Convention, switches: Mapping[str, bool]) -> set[str]:
    """Return nbnorm's names of the absent arrays."""
    leaves_out = convention.leaves_out.items()
    return {name for keyword, names in leaves_out if not switches[keyword] for name in names}


def _unused(convention: Convention, switches: Mapping[str, bool]) -> set[str]:
    """Return nbnorm's names of the arrays that are absent or ignored."""
    absent = _absent(convention, switches)
    if convention.fixes_gamma is not None:
        keyword, fixed = convention.fixes_gamma
        if switches[keyword] is fixed:
            absent.add("weight")
    return absent


def _title(convention: Convention, switches: Mapping[str, bool]) -> str:
    """Return "keras with scale=True, center=False", or "onnx", which has no switches."""
    listed = ", ".join(f"{keyword}={value}" for keyword, value in switches.items())
    return f"{convention.name} with {listed}" if listed else convention.name


def _weight_of_new(convention: Convention, momentum: float | None) -> float | None:
    """Return momentum in nbnorm's convention."""
    if convention.weighs == "new" and momentum is None:
        return None
    value = _checks.finite(momentum, convention.momentum[0])
    return value if convention.weighs == "new" else 1 - value


def _named(
    convention: Convention,
    switches: Mapping[str, bool],
    arrays: Mapping[str, Array] | Sequence[Array],
    prefix: str,
) -> tuple[dict[str, str], dict[str, Array]]:
    """Return full names and arrays, keyed by ours; raise if any is missing or unexpected."""
    absent = _absent(convention, switches)
    names = {ours: prefix + n for n, ours in convention.arrays.items() if ours not in absent}
    if isinstance(arrays, Mapping):
        keys = {_untagged(str(key), convention.tags): key for key in arrays}
        found = {name: arrays[key] for name, key in keys.items() if name.startswith(prefix)}
    elif isinstance(arrays, Sequence):
        more = [f"array {i}" for i in range(len(names), len(arrays))]
        found = dict(zip([*names.values(), *more], arrays, strict=False))
    else:
        raise TypeError(
            "arrays must be a mapping of names to arrays, or a sequence of arrays, "
            f"got {type(arrays).__qualname__}"
        )
    required = [name for ours, name in names.items() if ours != "num_batches_tracked"]
    missing = [name for name in required if name not in found]
    unexpected = [name for name in found if name not in names.values()]
    if missing or unexpected:
        raise ValueError(
            f"expected arrays {list(names.values())} for {_title(convention, switches)}; "
            f"missing {missing}, unexpected {unexpected}"
        )
    return names, {ours: found[name] for ours, name in names.items() if name in found}


def _untagged(name: str, tags: tuple[str, ...]) -> str:
    """Return a name without the tags of saved files."""
    for tag in tags:
        name = name.removeprefix(tag)
    return name


def _common_shape(
    values: Mapping[str, NDArray], names: Mapping[str, str], axis: Axis
) -> tuple[int, ...]:
    """Return the common shape of all arrays; raise if there is none or it does not fit `axis`."""
    first, *others = values
    shape: tuple[int, ...] = values[first].shape
    for name in others:
        if values[name].shape != shape:
            raise ValueError(
                f"{names[name]} has shape {values[name].shape}, "
                f"expected {shape}, the shape of {names[first]}"
            )
    if len(shape) != len(_checks.axes(axis)):
        raise ValueError(
            f"{names[first]} has shape {shape}, expected one dimension for each axis in axis={axis}"
        )
    return shape


def _widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """Return a dtype, at least float32, that holds all dtypes: bfloat16 and float16 differ."""
    return reduce(np.promote_types, dtypes, np.dtype(np.float32))


def _divisor(factor: Array, name: str) -> float:
    """Return the divisor of Caffe's sums as a float."""
    array = take_floating(factor, name)
    if array.size != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one number")
    value = float(array.item())
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value


def _sums(layer: BatchNorm, state: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Return the state with the running statistics as Caffe's sums, and their factor.

    Caffe gives the next batch the weight 1 / ((1 - momentum) factor + 1). The layer's weight is
    momentum, or 1 / (batches + 1) if that is None. So the factor is 1 / momentum, or the number of
    batches.
    """
    momentum = layer.momentum
    factor = 1 / momentum if momentum else float(layer.num_batches_tracked)
    if momentum == 0 or not 0 < factor < math.inf:
        raise ValueError(
            f"caffe cannot store running statistics with momentum={momentum} "
            f"after {layer.num_batches_tracked} batches"
        )
    dtype = _widest([layer.dtype])
    divisor = np.array([factor], dtype)
    held = {name: array.astype(dtype) for name, array in state.items()}
    sums = {name: (state[name] * divisor.astype(np.float64)).astype(dtype) for name in _STATISTICS}
    return held | sums | {"factor": divisor}
