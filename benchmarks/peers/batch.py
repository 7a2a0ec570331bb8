"""The arguments that peers get, and the description of a peer."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

EPS, MOMENTUM = 1e-5, 0.1


class Batch:
    """Random arrays of one shape, in C order or with the channels last in memory.

    Attributes
    ----------
    x, dy, residual, out : ndarray of `shape`, channel axis 1
        Input, gradient of the output, addend before ReLU, and memory for results.
    gamma, beta, running_mean, running_var : ndarray (C,)
        Of x's dtype, or float32 if x is float16 or bfloat16, as in mixed precision.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "float32", *, last: bool = False):
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: F401 - registers the name with NumPy
        self._shape, self._dtype, self._last = shape, np.dtype(dtype), last
        self._wide = np.promote_types(self._dtype, np.float32)
        self._rng = np.random.default_rng(0)
        C = shape[1]
        self.gamma = self._rng.uniform(0.5, 1.5, C).astype(self._wide)
        self.beta = self._rng.uniform(-0.5, 0.5, C).astype(self._wide)
        self.running_mean = self._rng.uniform(-0.5, 0.5, C).astype(self._wide)
        self.running_var = self._rng.uniform(0.5, 1.5, C).astype(self._wide)
        self.x = self._draw()

    @cached_property
    def dy(self) -> np.ndarray:
        return self._draw()

    @cached_property
    def residual(self) -> np.ndarray:
        return self._draw()

    @cached_property
    def out(self) -> np.ndarray:
        return self._draw()

    @property
    def values(self) -> int:
        """Number of values per channel."""
        return self.x[:, 0].size

    def _draw(self) -> np.ndarray:
        N, C, *space = self._shape
        shape = (N, *space, C) if self._last else self._shape
        array = self._rng.standard_normal(shape, self._wide).astype(self._dtype, copy=False)
        return np.moveaxis(array, -1, 1) if self._last else array


Call = Callable[[], Any]
Setup = Callable[[Batch], Call]


class Peer(NamedTuple):
    """How a library computes the ops.

    Attributes
    ----------
    ops : mapping of str to callable
        Setups of the supported `OPS`. A setup takes a `Batch`, does all preparations, and
        returns the call to time, which takes no arguments.
    last : bool
        Whether channels are last in memory.
    reuse : bool
        Whether results go into existing memory instead of new memory.
    library : str
        The library that has to be installed.
    """

    ops: Mapping[str, Setup]
    last: bool = False
    reuse: bool = False
    library: str = "numpy"


class LeftOut(Exception):  # noqa: N818 - not an error
    """Raised by a setup, with the reason why the peer cannot compute this batch."""
