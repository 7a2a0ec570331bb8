"""`BatchNorm`: a layer that holds parameters, gradients and running statistics."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from nbnorm import _checks
from nbnorm._arrays import (
    DTYPES,
    device_of,
    moved_to,
    on_host,
    ones_like,
    overwrite,
    take,
    take_floating,
)
from nbnorm._pairwise import Pairwise
from nbnorm._typing import Activation, Array, NDArray, X
from nbnorm.functional import batch_norm_backward, batch_norm_forward, batch_norm_stats
from nbnorm.moments import Moments, debiased, update_running_stats
from nbnorm.renorm import Renorm, batch_renorm_backward, batch_renorm_forward


class Saved(NamedTuple):
    """What `backward` needs from the last `forward`: references, not copies."""

    x: Array | None  # None if y was written over it
    mean: Array
    rstd: Array
    y: Array | None  # only if the ReLU mask depends on a residual, or x_hat on y
    added: Array | None  # the residual, only if the derivative of the activation depends on it
    residual: bool
    training: bool
    renorm: list[Array]  # r and d, or nothing
    parts: dict[str, Any]  # segments, and what counts, if given


class BatchNorm:
    """Batch normalization with parameters and running statistics (Ioffe & Szegedy 2015).

    Parameters
    ----------
    num_features : int or tuple of int
        Number of channels. If `axis` is a tuple, the lengths of those axes, in ascending order of
        the axes.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float or None, default 0.1
        Weight of the new batch in the running average. None takes the plain average of the means
        and corrected variances of all batches seen in training, as do Algorithm 2 of the paper
        (E[x] = E_B[mean_B], Var[x] = m/(m-1) E_B[var_B]) and PyTorch. That weights all batches
        equally and omits the variance between batch means; for the exact statistics of a data
        set, merge moments and call `set_statistics`.
    debias : bool, default False
        Whether to debias the running average, as Adam does: it then does not depend on the initial
        values 0 and 1, and the first batch replaces them. Momentum must be in (0, 1], or None,
        which has no bias in any case.
    affine : bool, "gamma" or "beta", default True
        Whether the layer has the parameters gamma ("weight") and beta ("bias"), or which of them.
    track_running_stats : bool, default True
        Whether the layer keeps running statistics. If not, evaluation uses batch statistics too.
    correction : int, default 1
        The running variance averages M2 / (m - correction): 1 is unbiased, 0 biased.
    axis : int or tuple of int, default 1
        Channel axes of the inputs: the axes that **keep** their statistics, not the axes to
        reduce.
    activation : None, str or Activation, default None
        Fused activation, applied last, as in `batch_norm_forward`.
    renorm : Renorm, optional
        Batch renormalization (Ioffe 2017) in training, with these bounds of r and d. Needs
        running statistics.
    dtype : floating dtype, default float32
        Dtype of parameters and running statistics, independent of the inputs' dtype.
    inplace : bool, default False
        Whether `forward` writes y **over x**; `backward` then computes x_hat from y, and the layer
        keeps one tensor alive instead of two. In training no gamma may be 0, and small ones cost
        digits (see `batch_norm_backward`). Residuals and activations are refused, except
        "leaky_relu" with a slope > 0.

    Attributes
    ----------
    parameters : dict of str to ndarray
        "weight" (gamma, initially 1) and "bias" (beta, initially 0), as far as `affine` has them.
        Parameters and running statistics are NumPy arrays until `forward` gets an x on a GPU. They
        then move there as CuPy arrays, and back with the next x in CPU memory.
    grads : dict of str to array
        Gradients of the parameters, under the same keys. Each `backward` replaces them by new
        arrays of x's library.
    running_mean, running_var : ndarray or None
        Initially 0 and 1; None without `track_running_stats`.
    num_batches_tracked : int
        Number of batches in the running statistics. Empty batches do not count.
    training : bool
        Set by `train` and `eval`; initially True.

    Raises
    ------
    TypeError
        `dtype` is not one of the four floating dtypes; `renorm` is not a `Renorm`.
    ValueError
        `num_features` is negative or does not fit `axis`; `affine` is none of its values; `renorm`
        without `track_running_stats`; `renorm`, or an activation without an inverse, with
        `inplace`. `forward` and `backward` check the other options.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm import BatchNorm
    >>> layer = BatchNorm(2)
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> np.round(layer.forward(x), 3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.backward(np.ones_like(x))
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> layer.grads["bias"]
    array([2., 2.], dtype=float32)
    >>> layer.running_mean
    array([0.2, 2. ], dtype=float32)
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        debias: bool = False,
        affine: bool | Literal["gamma", "beta"] = True,
        track_running_stats: bool = True,
        correction: int = 1,
        axis: int | tuple[int, ...] = 1,
        activation: Activation = None,
        renorm: Renorm | None = None,
        dtype: DTypeLike = np.float32,
        inplace: bool = False,
    ) -> None:
        shape, names = _channel_shape(num_features, axis), names_of(affine)
        if inplace:
            _checks.invertible(activation, "use inplace=False")
            if renorm is not None:
                raise ValueError("renorm needs x in backward; use inplace=False")
        dtype = np.dtype(dtype)
        if dtype.name not in DTYPES or not dtype.isnative:
            raise TypeError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
        if not isinstance(renorm, Renorm | None):
            raise TypeError(f"renorm must be an nbnorm.Renorm or None, got {renorm!r}")
        if renorm is not None and not track_running_stats:
            raise ValueError("renorm needs running statistics; pass track_running_stats=True")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.debias = debias
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.correction = correction
        self.axis = axis
        self.activation = activation
        self.renorm = renorm
        self.dtype = dtype
        self.inplace = inplace
        self.training = True
        self.parameters: dict[str, NDArray] = {
            name: np.full(shape, _INITIAL[name], dtype) for name in names
        }
        self.grads: dict[str, Array] = {
            name: np.zeros_like(parameter) for name, parameter in self.parameters.items()
        }
        self.running_mean = np.zeros(shape, dtype) if track_running_stats else None
        self.running_var = np.ones(shape, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self._device: int | None = None  # GPU of the parameters and statistics; None on the CPU
        self._saved: Saved | None = None
        self._seen: Pairwise | None = None  # moments of batches, inside `_collecting`

    def forward(
        self,
        x: X,
        residual: Array | None = None,
        *,
        groups: int | None = None,
        offsets: Array | None = None,
        mask: Array | None = None,
        lengths: Array | None = None,
        length_axis: int | None = None,
        weights: Array | None = None,
        fill: float | None = 0.0,
    ) -> X:
        """Normalise x with its own statistics in training, with the running ones in evaluation.

        Parameters
        ----------
        x : array
            Any floating dtype; the channel axes have the shape of the parameters. The layer keeps
            a reference until the next `forward`: do not modify x, the parameters or what counts
            before `backward`. With `inplace`, x becomes y: it must be writable, and y must not be
            modified before `backward`.
        residual : array shaped like x, optional
            Added before the activation.
        groups, offsets : int, or array of int, optional
            Parts of x with statistics of their own, as in `batch_norm_forward`.
        mask, lengths, length_axis, weights, fill : optional
            Which values count, and y elsewhere; see `batch_norm_forward`. If none does, the batch
            is not in num_batches_tracked.

        Returns
        -------
        array
            y, with x's shape, dtype and library.

        Raises
        ------
        TypeError, ValueError
            As in `batch_norm_forward`; the running statistics do not change then.
        ValueError
            With `inplace`: a residual, a gamma of 0 in training, or an x that is read-only.
        """
        normalise, training, options, parts = self._prepared(
            x, residual, groups=groups, offsets=offsets, mask=mask, lengths=lengths,
            length_axis=length_axis, weights=weights,
        )  # fmt: skip
        if parts:
            options["fill"] = fill
        y: X
        y, mean, rstd, *renorm, values = normalise(x, training, **options, **parts)
        collecting = self._seen is not None
        if training and not collecting and self.running_mean is not None and values > 0:
            self.num_batches_tracked += 1
        added, fused = residual is not None, self.activation is not None
        relu = fused and _checks.activation(self.activation) == "relu"
        kept_x = None if self.inplace else x
        kept_y = y if self.inplace or (added and relu) else None
        kept_residual = residual if fused and not relu else None
        self._saved = Saved(
            kept_x, mean, rstd, kept_y, kept_residual, added, training, renorm, parts
        )
        return y

    def __call__(self, x: X, residual: Array | None = None, **parts: Any) -> X:
        """Call `forward`."""
        return self.forward(x, residual, **parts)

    def _prepared(
        self, x: Array, residual: Array | None, **given: Any
    ) -> tuple[Callable[..., Any], bool, dict[str, Any], dict[str, Any]]:
        """Check what `batch_norm_forward` does not, and prepare its call.

        Returns a method that normalises x, whether x has its own statistics, the keywords, and
        those of `given` that are not None: segments, and what counts.
        """
        if self.inplace:
            self._check_inplace(x, residual)
        if type(x) is not np.ndarray or self._device is not None:
            self._follow(x)
        collecting = self._seen is not None
        training = self.training or collecting or self.running_mean is None
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (self.num_batches_tracked + 1)
        elif self.debias and training and self.running_mean is not None:
            momentum = debiased(momentum, self.num_batches_tracked)
        parts = {name: value for name, value in given.items() if value is not None}
        normalise = self._collect if collecting else self._normalise
        if self.renorm is not None and training and not collecting:
            if parts:
                raise ValueError(f"{', '.join(parts)} cannot be combined with renorm")
            normalise = self._renormalise
        options = {
            "gamma": self.parameters.get("weight"),
            "beta": self.parameters.get("bias"),
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "momentum": momentum,
            "eps": self.eps,
            "correction": self.correction,
            "axis": self.axis,
            "residual": residual,
            "activation": self.activation,
            "out": x if self.inplace else None,
        }
        return normalise, training, options, parts

    def _check_inplace(self, x: Array, residual: Array | None) -> None:
        """Raise if y must not be written over x, or would not determine x_hat."""
        if residual is not None:
            raise ValueError("residual is given, and y does not determine x_hat with inplace=True")
        _checks.mutable(x, "x", _OVERWRITTEN)
        taken = take_floating(x, "x")
        # Users may set the attribute.
        _checks.invertible(self.activation, "use inplace=False", taken.dtype)
        _checks.writable(taken, "x", _OVERWRITTEN)
        if self.training and "weight" in self.parameters:
            _checks.divisor(on_host(self.parameters["weight"]), taken.dtype)

    def _follow(self, x: Array) -> None:
        """Move parameters and statistics to the device of x, if they are elsewhere."""
        device = device_of(x)
        if device == self._device:
            return
        moved = {name: moved_to(x, array) for name, array in self._arrays().items()}
        self.running_mean = moved.pop("running_mean", None)
        self.running_var = moved.pop("running_var", None)
        self.parameters.update(moved)
        self._device = device

    def _normalise(self, x: Array, training: bool, **options: Any) -> tuple[Any, ...]:
        """Return y, mean, rstd and the number of values in the batch."""
        y, mean, rstd = batch_norm_forward(x, training=training, **options)
        return y, mean, rstd, math.prod(x.shape) * _anything_counts(options)

    def _renormalise(self, x: Array, training: bool, **options: Any) -> tuple[Any, ...]:
        """Return y, mean, rstd, r, d and the number of values in the batch."""
        assert self.renorm is not None
        bounds = self.renorm.bounds(self.num_batches_tracked)
        return *batch_renorm_forward(x, **bounds, **options), math.prod(x.shape)

    @contextmanager
    def _collecting(self) -> Iterator[Pairwise]:
        """Collect the moments of batches inside the block; do not update running statistics.

        Batches are normalised as in training, whatever the layer's mode, but without renorm.
        """
        seen = Pairwise()
        try:  # starts before the assignment, as an interrupt may come at any line
            self._seen = seen
            yield seen
        finally:
            self._seen = None

    def _collect(self, x: Array, training: bool, **options: Any) -> tuple[Any, ...]:
        """Call `_normalise` and add the moments of the batch to those collected."""
        assert self.running_mean is not None
        assert self._seen is not None
        shape = self.running_mean.shape
        # With momentum 1 the running statistics become the batch's: for SyncBatchNorm, those of
        # all ranks together.
        mean, var = (moved_to(x, np.zeros(shape)) for _ in range(2))
        options |= {"running_mean": mean, "running_var": var, "momentum": 1.0}
        if not _PARTS.isdisjoint(options):  # var omits what lies between segments
            counting = {name: options[name] for name in _COUNTING if name in options}
            self._seen.add(batch_norm_stats(x, axis=self.axis, **counting))
            return self._normalise(x, training, **options)
        _, _, _, values = results = self._normalise(x, training, **options)
        if values > 0:
            count = values // math.prod(shape)
            self._seen.add(Moments(count, mean, var * (count - self.correction)))
        return results

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy; a copy does not collect moments."""
        return vars(self) | {"_seen": None}

    def backward(self, dy: Array) -> Any:
        """Return the gradient of the last input; store the gradients of the parameters in `grads`.

        After a `forward` in evaluation mode, running statistics, if kept, are constants.

        Parameters
        ----------
        dy : array
            Gradient of the output, with its shape and dtype.

        Returns
        -------
        dx : array
            Gradient of x.
        dresidual : array
            Gradient of the residual, only if `forward` got one. Without an activation this is
            `dy` itself, not a copy.

        Raises
        ------
        RuntimeError
            `forward` has not been called.
        TypeError, ValueError
            As in `batch_norm_backward`; `grads` does not change then.
        """
        if self._saved is None:
            raise RuntimeError("backward called before forward")
        saved = self._saved
        gamma, beta = (self.parameters.get(name) for name in _INITIAL)
        dx, dgamma, dbeta, dresidual = self._differentiate(
            dy,
            saved,
            gamma=ones_like(beta) if gamma is None and beta is not None else gamma,
            beta=beta,
            y=saved.y,
            residual=saved.added,
            axis=self.axis,
            activation=self.activation,
            output_mask=(True, gamma is not None, beta is not None, saved.residual),
            **saved.parts,
        )
        for name, gradient in zip(_INITIAL, (dgamma, dbeta), strict=True):
            if gradient is not None:
                self.grads[name] = gradient
        if not saved.residual:
            return dx
        return dx, dy if dresidual is None else dresidual

    def _differentiate(self, dy: Array, saved: "Saved", **options: Any) -> tuple[Array | None, ...]:
        """Return the result of `batch_norm_backward`, or of `batch_renorm_backward`."""
        if saved.renorm:
            return batch_renorm_backward(
                dy, saved.x, options.pop("gamma"), saved.mean, saved.rstd, *saved.renorm, **options
            )
        return batch_norm_backward(
            dy, saved.x, mean=saved.mean, rstd=saved.rstd, training=saved.training, **options
        )

    def train(self) -> "BatchNorm":
        """Switch to training: normalise with batch statistics and update the running ones."""
        self.training = True
        return self

    def eval(self) -> "BatchNorm":
        """Switch to evaluation: normalise with the running statistics and do not update them."""
        self.training = False
        return self

    def set_statistics(self, moments: Moments, *, num_batches_tracked: int | None = None) -> None:
        """Set the running statistics, in place, from moments.

        Parameters
        ----------
        moments : Moments
            Usually those of a whole data set: `batch_norm_stats` of every chunk, merged. The
            running variance becomes M2 / (count - correction), with the layer's correction.
        num_batches_tracked : int, optional
            New `num_batches_tracked`: the number of batches that the statistics stand for when
            later ones are averaged (``momentum=None`` or ``debias=True``). None keeps the layer's
            number, except that with these options 0 becomes 1, as at 0 the next batch would replace
            the statistics.

        Raises
        ------
        TypeError
            Mean or M2 is not a floating array, or the count is not a number;
            num_batches_tracked is not an integer.
        ValueError
            The layer keeps no running statistics, or they are read-only or share memory with each
            other or a parameter; the moments have too few values or the wrong shape;
            num_batches_tracked is negative.

        Examples
        --------
        >>> import numpy as np
        >>> from nbnorm import BatchNorm, batch_norm_stats
        >>> chunks = np.arange(6.0).reshape(6, 1), np.arange(6.0, 9.0).reshape(3, 1)
        >>> first, *rest = [batch_norm_stats(chunk) for chunk in chunks]
        >>> layer = BatchNorm(1)
        >>> layer.set_statistics(first.merge(*rest))
        >>> layer.running_mean, layer.running_var
        (array([4.], dtype=float32), array([7.5], dtype=float32))
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("the layer keeps no running statistics (track_running_stats=False)")
        if np.ndim(moments.mean) > np.ndim(self.running_mean):
            raise ValueError("moments have a row for each segment; merge them into one first")
        count: Any = moments.count
        if len(getattr(count, "shape", ())) > 0:
            count = on_host(take_floating(count, "count"))
        if not np.all(count > 0):
            raise ValueError("moments.count is 0, expected at least one value per channel")
        tracked = self.num_batches_tracked
        if num_batches_tracked is not None:
            tracked = _checks.batches(num_batches_tracked)
        elif self.momentum is None or self.debias:
            tracked = max(tracked, 1)
        # Start from zeros: a NaN in the old statistics would survive a factor of 0.
        zeros = np.zeros(self.running_mean.shape, self.dtype)
        mean, m2 = (on_host(take_floating(getattr(moments, n), n)) for n in ("mean", "m2"))
        mean, var = update_running_stats(
            zeros, zeros, Moments(count, mean, m2),
            momentum=1.0, correction=self.correction, inplace=False,
        )  # fmt: skip
        self._arrays_to_write()
        overwrite(self.running_mean, mean)
        overwrite(self.running_var, var)
        self.num_batches_tracked = tracked

    def state_dict(self) -> dict[str, NDArray]:
        """Return copies of parameters and statistics under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            Arrays in CPU memory: "weight" and "bias", as far as `affine` has them; "running_mean",
            "running_var" and "num_batches_tracked" (int64, 0-d) with `track_running_stats`.

        Examples
        --------
        Load the state into a PyTorch layer. (`load_state_dict` accepts the ``state_dict()`` of a
        PyTorch layer as it is.)

        >>> state = layer.state_dict()  # doctest: +SKIP
        >>> module.load_state_dict(  # doctest: +SKIP
        ...     {name: torch.as_tensor(array) for name, array in state.items()}
        ... )

        PyTorch does not accept bfloat16 NumPy arrays: for a bfloat16 layer, pass
        ``array.astype("f8")`` to ``torch.as_tensor``.
        """
        state = {name: on_host(array).copy() for name, array in self._arrays().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, dtype=np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy parameters and statistics from a mapping with PyTorch's names.

        Parameters
        ----------
        state : mapping of str to array
            Exactly the keys of `state_dict`. Values are NumPy arrays, torch tensors or any objects
            with ``__dlpack__``, of any floating dtype; they are rounded to the layer's dtype.

        Raises
        ------
        TypeError
            A value is not a floating array; the count is not an integer.
        ValueError
            A key is missing or unexpected, a shape is wrong or the count is negative; the layer's
            running statistics share memory with its parameters. The layer does not change then.
        """
        arrays = self._arrays_to_write()
        expected = [*arrays, *(["num_batches_tracked"] if self.track_running_stats else [])]
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
        if missing or unexpected:
            raise ValueError(f"state has missing keys {missing} and unexpected keys {unexpected}")
        # Copy first: the state may hold the layer's own arrays, under other names.
        taken = {name: on_host(take_floating(state[name], name)).copy() for name in arrays}
        for name, array in arrays.items():
            if taken[name].shape != array.shape:
                raise ValueError(f"{name} has shape {taken[name].shape}, expected {array.shape}")
        if self.track_running_stats:
            self.num_batches_tracked = _checks.batches(state["num_batches_tracked"])
        for name, array in arrays.items():
            overwrite(array, taken[name])

    def _arrays_to_write(self) -> dict[str, NDArray]:
        """Return `_arrays`; raise if running statistics share memory with a parameter."""
        arrays = self._arrays()
        if self.running_mean is not None:
            _checks.running_to_update(arrays, "it is written in place")
        return arrays

    def _arrays(self) -> dict[str, NDArray]:
        """Return the layer's own arrays under PyTorch's names."""
        arrays = dict(self.parameters)
        if self.running_mean is not None and self.running_var is not None:
            arrays |= {"running_mean": self.running_mean, "running_var": self.running_var}
        return arrays

    def __repr__(self) -> str:
        extras = "debias=True, " * self.debias
        extras += "" if self.renorm is None else f"renorm={self.renorm}, "
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine!r}, track_running_stats={self.track_running_stats}, "
            f"correction={self.correction}, axis={self.axis}, activation={self.activation!r}, "
            f"{extras}dtype={self.dtype}, {'inplace=True, ' * self.inplace}"
            f"training={self.training})"
        )


def _anything_counts(options: Mapping[str, Any]) -> bool:
    """Return whether any value counts in a call with these valid options."""
    return all(
        bool(take(options[name], name).any())
        for name in ("mask", "lengths", "weights")
        if name in options
    )


_COUNTING = frozenset({"mask", "lengths", "length_axis", "weights"})
_PARTS = _COUNTING | {"groups", "offsets"}
_OVERWRITTEN = "inplace=True writes y over it"
_INITIAL = {"weight": 1, "bias": 0}
_NAMES = {True: ("weight", "bias"), False: (), "gamma": ("weight",), "beta": ("bias",)}


def names_of(affine: Any) -> tuple[str, ...]:
    """Return the names of the parameters; raise if `affine` is not valid."""
    try:
        return _NAMES[affine]
    except (KeyError, TypeError):
        raise ValueError(f"affine must be a bool, 'gamma' or 'beta', got {affine!r}") from None


def _channel_shape(
    num_features: int | tuple[int, ...], axis: int | tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of the parameters; raise if `num_features` does not fit `axis`."""
    shape = num_features if isinstance(num_features, tuple) else (num_features,)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if len(shape) != len(axes):
        raise ValueError(
            f"num_features is {num_features}, expected {len(axes)} for axis {axis}, "
            "which names the channel axes, not the axes to reduce"
        )
    if any(operator.index(length) < 0 for length in shape):
        raise ValueError(f"num_features must not be negative, got {num_features}")
    return shape
