"""Conversion of arguments to NumPy or CuPy arrays, and of results back to the caller's library.

`take` views any accepted array as a plain `numpy.ndarray` on the same memory, or as a CuPy array if
it is on a GPU. `home_of` converts results back, so torch tensors in give torch tensors out. Neither
imports the array's library: since the array exists, it is imported already. The first array on a
GPU imports the CUDA backend.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from inspect import signature
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nbnorm._checks import has_lazy_sign
from nbnorm._typing import Array, NDArray

_P = ParamSpec("_P")
_R = TypeVar("_R")

# DLPack's device types: CPU and pinned memory; CUDA and managed memory.
_HOST, _GPU = (1, 3), (2, 13)

DTYPES = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("uint8", "int8", "uint16", "int16")
# Compare dtypes, not names, where possible: NumPy builds dtype.name at each access, in 1.7 us.
_KNOWN = frozenset(np.dtype(name) for name in DTYPES[:3])
_INTEGERS = frozenset(map(np.dtype, INTEGERS))


def take(obj: Array, name: str) -> NDArray:
    """View `obj` as a plain ndarray without a copy, or raise TypeError naming the argument."""
    if type(obj) is np.ndarray:
        array = obj
    elif isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; fill it first")
    elif isinstance(obj, np.ndarray):
        array = obj.view(np.ndarray)
    elif is_cupy(type(obj)):
        array = _aligned(obj, name)
    elif stand_in := stand_in_of(type(obj)):  # type: ignore[arg-type]
        raise TypeError(f"{name} is {stand_in}")
    elif hasattr(obj, "__dlpack__"):
        _refuse_tensor(obj, name)
        array = _from_dlpack(obj, name)
    else:
        # NumPy can convert a list, a DataFrame, or an xarray or dask array.
        convertible = isinstance(obj, list | tuple) or hasattr(obj, "__array__")
        raise TypeError(
            f"{name} must be a NumPy array, a CuPy array or an object with __dlpack__, got "
            f"{_class_name(obj)}" + f"; np.asarray({name}) makes an array of it" * convertible
        )
    if not array.dtype.isnative:
        native = array.dtype.str[1:]
        raise TypeError(f"{name} has non-native byte order; use {name}.astype({native!r})")
    return array


def take_floating(obj: Array, name: str) -> NDArray:
    """Call `take`, and raise if the dtype is not one of the four floating dtypes."""
    if type(obj) is np.ndarray and obj.dtype in _KNOWN:  # fast path for most arrays
        return obj
    array = take(obj, name)
    if array.dtype not in _KNOWN and array.dtype.name != "bfloat16":
        remedy = _remedy(obj, name, array.dtype.name)
        raise TypeError(f"{name} has dtype {array.dtype}, expected one of {_or(DTYPES)}{remedy}")
    return array


def take_float64(obj: Array, name: str, expected: tuple[int, ...], of: str) -> NDArray:
    """Convert a parameter or statistic to float64; raise if its shape is not as expected."""
    array = take_floating(obj, name)
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected} {of}")
    return array.astype(np.float64)


def holds_integers(obj: Array, name: str) -> bool:
    """Return whether an object has one of the dtypes of `INTEGERS`; it need not be an array."""
    dtype = getattr(obj, "dtype", None)
    if isinstance(dtype, np.dtype):
        return dtype in _INTEGERS
    named = str(dtype).rpartition(".")[2]
    if named in (*DTYPES, *INTEGERS) or not hasattr(obj, "__dlpack__"):
        return named in INTEGERS
    return take(obj, name).dtype in _INTEGERS  # no dtype, or one with another name


def take_numbers(obj: Array, name: str) -> NDArray:
    """Call `take`, and raise if the dtype is neither floating nor one of `INTEGERS`."""
    return take(obj, name) if holds_integers(obj, name) else take_floating(obj, name)


def result_dtype(dtype: Any, name: str) -> np.dtype[Any]:
    """Return `dtype`, which the argument `name` gives, as one of `DTYPES`, or raise."""
    named = str(dtype).rpartition(".")[2]  # drops "torch."
    try:
        found = (
            _bfloat16(name)
            if named == "bfloat16"
            else np.dtype(named if named in DTYPES else dtype)
        )
    except TypeError:
        raise TypeError(f"{name} must be one of {_or(DTYPES)}, got {dtype!r}") from None
    if found not in _KNOWN and found.name != "bfloat16":
        raise TypeError(f"{name} is {found}, expected one of {_or(DTYPES)}")
    return found


def _remedy(obj: Array, name: str, dtype: str) -> str:
    """Return advice for converting an array to a floating dtype, or an empty string."""
    if "complex" in dtype:
        return f"; pass {name}.real and {name}.imag, separately or stacked as channels"
    if not dtype.startswith(("bool", "int", "uint")):
        return ""
    taken = name == "x" and dtype in INTEGERS
    hint = "; batch_norm_stats and batch_norm_inference take integers" if taken else ""
    for method, argument in ("astype", "np.float32"), ("float", ""):
        if hasattr(obj, method):
            return f"; convert it with {name}.{method}({argument}){hint}"
    return hint


def is_cupy(cls: type) -> bool:
    """Return True for CuPy's array class."""
    return cls.__module__.partition(".")[0] == "cupy" and cls.__name__ == "ndarray"


