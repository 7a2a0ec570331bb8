"""`fold`: a model for inference, whose batch normalizations are part of the layers beside them."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbnorm.folding import fold_into_conv, fold_into_linear
from nbnorm.integrations._folded import Folded, LeaveError
from nbnorm.integrations.torch._convert import _Fused, _hooked
from nbnorm.integrations.torch._functional import chosen
from nbnorm.integrations.torch._modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormModule,
)

# The rank of a layer's input with a batch axis.
_RANKS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
# The ranks of inputs that a batch normalization accepts.
_ACCEPTED: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
    BatchNorm1d: (2, 3),
    BatchNorm2d: (4,),
    BatchNorm3d: (5,),
}
# Modules that return their input in eval mode. Subclasses may not.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def fold(model: nn.Module) -> Folded:
    """Fold the batch normalizations of a model in eval mode into the layers beside them.

    Returns a copy of the model. In it a linear layer or a convolution directly before or after a
    batch normalization does the work of both, and `torch.nn.Identity` takes the place of the batch
    normalization. The model keeps its class and its code.

    Parameters
    ----------
    model : torch.nn.Module
        A model in eval mode. It does not change.

    Returns
    -------
    model : torch.nn.Module
        The copy.
    folded : tuple of str
        Names of the batch normalizations that are folded.
    left : dict of str to str
        Names of all others, each with the reason.

    Raises
    ------
    TypeError
        model is not a module.
    ValueError
        model is in training mode.

    Notes
    -----
    `torch.fx` finds which layer feeds which. If a module's own code can be traced, but not that of
    a module inside it, everything outside the latter is folded. What is inside a module that cannot
    be traced is left alone, because its code may use the layers by themselves. If you know that it
    calls a part only as a whole, fold that part: ``model.features = fold(model.features).model``.
    `fold` folds `torch.nn.BatchNorm1d`, ``2d``, ``3d``, SyncBatchNorm and nbnorm's own modules into
    `torch.nn.Linear`, ``Conv1d`` to ``3d`` and ``ConvTranspose1d`` to ``3d`` (not subclasses), with
    `nbnorm.fold_into_linear` and `nbnorm.fold_into_conv`. The layer before is preferred. A module
    is left alone if the result would not be the same function: for instance, if another module sees
    the value between the two, or a convolution pads what a batch normalization returns with zeros.
    Identities and dropout, which does nothing in eval mode, may lie between. A ReLU that is part of
    nbnorm's modules becomes a `torch.nn.ReLU`. A batch normalization before its layer is left alone
    if the model's code does anything between their calls, as that may change the input in place.

    `torch.nn.BatchNorm1d` normalises axis 1 of inputs of shape (N, C) and (N, C, L), a Linear maps
    the last axis; they meet in the first shape only. The code does not tell shapes, so the module
    in place of such a batch normalization is an Identity that raises if it receives the second.

    A trace is one path through the code of ``forward``. Code that other inputs reach, or methods
    other than ``forward``, must not use a layer without its batch normalization. No code may need
    attributes such as ``eps`` of a batch normalization, which `torch.nn.Identity` does not have.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nbnorm.integrations.torch import fold
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> folded, names, left = fold(model)
    >>> folded
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> names, left
    (('1',), {})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    if model.training:
        raise ValueError(
            "model is in training mode, where batch normalization uses the statistics of each "
            "batch; call model.eval() first"
        )
    model = deepcopy(model)
    folded: list[str] = []
    while True:
        names, left = _fold_once(model)
        if not names:
            return Folded(model, tuple(folded), left)
        folded += names


class _OfRank(nn.Identity):
    """An Identity that raises unless its input has the rank that was folded for."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        # An ordinary `if` could not be traced.
        torch._assert(
            input.dim() == self.rank,
            f"this batch normalization is folded for inputs of {self.rank} axes only: of others it "
            "normalises another axis than the layer; do not fold this part",
        )
        return input

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def _fold_once(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Fold what can be folded now, in place; return the names, and the rest with reasons."""
    calls = _Calls(model)
    folded, left = [], {}
    for name, norm in list(model.named_modules()):
        if not isinstance(norm, _BatchNorm):
            continue
        reasons = []
        for norm_first in (False, True):
            try:
                rest = _rest_of(norm, norm_first)
                layer = model.get_submodule(calls.partner(name, norm_first))
                _fold_pair(layer, norm, norm_first)
            except LeaveError as reason:
                reasons += [str(reason)] * (str(reason) not in reasons)
            else:
                _replace(model, norm, _RANKS[type(layer)], rest)
                folded.append(name)
                break
        else:
            left[name] = "; ".join(reasons)
    return folded, left


