"""What `fold` of PyTorch and ONNX return, and raise inside."""

from typing import Any, NamedTuple


class Folded(NamedTuple):
    """A model with batch normalizations folded into their neighbours, and what became of each."""

    model: Any
    folded: tuple[str, ...]  # names of those that are gone
    left: dict[str, str]  # name and reason of those that stayed


class LeaveError(Exception):
    """Why a batch normalization stays."""
