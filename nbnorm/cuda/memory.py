"""Memory on a GPU, allocated by CuPy on its current device and stream.

It has the functions of `nbnorm.cpu.memory`, and some that only arrays on a GPU need.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import cupy

from nbnorm._typing import Array

from_dlpack = cupy.from_dlpack
empty = cupy.empty
zeros = cupy.zeros
contiguous = cupy.ascontiguousarray
from_host = cupy.asarray


def aligned(_: Array) -> bool:
    """Whether every value lies at a multiple of its size: always, as others were refused before."""
    return True


def plain(array: Array) -> bool:
    """Whether an array is C-contiguous, aligned and writeable."""
    return bool(array.flags.c_contiguous)


def constant(size: int, value: float, dtype: Any) -> Array:
    """Return an array filled with one value, never to be written to; small ones are cached."""
    if size > 1 << 12:
        return cupy.full(size, value, dtype)
    return _small_constant(size, value, dtype, cupy.cuda.runtime.getDevice())


@cache  # never freed: memory reused by one stream may still be read by another
def _small_constant(size: int, value: float, dtype: Any, device: int) -> Array:
    array = cupy.full(size, value, dtype)
    cupy.cuda.get_current_stream().synchronize()  # other streams will read it
    return array


def current_for(array: Array) -> AbstractContextManager[None]:
    """Make the device of an array, and the stream of its library, current in CuPy."""
    library = type(array).__module__.partition(".")[0]
    device = array.device.id if library == "cupy" else array.__dlpack_device__()[1]
    if library == "cupy" and device == cupy.cuda.runtime.getDevice():
        return _AS_IT_IS
    return _made_current(library, device)


_AS_IT_IS = nullcontext()


@contextmanager
def _made_current(library: str, device: int) -> Iterator[None]:
    with cupy.cuda.Device(device):
        pointer = _stream_of(library, device)
        with (
            nullcontext() if pointer is None else cupy.cuda.Stream.from_external(_Foreign(pointer))
        ):
            yield


class _Foreign:
    """Another library's stream, as CuPy accepts it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream."""
        return 0, self._pointer


def _stream_of(library: str, device: int) -> int | None:
    """Return torch's current stream; None for others, which order arrays before CuPy's stream."""
    if library != "torch":
        return None
    stream: int = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    return stream
