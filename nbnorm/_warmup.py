"""Kernels compiled before they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from nbnorm import functional
from nbnorm._typing import Activation, Axis


def warmup(
    *shapes: tuple[int, ...],
    dtype: DTypeLike = np.float32,
    axis: Axis = 1,
    activation: Activation = None,
    residual: bool = False,
    training: bool = True,
) -> None:
    """Compile what calls on arrays of these shapes need, or load it from the cache.

    The first call with another dtype, another kind of shape (large planes, or small ones and
    vectors) or another set of options compiles for some seconds. The kernels are kept on disk, so
    that this happens once on a machine; `nbnorm.show_config` says where. To compile ahead, in the
    build of a container or before requests are served, call this.

    Parameters
    ----------
    *shapes : tuples of int
        Shapes of x. What is compiled depends on the size of the planes.
    dtype : dtype, default float32
        Of x: float32, float64, float16 or bfloat16.
    axis, activation : optional
        As in `batch_norm_forward`.
    residual : bool, default False
        Whether a residual is added before the activation.
    training : bool, default True
        Whether to prepare training forward and backward as well as inference.

    Raises
    ------
    TypeError
        dtype is not one of the four; no shape is given.
    ValueError
        Shapes, axis or activation that do not fit.

    Notes
    -----
    The functions run once on zeros, which takes the memory of one such call for each shape in turn.
    Other kernels may be needed for arrays with gaps between their values, for parameters or
    statistics of another dtype than x's, and where not all gradients are wanted (``output_mask``).

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.warmup((8, 3, 5, 5), activation="relu")
    """
    if not shapes:
        raise TypeError("warmup needs at least one shape of x, such as (32, 64, 56, 56)")
    for shape in shapes:
        x = np.zeros(shape, dtype)
        frozen = functional.batch_norm_stats(x, axis=axis)
        statistics = [a.astype(_parameters_of(x.dtype)) for a in (frozen.mean, frozen.m2)]
        added = x if residual else None
        functional.batch_norm_inference(
            x, None, None, *statistics,
            axis=axis, activation=activation, residual=added,
        )  # fmt: skip
        if not training:
            continue
        running = [np.zeros(frozen.mean.shape, _parameters_of(x.dtype)) for _ in range(2)]
        y, mean, rstd = functional.batch_norm_forward(
            x, None, None, *running,
            axis=axis, activation=activation, residual=added, correction=0,
        )  # fmt: skip
        functional.batch_norm_backward(
            x, x, None, mean, rstd,
            beta=None, axis=axis, activation=activation, y=y if residual else None,
        )  # fmt: skip


def _parameters_of(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the dtype in which users have parameters for x of this dtype."""
    return np.float64 if dtype == np.float64 else np.float32