def place_of(array: Array) -> str:
    """Return the location of an array returned by `take`, in words."""
    if isinstance(array, np.ndarray):
        return "CPU memory"
    return f"the memory of CUDA device {array.device.id}"


def on_gpu(obj: Array) -> bool:
    """Return True if an object is an array in the memory of a CUDA device."""
    if is_cupy(type(obj)):
        return True
    if isinstance(obj, np.ndarray) or not hasattr(obj, "__dlpack_device__"):
        return False
    with suppress(Exception):  # `take` reports the error later
        return int(obj.__dlpack_device__()[0]) in _GPU
    return False


def device_of(obj: Array) -> int | None:
    """Return the id of the CUDA device that holds an array, or None for CPU memory."""
    if not on_gpu(obj):
        return None
    return int(obj.device.id if is_cupy(type(obj)) else obj.__dlpack_device__()[1])


def moved_to(x: Array, array: NDArray) -> NDArray:
    """Copy an array to the device of x, as a CuPy array if that is a GPU."""
    if not on_gpu(x):
        return on_host(array)
    memory = cuda_backend("x").memory
    with memory.current_for(x):
        moved: NDArray = memory.from_host(on_host(array))
    return moved


def on_host(array: Array) -> NDArray:
    """Return an array in CPU memory, copied if it is on a GPU."""
    if isinstance(array, np.ndarray):
        return array
    array.device.synchronize()  # the array may have been written on any stream
    copied: NDArray = array.get()
    return copied


def ones_like(array: NDArray) -> NDArray:
    """Return ones with the shape and dtype of a parameter, on its device.

    Passed as gamma where there is only beta: dbeta then has beta's dtype, not x's.
    """
    ones = np.zeros_like(array)
    ones[...] = 1
    return ones


def overwrite(array: Array, values: NDArray) -> None:
    """Round values to an array's dtype and write them to it; the array may be on a GPU."""
    with np.errstate(all="ignore"):  # a statistic may overflow the dtype
        rounded = values.astype(array.dtype)
    if isinstance(array, np.ndarray):
        array[...] = rounded
    else:
        with array.device:
            array.set(rounded)


