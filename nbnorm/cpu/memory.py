"""Memory for results and copies, and checks of its layout.

`nbnorm.cuda.memory` has the same functions for a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from nbnorm import pool
from nbnorm._typing import NDArray

empty = pool.empty
zeros = np.zeros
from_host = np.asarray


def contiguous(array: NDArray) -> NDArray:
    """Return the array in C order and aligned: itself, or else a copy."""
    return np.require(array, requirements=["C", "A"])


def aligned(array: NDArray) -> bool:
    """Whether every value lies at a multiple of its size."""
    return array.flags.aligned


def plain(array: NDArray) -> bool:
    """Whether an array is C-contiguous, aligned and writeable.

    Numba types read-only arrays differently and would compile every kernel again for them.
    """
    return array.flags.carray


def constant(size: int, value: float, dtype: np.dtype[Any]) -> NDArray:
    """Return an array filled with one value, never to be written to; small ones are cached."""
    if size > 1 << 12:
        return np.full(size, value, dtype)
    return _small_constant(size, value, dtype)


@lru_cache(maxsize=64)
def _small_constant(size: int, value: float, dtype: np.dtype[Any]) -> NDArray:
    return np.full(size, value, dtype)
