"""`warmup`: compile kernels before they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from nbnorm import _checks, functional
from nbnorm._typing import Activation, Axis
from nbnorm.activations import with_own_kernels


def warmup(
    *shapes: tuple[int, ...],
    dtype: DTypeLike = np.float32,
    axis: Axis = 1,
    activation: Activation = None,
    residual: bool = False,
    training: bool = True,
) -> None:
    """Compile the kernels for arrays of these shapes, or load them from the cache.

    The first call with a new dtype, kind of shape (large planes, or small planes and vectors) or
    set of options compiles kernels, which takes some seconds. nbnorm caches the kernels on disk, so
    this happens once per machine; `nbnorm.show_config` prints the folder. Call `warmup` to compile
    them in advance, such as when building a container or before serving requests.

    Parameters
    ----------
    *shapes : tuples of int
        Shapes of x. The size of the planes determines the kernels.
    dtype : dtype, default float32
        Dtype of x: float32, float64, float16 or bfloat16.
    axis, activation : optional
        As in `batch_norm_forward`.
    residual : bool, default False
        Whether to prepare calls that add a residual before the activation.
    training : bool, default True
        Whether to prepare the training forward and backward passes as well as inference.

    Raises
    ------
    TypeError
        dtype is not one of the four; no shape is given.
    ValueError
        A shape, axis or activation is invalid.

    Notes
    -----
    Runs the functions once on zeros, for one shape at a time, which takes the memory of such a
    call. Other kernels may be needed for arrays with gaps between their values, for parameters or
    statistics with another dtype than the usual one (float64 if x is float64, else float32), and if
    not all gradients are requested (``output_mask``).

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.warmup((8, 3, 5, 5), activation="relu")
    """
    if not shapes:
        raise TypeError("warmup needs at least one shape of x, such as (32, 64, 56, 56)")
    recomputed = with_own_kernels(_checks.activation(activation)) is not None
    for shape in shapes:
        x = np.zeros(shape, dtype)
        moments = functional.batch_norm_stats(x, axis=axis)  # of zeros: M2 serves as the variance
        statistics = [a.astype(_parameters_of(x.dtype)) for a in (moments.mean, moments.m2)]
        added = x if residual else None
        functional.batch_norm_inference(
            x, None, None, *statistics,
            axis=axis, activation=activation, residual=added,
        )  # fmt: skip
        if not training:
            continue
        running = [np.zeros(moments.mean.shape, _parameters_of(x.dtype)) for _ in range(2)]
        y, mean, rstd = functional.batch_norm_forward(
            x, None, None, *running,
            axis=axis, activation=activation, residual=added, correction=0,
        )  # fmt: skip
        functional.batch_norm_backward(
            x, x, None, mean, rstd,
            beta=None, axis=axis, activation=activation,
            y=y if residual and not recomputed else None, residual=added if recomputed else None,
        )  # fmt: skip


def _parameters_of(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the usual dtype of parameters for x of this dtype."""
    return np.float64 if dtype == np.float64 else np.float32
