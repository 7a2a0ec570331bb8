"""`fold`: an ONNX model whose batch normalizations are part of the operators beside them."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from nbnorm._typing import NDArray
from nbnorm.folding import fold_into_conv, fold_into_linear
from nbnorm.integrations._folded import Folded, LeaveError
from nbnorm.integrations._onnx_graph import (
    Scope,
    attributes_of,
    is_a,
    names_of,
    nodes_of,
    ranks_of,
    subgraphs_of,
    uses_of,
)


def fold(model: ModelProto) -> Folded:
    """Fold the batch normalizations of a model into the operators beside them.

    Returns a copy of the model, in which a Conv, ConvTranspose, Gemm or MatMul (with or without the
    Add of a bias) directly before or after a BatchNormalization does the work of both.

    Parameters
    ----------
    model : ModelProto
        Any model, for instance from `onnx.load`. It does not change.

    Returns
    -------
    model : ModelProto
        The copy.
    folded : tuple of str
        Names of the BatchNormalization nodes that are folded; of a node without a name, that of its
        result. Names that occur twice become paths of results: ``"y/then_branch/z"`` is z in a
        branch of the node that returns y.
    left : dict of str to str
        Names of all others, each with the reason.

    Raises
    ------
    TypeError
        model is not a ModelProto.
    ValueError
        model has training_info, which refers to its initializers.

    Notes
    -----
    A node is left alone if the result would not be the same function of the same inputs: in
    training mode; if its parameters or the layer's are not constants (initializers that are not
    graph inputs, Constant nodes, and these through Identity); if the value between the two is used
    elsewhere, by a subgraph too, or is an output of the graph; if a convolution pads what a batch
    normalization returns with zeros; if shape inference does not find that a MatMul returns a
    matrix, as batch normalization has the channels in axis 1 and MatMul in the last. The operator
    before is preferred. Subgraphs are folded too, but not the model's functions. Shared
    initializers stay; folded weights are new ones.

    Weights are folded in float64 and rounded once to their dtype, by `nbnorm.fold_into_linear` and
    `nbnorm.fold_into_conv`.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx.parser import parse_model
    >>> from nbnorm.integrations.onnx import fold
    >>> model = parse_model('''
    ...     <ir_version: 8, opset_import: ["": 15]>
    ...     example (float[N, 1, L] x) => (float[N, 1, M] y)
    ...     <float[1, 1, 2] w = {1, 2}, float[1] one = {1}, float[1] var = {4}>
    ...     {
    ...         z = Conv(x, w)
    ...         y = BatchNormalization<epsilon = 0.0>(z, one, one, one, var)
    ...     }
    ... ''')
    >>> folded, names, left = fold(model)
    >>> names, [node.op_type for node in folded.graph.node]
    (('y',), ['Conv'])
    """
    if not isinstance(model, ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto, got {type(model).__qualname__}")
    if model.training_info:
        raise ValueError("model has training_info, expected a model for inference")
    copy = ModelProto()
    copy.CopyFrom(model)
    folding = _Folding(copy)
    return Folded(copy, tuple(folding.folded), folding.left)


class _Layer(NamedTuple):
    """An operator, or a MatMul and an Add, with its constants in float64."""

    first: NodeProto  # whose second input is the weight
    last: NodeProto | None  # whose input `bias_at` is the bias; None: there is no place for one
    bias_at: int
    dtype: np.dtype[Any]  # of the weight
    weight: NDArray
    bias: NDArray | None
    fold: Callable[..., tuple[NDArray, NDArray]]


class _Folding:
    """Folds one model in place."""

    def __init__(self, model: ModelProto) -> None:
        self.folded: list[str] = []
        self.left: dict[str, str] = {}
        norms = (node for node in nodes_of(model.graph) if is_a(node, "BatchNormalization"))
        self.often = Counter(_name_of(node) for node in norms)
        self.old: set[str] = set()  # perhaps unused constants, and removed values
        versions = {entry.domain: entry.version for entry in model.opset_import}
        self.version = versions.get("", versions.get("ai.onnx", 1))
        self.ir_version = model.ir_version
        self.names = set(names_of(model.graph))
        self.graph(Scope(model.graph, None, ranks_of(model)), "")
        self.clean(model.graph)

    def graph(self, scope: Scope, path: str) -> None:
        """Fold the norms of a graph and its subgraphs; `path` locates the graph."""
        again = True
        while again:
            again, left = False, {}
            for node in list(scope.graph.node):
                if is_a(node, "BatchNormalization"):
                    name, reason = self.name(node, path), self.node(node, scope)
                    if reason is None:
                        again = True
                        self.folded.append(name)
                    else:
                        left[name] = reason
        self.left |= left
        for node in scope.graph.node:
            for name, graph in subgraphs_of(node):
                of = next(iter(node.output), node.name)
                self.graph(Scope(graph, scope, {}), f"{path}{of}/{name}/")

    def name(self, node: NodeProto, path: str) -> str:
        """Return a name for a node that no other batch norm of the model has."""
        name = _name_of(node)
        if self.often[name] == 1:
            return name
        name = path + node.output[0]  # which no other node of the graph returns
        while name in self.often:
            name = f"/{name}"
        return name

    def node(self, node: NodeProto, scope: Scope) -> str | None:
        """Fold a node if possible; return why it stays otherwise."""
        reasons: list[str] = []
        for norm_first in (False, True):
            try:
                norm, eps = self.norm(node, scope)
                layer = self.after(node, scope) if norm_first else self.before(node, scope)
                arrays = layer.fold(layer.weight, layer.bias, *norm, eps=eps, norm_first=norm_first)
            except (LeaveError, TypeError, ValueError) as reason:
                reasons += [str(reason)] * (str(reason) not in reasons)
            else:
                self.replace(node, layer, arrays, scope.graph, norm_first)
                scope.index()
                return None
        return "; ".join(reasons)

    def norm(self, node: NodeProto, scope: Scope) -> tuple[list[NDArray], float]:
        """Return gamma, beta, mean and var, and eps; raise if y is not a function of x alone."""
        attributes = attributes_of(node)
        trains = attributes.get("training_mode", 0)
        if self.version < 7:
            trains = not attributes.get("is_test", 0)
        if trains or any(node.output[1:]):
            raise LeaveError("it is in training mode")
        if not attributes.get("spatial", 1):
            raise LeaveError("it has statistics for every activation (spatial=0)")
        if self.ir_version < 4:
            raise LeaveError(
                f"with IR version {self.ir_version} initializers are inputs, which callers may "
                "set; set ir_version to 4 or more, and remove them from graph.input"
            )
        self.old.update(node.input[1:])
        eps = float(attributes.get("epsilon", np.float32(1e-5)))
        return [scope.constant(name) for name in node.input[1:5]], eps

    def before(self, node: NodeProto, scope: Scope) -> _Layer:
        """Return the layer that feeds a batch normalization and nothing else."""
        value = node.input[0]
        last = scope.nodes.get(value)
        if last is None:
            raise LeaveError("no operator of its graph comes before it")
        layer = self.layer(last, scope)
        if layer is None:
            raise LeaveError(f"{last.op_type}, which comes before it, cannot take it")
        if scope.uses[value] != 1:
            raise LeaveError(f"{value}, its input, is used elsewhere, too")
        if is_a(layer.first, "MatMul"):
            scope.check_matrix(value)
        return layer

    def after(self, node: NodeProto, scope: Scope) -> _Layer:
        """Return the layer that a batch normalization feeds, and nothing else does."""
        result = node.output[0]
        first = last = scope.user(result)
        if first is None:
            raise LeaveError(f"{result}, its result, is not the input of just one operator")
        if is_a(first, "MatMul"):
            last = scope.user(first.output[0])  # a bias is needed
        layer = None if last is None else self.layer(last, scope)
        if layer is None or layer.last is None or layer.first.output[0] != first.output[0]:
            raise LeaveError(f"{first.op_type}, which comes after it, cannot take it")
        if attributes_of(first).get("transA", 0):
            raise LeaveError("the Gemm after it transposes its result")
        if is_a(first, "MatMul"):
            scope.check_matrix(result)
        return layer

    def layer(self, last: NodeProto, scope: Scope) -> _Layer | None:
        """Return the layer that ends with node `last`, or None."""
        attributes, inputs = attributes_of(last), [*last.input, "", ""]
        if is_a(last, "Conv") or is_a(last, "ConvTranspose"):
            options = {
                "transposed": last.op_type == "ConvTranspose",
                "groups": attributes.get("group", 1),
                "padding": _padding(attributes),
            }
            fold = partial(fold_into_conv, **options)
            bias = self.constant(inputs[2], scope) if inputs[2] else None
            return _Layer(last, last, 2, *self.weight(inputs[1], scope), bias, fold)
        if self.version < 7:  # other broadcasting
            return None
        if is_a(last, "Gemm"):
            dtype, weight = self.weight(inputs[1], scope)
            layout = "OI" if attributes.get("transB", 0) else "IO"
            bias = self.row(inputs[2], scope, weight.shape[layout.index("O")])
            weight = weight * attributes.get("alpha", 1.0)
            bias = bias * attributes.get("beta", 1.0)
            fold = partial(fold_into_linear, layout=layout)
            return _Layer(last, last, 2, dtype, weight, bias, fold)
        fold = partial(fold_into_linear, layout="IO")
        if is_a(last, "MatMul"):
            return _Layer(last, None, 1, *self.weight(inputs[1], scope), None, fold)
        if is_a(last, "Add"):
            for bias_at in (1, 0):
                first = scope.nodes.get(inputs[1 - bias_at])
                if first and is_a(first, "MatMul") and scope.uses[first.output[0]] == 1:
                    dtype, weight = self.weight(first.input[1], scope)
                    bias = self.row(inputs[bias_at], scope, weight.shape[-1])
                    return _Layer(first, last, bias_at, dtype, weight, bias, fold)
        return None

    def weight(self, name: str, scope: Scope) -> tuple[np.dtype[Any], NDArray]:
        """Return the dtype of a constant, and the constant in float64."""
        array = scope.constant(name)
        self.old.add(name)
        return array.dtype, array.astype(np.float64)

    def constant(self, name: str, scope: Scope) -> NDArray:
        """Return a constant in float64."""
        return self.weight(name, scope)[1]

    def row(self, name: str, scope: Scope, channels: int) -> NDArray:
        """Return a bias, which may broadcast, with one value per channel."""
        bias = self.constant(name, scope) if name else np.zeros(1)
        if bias.shape[:-1] not in ((), (1,)) or bias.size not in (1, channels):
            raise LeaveError(f"{name} of shape {bias.shape} is not one value per channel")
        return np.broadcast_to(bias.reshape(-1), (channels,))

    def replace(
        self,
        node: NodeProto,
        layer: _Layer,
        arrays: tuple[NDArray, NDArray],
        graph: GraphProto,
        norm_first: bool,
    ) -> None:
        """Set the weight and bias, remove the batch norm (of a MatMul: make it an Add)."""
        value, result = node.input[0], node.output[0]
        first, last = layer.first, layer.last
        with np.errstate(over="ignore"):  # float16 may overflow
            weight, bias = (self.store(a.astype(layer.dtype), result, graph) for a in arrays)
        if last is None:
            node.CopyFrom(helper.make_node("Add", [value, bias], [result], node.name))
        else:
            for attribute in [a for a in last.attribute if a.name in ("alpha", "beta")]:
                last.attribute.remove(attribute)
            last.input.extend([""] * (layer.bias_at + 1 - len(last.input)))
            last.input[layer.bias_at] = bias
            if norm_first:
                first.input[0] = value
            else:
                last.output[0] = result
            self.old.add(result if norm_first else value)
            graph.node.remove(node)
        first.input[1] = weight

    def store(self, array: NDArray, result: str, graph: GraphProto) -> str:
        """Store an array as initializer `result`.foldedN; return the name."""
        name = next(n for i in count() if (n := f"{result}.folded{i}") not in self.names)
        self.names.add(name)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def clean(self, graph: GraphProto) -> None:
        """Remove constants no longer used, and the types of removed values."""
        for node in graph.node:
            for _, inner in subgraphs_of(node):
                self.clean(inner)
        while True:
            uses = uses_of(graph)
            unused = [
                node
                for node in graph.node
                if is_a(node, "Constant") or is_a(node, "Identity")
                if node.output[0] in self.old and not uses[node.output[0]]
            ]
            if not unused:
                break
            for node in unused:
                self.old.update(node.input)
                graph.node.remove(node)
        for values in (graph.initializer, graph.value_info):
            for value in [v for v in values if v.name in self.old and not uses[v.name]]:
                values.remove(value)


def _name_of(node: NodeProto) -> str:
    """Return the name of a node, or that of its result."""
    return str(node.name or node.output[0])


def _padding(attributes: dict[str, Any]) -> Any:
    """Return the padding of a convolution, as `fold_into_conv` takes it."""
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic == "NOTSET":
        return list(attributes.get("pads", [])) or 0
    return "valid" if automatic == "VALID" else "same"
