"""`Moments`: count, mean and M2 per channel, which can be merged; running statistics from them."""

import math
import operator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nbnorm import _checks, _files
from nbnorm._arrays import home_of, on_host, on_its_device, take_floating
from nbnorm._running import move
from nbnorm._typing import Array, File, NDArray

# Types of the running statistics: results have the type of the arguments.
Mean = TypeVar("Mean")
Var = TypeVar("Var")


class Moments(NamedTuple):
    """Count, mean and M2 of every channel.

    M2 is the sum of squared deviations from the mean. Merging these three is as accurate as one
    pass over all values. Merging mean and ``rstd`` is not: recovering a variance far below ``eps``
    from ``rstd`` suffers from cancellation.

    Attributes
    ----------
    count : int, float or array of float64
        Number of values per channel; 0 for an empty batch, whose mean and M2 are 0. With weights,
        their sum, a float. An array shaped like `mean` with ``offsets``, or if mask, lengths or
        weights may differ by channel or segment.
    mean : array of float64
        Mean, with the shape of the channel axes: ``(C,)`` for one axis.
    m2 : array of float64
        Sum of squared deviations from the mean, shaped like `mean`.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.moments import Moments
    >>> first = Moments(2, np.array([1.0]), np.array([2.0]))  # of 0 and 2
    >>> second = Moments(1, np.array([4.0]), np.array([0.0]))  # of 4
    >>> first.merge(second)
    Moments(count=3, mean=array([2.]), m2=array([8.]))
    """

    count: int  # type: ignore[assignment]  # shadows tuple.count, on purpose
    mean: Array
    m2: Array

    @on_its_device("self")
    def merge(self, *others: "Moments") -> "Moments":
        """Return the moments of all values together, merged in the order given.

        Parameters
        ----------
        *others : Moments
            Moments of other values of the same channels. The same order always gives the same
            bits; another order may change the last bit. Empty moments (``count == 0``) have no
            effect.

        Returns
        -------
        Moments
            float64 arrays of the library of ``self.mean``.

        Raises
        ------
        TypeError
            A mean or M2 is not a floating array; a count is not a number.
        ValueError
            Means or M2 have different shapes; a count is negative.

        Notes
        -----
        Uses the pairwise update of Chan, Golub & LeVeque (1983): with d = mean_b - mean_a and
        n = n_a + n_b, mean = mean_a + d n_b / n and M2 = M2_a + M2_b + d² n_a n_b / n.

        Examples
        --------
        >>> import numpy as np
        >>> from nbnorm.moments import Moments
        >>> parts = [Moments(1, np.array([v]), np.zeros(1)) for v in (1.0, 2.0, 6.0)]
        >>> parts[0].merge(*parts[1:])
        Moments(count=3, mean=array([3.]), m2=array([14.]))
        """
        count, mean, m2 = _taken(self)
        parts = [_taken(other, expected=mean.shape) for other in others]
        with np.errstate(all="ignore"):  # a NaN or Inf in one channel is not worth a warning
            for count_b, mean_b, m2_b in parts:
                if not (isinstance(count, _SCALAR) and isinstance(count_b, _SCALAR)):
                    count, mean, m2 = merged(count, mean, m2, count_b, mean_b, m2_b)
                elif count == 0:
                    count, mean, m2 = count_b, mean_b, m2_b
                elif count_b > 0:
                    total = count + count_b
                    d = mean_b - mean
                    mean = mean + d * (count_b / total)
                    m2 = m2 + m2_b + d * d * (count * count_b / total)
                    count = total
        home = home_of(self.mean)
        counted: Any = count if isinstance(count, _SCALAR) else home(count)
        return Moments(counted, home(mean), home(m2))

    @on_its_device("self")
    def var(self, correction: int = 0) -> Array:
        """Return the variance M2 / (count - correction), or 0 if there are no values.

        Parameters
        ----------
        correction : int, default 0
            0 gives the biased variance, used to normalise; 1 the unbiased estimate.

        Returns
        -------
        array of float64
            Variance, with the shape and library of `mean`.

        Raises
        ------
        ValueError
            ``0 < count <= correction``: there are too few values for this correction.

        Examples
        --------
        >>> import numpy as np
        >>> from nbnorm.moments import Moments
        >>> Moments(3, np.array([3.0]), np.array([14.0])).var(correction=1)
        array([7.])
        """
        count, _, m2 = _taken(self)
        return home_of(self.mean)(_var(count, m2, correction))

    @on_its_device("self")
    def rstd(self, eps: float) -> Array:
        """Return 1 / sqrt(biased variance + eps), or 0 if that sum or the count is 0.

        The result is NaN if M2 is Inf: float64 cannot hold the squares of values beyond about
        1e154.

        Parameters
        ----------
        eps : float
            Added to the variance; finite and not negative.

        Returns
        -------
        array of float64
            1 / sqrt(biased variance + eps), with the shape and library of `mean`.

        Raises
        ------
        ValueError
            `eps` is negative or not finite.

        Examples
        --------
        >>> import numpy as np
        >>> from nbnorm.moments import Moments
        >>> Moments(4, np.zeros(2), np.array([1.0, 0.0])).rstd(eps=0.0)
        array([2., 0.])
        """
        count, _, m2 = _taken(self)
        rstd = rstd_of(_var(count, m2, 0), eps)
        rstd = np.where(m2 == np.inf, np.nan, rstd)
        if isinstance(count, _SCALAR):
            return home_of(self.mean)(rstd if count > 0 else np.zeros_like(rstd))
        return home_of(self.mean)(np.where(count > 0, rstd, 0.0))

    @on_its_device("self")
    def save(self, file: File) -> None:
        """Write the moments to a file, from which `load` reads them back exactly.

        The file is an npz of the arrays ``count``, ``mean`` and ``m2``, which `numpy.load` reads as
        well, and ``format``, by which `load` knows it.

        Parameters
        ----------
        file : str, path or binary file object
            Where to write. A path is used as given, whatever its suffix. An existing file is
            replaced once the new one is complete, so an interrupted call leaves it unchanged.

        Raises
        ------
        TypeError
            Mean or M2 is not a floating array; the count is not a number.
        ValueError
            Mean, M2 or count have different shapes; the count is negative, or beyond 64 bits.
        OSError
            The file cannot be written.

        Examples
        --------
        >>> import io
        >>> import numpy as np
        >>> from nbnorm.moments import Moments
        >>> file = io.BytesIO()
        >>> Moments(3, np.array([3.0]), np.array([14.0])).save(file)
        >>> _ = file.seek(0)
        >>> Moments.load(file)
        Moments(count=3, mean=array([3.]), m2=array([14.]))
        """
        count, mean, m2 = _taken(self)
        counted = on_host(count) if hasattr(count, "shape") else np.array(count)
        if counted.dtype == object:
            raise ValueError(f"moments.count must fit into 64 bits, got {count}")
        _files.write(file, _CONTENT, {"count": counted, "mean": on_host(mean), "m2": on_host(m2)})

    @classmethod
    def load(cls, file: File) -> "Moments":
        """Read moments that `save` has written.

        Parameters
        ----------
        file : str, path or binary file object
            What to read.

        Returns
        -------
        Moments
            The same count, an int, a float or an array, and the same float64 values, as NumPy
            arrays.

        Raises
        ------
        ValueError
            `file` was not written by `save`, or is damaged or edited: mean, M2 and count do not
            agree.
        OSError
            The file cannot be read.

        Examples
        --------
        Merge what several machines have saved:

        >>> import numpy as np
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from nbnorm.moments import Moments
        >>> with TemporaryDirectory() as folder:
        ...     for value in (1.0, 2.0, 6.0):
        ...         Moments(1, np.array([value]), np.zeros(1)).save(f"{folder}/{value}.npz")
        ...     first, *others = map(Moments.load, sorted(Path(folder).glob("*.npz")))
        >>> first.merge(*others)
        Moments(count=3, mean=array([3.]), m2=array([14.]))
        """
        stored = _files.read(file, _CONTENT, cls._fields, "file")
        count: Any = stored["count"] if stored["count"].ndim else stored["count"].item()
        moments = cls(count, stored["mean"], stored["m2"])
        try:
            return cls(*_taken(moments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_files.named_file(file, 'file')} is damaged: {error}") from error


_CONTENT = "nbnorm.Moments 1"  # the format of files; a new number where it changes
_SCALAR = (int, float)  # types of a shared count


def rstd_of(var: NDArray, eps: float) -> NDArray:
    """Return 1 / sqrt(var + eps) in float64, or 0 if var + eps is 0.

    Parameters
    ----------
    var : ndarray of float64
        Variances. NaN passes through.
    eps : float
        Added to the variance; finite and not negative.

    Returns
    -------
    ndarray of float64
        1 / sqrt(var + eps), with the shape of `var`.

    Raises
    ------
    ValueError
        `eps` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.moments import rstd_of
    >>> rstd_of(np.array([4.0, 0.0]), eps=0.0)
    array([0.5, 0. ])
    """
    total = var + _checks.epsilon(eps)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total == 0, 0.0, 1.0 / np.sqrt(total))