class _Tracer(fx.Tracer):
    """Record calls of modules; do not trace into modules that have hooks."""

    def __init__(self, shallow: bool) -> None:
        super().__init__()
        self.shallow, self.hooked, self.read = shallow, list[nn.Module](), set[int]()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            # A trace holds buffers as constants, without their names.
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _hooked(m):
            self.hooked.append(m)
            return True
        own = isinstance(m, BatchNormModule | _OfRank)
        return self.shallow or own or bool(super().is_leaf_module(m, module_qualified_name))


def _graphs(root: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph | None, set[int]]]:
    """Yield (module, graph, ids of the tensors its code reads), then modules that graph lacks.

    The graph is None if not even the module's own code can be traced.
    """
    inside = list(root.children())
    if type(root).forward is not nn.Module.forward:  # a ModuleList has no code
        for shallow in (False, True):
            tracer = _Tracer(shallow)
            try:
                graph = tracer.trace(root)
            except Exception:  # the module's own code, which may raise anything
                continue
            yield root, graph, tracer.read
            if not shallow:
                inside = tracer.hooked
            break
        else:
            yield root, None, set()
            return
    for module in inside:
        if next(module.children(), None) is not None:
            yield from _graphs(module)


class _Calls:
    """Calls of a model's modules, by name."""

    def __init__(self, model: nn.Module) -> None:
        # Traced code may keep what it computes in the model: trace a copy, of everything but the
        # parameters, which a trace does not change.
        model = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        for module in model.modules():
            if isinstance(module, _Fused):
                module.__class__ = type(module).__bases__[1]
        names = {id(module): name for name, module in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.of = defaultdict[str, list[fx.Node]](list)
        self.name_of: dict[Any, str] = {}
        self.untraced: dict[str, str] = {}  # modules inside one that cannot be traced
        self.read = set[int]()
        owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        self.shared = {parameter for parameter, count in owners.items() if count > 1}
        for root, graph, read in _graphs(model):
            self.read |= read
            if graph is None:
                whole = names[id(root)] or "the model"
                self.untraced |= {names[id(module)]: whole for module in root.modules()}
                continue
            for node in list(graph.nodes):
                if node.op == "get_attr":
                    path, _, name = node.target.rpartition(".")
                    self.read.add(id(getattr(root.get_submodule(path), name)))
                elif node.op == "call_module":
                    module = root.get_submodule(node.target)
                    if _passes(module) and node.args:
                        node.replace_all_uses_with(node.args[0])
                        graph.erase_node(node)
                    else:
                        self.name_of[node] = name = names[id(module)]
                        self.of[name].append(node)

    def partner(self, name: str, norm_first: bool) -> str:
        """Return the name of the layer beside every call of a batch norm, called only there."""
        self.check_traced(name)
        if self.reads(name):
            raise LeaveError("the model's code reads its parameters or statistics")
        norms = self.of[name]
        if not norms:
            raise LeaveError("no trace of the model's code calls it")
        if any(len(node.args) != 1 or node.kwargs for node in norms):
            raise LeaveError("it is called with a keyword or with more than its input")
        side = "after" if norm_first else "before"
        besides = [[*n.users] if norm_first else [n.args[0]] for n in norms]
        names = {self.name_of.get(node) for nodes in besides for node in nodes}
        found = names.pop() if len(names) == 1 else None
        if found is None or type(self.modules[found]) not in _RANKS:
            raise LeaveError(f"no linear layer or convolution is directly {side} it")
        self.check_traced(found)
        layer = self.modules[found]
        for call in self.of[found]:
            others = [*call.args, *call.kwargs.values()] if norm_first else [*call.users]
            # Both users would get the same tensor, which code may change in place.
            if len(others) != 1 or others[0] not in norms:
                raise LeaveError(f"{found}, {side} it, is also used without it, or twice")
            if norm_first and not self.harmless(others[0], call):
                raise LeaveError(f"its input may change in place before {found} runs")
        if _hooked(layer):
            raise LeaveError(f"{found}, {side} it, has hooks")
        tied = any(id(parameter) in self.shared for parameter in layer.parameters())
        if tied or self.reads(found):
            raise LeaveError(f"the weight or bias of {found}, {side} it, is used elsewhere, too")
        return found

    def check_traced(self, name: str) -> None:
        """Raise if a module is inside one that cannot be traced."""
        if name in self.untraced:
            whole = self.untraced[name]
            raise LeaveError(f"{whole} cannot be traced: its code may use the layers by themselves")

    def reads(self, name: str) -> bool:
        """Return whether code of the model reads a parameter or buffer of a module."""
        module = self.modules[name]
        return any(id(tensor) in self.read for tensor in (*module.parameters(), *module.buffers()))

    def harmless(self, first: fx.Node, last: fx.Node) -> bool:
        """Return whether only modules that do not write to their input run between two calls."""
        node = first.next
        while node is not last:
            name = self.name_of.get(node)
            if name is None or not all(map(_only_reads, self.modules[name].modules())):
                return False
            node = node.next
        return True


def _passes(module: nn.Module) -> bool:
    """Return whether a module returns its input and has no hooks."""
    identity = type(module) in (nn.Identity, _OfRank)
    return (identity or (type(module) in _DROPOUTS and not module.training)) and not _hooked(module)


def _only_reads(module: nn.Module) -> bool:
    """Return whether a module is known to leave its input as it is."""
    known = type(module).__module__.startswith("torch.nn.modules.") or isinstance(
        module, BatchNormModule | _OfRank
    )
    return known and not getattr(module, "inplace", False) and not _hooked(module)


def _rest_of(norm: _BatchNorm, norm_first: bool) -> list[nn.Module]:
    """Return the modules to put in its place: [ReLU] or []; raise if it must stay."""
    if type(norm) not in _ACCEPTED:
        raise LeaveError(f"its class, {type(norm).__qualname__}, is not one that `fold` knows")
    if norm.training:
        raise LeaveError("it is in training mode")
    if norm.running_mean is None or norm.running_var is None:
        raise LeaveError("it has no running statistics")
    if _hooked(norm):
        raise LeaveError("it has hooks")
    activation = isinstance(norm, BatchNormModule) and chosen(norm.relu, norm.activation)
    if activation is False:
        return []
    if activation is not True or norm_first:
        raise LeaveError("it applies an activation")
    return [nn.ReLU()]


def _fold_pair(layer: Any, norm: _BatchNorm, norm_first: bool) -> None:
    """Fold a batch norm into a layer's weight."""
    if _RANKS[type(layer)] not in _ACCEPTED[type(norm)]:
        raise LeaveError(f"{type(norm).__name__} normalises another axis than the layer beside it")
    given = layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var
    options = {"eps": norm.eps, "norm_first": norm_first}
    try:
        arrays = [None if tensor is None else tensor.detach().cpu() for tensor in given]
        if isinstance(layer, nn.Linear):
            weight, bias = fold_into_linear(*arrays, **options)
        else:
            weight, bias = fold_into_conv(
                *arrays,
                transposed=layer.transposed,
                groups=layer.groups,
                padding=layer.padding if layer.padding_mode == "zeros" else 0,
                **options,
            )
    except (TypeError, ValueError, NotImplementedError) as error:  # the last from meta tensors
        raise LeaveError(str(error)) from error
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is None:
            bias = bias.to(layer.weight.device)
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(bias)


def _replace(model: nn.Module, norm: _BatchNorm, rank: int, rest: list[nn.Module]) -> None:
    """Replace a batch norm, wherever it occurs, with `rest` or an Identity."""
    if len(_ACCEPTED[type(norm)]) > 1:
        rest = [_OfRank(rank), *rest]
    instead = nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is norm:
                parent._modules[name] = instead.eval()
