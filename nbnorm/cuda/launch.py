"""From kernels and device arrays to launches: raw pointers on CuPy's current stream.

Numba's own launch asks each array for its CUDA array interface and synchronises with its stream:
200 us of host time and eight synchronisations for eight arrays. `cuda.core.launch` takes pointers,
but an object for every number: 10 us for twenty arguments. Here arguments, 8 bytes each, are packed
into memory that the driver's array of pointers was made for once: 2 us.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from struct import Struct
from typing import Any

import cupy
from cuda.bindings import driver
from numba import cuda
from numba.cuda import types

from nbnorm.cuda.kernels import signature

_FORMATS = {types.int64: "q", types.float64: "d"}  # all else is an address
_NO_CONTEXT = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

_current_stream, _current_device = cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice
_launch = driver.cuLaunchKernel


def address(array: Any) -> int:
    """Where a device array begins."""
    pointer: int = array.data.ptr
    return pointer


def run(kernel: Any, dtype: str, parameters: str, blocks: int, threads: int, *args: Any) -> None:
    """Launch a kernel; arrays are handed over by their address."""
    device = _current_device()
    bound = _bound(kernel, dtype, parameters, device)
    values = list(args)
    for i in bound.arrays:
        values[i] = values[i].data.ptr
    # Out of the list while in use: the launch lets other threads run.
    try:
        packed, pointers, place = bound.idle.pop()
    except IndexError:
        packed, pointers, place = bound.memory()
    bound.pack(packed, 0, *values)
    stream = _current_stream().ptr
    launch = bound.function, blocks, 1, 1, threads, 1, 1, 0, stream, place, 0
    (error,) = _launch(*launch)
    if error == _NO_CONTEXT:  # nothing has made the device this thread's yet
        cuda.current_context(device)
        (error,) = _launch(*launch)
    if error:
        raise RuntimeError(f"CUDA could not launch {kernel.py_func.__name__}: {_words(error)}")
    bound.idle.append((packed, pointers, place))


class _Bound:
    """A kernel loaded on a device, and how its arguments are handed over."""

    def __init__(self, kernel: Any, kinds: tuple[Any, ...], device: int) -> None:
        with cuda.gpus[device]:
            compiled = kernel.compile(types.void(*kinds))
            self.loaded = compiled._codelibrary.get_cufunc()  # unloaded when it is collected
        self.function = driver.CUfunction(int(self.loaded.kernel.handle))
        formats = [_FORMATS.get(kind, "P") for kind in kinds]
        self.arrays = [i for i, letter in enumerate(formats) if letter == "P"]
        self._struct = Struct("".join(formats))
        self.pack = self._struct.pack_into
        self.idle = [self.memory()]

    def memory(self) -> tuple[Any, Any, int]:
        """Memory for the arguments, pointers to each of them, and where these are."""
        size = self._struct.size
        packed = (ctypes.c_char * size)()
        first = ctypes.addressof(packed)
        pointers = (ctypes.c_void_p * (size // 8))(*range(first, first + size, 8))
        return packed, pointers, ctypes.addressof(pointers)


@lru_cache(maxsize=1024)
def _bound(kernel: Any, dtype: str, parameters: str, device: int) -> _Bound:
    return _Bound(kernel, signature(kernel, dtype, parameters), device)


def _words(error: Any) -> str:
    _, name = driver.cuGetErrorName(error)
    _, text = driver.cuGetErrorString(error)
    return f"{name.decode()}, {text.decode()}"
