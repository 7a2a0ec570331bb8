"""Integrations with other frameworks, one module each, imported on first use."""

from importlib import import_module as _import_module
from typing import Any as _Any

# No imports under TYPE_CHECKING either: type checkers would have to read every framework.
_SUBMODULES = ("autograd", "mygrad", "onnx", "sklearn", "thinc", "torch")  # imported on first use


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _import_module(f"nbnorm.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
