"""scikit-learn: `StandardScaler`, a drop-in for its own."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
from sklearn import get_config, preprocessing
from sklearn.base import _fit_context
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import (
    FLOAT_DTYPES,
    _check_sample_weight,
    check_array,
    check_is_fitted,
    validate_data,
)

from nbnorm._rows import Rows
from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_apply, batch_norm_stats
from nbnorm.moments import Moments

__all__ = ["StandardScaler"]


class StandardScaler(preprocessing.StandardScaler):
    """Standardise features: subtract their mean, divide by their standard deviation.

    A drop-in for `sklearn.preprocessing.StandardScaler`, which it derives from: the same
    parameters, attributes, methods and errors, computed by nbnorm's kernels.

    z = (x - mean) / sqrt(biased variance), where statistics are those of all rows passed to `fit`
    or `partial_fit`. NaN is left out of them, and stays NaN in `transform`. Features that are
    constant up to rounding are not scaled.

    Parameters
    ----------
    copy : bool, default True
        False lets `transform` and `inverse_transform` write over X, if X is a writeable array of
        a floating dtype.
    with_mean : bool, default True
        Whether to subtract the mean. Must be False for sparse matrices.
    with_std : bool, default True
        Whether to divide by the standard deviation.

    Attributes
    ----------
    mean_, var_, scale_ : ndarray of float64, shape (n_features,), or None
        Mean, biased variance, and what `transform` divides by: the standard deviation, or 1 for
        constant features. `var_` and `scale_` are None if `with_std` is False, and `mean_` too if
        `with_mean` is also. NaN for features without values.
    n_samples_seen_ : int, float or ndarray of shape (n_features,)
        Number of rows in the statistics, or the sum of their weights; an array if it differs,
        because of NaN.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of str, shape (n_features,)
        Names of the features, if X had names that are all strings.

    Notes
    -----
    Rows are summed in blocks of 1000, counted from the first row, and blocks are merged in pairs,
    then pairs of pairs, with the formula of Chan, Golub & LeVeque (1983). So for the same rows
    in the same memory order, `partial_fit` in any calls that end at multiples of 1000 rows has the
    same bits as `fit`, on any number of threads. Other calls may change the last bits. Means are
    kept relative to a value of the feature, so a mean of 1e8 standard deviations costs `scale_` no
    digits.

    float32, float64 and float16 keep their dtype, anything else becomes float64. For sparse
    matrices, and for arrays of other libraries under ``array_api_dispatch``, the methods of
    scikit-learn itself run; both kinds of calls may alternate in `partial_fit`.

    Negative sample weights are refused.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.integrations.sklearn import StandardScaler
    >>> X = np.array([[0.0, 10.0], [4.0, 10.0], [2.0, np.nan]])
    >>> scaler = StandardScaler().fit(X)
    >>> scaler.mean_, scaler.n_samples_seen_
    (array([ 2., 10.]), array([3, 2]))
    >>> scaler.transform(X).round(3)
    array([[-1.225,  0.   ],
           [ 1.225,  0.   ],
           [ 0.   ,    nan]])
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Compute the statistics of X.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            The data. NaN is left out.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), optional
            How often each row counts; finite and not negative.

        Returns
        -------
        StandardScaler
            The scaler itself.

        Raises
        ------
        ValueError
            As in scikit-learn: X contains Inf or is not 2-d, a parameter is invalid, X is sparse
            and `with_mean` is True; or a weight is negative.
        """
        self.__dict__.pop("_seen", None)
        super().fit(X, y, sample_weight)
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # checks parameters, ends callbacks
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Add the rows of X to the statistics.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            More data. NaN is left out.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), optional
            How often each row counts; finite and not negative.

        Returns
        -------
        StandardScaler
            The scaler itself.

        Raises
        ------
        ValueError
            As in `fit`, or X has another number of features. The statistics do not change
            then.
        """
        first = not hasattr(self, "n_samples_seen_")
        data = _taken(X, partial(validate_data, self, reset=first), accept_sparse=("csr", "csc"))
        if data is None:
            super().partial_fit(X, y, sample_weight)
            self.__dict__.pop("_seen", None)  # it lacks the rows just added
            return self
        task = {"estimator": self, "X": data, "y": y, "metadata": {"sample_weight": sample_weight}}
        callbacks = self._init_callback_context()
        callbacks.call_on_fit_task_begin(**task)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(
                sample_weight, data, dtype=data.dtype, ensure_non_negative=True
            )
            _refuse_infinite(data)  # which a weight of 0 would hide
        whole = weights is None and (first or np.asarray(self.n_samples_seen_).dtype.kind in "iu")
        seen = Rows(data.shape[1]) if first else self._before()
        seen.add(data, weights)
        moments = seen.total()
        if not np.isfinite(moments.mean).all():
            assert_all_finite(data, allow_nan=True, input_name="X")
        self._seen = seen
        self._publish(moments, whole)
        callbacks.call_on_fit_task_end(**task, reconstruction_attributes={})
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Standardise X.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            The data. NaN stays NaN.
        copy : bool, optional
            Replaces the parameter `copy` in this call.

        Returns
        -------
        ndarray, sparse matrix, or what `set_output` asks for
            ``(X - mean_) / scale_``, in X's floating dtype.

        Raises
        ------
        ValueError
            As in scikit-learn: X contains Inf or has another number of features.
        sklearn.exceptions.NotFittedError
            There are no statistics yet.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        data = _taken(X, partial(validate_data, self, reset=False), force_writeable=not copy)
        if data is None:
            return super().transform(X, copy)
        _refuse_infinite(data)
        mean, scale = self._map()
        with np.errstate(divide="ignore"):  # a scale that the user set to 0
            return batch_norm_apply(data, None, None, mean, 1 / scale, out=None if copy else data)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Undo `transform`.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            Standardised data. NaN stays NaN.
        copy : bool, optional
            Replaces the parameter `copy` in this call.

        Returns
        -------
        ndarray or sparse matrix
            ``X * scale_ + mean_``, in X's floating dtype.

        Raises
        ------
        ValueError
            As in scikit-learn: X contains Inf or has another number of features.
        sklearn.exceptions.NotFittedError
            There are no statistics yet.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        data = _taken(X, check_array, force_writeable=not copy)
        if data is None:
            return super().inverse_transform(X, copy)
        if data.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {data.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        _refuse_infinite(data)
        mean, scale = self._map()
        zero, one = np.zeros_like(mean), np.ones_like(mean)
        return batch_norm_apply(data, scale, mean, zero, one, out=None if copy else data)

    def _map(self) -> tuple[NDArray, NDArray]:
        """Return what `transform` subtracts and divides by, float64 of shape (n_features,)."""
        features = self.n_features_in_
        mean = np.asarray(self.mean_, np.float64) if self.with_mean else np.zeros(features)
        scale = np.asarray(self.scale_, np.float64) if self.with_std else np.ones(features)
        return mean, scale

    def _publish(self, moments: Moments, whole: bool) -> None:
        """Set the attributes; `whole` says that counts are numbers of rows, not sums of weights."""
        count = np.asarray(moments.count)
        seen = count.astype(np.int64) if whole else count
        self.n_samples_seen_ = seen[0] if np.ptp(seen) == 0 else seen
        with np.errstate(invalid="ignore"):
            mean, var = np.where(count > 0, moments.mean, np.nan), moments.m2 / count
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            # scikit-learn's bound of its own error, so that the same features are constant.
            eps = np.finfo(np.float64).eps
            constant = var <= count * eps * var + (count * mean * eps) ** 2
            self.var_, self.scale_ = var, np.where(constant, 1.0, np.sqrt(var))

    def _before(self) -> Rows:
        """Return the rows seen, or one block with the attributes' statistics."""
        if "_seen" in self.__dict__:
            return self._seen.copy()
        columns = self.n_features_in_
        count = np.broadcast_to(np.asarray(self.n_samples_seen_, np.float64), (columns,))
        mean, var = (
            np.zeros(columns) if a is None else np.asarray(a) for a in (self.mean_, self.var_)
        )
        seen = Rows(columns)
        seen.origin[:] = mean
        m2 = np.where(count > 0, count * var, 0)
        seen.blocks.add(Moments(count, np.zeros(columns), m2))  # type: ignore[arg-type]
        return seen


def _taken(X: Any, validate: Callable[..., Any], **options: Any) -> NDArray | None:
    """Return X as a floating array, or None if it is for scikit-learn's own methods."""
    if get_config()["array_api_dispatch"] and not isinstance(X, np.ndarray):
        return None
    options = {"accept_sparse": "csr", "dtype": FLOAT_DTYPES, **options}
    data = validate(X, ensure_all_finite=False, **options)  # later passes find Inf
    return np.asarray(data) if isinstance(data, np.ndarray) else None


def _refuse_infinite(x: NDArray) -> None:
    """Raise scikit-learn's error if x contains Inf, unless ``assume_finite`` is set.

    One pass on all threads decides in the usual case, without NaN.
    """
    if not get_config()["assume_finite"] and not np.isfinite(batch_norm_stats(x).mean).all():
        assert_all_finite(x, allow_nan=True, input_name="X")
