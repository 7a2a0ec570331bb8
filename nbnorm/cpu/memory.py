"""Memory for results and copies, and questions about it; `nbnorm.cuda.memory` has the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from nbnorm import pool
from nbnorm._typing import NDArray

empty = pool.empty
zeros = np.zeros


def contiguous(array: NDArray) -> NDArray:
    """Return the array itself or a copy, in C order and aligned."""
    return np.require(array, requirements=["C", "A"])


def aligned(array: NDArray) -> bool:
    """Whether every value lies at a multiple of its size."""
    return array.flags.aligned


def plain(array: NDArray) -> bool:
    """Whether an array is contiguous, aligned and can be written to.

    Read-only arrays are another type to Numba, which would compile every kernel anew for them.
    """
    return array.flags.carray


def constant(size: int, value: float, dtype: np.dtype[Any]) -> NDArray:
    """Return an array of one value, never to be written to; small ones are made once."""
    if size > 1 << 12:
        return np.full(size, value, dtype)
    return _small_constant(size, value, dtype)


@lru_cache(maxsize=64)
def _small_constant(size: int, value: float, dtype: np.dtype[Any]) -> NDArray:
    return np.full(size, value, dtype)
