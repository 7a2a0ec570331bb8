"""Type aliases of arguments and results."""

import os
from typing import IO, Any, Literal, TypeVar

import numpy as np

from nbnorm.activations import Activation as _Activation

Array = Any  # numpy.ndarray, or anything with __dlpack__
NDArray = np.ndarray[Any, np.dtype[Any]]

Axis = int | tuple[int, ...]
NamedAxis = int | str | tuple[int | str, ...]  # names of xarray's dimensions
File = str | os.PathLike[str] | IO[bytes]
Activation = (
    Literal[
        "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh"
    ]
    | _Activation
    | None
)
Mask = tuple[bool, bool, bool, bool]

# The type of x, and of results like it. Statistics are of x's library too, but float64 and of
# another shape, which Python's types cannot express: they are Any.
X = TypeVar("X")
# A result that is None unless it was requested. Any, so that type checkers do not demand a check
# for None at every use.
OrNone = Any