def debiased(momentum: float, batches: int) -> float:
    """Return the weight of the next batch in a debiased average of `batches` batches.

    With a = momentum and t = batches + 1, this is w = a / (1 - (1 - a)^t). The average
    avg <- (1 - w) avg + w batch is then, at every t, the moving average that starts at 0 divided
    by 1 - (1 - a)^t (Kingma & Ba 2014).

    Parameters
    ----------
    momentum : float
        Weight of a batch in the moving average, in (0, 1].
    batches : int
        Number of batches in the average so far.

    Returns
    -------
    float
        Weight of the next batch: 1 for the first, momentum in the limit.

    Raises
    ------
    TypeError
        momentum is not a number, or batches not an integer.
    ValueError
        momentum is not in (0, 1]; batches is negative.

    Examples
    --------
    >>> from nbnorm.moments import debiased
    >>> [round(debiased(0.1, batches), 3) for batches in (0, 1, 2, 100)]
    [1.0, 0.526, 0.369, 0.1]
    """
    batches, alpha = _checks.batches(batches), _checks.number(momentum, "momentum")
    if not 0 < alpha <= 1:
        raise ValueError(
            f"momentum must be in (0, 1] for a debiased average, got {momentum}; "
            "for equal weights, use momentum=None in BatchNorm"
        )
    if batches == 0 or alpha == 1:
        return 1.0
    return min(alpha / -math.expm1((batches + 1) * math.log1p(-alpha)), 1.0)


