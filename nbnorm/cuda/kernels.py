"""All kernels, and the types of their arguments, which follow from the arguments' names.

An argument whose name is in none of the sets below is an int64.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from numba.cuda import types

from nbnorm.activations import Activation
from nbnorm.cuda import channel, columns, rows
from nbnorm.cuda import weighted as with_weights
from nbnorm.cuda.intrinsics import STORAGE, cluster_barrier
from nbnorm.cuda.plan import Names
from nbnorm.cuda.values import block_barrier

_TENSORS = frozenset(("x", "dy", "y", "dx", "residual", "dresidual", "ddx", "ddy"))
_STATISTICS = frozenset(
    ("mean", "rstd", "m2", "var", "sums", "partial", "table", "dgamma", "r", "d", "counts")
)
_FLOATS = frozenset(("eps", "count", "floor", "momentum", "divisor", "r_max", "d_max", "fill"))
# gamma and beta, running statistics: float32 or float64. In the second order and in
# `renorm_factors`, float64.
_PARAMETERS = frozenset(("gamma", "beta", "running_mean", "running_var", "tgamma", "tbeta"))


@lru_cache(maxsize=64)
def build(
    traversal: str,
    dtype: str,
    width: int,
    activation: Activation | None = None,
    wide: Names = (),
) -> Any:
    """Return the kernels of a traversal; those without `activation` also do ReLU."""
    source = rows if traversal == "rows" else columns
    return _noted(source.build(dtype, width, activation, wide), wide)


@lru_cache(maxsize=64)
def fused(
    traversal: str,
    dtype: str,
    width: int,
    clusters: bool,
    activation: Activation | None = None,
    wide: Names = (),
) -> Any:
    """Return the kernels that read memory once, for single blocks or for clusters of blocks."""
    barrier = cluster_barrier if clusters else block_barrier
    return _noted(build(traversal, dtype, width, activation, wide).fused(barrier), wide)


def _noted(source: Any, wide: Names) -> Any:
    """Note on each kernel which of its tensors are float32, for `signature`; return them."""
    for kernel in vars(source).values():
        if hasattr(kernel, "py_func"):
            kernel.py_func.wide = wide
    return source


@lru_cache(maxsize=64)
def weighted(dtype: str, activation: Activation | None = None, wide: Names = ()) -> Any:
    """Return the kernels for values with weights."""
    return _noted(with_weights.build(dtype, activation, wide), wide)


@lru_cache(maxsize=4)
def finish_sums(dtype: str) -> Any:
    """Return the kernel that follows `backward_reduce`."""
    return channel.finish_sums(STORAGE[dtype].computed)


@lru_cache(maxsize=4)
def finish_second_sums(dtype: str) -> Any:
    """Return the kernel that follows `second_reduce`."""
    return channel.finish_second_sums(STORAGE[dtype].computed)


second_table = channel.second_table
finish_weighted = with_weights.finish_weighted
finish_moments, rstd_all, move = channel.finish_moments, channel.rstd_all, channel.move
renorm_factors = channel.renorm_factors


def signature(kernel: Any, dtype: str, parameters: str, weights: str = "") -> tuple[Any, ...]:
    """Return the argument types of a kernel for tensors, parameters and weights of these dtypes."""
    wide = getattr(kernel.py_func, "wide", ())

    def kind(name: str) -> Any:
        if name in _TENSORS:
            return STORAGE["float32" if name in wide else dtype].pointer
        if name in _STATISTICS:
            return types.CPointer(types.float64)
        if name in _PARAMETERS:
            return STORAGE[parameters].pointer
        if name == "weights":
            return types.CPointer(getattr(types, weights))
        return types.float64 if name in _FLOATS else types.int64

    return tuple(kind(name) for name in inspect.signature(kernel.py_func).parameters)
