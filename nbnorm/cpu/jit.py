"""How kernels are compiled: the only file that says parallel, cache, nogil or fastmath."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.serialize import dumps
from numba.core.typed_passes import NopythonTypeInference
from numba.extending import overload

from nbnorm.cpu.threads import turn

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


# Modules whose functions work on one value or channel, inside a loop of others.
_INNERMOST = ("nbnorm.cpu.channel", "nbnorm.cpu.element", "nbnorm.cpu.storage")


class _InnerLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code of a function that only compiled code calls: no machine code is made of it by itself.

    Numba makes some of every function, and of its callees again within each of their callers, and
    optimises all of it each time: a kernel of fifty functions, five levels deep, took 9 s to
    compile. What runs inside a loop must be optimised before it gets there, or the loop is not
    vectorised (some kernels took 20 times as long); the rest is optimised in the kernel alone.
    """

    innermost = False

    def _optimize_final_module(self) -> None:
        if self.innermost:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        """Where Numba would set the environment of machine code that there is none of."""
        return SimpleNamespace(set_env=lambda name, environment: None)


@register_pass(mutates_CFG=False, analysis_only=True)
class _UseInnerLibrary(FunctionPass):  # type: ignore[misc]
    _name = "nbnorm_use_inner_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = _InnerLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.innermost = state.func_id.func.__module__ in _INNERMOST
        return False


class _InnerCompiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_UseInnerLibrary, NopythonTypeInference)
        passes.finalize()
        return [passes]


_INNER = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _InnerCompiler,
    **_OPTIONS,
}
_FUSED = {"fastmath": {"contract"}, **_INNER}


def ordered(function: Callable[..., Any]) -> Any:
    """Compile arithmetic exactly as it is written, every operation rounded by itself.

    LLVM optimises a function again in every kernel that it is inlined in. With "reassoc" it splits
    a sum as it sees fit there, with "contract" it fuses a product that it has not moved to another
    block, and two kernels disagree in the last bit (seen: sum dy of 256 values by itself and in the
    fused backward). Lanes that are written out vectorise as well.
    """
    return numba.njit(**_INNER)(function)


def by_types(choose: Callable[..., Any], options: dict[str, Any] = _INNER) -> Any:
    """Compile the function that `choose` returns for the types of its arguments."""

    @wraps(choose)
    def compiled_only(*args: Any) -> Any:
        raise NotImplementedError(f"{choose.__qualname__} is for compiled functions")

    overload(compiled_only, jit_options=options, strict=False)(choose)
    return compiled_only


def fused_by_types(choose: Callable[..., Any]) -> Any:
    """`by_types` of a function whose product and sum are one multiply-add; see `none_without`."""
    return by_types(choose, _FUSED)


def none_without(name: str, *, fused: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that returns None where its argument `name` is None.

    The type decides. Numba prunes `if argument is None` only where it holds; elsewhere the result
    would be Optional, and a loop over it would not vectorise. `fused`: a product and its sum are
    one multiply-add; only for a product of what the innermost loop runs over, see `ordered`.
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


class Kernel(NamedTuple):
    """One source compiled twice; the twins give the same bits."""

    serial: Any
    parallel: Any

    def twin(self, parallel: bool) -> Callable[..., None]:
        """One of the twins, to be called: handing the arguments of a small call on took 0.2 us."""
        return self._in_turn if parallel else self.serial

    def _in_turn(self, *args: Any) -> None:
        with turn():
            self.parallel(*args)


def kernel(name: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Compile a loop of one `prange` whose body is one call, serial and parallel.

    One prange a kernel: several cost 2-3 s each to compile.
    """

    def compile_twins(function: Callable[..., Any]) -> Kernel:
        return Kernel(
            _cached(function, f"{name}_serial", parallel=False),
            _cached(function, f"{name}_parallel", parallel=True),
        )

    return compile_twins


def entry(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a serial function that Python calls."""
    return lambda function: _cached(function, name, parallel=False)


def named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that is made several times a name of its own in compiled code.

    Numba tells functions of one name apart by a counter, which starts anew in every process. Of two
    kernels from the cache, compiled by two processes, one then calls the other's function (seen: a
    rows kernel that summed by columns).
    """

    def rename(function: Callable[..., Any]) -> Callable[..., Any]:
        copy = FunctionType(
            function.__code__, function.__globals__, name, None, function.__closure__
        )
        copy.__module__, copy.__qualname__ = function.__module__, name
        return copy

    return rename


def _cached(function: Callable[..., Any], name: str, *, parallel: bool) -> Any:
    function = named(name)(function)
    dispatcher = numba.njit(parallel=parallel, **_OPTIONS)(function)
    with suppress(RuntimeError):  # no folder can be written to: compile in every process
        dispatcher._cache = _KernelCache(function, name)
    return dispatcher


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache, but one file for each kernel, signature, machine and state of the source.

    Numba keys an entry by the function's own file and by its pickled closure: an edited callee in
    another file would go unnoticed, and a closure over compiled functions never hits. And it
    numbers the files of a function through an index, where two processes that compile at the same
    time can take the same number, and one then loads the other's kernel.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        super().__init__(function)
        self._kernel_name = name

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = (*_VERSIONS, str(sig), codegen.magic_tuple(), _SOURCES)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        return Path(self.cache_path) / f"nbnorm-{self._kernel_name}-{digest}.nbc"

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            reduced = pickle.loads(self._path(sig, target_context.codegen()).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        return self._impl.rebuild(target_context, reduced)

    def _save_overload(self, sig: Any, data: Any) -> None:
        if not self._impl.check_cachable(data):
            return
        path = self._path(sig, data.codegen)
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        with suppress(OSError):  # a full disk, a folder gone: the kernel is compiled all the same
            try:
                self._impl.locator.ensure_cache_path()
                part.write_bytes(dumps(self._impl.reduce(data)))
                part.replace(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Machine code calls into Numba and the interpreter.
_VERSIONS = (
    numba.__version__,
    llvmlite.__version__,
    sys.implementation.cache_tag,
    getattr(sys, "abiflags", ""),  # not on Windows
)

# Taken now, with the import of what it describes: taken at the first compilation, an edit in
# between would file the old kernel under the new source (seen: means wrong by 0.2).
_SOURCES = _digest_of_sources()
