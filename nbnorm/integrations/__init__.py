"""Frameworks that nbnorm plugs into, one module each; none is imported unless asked for."""

from importlib import import_module as _import_module
from typing import Any as _Any

# Not imported for type checkers either: they would have to read the whole of every framework.
_SUBMODULES = ("autograd", "mygrad", "onnx", "thinc", "torch")  # imported on first use


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _import_module(f"nbnorm.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
