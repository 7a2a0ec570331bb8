"""The parts of CuPy that nbnorm uses, over NumPy's memory; `install` replaces CuPy.

An array is not a NumPy array and cannot be converted to one, so that NumPy functions that do not
accept CuPy's arrays do not accept these. Devices and streams are numbers that remember where they
were current.
"""

import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np

_current = threading.local()


class ndarray:  # noqa: N801  # CuPy's name
    """A CuPy array whose values are in `numpy`, on `device`."""

    def __init__(self, shape, dtype=float, memptr=None, strides=None):
        memory = np.empty(0, np.uint8) if memptr is None else memptr.memory
        self.numpy = np.ndarray(shape, dtype, memory, memptr.offset if memptr else 0, strides)
        self.device, self.base = Device(), None

    @classmethod
    def of(cls, numpy, device, base=None):
        """Return an array on the memory of a NumPy array."""
        array = cls.__new__(cls)
        array.numpy, array.device, array.base = numpy, device, base
        return array

    shape = property(lambda self: self.numpy.shape)
    strides = property(lambda self: self.numpy.strides)
    dtype = property(lambda self: self.numpy.dtype)
    itemsize = property(lambda self: self.numpy.itemsize)
    nbytes = property(lambda self: self.numpy.nbytes)
    ndim = property(lambda self: self.numpy.ndim)
    size = property(lambda self: self.numpy.size)
    data = property(lambda self: _Pointer(self.numpy, 0))

    @property
    def flags(self):
        flags = self.numpy.flags
        return SimpleNamespace(
            c_contiguous=flags.c_contiguous,
            f_contiguous=flags.f_contiguous,
            owndata=self.base is None,  # also for memory imported through DLPack
        )

    def _like(self, numpy):
        view = np.may_share_memory(numpy, self.numpy)
        return ndarray.of(
            numpy, self.device, (self if self.base is None else self.base) if view else None
        )

    def get(self):
        """Copy to the host."""
        return self.numpy.copy()

    def set(self, array):
        """Copy from the host."""
        assert Device().id == self.device.id
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        self.numpy[...] = array

    def copy(self):
        return self._like(self.numpy.copy())

    def reshape(self, *shape):
        return self._like(self.numpy.reshape(*shape))

    def transpose(self, *axes):
        return self._like(self.numpy.transpose(*axes))

    def view(self, dtype):
        return self._like(self.numpy.view(dtype))

    def astype(self, dtype, order="K", copy=True):
        return self._like(self.numpy.astype(dtype, order, copy=copy))

    def fill(self, value):
        self.numpy.fill(value)

    def repeat(self, repeats, axis=None):
        return self._like(self.numpy.repeat(repeats, axis))

    def sum(self, axis=None, dtype=None):
        return self._like(np.asarray(self.numpy.sum(axis, dtype)))

    def mean(self, axis=None):
        return self._like(np.asarray(self.numpy.mean(axis)))

    def min(self):
        return self._like(np.asarray(self.numpy.min()))

    def max(self):
        return self._like(np.asarray(self.numpy.max()))

    def __float__(self):
        synchronised.append("value")
        return float(self.numpy)

    def __bool__(self):
        synchronised.append("value")
        return bool(self.numpy)

    def __getitem__(self, index):
        return self._like(np.asarray(self.numpy[index]))

    def __setitem__(self, index, value):
        self.numpy[index] = _host(value)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        assert method == "__call__"
        assert out is None
        return self._like(np.asarray(ufunc(*map(_host, inputs), **options)))

    def __array_function__(self, function, types, args, kwargs):
        if function is np.ndim:
            return args[0].ndim
        assert function in _FUNCTIONS, function
        return self._like(function(*map(_host, args), **kwargs))

    def __dlpack__(self, **_):
        raise AssertionError("not needed")

    def __dlpack_device__(self):
        return 2, self.device.id

    def _binary(name):  # noqa: N805
        def operate(self, other):
            return self._like(np.asarray(getattr(self.numpy, name)(_host(other))))

        return operate

    for _name in ("add", "sub", "mul", "truediv"):
        locals()[f"__{_name}__"] = _binary(f"__{_name}__")
        locals()[f"__r{_name}__"] = _binary(f"__r{_name}__")
    for _name in ("eq", "gt", "lt", "or"):
        locals()[f"__{_name}__"] = _binary(f"__{_name}__")
    __hash__ = None

    def __neg__(self):
        return self._like(-self.numpy)


ndarray.__module__ = "cupy"
_FUNCTIONS = np.zeros_like, np.where, np.stack, np.broadcast_to, np.any


class _Pointer:
    """An address in the memory of a NumPy array."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.ptr = memory.ctypes.data + offset

    def __add__(self, nbytes):
        return _Pointer(self.memory, self.offset + nbytes)


def _host(value):
    """Return the NumPy array behind a stand-in, or a number; reject NumPy arrays."""
    if isinstance(value, list | tuple):
        return type(value)(_host(item) for item in value)
    if isinstance(value, ndarray):
        return value.numpy
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


class _Current:
    """Base of objects that `with` makes current."""

    def __enter__(self):
        stack = _stack(type(self).kind)
        stack.append(self)
        return self

    def __exit__(self, *_):
        _stack(type(self).kind).pop()


def _stack(kind):
    if not hasattr(_current, kind):
        setattr(_current, kind, [])
    return getattr(_current, kind)


class Device(_Current):
    kind = "devices"

    def __init__(self, number=None):
        current = _stack("devices")
        self.id = number if number is not None else (current[-1].id if current else 0)

    def synchronize(self):
        synchronised.append(("device", self.id))


class Stream(_Current):
    kind = "streams"

    def __init__(self, ptr=0):
        self.ptr = ptr

    @classmethod
    def from_external(cls, stream):
        version, ptr = stream.__cuda_stream__()
        assert version == 0
        return cls(ptr)

    def synchronize(self):
        synchronised.append(self.ptr)


synchronised = []  # streams, in order
_null = Stream()


def get_current_stream():
    stack = _stack("streams")
    return stack[-1] if stack else _null


def asarray(array):
    """Copy a NumPy array to the current device."""
    return ndarray.of(np.array(array), Device())


def _made(function):
    return lambda *args, **options: ndarray.of(function(*args, **options), Device())


def empty(shape, dtype=float):
    """Return memory filled with a value that no kernel writes."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xAB
    return ndarray.of(array, Device())


def ascontiguousarray(array):
    return ndarray.of(np.ascontiguousarray(array.numpy), array.device)


def from_dlpack(obj):
    return obj.to_cupy()


def install():
    """Replace CuPy by this module."""
    module = ModuleType("cupy")
    vars(module).update(
        ndarray=ndarray, asarray=asarray, empty=empty, zeros=_made(np.zeros), full=_made(np.full),
        ascontiguousarray=ascontiguousarray, from_dlpack=from_dlpack,
        cuda=SimpleNamespace(
            Device=Device, Stream=Stream, get_current_stream=get_current_stream,
            runtime=SimpleNamespace(getDevice=lambda: Device().id),
        ),
    )  # fmt: skip
    sys.modules["cupy"] = module
