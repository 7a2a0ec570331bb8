"""Arrays in and out: what is accepted, how it is viewed as NumPy, how results go back.

`take` turns any accepted array into a plain `numpy.ndarray` on the same memory; `home_of` says how
results are handed back, so that a torch tensor in means torch tensors out. Neither imports the
other library: an array brings its own.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, or anything with __dlpack__
NDArray = np.ndarray[Any, np.dtype[Any]]

DTYPES = ("float32", "float64", "float16", "bfloat16")
# By the dtype itself where it can be: its name is put together at every look, which takes 1.7 us.
_KNOWN = frozenset(np.dtype(name) for name in DTYPES[:3])


def take(obj: Array, name: str) -> NDArray:
    """View `obj` as a plain ndarray without a copy, or raise TypeError naming the argument."""
    if type(obj) is np.ndarray:
        array = obj
    elif isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; fill it first")
    elif isinstance(obj, np.ndarray):
        array = obj.view(np.ndarray)
    elif hasattr(obj, "__dlpack__"):
        array = _from_dlpack(obj, name)
    else:
        raise TypeError(
            f"{name} must be a NumPy array or an object with __dlpack__, "
            f"got {type(obj).__module__}.{type(obj).__qualname__}"
        )
    if not array.dtype.isnative:
        raise TypeError(f"{name} has non-native byte order ({array.dtype.str}); byteswap it first")
    return array


def take_floating(obj: Array, name: str) -> NDArray:
    """`take` for data, parameters and statistics: any of the four floating dtypes."""
    if type(obj) is np.ndarray and obj.dtype in _KNOWN:  # most are: one step for all
        return obj
    array = take(obj, name)
    if array.dtype not in _KNOWN and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {array.dtype}, expected one of {_or(DTYPES)}")
    return array


def home_of(obj: Array) -> Callable[[NDArray], Array]:
    """Return the function that hands a result back as an array of obj's library."""
    return _home(type(obj))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _home(cls: type) -> Callable[[NDArray], Array]:
    if issubclass(cls, np.ndarray):
        return lambda array: array
    library = _library_of(cls)

    def give(array: NDArray) -> Array:
        if array.dtype.name == "bfloat16":
            return library.from_dlpack(array.view(np.int16)).view(library.bfloat16)
        given = library.from_dlpack(array)
        # A library that cannot hold float64 (JAX without x64) rounds it silently: keep ours then.
        held = str(given.dtype).rpartition(".")[2]
        return given if held == array.dtype.name else array

    return give


def _library_of(cls: type) -> Any:
    """Return the module with `from_dlpack` that made arrays of this class; it is imported."""
    # The longest package prefix that offers from_dlpack: torch, array_api_strict, jax.numpy.
    root = cls.__module__.partition(".")[0]
    for module in ({"jaxlib": "jax.numpy", "jax": "jax.numpy"}.get(root, root), root):
        library = sys.modules.get(module)
        if library is not None and hasattr(library, "from_dlpack"):
            return library
    raise TypeError(f"cannot return arrays of {cls.__module__}.{cls.__qualname__}: no from_dlpack")


def _from_dlpack(obj: Array, name: str) -> NDArray:
    if getattr(obj, "requires_grad", False) is True:
        raise TypeError(
            f"{name} is a tensor that requires grad, and no gradient would be recorded here; "
            "pass it detached, or use nbnorm.integrations.torch where that is installed"
        )
    dtype = str(getattr(obj, "dtype", "unknown dtype"))
    if not hasattr(obj, "__dlpack_device__"):
        raise TypeError(f"{name} has __dlpack__ but no __dlpack_device__")
    try:
        kind = int(obj.__dlpack_device__()[0])
        if kind == 1:  # kDLCPU
            if dtype.endswith("bfloat16"):
                return np.from_dlpack(_bits(obj)).view(_bfloat16(name))
            return np.from_dlpack(obj)
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name} ({dtype}) cannot be viewed as a NumPy array: {error}") from error
    # x says which device the call is for; another array can only be on the wrong one.
    refusal = TypeError if name == "x" else ValueError
    raise refusal(f"{name} is not in CPU memory (DLPack device type {kind})")


def _bits(obj: Array) -> Array:
    """View a bfloat16 array as int16 in its own library: DLPack has no bfloat16 for NumPy."""
    library = _library_of(type(obj))
    return obj.view(library.int16)


def _bfloat16(name: str) -> np.dtype[Any]:
    """NumPy's bfloat16, which ml_dtypes adds to it."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} is bfloat16, for which NumPy needs ml_dtypes: install it"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
