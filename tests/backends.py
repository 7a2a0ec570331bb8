"""Run the same tests on another backend: `pytest --backend read-only`, `simulator` or `cupy`.

Tests pass NumPy arrays to the functions of `nbnorm`. This module wraps each function: arguments
become arrays of the backend, and results become NumPy arrays again. Memory keeps its structure:
views of one array stay views of one array, with the same strides, and writes are copied back.
"""

import functools
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

import nbnorm
from nbnorm import Moments

WRITTEN = ("out", "running_mean", "running_var")


def wrap(function, exchange):
    """Return a function that takes NumPy arrays and calls `function` with the backend's arrays."""

    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args, **kwargs):
        taken = exchange()
        args = [taken.give(arg, name) for name, arg in zip(names, args, strict=False)]
        kwargs = {name: taken.give(arg, name) for name, arg in kwargs.items()}
        try:
            return taken.back(function(*args, **kwargs))
        finally:
            taken.settle()

    return call


def install(exchange):
    """Wrap all functions of nbnorm that take arrays."""
    for name in nbnorm.__all__:
        function = getattr(nbnorm, name)
        if inspect.isfunction(function) and name.startswith(("batch_norm", "update_", "fold_")):
            setattr(nbnorm, name, wrap(function, exchange))


class ReadOnly:
    """Pass read-only views of all NumPy arrays that the function must not write to."""

    def give(self, value, name):
        if type(value) is np.ndarray and name not in WRITTEN:
            value = value.view()
            value.flags.writeable = False
        return value

    def back(self, result):
        return result

    def settle(self):
        pass


class OnDevice:
    """Copy the memory that NumPy arrays are views of to CuPy arrays, and copy writes back."""

    def __init__(self):
        import cupy

        self._cupy = cupy
        self._memory = {}  # by the address of the root array
        self._given = {}  # by id of the device array

    def give(self, value, name):
        if isinstance(value, Moments):
            return Moments(value.count, self.give(value.mean, None), self.give(value.m2, None))
        if type(value) is not np.ndarray or value.dtype == object or not value.dtype.isnative:
            return value  # nbnorm rejects the last two before it looks at memory
        root = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        flat = _as_bytes(root)
        start = flat.__array_interface__["data"][0]
        offset = value.__array_interface__["data"][0] - start
        if start not in self._memory:
            # Align the array on the device even if it is unaligned here: GPUs cannot read it
            # otherwise.
            padding = -offset % value.itemsize
            memory = self._cupy.asarray(np.concatenate([np.zeros(padding, np.uint8), flat]))
            self._memory[start] = flat, memory[padding:]
        memory = self._memory[start][1]
        given = self._cupy.ndarray(
            value.shape, value.dtype, memory.data + offset, strides=value.strides
        )
        self._given[id(given)] = given, value
        return given

    def back(self, result):
        if id(result) in self._given:
            self.settle()
            return self._given[id(result)][1]
        if isinstance(result, tuple):
            values = [self.back(value) for value in result]
            return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
        if isinstance(result, self._cupy.ndarray):
            order = sorted(range(result.ndim), key=lambda i: -result.strides[i])
            return result.transpose(order).get().transpose(np.argsort(order))
        return result

    def settle(self):
        for host, device in self._memory.values():
            if host.flags.writeable:
                host[...] = device.get()


def _as_bytes(root):
    """Return all memory of an array as bytes, gaps included, without a copy."""
    low, high = np.lib.array_utils.byte_bounds(root)
    return np.asarray(_Span(root, low, high - low))


class _Span:
    def __init__(self, owner, start, nbytes):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (start, not owner.flags.writeable),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


def simulated():
    """Return `OnDevice` after replacing CuPy by a stand-in and the GPU by the simulator."""
    sys.path.insert(0, str(Path(__file__).parent / "cuda"))
    import fake_cupy
    import simulator

    fake_cupy.install()
    cuda = simulator.load(BLOCK_VALUES=1 << 11)
    del sys.modules["nbnorm.cuda.memory"]  # nbnorm's own works with the stand-in
    cuda.memory = importlib.import_module("nbnorm.cuda.memory")
    cuda.launch.address = lambda array: array.data.ptr
    cuda.launch.run = lambda *args, **options: simulator.run(
        *(getattr(arg, "numpy", arg) for arg in args), **options
    )
    return OnDevice


def missing(name):
    """Return why a backend is unavailable, or None if it can be used."""
    if name != "cupy":
        return None
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except Exception as error:  # no CuPy, no driver, or a library that does not load
        return f"CuPy cannot be used: {error}"


ON_DEVICE = ("cupy", "simulator")  # their arrays are CuPy's or look like them
EXCHANGES = {"read-only": lambda: ReadOnly, "cupy": lambda: OnDevice, "simulator": simulated}