def on_its_device(name: str, instead: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate: run on the device of the argument `name`, on its library's current stream.

    Has no effect for arrays in CPU memory. If the argument is None, the keyword `instead` takes its
    place. Moments (`self`) are on the device of their mean. Also tells torch.compile to call the
    function instead of tracing it.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        position = list(signature(function).parameters).index(name)
        ndarray, gpu, backend = np.ndarray, on_gpu, cuda_backend
        modules, disabled, reason = sys.modules, dict[str, Callable[_P, _R]](), _NOT_TRACED

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            x = args[position] if len(args) > position else kwargs.get(name)
            if type(x) is ndarray:
                return function(*args, **kwargs)
            if "torch._dynamo" not in modules:
                return run(*args, **kwargs)
            if "run" not in disabled:
                disable = modules["torch"].compiler.disable
                disabled["run"] = disable(run, reason=reason)
            return disabled["run"](*args, **kwargs)

        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            x = args[position] if len(args) > position else kwargs.get(name)
            x = kwargs.get(instead) if x is None else x
            x = getattr(x, "mean", x) if name == "self" else x
            if not gpu(x):
                return function(*args, **kwargs)
            with backend(name).memory.current_for(x):
                return function(*args, **kwargs)

        # doctest recognises a module's functions by their globals: give the wrapper the module's.
        code, scope, closure = call.__code__, function.__globals__, call.__closure__
        found: Callable[_P, _R] = wraps(function)(FunctionType(code, scope, closure=closure))
        return untraced(found)

    return decorate


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Tell torch.compile to call a function instead of tracing it."""
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_NOT_TRACED)
    return function


# Message of torch.compile for a call that it cannot trace.
_NOT_TRACED = "nbnorm needs values; nbnorm.integrations.torch can be compiled"


def cuda_backend(name: str) -> ModuleType:
    """Import and return `nbnorm.cuda`; `name` is that of the argument on the GPU."""
    try:
        from nbnorm import cuda
    except ImportError as error:
        needed = error.name or f"packages that can be loaded ({error})"
        message = (
            f"{name} is not in CPU memory, and arrays on a GPU need {needed}: "
            'pip install "nbnorm-kernels[cuda]"'
        )
        raise (ImportError if name == "x" else ValueError)(message) from error
    return cuda


def home_of(obj: Array) -> Callable[[NDArray], Array]:
    """Return a function that converts a result to an array of obj's library and device."""
    library = _home(type(obj))  # type: ignore[arg-type]
    if library is None:
        return _as_it_is
    device = getattr(obj, "device", None)

    def give(array: NDArray) -> Array:
        half = array.dtype.name == "bfloat16"
        bits = array.view(np.int16) if half else array
        given = library.from_dlpack(bits)
        # A library may have several devices in CPU memory, as do JAX and array-api-strict.
        if device is not None and given.device != device:
            try:
                given = library.from_dlpack(bits, device=device)
            except ValueError:  # the device does not support float64
                return array
        if half:
            return given.view(library.bfloat16)
        # JAX without x64 silently rounds float64 to float32: return the NumPy array instead.
        held = str(given.dtype).rpartition(".")[2]
        return given if held == array.dtype.name else array

    return give


def _as_it_is(array: NDArray) -> Array:
    return array


@lru_cache(maxsize=64)
def _home(cls: type) -> Any:
    """Return the library for results, or None for NumPy's and CuPy's own arrays."""
    return None if issubclass(cls, np.ndarray) or is_cupy(cls) else _library_of(cls)


def _library_of(cls: type) -> Any:
    """Return the module with `from_dlpack` that defines this class; it is already imported."""
    # Examples are torch, array_api_strict and jax.numpy. A subclass of a library's class belongs
    # to that library.
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        for module in ({"jaxlib": "jax.numpy", "jax": "jax.numpy"}.get(root, root), root):
            library = sys.modules.get(module)
            if library is not None and hasattr(library, "from_dlpack"):
                return library
    raise TypeError(
        f"cannot return arrays of {cls.__module__}.{cls.__qualname__}, "
        "whose library has no from_dlpack"
    )


# Classes that represent an array while a function is transformed, recorded or differentiated, with
# the error message for each.
_STAND_INS = {
    "jax._src.core.Tracer": (
        "a JAX tracer, which has no values; "
        "call nbnorm through jax.pure_callback, which has no gradient"
    ),
    "torch.fx.proxy.Proxy": (
        "a torch.fx.Proxy, which has no values; "
        "call nbnorm in a function marked by torch.fx.wrap, or in a leaf module of the tracer"
    ),
    "autograd.tracer.Box": (
        "an autograd box, whose gradient would not be recorded here; "
        "use nbnorm.integrations.autograd"
    ),
    "mygrad.tensor_base.Tensor": (
        "a mygrad tensor, whose gradient would not be recorded here; "
        "use nbnorm.integrations.mygrad, or pass its data"
    ),
}


@lru_cache(maxsize=64)
def stand_in_of(cls: type) -> str:
    """Return the error message for a class that only represents an array, else an empty string."""
    names = (f"{base.__module__}.{base.__name__}" for base in cls.__mro__)
    return next((_STAND_INS[name] for name in names if name in _STAND_INS), "")


def _refuse_tensor(obj: Array, name: str) -> None:
    """Raise for a torch tensor without memory of its own, or whose memory omits its tangent."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)  # None while torch is being imported
    if torch is None or tensor is None or not isinstance(obj, tensor):
        return
    own = type(obj).__torch_dispatch__ is not tensor.__torch_dispatch__  # FakeTensor, DTensor
    if own or torch._C._functorch.is_functorch_wrapped_tensor(obj):
        kind = _class_name(obj) if own else "tensor of torch.func (grad, vmap)"
        raise TypeError(
            f"{name} is a {kind}, which has no memory of its own; "
            "nbnorm.integrations.torch can be transformed, compiled and traced"
        )
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise TypeError(
            f"{name} is a real tensor in a FakeTensorMode, which computes without values; "
            "call nbnorm outside the mode, or nbnorm.integrations.torch with fake tensors"
        )
    if obj._is_zerotensor():
        raise TypeError(
            f"{name} is a ZeroTensor, which has no memory in torch; pass {name}.clone()"
        )
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(obj).tangent is not None:
        raise TypeError(
            f"{name} is a dual tensor of torch's forward mode, and its tangent would be lost here; "
            f"pass {name}.detach(), or use torch.nn.functional.batch_norm"
        )


def _class_name(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def _from_dlpack(obj: Array, name: str) -> NDArray:
    if getattr(obj, "requires_grad", False) is True:
        raise TypeError(
            f"{name} is a tensor that requires grad, and its gradient would not be recorded here; "
            f"pass {name}.detach(), or use nbnorm.integrations.torch"
        )
    dtype = str(getattr(obj, "dtype", "unknown dtype"))
    if not hasattr(obj, "__dlpack_device__"):
        raise TypeError(f"{name} has __dlpack__ but no __dlpack_device__")
    try:
        kind = int(obj.__dlpack_device__()[0])
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name} ({dtype}) has no accessible memory: {error}") from error
    if kind not in _HOST + _GPU:
        # x determines the device of the call, so any other array is on the wrong device.
        refusal = TypeError if name == "x" else ValueError
        raise refusal(
            f"{name} is in memory of DLPack device type {kind}, expected CPU or CUDA memory"
        )
    if has_lazy_sign(obj):  # DLPack drops the negative bit
        obj = obj.resolve_neg()
    library: Any = np if kind in _HOST else cuda_backend(name).memory
    half = dtype.endswith("bfloat16")
    try:
        array: NDArray = library.from_dlpack(_bits(obj) if half else obj)
    except (BufferError, RuntimeError, ValueError) as error:
        remedy = _remedy(obj, name, dtype) * ("complex" in dtype)
        message = f"{name} ({dtype}) cannot be viewed as an array: {error}{remedy}"
        raise TypeError(message) from error
    if kind in _GPU:
        _aligned(array, name)
    return array.view(_bfloat16(name)) if half else array


def _aligned(array: Array, name: str) -> Array:
    """Raise for a GPU array that is not aligned to its itemsize, which GPUs cannot access."""
    if array.data.ptr % array.itemsize:
        raise ValueError(f"{name} is misaligned: its address is not a multiple of {array.itemsize}")
    return array


def _bits(obj: Array) -> Array:
    """View a bfloat16 array as int16 in its library: NumPy's DLPack does not support bfloat16."""
    library = _library_of(type(obj))
    return obj.view(library.int16)


def _bfloat16(name: str) -> np.dtype[Any]:
    """Return NumPy's bfloat16 dtype, which ml_dtypes provides."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} has dtype bfloat16, for which NumPy needs ml_dtypes: pip install ml_dtypes"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
