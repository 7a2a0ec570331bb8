"""NumPy arrays as Python objects, which compiled code reads in place.

Numba's dispatcher asks each argument for its type and unpacks it: 0.5 us for ten arrays, and one
compiled function for every rank. An `Object` reaches a compiled function as its address. The
function reads the fields that NumPy guarantees to C (PyArrayObject_fields): data, rank, shape,
dtype and flags. The caller holds the objects while the function runs, so no references are counted.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from nbnorm.cpu.intrinsics import array_at
from nbnorm.cpu.jit import ordered

# Offsets in words of 8 bytes. An array's own fields follow the head of every Python object, which
# ends with the class.
_HEAD = object.__basicsize__ // 8
_CLASS, _DATA, _RANK, _SHAPE, _STRIDES, _DTYPE, _FLAGS = (_HEAD + i for i in (-1, 0, 1, 2, 3, 5, 6))

# The word of a dtype (PyArray_Descr) that holds its type number and its byte order. Addresses of
# dtypes do not identify them: unpickled arrays have dtypes of their own.
_KIND, _KIND_BITS = _HEAD + 1, -1 << 32 | 0xFF << 16

# NumPy's array flags, as NumPy integers: Numba would compile once more for every plain int.
ALIGNED = np.int64(0x100)
WRITABLE = np.int64(0x400) | ALIGNED


class Object(types.Type):  # type: ignore[misc]
    """Any Python object, represented by its address."""

    def __init__(self) -> None:
        super().__init__("nbnorm_object")


register_model(Object)(models.OpaqueModel)
anything = Object()


@unbox(Object)  # type: ignore[untyped-decorator]
def _address(kind: Any, obj: Any, c: Any) -> Any:
    return NativeValue(obj)


@intrinsic
def address(typing_context, obj):
    """Address of the object, `id` in Python."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(obj), codegen


@intrinsic
def word(typing_context, start, i):
    """The i-th 8 bytes from an address on."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(_pointer(builder, args[0], ir.IntType(64)), [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def half_word(typing_context, start, i):
    """The first 4 of the i-th 8 bytes from an address on, such as a C int."""

    def codegen(context, builder, signature, args):
        whole = builder.gep(_pointer(builder, args[0], ir.IntType(64)), [args[1]])
        return builder.load(builder.bitcast(whole, ir.IntType(32).as_pointer()))

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def values(typing_context, obj, size, dtype):
    """The first `size` values of an array's memory, as a row."""
    row = types.Array(dtype.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        kind = context.get_data_type(row.dtype)
        field = builder.ptrtoint(args[0], ir.IntType(64))
        field = builder.add(field, ir.IntType(64)(8 * _DATA))
        data = builder.load(_pointer(builder, field, kind.as_pointer()))
        return array_at(context, builder, row, data, [args[1]])

    return row(obj, types.intp, dtype), codegen


def _pointer(builder, integer, kind):
    return builder.inttoptr(integer, kind.as_pointer())


@ordered
def data(array):
    """Address of an array's first value."""
    return word(address(array), _DATA)


@ordered
def is_array(obj, ndarray, dtype, flags):
    """Whether an object is exactly an ndarray, with this dtype (`kind_of`) and these flags."""
    at = address(obj)
    return (
        word(at, _CLASS) == ndarray
        and word(word(at, _DTYPE), _KIND) & _KIND_BITS == dtype
        and half_word(at, _FLAGS) & flags == flags
    )


@ordered
def has_form(array, form, rank):
    """Whether an array has shape form[:rank] and strides form[rank:]."""
    at = address(array)
    if half_word(at, _RANK) != rank:
        return False
    shape, strides = word(at, _SHAPE), word(at, _STRIDES)
    others = 0
    for i in range(rank):
        others += word(shape, i) != form[i]
        others += word(strides, i) != form[rank + i]
    return others == 0


@ordered
def is_vector(array, size, itemsize):
    """Whether an array has shape (size,) and is contiguous."""
    at = address(array)
    return (
        half_word(at, _RANK) == 1
        and word(word(at, _SHAPE), 0) == size
        and (size == 1 or word(word(at, _STRIDES), 0) == itemsize)
    )


def _word(start: int, i: int) -> int:
    """`word` in Python."""
    return ctypes.c_int64.from_address(start + 8 * i).value


def kind_of(dtype: np.dtype[Any]) -> int:
    """Return what identifies a dtype: its type number and its byte order."""
    return _word(id(dtype), _KIND) & _KIND_BITS


def readable() -> bool:
    """Whether this interpreter and NumPy lay out arrays as this module reads them."""
    array = np.zeros((3, 5), np.float32)
    at, dtype = id(array), array.dtype
    fields = _word(at, _CLASS), _word(at, _DATA), _word(at, _DTYPE)
    if fields != (id(np.ndarray), array.__array_interface__["data"][0], id(dtype)):
        return False
    form = [_word(_word(at, field), i) for field in (_SHAPE, _STRIDES) for i in range(2)]
    return (
        form == [*array.shape, *array.strides]
        and kind_of(dtype) == dtype.num << 32 | ord("=") << 16
        and ctypes.c_int.from_address(at + 8 * _RANK).value == 2
        and ctypes.c_int.from_address(at + 8 * _FLAGS).value & WRITABLE == WRITABLE
    )