@on_its_device("running_mean")
def update_running_stats(
    running_mean: Mean,
    running_var: Var,
    moments: Moments,
    *,
    momentum: float = 0.1,
    correction: int = 1,
    inplace: bool = True,
    num_batches_tracked: int | None = None,
) -> tuple[Mean, Var]:
    """Update running statistics with those of a batch.

    Each becomes ``(1 - momentum) * running + momentum * batch``, computed in float64 and rounded
    once to its own dtype. An empty batch (``count == 0``) does not change them.

    Parameters
    ----------
    running_mean, running_var : array of shape moments.mean.shape
        float32, float64, float16 or bfloat16; the two dtypes may differ. NumPy arrays or any
        objects with ``__dlpack__``. Moments of segments have one more axis, the first: the
        statistics are updated once, by the segments' means and variances averaged by count.
    moments : Moments
        Moments of a batch, or of several batches merged.
    momentum : float, default 0.1
        Weight of the new batch statistic (PyTorch's convention; Keras's momentum is 1 minus this
        one). Any finite number is valid. Values outside [0, 1] extrapolate and can make a running
        variance negative, which yields NaN at inference.
    correction : int, default 1
        The batch variance is M2 / (count - correction): 1 gives the unbiased variance (PyTorch,
        cuDNN, Caffe, the paper), 0 the biased one (Keras, ONNX, Flax).
    inplace : bool, default True
        If True, write to the given arrays. If False, return new arrays of the same library and
        dtype, as read-only arrays (JAX) require.
    num_batches_tracked : int, optional
        If given, debias: the number of nonempty batches already in the averages. At 0 the batch
        replaces the initial values, if these are finite. Requires a momentum in (0, 1].

    Returns
    -------
    running_mean, running_var : array
        Updated statistics; the objects passed in if ``inplace=True``.

    Raises
    ------
    TypeError
        A statistic is not a floating array; momentum or correction is not a number;
        num_batches_tracked is not an integer.
    ValueError
        ``0 < count <= correction``; momentum or correction is not finite; num_batches_tracked is
        negative, or given with a momentum outside (0, 1]; an array does not have the shape of the
        moments; with ``inplace=True``, an array is read-only or shares memory with the other or
        with the moments. Nothing is written then.

    Notes
    -----
    A moving average that starts at 0 is too small by a factor of 1 - (1 - momentum)^t after t
    batches; Adam divides by it (Kingma & Ba 2014). The running statistics hold the quotient: with
    `num_batches_tracked`, batch t has the weight momentum / (1 - (1 - momentum)^t).

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.moments import Moments, update_running_stats
    >>> mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    >>> batch = Moments(3, np.array([4.0]), np.array([6.0]))
    >>> update_running_stats(mean, var, batch, momentum=0.5)
    (array([2.], dtype=float32), array([2.], dtype=float32))
    """
    count, mean, m2 = _taken(moments)
    running = {
        "running_mean": take_floating(running_mean, "running_mean"),
        "running_var": take_floating(running_var, "running_var"),
    }
    segments = mean.ndim > 1 and all(a.shape == mean.shape[1:] for a in running.values())
    for name, array in running.items():
        if array.shape != mean.shape[segments:]:
            raise ValueError(
                f"{name} has shape {array.shape}, expected {mean.shape[segments:]}, "
                "the shape of the moments"
            )
    if inplace:
        instead = "update_running_stats(..., inplace=False) returns new ones"
        _checks.mutable(running_mean, "running_mean", instead)
        _checks.mutable(running_var, "running_var", instead)
        batch = {f"moments.{n}": take_floating(getattr(moments, n), n) for n in ("mean", "m2")}
        _checks.running_to_update(running | batch, instead)
    momentum = _checks.finite(momentum, "momentum")
    if num_batches_tracked is not None:
        momentum = debiased(momentum, num_batches_tracked)
    var = _var(count, m2, correction)
    targets = list(running.values()) if inplace else [array.copy() for array in running.values()]
    if segments:
        mean, var = _average(count, mean), _average(count, var)
    if isinstance(count, _SCALAR):
        if count > 0:
            move(targets, (mean, var), momentum)
    else:  # channels in which nothing counts do not change
        move(targets, (mean, var), momentum, (count.sum(axis=0) if segments else count) > 0)
    if inplace:
        return running_mean, running_var
    return home_of(running_mean)(targets[0]), home_of(running_var)(targets[1])


