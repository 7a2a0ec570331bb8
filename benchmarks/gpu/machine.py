"""Where arrays live: CuPy on a GPU; NumPy, so that the checks themselves can be tried without one.

Nothing here but allocation, copies and views of 16-bit integers is asked of CuPy for bfloat16, so
that what is checked is nbnorm and not CuPy's arithmetic in it.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

DTYPES = ("float32", "float64", "float16", "bfloat16")
MARGIN = 64  # values before and after every array: 128 bytes at least, so alignment stays
_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class Unavailable(Exception):  # noqa: N818 - no error
    """Raised where something that is not nbnorm cannot do what a check needs: it is left out."""


class Machine:
    """CuPy and its current device or, `dry`, NumPy and the CPU."""

    def __init__(self, *, dry: bool = False) -> None:
        self.dry = dry
        if dry:
            self.xp: Any = np
        else:
            import cupy

            self.xp = cupy

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return a dtype by name; Unavailable where this installation has no such arrays."""
        if name == "bfloat16":
            if importlib.util.find_spec("ml_dtypes") is None:
                raise Unavailable("bfloat16 needs ml_dtypes, which is not installed")
            import ml_dtypes  # noqa: F401 - NumPy knows the name from here on
        dtype = np.dtype(name)
        try:
            self.xp.empty(1, dtype)
        except (TypeError, ValueError) as error:
            raise Unavailable(f"{self.xp.__name__} has no {name}: {error}") from error
        return dtype

    def sync(self) -> None:
        """Wait for all that was launched."""
        if not self.dry:
            self.xp.cuda.Device().synchronize()

    def alive(self) -> bool:
        """Whether the device still answers: after an illegal access no call of a process does."""
        try:
            self.xp.zeros(2).sum()
            self.sync()
        except Exception:
            return False
        return True

    def free_bytes(self) -> int:
        """Memory of the device that is free; little of it when dry."""
        return 1 << 30 if self.dry else int(self.xp.cuda.runtime.memGetInfo()[0])

    def tidy(self) -> None:
        """Give memory that CuPy keeps back to the device."""
        if not self.dry:
            self.xp.get_default_memory_pool().free_all_blocks()

    def send(self, host: np.ndarray) -> Array:
        """Copy a NumPy array to the device, contiguous."""
        host = np.ascontiguousarray(host)
        return self.xp.array(bits(host)).view(host.dtype)

    def fetch(self, array: Array) -> np.ndarray:
        """Copy an array from the device, in C order."""
        if self.dry:
            return np.array(array, order="C")
        return self.xp.ascontiguousarray(bits(array)).get().view(array.dtype)

    def place(self, host: np.ndarray, where: str) -> Array:
        """Copy a NumPy array to the device, laid out as `PLACES` has it."""
        array = self.poisoned(host.shape, host.dtype, where).array
        bits(array)[...] = self.xp.array(bits(np.ascontiguousarray(host)))
        return array

    def poisoned(self, shape: tuple[int, ...], dtype: Any, where: str = "C") -> "Poisoned":
        """Return memory full of NaN (of ones, which is a NaN in every dtype)."""
        outer, cut = PLACES[where]
        dtype, whole = np.dtype(dtype), outer(shape)
        size, start = math.prod(whole), MARGIN + (where == "misaligned")
        memory = self.xp.full(size + 2 * MARGIN, -1, _INTEGERS[dtype.itemsize])
        array = cut(memory[start : start + size].view(dtype).reshape(whole))
        assert array.shape == shape
        return Poisoned(array, memory)

    def copied(self, array: Array) -> Array:
        """Return a copy with the same order in memory."""
        copy = self.xp.empty_like(array)
        bits(copy)[...] = bits(array)
        return copy

    def wide(self, array: Array) -> Array:
        """Return an array in float64."""
        if array.dtype.name != "bfloat16":
            return array.astype(np.float64)
        upper = bits(array).astype(np.int32) << 16
        return upper.view(np.float32).astype(np.float64)


class Poisoned(NamedTuple):
    """Memory for a result, and all the memory around it."""

    array: Array
    memory: Array

    def spilled(self) -> int:
        """How many values outside the array were written; the array is poisoned again."""
        bits(self.array)[...] = -1
        return int((self.memory != -1).sum())


def bits(array: Array) -> Array:
    """View an array as integers of its size."""
    return array.view(_INTEGERS[array.dtype.itemsize])


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays agree in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((bits(a) == bits(b)).all())


Shape = tuple[int, ...]


def _last(shape: Shape) -> Shape:
    return shape[:1] + shape[2:] + shape[1:2]


def _same(shape: Shape) -> Shape:
    return shape


def _longer(axis: int) -> Callable[[Shape], Shape]:
    return lambda shape: tuple(n + 2 * (i == axis % len(shape)) for i, n in enumerate(shape))


# How an array lies in memory: the shape of the memory, and the view that is the array.
PLACES: dict[str, tuple[Callable[[Shape], Shape], Callable[[Array], Array]]] = {
    "C": (_same, lambda a: a),
    "channels-last": (_last, lambda a: a.transpose(0, a.ndim - 1, *range(1, a.ndim - 1))),
    "F": (lambda shape: shape[::-1], lambda a: a.T),
    "misaligned": (_same, lambda a: a),
    # Samples, or channels, lie apart, as in a slice of a concatenation: kernels take the strides.
    "apart": (_longer(1), lambda a: a[:, 1:-1]),
    # There is no (N, C, S) view of a cropped image: it is copied.
    "cropped": (_longer(-1), lambda a: a[..., 1:-1]),
    "backwards": (_same, lambda a: a[::-1]),
}
