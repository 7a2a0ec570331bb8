"""`convert`: nbnorm's batch normalization in existing models, with fused ReLU if requested."""

from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from nbnorm.integrations.torch._modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormModule,
)

_Model = TypeVar("_Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[BatchNormModule]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def convert(model: _Model, *, fuse_relu: bool = False) -> _Model:
    """Convert all batch normalization modules of a model to nbnorm's, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Converts the modules whose class is exactly `torch.nn.BatchNorm1d`, ``2d`` or ``3d``. They
        remain the same objects, with the same parameters, buffers, mode and hooks, so optimizers
        and other references stay valid. Subclasses (SyncBatchNorm, lazy, quantised, your own) do
        not change.
    fuse_relu : bool, default False
        Whether each `torch.nn.Sequential` in the model fuses a batch normalization with a
        `torch.nn.ReLU` that directly follows it. Both modules stay in place and work as before on
        their own. The Sequential decides at each call: modules with hooks, and modules that have
        been replaced, for instance by a SyncBatchNorm, are not fused.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        model is not a module.

    Notes
    -----
    Call `convert` before `torch.compile`, not after. `state_dict` does not change: a converted
    model loads weights saved from the original, and vice versa.

    Tools that read a model's code fail on a converted model, so use them before `convert`:
    `torch.fx.symbolic_trace`, `torch.jit.script`, the TorchScript-based ONNX exporter, and tools
    that start with one of these, such as quantisation. `torch.compile`, `torch.export` and
    `torch.jit.trace` accept a converted model. A `torch.fx.Tracer` does if its ``is_leaf_module``
    returns True for nbnorm's modules.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nbnorm.integrations.torch import convert
    >>> convert(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), fuse_relu=True)
    ... # doctest: +ELLIPSIS
    Sequential(
      fuse_relu=True
      (0): Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): BatchNorm2d(8, ...)
      (2): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    for module in model.modules():
        if type(module) in _OURS:
            # Change the class, so that existing references see the converted module.
            module.__class__ = _OURS[type(module)]
    if fuse_relu:
        _fuse_relu(model)
    return model


def _fuse_relu(model: nn.Module) -> None:
    for module in model.modules():
        kind: Any = type(module)
        # A subclass with its own forward may not run its modules in order.
        if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
            children = list(module._modules.values())
            if any(_fusible(norm, relu) for norm, relu in pairwise(children)):
                module.__class__ = _fused(kind)


class _Fused:
    """A Sequential that has batch normalizations apply ReLU, and then skips the ReLU module.

    The modules stay in place, and each call inspects them anew. So the result stays correct if a
    module is replaced later by a SyncBatchNorm, a folded convolution or a wrapper.
    """

    def forward(self: Any, input: Any) -> Any:  # noqa: A002
        modules = list(self._modules.values())
        skip = False
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if skip:
                skip = False
            elif _fusible(module, following):
                input = module(input, relu=True)  # noqa: A001
                skip = True
            else:
                input = module(input)  # noqa: A001
        return input

    def extra_repr(self) -> str:
        return "fuse_relu=True"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy through the original class; this one cannot be imported by name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _remade, (type(self).__bases__[1],), *reduced[2:]


@cache
def _fused(kind: Any) -> Any:
    """Return the fusing subclass of a Sequential class."""
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__})


def _remade(kind: Any) -> Any:
    cls: Any = _fused(kind)
    return cls.__new__(cls)


def _fusible(norm: nn.Module | None, relu: nn.Module | None) -> bool:
    """Return True if `norm` can apply `relu` and no hook sees the value between them."""
    return (
        type(relu) is nn.ReLU
        and isinstance(norm, BatchNormModule)
        and type(norm) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
        and norm.activation is None
        and not _hooked(norm)
        and not _hooked(relu)
    )


def _hooked(module: nn.Module) -> bool:
    """Return True if the module has hooks, which see its inputs or outputs."""
    return any(
        (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    )