def merged(
    count: Any, mean: NDArray, m2: NDArray, count_b: Any, mean_b: NDArray, m2_b: NDArray
) -> tuple[Any, NDArray, NDArray]:
    """Return merged moments if a count is an array."""
    total = count + count_b
    d, share = mean_b - mean, count_b / np.where(total == 0, 1, total)
    mean = np.where(count == 0, mean_b, np.where(count_b == 0, mean, mean + d * share))
    between = np.where((count == 0) | (count_b == 0), 0, d * d * (count * share))
    return total, mean, m2 + m2_b + between


def _average(count: Any, values: NDArray) -> NDArray:
    """Return the average of values over the first axis, weighted by count; 0 without values."""
    if isinstance(count, _SCALAR):
        equal: NDArray = values.mean(axis=0)
        return equal
    total = count.sum(axis=0)
    average: NDArray = (count / np.where(total == 0, 1, total) * values).sum(axis=0)
    return average


def _var(count: Any, m2: NDArray, correction: float) -> NDArray:
    """Return M2 / (count - correction), or 0 without values; raise if there are too few."""
    correction = _checks.finite(correction, "correction")
    if not isinstance(count, _SCALAR):
        counts = on_host(count)
        least = float(min(counts[counts > 0], default=0))
        _checks.enough_values(least, correction, "{:g}", least)
        return np.where(count > 0, m2 / np.where(count > 0, count - correction, 1), 0.0)
    if count == 0:
        return np.zeros_like(m2)
    _checks.enough_values(count, correction, "{}", count)
    return m2 / float(count - correction)


def _taken(
    moments: Moments, expected: tuple[int, ...] | None = None
) -> tuple[Any, NDArray, NDArray]:
    """Return count, mean and M2: a number, or a float64 array if it has axes, and two arrays.

    The arrays are float64 of one shape.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be nbnorm.Moments, got {type(moments).__qualname__}")
    mean = take_floating(moments.mean, "moments.mean").astype(np.float64)
    m2 = take_floating(moments.m2, "moments.m2").astype(np.float64)
    arrays = [("moments.mean", mean), ("moments.m2", m2)]
    if len(getattr(moments.count, "shape", ())) > 0:
        count: Any = take_floating(moments.count, "moments.count").astype(np.float64)
        arrays.append(("moments.count", count))
    else:
        count = _single(moments.count)
    if bool(np.any(count < 0)):
        raise ValueError(f"moments.count must not be negative, got {count}")
    for name, array in arrays:
        if array.shape != (mean.shape if expected is None else expected):
            raise ValueError(
                f"{name} has shape {array.shape}, "
                f"expected {mean.shape if expected is None else expected}"
            )
    return count, mean, m2


def _single(count: Any) -> int | float:
    try:
        return operator.index(count)
    except TypeError:
        pass
    if not isinstance(count, float | np.floating) or not math.isfinite(count):
        raise TypeError(f"moments.count must be an int or a finite float, got {count!r}")
    return float(count)
