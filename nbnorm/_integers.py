"""`IntegerFrame`: calls in which x holds integers, such as the bytes of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbnorm import cpu
from nbnorm._arrays import holds_integers, result_dtype, take
from nbnorm._frame import Frame
from nbnorm._typing import Array, Axis, NDArray
from nbnorm.cpu.integers import MOST


class IntegerFrame(Frame):
    """Frame of a call with uint8, int8, uint16 or int16 x, and floating y.

    y's dtype is `dtype`, or else that of `out`, or else float32.
    """

    _take = staticmethod(take)

    def __init__(self, x: Array, axis: Axis, dtype: Any, out: Array | None) -> None:
        super().__init__(x, axis)
        if self.backend is not cpu:
            raise TypeError(
                f"x has dtype {self.x.dtype} and is on a GPU, where integers are not supported; "
                "convert it with x.astype(np.float32)"
            )
        if self.m > MOST:
            raise ValueError(
                f"x has {self.m} integers per channel, expected at most 2^33; "
                "population_stats takes them in parts"
            )
        if dtype is not None:
            self.dtype = result_dtype(dtype, "dtype")
        else:
            self.dtype = (
                np.dtype("f4") if out is None else result_dtype(take(out, "out").dtype, "out")
            )

    def required_like_x(self, array: Array, name: str) -> NDArray:
        """Raise: only floating x takes a residual."""
        raise TypeError(f"{name} must be None if x has dtype {self.x.dtype}; convert x first")


def integer_frame(
    x: Array, axis: Axis, dtype: Any = None, out: Array | None = None, **parts: Any
) -> IntegerFrame | None:
    """Return the frame if x holds integers, else None; raise for integers with `parts`."""
    if not holds_integers(x, "x"):
        return None
    given = [name for name, value in parts.items() if value is not None and name != "fill"]
    if given:
        raise TypeError(
            f"{given[0]} must be None if x has dtype {take(x, 'x').dtype}; convert x first, with "
            "x.astype(np.float32)"
        )
    return IntegerFrame(x, axis, dtype, out)
