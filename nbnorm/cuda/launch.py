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
from nbnorm.cuda.loading import load
from nbnorm.cuda.plan import CLUSTER

_FORMATS = {types.int64: "q", types.float64: "d"}  # all else is an address
_MAXIMUM = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CONFIGS = 64  # descriptions of launches that a slot keeps

_NO_CONTEXT = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

_current_stream, _current_device = cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice
_launch, _launch_clusters = driver.cuLaunchKernel, driver.cuLaunchKernelEx


def address(array: Any) -> int:
    """Where a device array begins."""
    pointer: int = array.data.ptr
    return pointer


def run(
    kernel: Any,
    dtype: str,
    parameters: str,
    blocks: int,
    threads: int,
    *args: Any,
    cluster: int = 1,
    shared: int = 0,
) -> None:
    """Launch a kernel; arrays are handed over by their address.

    `cluster` blocks wait for each other; each has so many bytes of `shared` memory besides its own.
    """
    device = _current_device()
    bound = _bound(kernel, dtype, parameters, device, shared > 0)
    values = list(args)
    for i in bound.arrays:
        values[i] = values[i].data.ptr
    # Out of the list while in use: the launch lets other threads run.
    try:
        slot = bound.idle.pop()
    except IndexError:
        slot = _Slot(bound.size)
    bound.pack(slot.packed, 0, *values)
    stream = _current_stream().ptr
    launch: Any = _launch
    to_launch: Any = (
        bound.function, blocks, 1, 1, threads, 1, 1, shared, stream, slot.pointers, 0
    )  # fmt: skip
    if cluster > 1:
        config = slot.config(blocks, threads, cluster, shared)
        config.hStream = stream
        launch, to_launch = _launch_clusters, (config, bound.function, slot.pointers, 0)
    (error,) = launch(*to_launch)
    if error == _NO_CONTEXT:  # nothing has made the device this thread's yet
        cuda.current_context(device)
        (error,) = launch(*to_launch)
    if error:
        raise RuntimeError(f"CUDA could not launch {kernel.py_func.__name__}: {_words(error)}")
    bound.idle.append(slot)


def limits() -> tuple[int, bool]:
    """Bytes of shared memory that a block may have on this device; whether it has clusters."""
    return _limits(_current_device())


@lru_cache(maxsize=64)
def _limits(device: int) -> tuple[int, bool]:
    asked = driver.CUdevice_attribute
    values = []
    for attribute in (
        asked.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        asked.CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH,
        asked.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    ):
        error, value = driver.cuDeviceGetAttribute(attribute, device)
        if error:
            raise RuntimeError(f"CUDA does not tell what device {device} can do: {_words(error)}")
        values.append(value)
    shared, clusters, multiprocessors = values
    return shared, bool(clusters) and multiprocessors >= CLUSTER  # fewer in a slice of a GPU


class _Bound:
    """A kernel loaded on a device, and how its arguments are handed over."""

    def __init__(self, kernel: Any, kinds: tuple[Any, ...], device: int, keeps: bool) -> None:
        with cuda.gpus[device]:
            self.loaded = load(kernel, kinds)  # unloaded when it is collected
            if keeps:  # launches say how much they take of what there is
                most = _limits(device)[0] - self.loaded.shared
                of = driver.CUkernel(self.loaded.handle)
                error, *_ = driver.cuKernelSetAttribute(_MAXIMUM, most, of, device)
                if error:
                    raise RuntimeError(f"CUDA does not give a block {most} bytes: {_words(error)}")
        self.function = driver.CUfunction(self.loaded.handle)
        formats = [_FORMATS.get(kind, "P") for kind in kinds]
        self.arrays = [i for i, letter in enumerate(formats) if letter == "P"]
        struct = Struct("".join(formats))
        self.size, self.pack = struct.size, struct.pack_into
        self.idle: list[_Slot] = []


class _Slot:
    """Memory for the arguments of one launch, where pointers to each of them are, its shapes."""

    def __init__(self, size: int) -> None:
        self.packed = (ctypes.c_char * size)()
        first = ctypes.addressof(self.packed)
        self._pointers = (ctypes.c_void_p * (size // 8))(*range(first, first + size, 8))
        self.pointers = ctypes.addressof(self._pointers)
        self._configs: dict[tuple[int, ...], Any] = {}

    def config(self, blocks: int, threads: int, cluster: int, shared: int) -> Any:
        """Describe a launch of clusters; it takes 4 us to make and is kept."""
        key = blocks, threads, cluster, shared
        if key in self._configs:
            return self._configs[key]
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
        if len(self._configs) >= _CONFIGS:
            self._configs.clear()
        self._configs[key] = config
        return config


@lru_cache(maxsize=1024)
def _bound(kernel: Any, dtype: str, parameters: str, device: int, keeps: bool) -> _Bound:
    return _Bound(kernel, signature(kernel, dtype, parameters), device, keeps)


def _words(error: Any) -> str:
    _, name = driver.cuGetErrorName(error)
    _, text = driver.cuGetErrorString(error)
    return f"{name.decode()}, {text.decode()}"
