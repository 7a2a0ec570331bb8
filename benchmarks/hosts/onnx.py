"""ONNX: the reference evaluator's operator and nbnorm's. ONNX has no gradients: forward only."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from benchmarks.peers.batch import EPS, MOMENTUM, Batch
from nbnorm.integrations.onnx import BatchNormalization


def name() -> str:
    return f"onnx {onnx.__version__}"


def calls(
    shape: tuple[int, ...], dtype: str = "float32", *, training: bool = False
) -> dict[str, Callable[[], object]]:
    """Return calls that run a model of one node; they return y and, in training, statistics."""
    batch = Batch(shape, dtype)
    feeds = {
        "x": batch.x,
        "scale": batch.gamma,
        "bias": batch.beta,
        "mean": batch.running_mean,
        "var": batch.running_var,
    }
    node = helper.make_node(
        "BatchNormalization",
        list(feeds),
        ["y", "running_mean", "running_var"] if training else ["y"],
        epsilon=EPS,
        momentum=1 - MOMENTUM,
        training_mode=int(training),
    )
    like = dict(zip(node.output, (batch.x, batch.running_mean, batch.running_var), strict=False))
    graph = helper.make_graph([node], "batch_norm", _tensors(feeds), _tensors(like))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    evaluators = {
        "host": ReferenceEvaluator(model),
        "nbnorm": ReferenceEvaluator(model, new_ops=[BatchNormalization]),
    }
    return {which: _run(evaluator, feeds) for which, evaluator in evaluators.items()}


def _tensors(arrays: dict[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in arrays.items()
    ]


def _run(evaluator: ReferenceEvaluator, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    return lambda: evaluator.run(None, feeds)
