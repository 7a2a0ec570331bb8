"""What arguments and results are, to readers and to type checkers."""

from typing import Any, TypeVar

import numpy as np

Array = Any  # numpy.ndarray, or anything with __dlpack__
NDArray = np.ndarray[Any, np.dtype[Any]]

Axis = int | tuple[int, ...]
Activation = Any  # None, a name such as "relu", or what `nbnorm.activation` returned
Mask = tuple[bool, bool, bool, bool]

# The type of x, and of results like it. Statistics are of x's library too, but float64 and of
# another shape, which Python's types cannot express: they are Any.
X = TypeVar("X")
# A result that is None where it was not asked for. Any, so that type checkers do not demand a check
# for None at every use.
OrNone = Any
