"""From kernels and device arrays to launches: raw pointers on CuPy's current stream.

Numba's own launch asks each array for its CUDA array interface and synchronises with its stream:
200 us of host time and eight synchronisations for eight arrays. `cuda.core` takes pointers, 2 us.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from cuda.core import LaunchConfig, Stream, launch
from numba import cuda
from numba.cuda import types

from nbnorm.cuda.kernels import signature

_SCALARS = {types.int64: ctypes.c_int64, types.float64: ctypes.c_double}


def address(array: Any) -> int:
    """Where a device array begins."""
    pointer: int = array.data.ptr
    return pointer


def run(kernel: Any, dtype: str, parameters: str, blocks: int, threads: int, *args: Any) -> None:
    """Launch a kernel; arrays are handed over by their address."""
    device, stream = _current()
    bound = _bound(kernel, dtype, parameters, device)
    values = [
        convert(arg) if convert is not None else arg.data.ptr
        for convert, arg in zip(bound.converters, args, strict=True)
    ]
    launch(_stream(stream), _config(blocks, threads), bound.kernel, *values)


class _Bound:
    """A kernel compiled for a device, and how each of its arguments is handed over."""

    def __init__(self, kernel: Any, dtype: str, parameters: str) -> None:
        kinds = signature(kernel, dtype, parameters)
        compiled = kernel.compile(types.void(*kinds))
        self.kernel = compiled._codelibrary.get_cufunc().kernel
        self.converters = [_SCALARS.get(kind) for kind in kinds]


@lru_cache(maxsize=1024)
def _bound(kernel: Any, dtype: str, parameters: str, device: int) -> _Bound:
    cuda.current_context(device)
    return _Bound(kernel, dtype, parameters)


@lru_cache(maxsize=1024)
def _config(blocks: int, threads: int) -> Any:
    return LaunchConfig(grid=blocks, block=threads)


@lru_cache(maxsize=64)
def _stream(pointer: int) -> Any:
    return Stream.from_handle(pointer)


def _current() -> tuple[int, int]:
    """CuPy's current device and stream."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    return stream.device_id if stream.device_id >= 0 else cupy.cuda.Device().id, stream.ptr
