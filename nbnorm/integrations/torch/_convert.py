"""Models that exist: `convert`, and ReLU done by the normalization before it."""

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
    """Have all batch normalization modules of a model computed by nbnorm, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Modules in it that are exactly `torch.nn.BatchNorm1d`, ``2d`` or ``3d`` become nbnorm's:
        the same objects with the same parameters, buffers, mode and hooks, so that optimizers
        and other references to them still hold. Subclasses (SyncBatchNorm, lazy, quantised, your
        own) are left alone.
    fuse_relu : bool, default False
        Whether each `torch.nn.Sequential` in the model lets a batch normalization do the work of
        a `torch.nn.ReLU` that directly follows it. Both modules stay in place and what they are by
        themselves. Each call looks again: a module that has a hook, or something else put in its
        place, such as a SyncBatchNorm, runs by itself.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        model is no module.

    Notes
    -----
    Before `torch.compile`, not after. `state_dict` stays what it was: weights saved of a
    converted model load into the original, and the other way round.

    What reads a model's code comes before `convert`, and fails after it: `torch.fx.symbolic_trace`,
    `torch.jit.script`, ONNX's exporter by TorchScript, and what begins with one of them, such as
    quantisation. `torch.compile`, `torch.export` and `torch.jit.trace` take a converted model. So
    does a `torch.fx.Tracer` whose ``is_leaf_module`` is true of nbnorm's modules, too.

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
            # A change of class: whoever holds the module, holds the converted one.
            module.__class__ = _OURS[type(module)]
    if fuse_relu:
        _fuse_relu(model)
    return model


def _fuse_relu(model: nn.Module) -> None:
    for module in model.modules():
        kind: Any = type(module)
        # A Sequential with a forward of its own has an order of its own.
        if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
            children = list(module._modules.values())
            if any(_fusible(norm, relu) for norm, relu in pairwise(children)):
                module.__class__ = _fused(kind)


class _Fused:
    """What a Sequential becomes: it asks normalizations for ReLU and leaves out the next module.

    The modules stay what and where they are, and each call looks at them anew, so that it is right
    whatever has been put in their place since: SyncBatchNorm, a folded convolution, a wrapper.
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
        """Pickle and copy by the class that there was: this one has no name to be imported by."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _remade, (type(self).__bases__[1],), *reduced[2:]


@cache
def _fused(kind: Any) -> Any:
    """The class of a Sequential that fuses."""
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__})


def _remade(kind: Any) -> Any:
    cls: Any = _fused(kind)
    return cls.__new__(cls)


def _fusible(norm: nn.Module | None, relu: nn.Module | None) -> bool:
    """Whether the first can do the work of the second, and nobody looks at what is between."""
    return (
        type(relu) is nn.ReLU
        and type(norm) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
        and not _hooked(norm)
        and not _hooked(relu)
    )


def _hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out."""
    return any(
        (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    )
