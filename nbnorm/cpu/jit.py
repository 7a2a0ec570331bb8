"""How kernels are compiled: the only file that sets nogil or fastmath."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NopythonRewrites, NopythonTypeInference
from numba.core.untyped_passes import InlineClosureLikes
from numba.extending import overload, register_jitable

from nbnorm.cpu.disk import cache_of

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


# Modules whose functions handle one value or channel and run inside loops.
_INNERMOST = (
    "nbnorm.activations",
    *(f"nbnorm.cpu.{name}" for name in ("channel", "element", "functions", "storage")),
)


class _InnerLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code of a function that only compiled code calls, without machine code of its own.

    Numba generates and optimises machine code for every function, and again within each of its
    callers: a kernel of fifty functions, five levels deep, took 9 s to compile. What runs inside a
    loop must be optimised before it is inlined, or the loop is not vectorised (some kernels took
    20 times as long); the rest is optimised in the kernel only.
    """

    innermost = False
    noinline = False

    def add_ir_module(self, ir_module: Any) -> None:
        if self.noinline:
            for function in ir_module.functions:
                if not function.is_declaration and "alwaysinline" not in function.attributes:
                    function.attributes.add("noinline")
        super().add_ir_module(ir_module)

    def _optimize_final_module(self) -> None:
        if self.innermost:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        """A stand-in: there is no machine code whose environment Numba could set."""
        return SimpleNamespace(set_env=lambda name, environment: None)


@register_pass(mutates_CFG=False, analysis_only=True)
class _UseInnerLibrary(FunctionPass):  # type: ignore[misc]
    _name = "nbnorm_use_inner_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = _InnerLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        function = state.func_id.func
        state.library.innermost = function.__module__ in _INNERMOST
        state.library.noinline = getattr(function, "noinline", False)
        return False


# Skipped: passes for closures and array expressions, which kernels do not use, 4 % of compilation.
_IDLE = (InlineClosureLikes, NopythonRewrites)


class _InnerCompiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [step for step in passes.passes if step[0] not in _IDLE]
        passes.add_pass_after(_UseInnerLibrary, NopythonTypeInference)
        passes.finalize()
        return [passes]


# Set explicitly, as Numba inherits both from the caller: a user's fastmath would change bits.
_OF_THE_CALLER = {"fastmath": False, "forceinline": False}
_INNER = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _InnerCompiler,
    **_OF_THE_CALLER,
    **_OPTIONS,
}
_INLINED = {**_INNER, "forceinline": True}
_FUSED = {**_INNER, "fastmath": {"contract"}}


def ordered(function: Callable[..., Any]) -> Any:
    """Compile arithmetic exactly as written, every operation rounded by itself.

    LLVM optimises a function again in every kernel that inlines it. With "reassoc" it splits sums
    as it sees fit there. With "contract" it fuses a product with a sum, unless it has moved the
    product to another block. Two kernels then disagree in the last bit (seen: sum dy of 256 values
    by itself and in the fused backward). Lanes that are written out vectorise just as well.
    """
    return numba.njit(**_INNER)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """`ordered`, inlined whatever its size: a loop that calls a function is not vectorised."""
    return numba.njit(**_INLINED)(function)


def noinline(function: Callable[..., Any]) -> Any:
    """`ordered`, not inlined: a kernel that calls the function twice contains it once."""
    function.noinline = True  # type: ignore[attr-defined]
    return ordered(function)


def compiled_too(function: Function) -> Function:
    """Let compiled functions call a Python function, which itself stays unchanged."""
    same: Function = register_jitable(**_INNER)(function)
    return same


def overloaded(function: Callable[..., Any]) -> Any:
    """Let users' compiled functions call a Python function; literals are typed as literals."""
    return overload(function, jit_options=_INNER, prefer_literal=True, target="cpu")


def by_types(choose: Callable[..., Any], options: dict[str, Any] = _INNER) -> Any:
    """Compile the function that `choose` returns for the types of its arguments."""

    @wraps(choose)
    def compiled_only(*args: Any) -> Any:
        raise NotImplementedError(f"{choose.__qualname__} is for compiled functions")

    overload(compiled_only, jit_options=options, strict=False)(choose)
    return compiled_only


def inlined_by_types(choose: Callable[..., Any]) -> Any:
    """`by_types`, inlined whatever its size."""
    return by_types(choose, _INLINED)


def fused_by_types(choose: Callable[..., Any]) -> Any:
    """`by_types`, where LLVM may fuse a product and a sum; use it as `none_without` says."""
    return by_types(choose, _FUSED)


def none_without(name: str, *, fused: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that returns None if its argument `name` is None.

    The choice is made by type. Numba removes the other branch of `if argument is None` only if it
    is None; else the result would be Optional, and a loop over it would not vectorise. With
    `fused`, LLVM may fuse a product and a sum into a multiply-add; use it only for products within
    the innermost loop (see `ordered`).
    """
    options = _FUSED if fused else _INNER

    def decorate(function: Callable[..., Any]) -> Any:
        position = list(inspect.signature(function).parameters).index(name)

        @wraps(function)
        def choose(*args: Any) -> Callable[..., Any]:
            absent = isinstance(args[position], numba.types.NoneType)
            return (lambda *args: None) if absent else function

        return by_types(choose, options)

    return decorate


def entry(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, cached on disk under `name`."""
    return lambda function: _cached(function, name)


def entry_point(function: Callable[..., Any], name: str, signature: Any) -> Callable[..., Any]:
    """Compile a function for these types; return its entry point, which checks no types.

    Numba's dispatcher asks every argument for its type, 0.5 us for a dozen.
    """
    dispatcher = _cached(function, name)
    dispatcher.compile(signature)
    found: Callable[..., Any] = dispatcher.overloads[signature.args].entry_point
    return found


def named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that is built several times a name of its own each time.

    Numba tells functions of one name apart by a counter that starts anew in every process. Of two
    cached kernels, compiled by two processes, one can then call the other's function (seen: a rows
    kernel that summed by columns).
    """

    def rename(function: Callable[..., Any]) -> Callable[..., Any]:
        copy = FunctionType(
            function.__code__, function.__globals__, name, None, function.__closure__
        )
        copy.__module__, copy.__qualname__ = function.__module__, name
        return copy

    return rename


def _cached(function: Callable[..., Any], name: str) -> Any:
    function = named(name)(function)
    dispatcher = numba.njit(**_OPTIONS)(function)
    dispatcher._cache = cache_of(function, name)
    return dispatcher
