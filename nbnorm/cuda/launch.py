"""Launches of kernels with raw pointers, on CuPy's current stream.

Numba's own launch asks each array for its CUDA array interface and synchronises with its stream:
200 us of host time and eight synchronisations for eight arrays. `cuda.core.launch` takes pointers,
but needs an object for every number: 10 us for twenty arguments. Here the arguments, 8 bytes each,
are packed into memory for which the driver's array of pointers was made once: 2 us.
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

_FORMATS = {types.int64: "q", types.float64: "d"}  # anything else is an address
_MAXIMUM = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CONFIGS = 64  # launch configurations that a slot caches

_NO_CONTEXT = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

_current_stream, _current_device = cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice
_launch, _launch_clusters = driver.cuLaunchKernel, driver.cuLaunchKernelEx


def address(array: Any) -> int:
    """Return the address of a device array."""
    pointer: int = array.data.ptr
    return pointer


def run(
    kernel: Any,
    dtype: str,
    parameters: str,
    blocks: int,
    threads: int,
    *args: Any,
    weights: str = "",
    cluster: int = 1,
    shared: int = 0,
) -> None:
    """Launch a kernel; arrays are passed by address.

    `dtype` is that of tensors, `parameters` that of gamma and beta, `weights` that of weights.
    `cluster` blocks can wait for each other; each gets `shared` bytes of shared memory besides its
    static ones.
    """
    device = _current_device()
    bound = _bound(kernel, dtype, parameters, weights, device, shared > 0)
    values = list(args)
    for i in bound.arrays:
        values[i] = values[i].data.ptr
    # Taken out of the list while in use: other threads can run during the launch.
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
    if error == _NO_CONTEXT:  # this thread has no current context yet
        cuda.current_context(device)
        (error,) = launch(*to_launch)
    if error:
        raise RuntimeError(f"CUDA could not launch {kernel.py_func.__name__}: {_words(error)}")
    bound.idle.append(slot)


def limits() -> tuple[int, bool]:
    """Return the bytes of shared memory a block may have, and whether the device has clusters."""
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
            raise RuntimeError(f"CUDA could not query device {device}: {_words(error)}")
        values.append(value)
    shared, clusters, multiprocessors = values
    return shared, bool(clusters) and multiprocessors >= CLUSTER  # a slice of a GPU may have fewer


class _Bound:
    """A kernel loaded on a device, and how its arguments are packed."""

    def __init__(self, kernel: Any, kinds: tuple[Any, ...], device: int, keeps: bool) -> None:
        with cuda.gpus[device]:
            self.loaded = load(kernel, kinds)  # unloaded when it is collected
            if keeps:  # allow the most there is; each launch asks for what it needs
                most = _limits(device)[0] - self.loaded.shared
                of = driver.CUkernel(self.loaded.handle)
                error, *_ = driver.cuKernelSetAttribute(_MAXIMUM, most, of, device)
                if error:
                    raise RuntimeError(
                        f"CUDA could not give a block {most} bytes of shared memory: "
                        f"{_words(error)}"
                    )
        self.function = driver.CUfunction(self.loaded.handle)
        formats = [_FORMATS.get(kind, "P") for kind in kinds]
        self.arrays = [i for i, letter in enumerate(formats) if letter == "P"]
        struct = Struct("".join(formats))
        self.size, self.pack = struct.size, struct.pack_into
        self.idle: list[_Slot] = []


class _Slot:
    """Memory for the arguments of one launch, the pointers to them, and launch configurations."""

    def __init__(self, size: int) -> None:
        self.packed = (ctypes.c_char * size)()
        first = ctypes.addressof(self.packed)
        self._pointers = (ctypes.c_void_p * (size // 8))(*range(first, first + size, 8))
        self.pointers = ctypes.addressof(self._pointers)
        self._configs: dict[tuple[int, ...], Any] = {}

    def config(self, blocks: int, threads: int, cluster: int, shared: int) -> Any:
        """Return the configuration of a launch of clusters, cached as making it takes 4 us."""
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
def _bound(
    kernel: Any, dtype: str, parameters: str, weights: str, device: int, keeps: bool
) -> _Bound:
    return _Bound(kernel, signature(kernel, dtype, parameters, weights), device, keeps)


def _words(error: Any) -> str:
    _, name = driver.cuGetErrorName(error)
    _, text = driver.cuGetErrorString(error)
    return f"{name.decode()}, {text.decode()}"
