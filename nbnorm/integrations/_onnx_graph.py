"""Queries of ONNX graphs: constants, uses of values, and ranks."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    external_data_helper,
    helper,
    numpy_helper,
    shape_inference,
)

from nbnorm._typing import NDArray
from nbnorm.integrations._folded import LeaveError


class Scope:
    """A graph and the enclosing ones, whose values it can use."""

    def __init__(self, graph: GraphProto, outer: "Scope | None", ranks: dict[str, int]) -> None:
        self.graph, self.outer, self.ranks = graph, outer, ranks
        self.index()

    def index(self) -> None:
        """Index the graph's contents, again."""
        self.inputs = {value.name for value in self.graph.input}
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes = {name: node for node in self.graph.node for name in node.output if name}
        self.uses = uses_of(self.graph)

    def constant(self, name: str) -> NDArray:
        """Return the array of a constant, or raise LeaveError."""
        if name in self.inputs:
            remedy = "; take it off graph.input if it is a constant" * (name in self.tensors)
            raise LeaveError(f"{name} is an input of the graph, which callers may set{remedy}")
        if name in self.tensors:
            return value_of(self.tensors[name])
        node = self.nodes.get(name)
        if node is None and self.outer is not None:
            return self.outer.constant(name)
        if node is not None and is_a(node, "Identity"):
            return self.constant(node.input[0])
        if node is not None and is_a(node, "Constant"):
            (attribute,) = node.attribute
            if attribute.name == "value":
                return value_of(attribute.t)
            if attribute.name in ("value_float", "value_floats"):
                return np.asarray(helper.get_attribute_value(attribute), np.float32)
        raise LeaveError(f"{name} is not a constant")

    def user(self, name: str) -> NodeProto | None:
        """Return the only user of a value, if that is a node of this graph."""
        users = [node for node in self.graph.node if name in node.input]
        return users[0] if users and self.uses[name] == 1 else None

    def check_matrix(self, name: str) -> None:
        """Raise if a value may have another rank than 2."""
        if self.ranks.get(name) != 2:
            raise LeaveError(f"{name} is not known to have two axes")


def is_a(node: NodeProto, op: str) -> bool:
    """Return whether a node is ONNX's operator `op`."""
    return node.op_type == op and node.domain in ("", "ai.onnx")


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def value_of(tensor: TensorProto) -> NDArray:
    """Return the value of a tensor; raise if it is in another file."""
    if external_data_helper.uses_external_data(tensor):
        raise LeaveError(f"{tensor.name} is in an external file, which was not loaded")
    return numpy_helper.to_array(tensor)


def subgraphs_of(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """Yield (attribute name, graph) for each subgraph of a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for i, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{i}]", graph


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield all nodes of a graph and its subgraphs."""
    for node in graph.node:
        yield node
        for _, inner in subgraphs_of(node):
            yield from nodes_of(inner)


def uses_of(graph: GraphProto) -> Counter[str]:
    """Count the uses of values by a graph and its subgraphs, as inputs of nodes and as outputs."""
    uses = Counter(value.name for value in graph.output)
    for node in graph.node:
        uses.update(node.input)
        for _, inner in subgraphs_of(node):
            uses.update(uses_of(inner))
    return uses


def names_of(graph: GraphProto) -> Iterator[str]:
    """Yield all names of values of a graph and its subgraphs."""
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for _, inner in subgraphs_of(node):
            yield from names_of(inner)


def ranks_of(model: ModelProto) -> dict[str, int]:
    """Return the main graph's known ranks by name; {} without MatMul, their only use."""
    if not any(is_a(node, "MatMul") for node in model.graph.node):
        return {}
    if model.ByteSize() < checker.MAXIMUM_PROTOBUF:
        model = shape_inference.infer_shapes(model)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    types = {value.name: value.type.tensor_type for value in values}
    return {name: len(t.shape.dim) for name, t in types.items() if t.HasField("shape")}
