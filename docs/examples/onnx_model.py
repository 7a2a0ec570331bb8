"""Read digits with an ONNX model of convolutions, batch normalizations and ReLUs.

The filters are random. The model learns only the statistics of its batch norms and the last layer,
each in a single pass. With ``training_mode`` and a momentum of 0 it returns the statistics of its
input digits (data/README.md names the source) and their features. From the features, ridge
regression computes the last layer in closed form. The model reads 19 of 20 new digits correctly.

ONNX's reference evaluator runs the model, once with its own `BatchNormalization` and once with
nbnorm's. The program prints times and accuracies of both.

    python onnx_model.py                 # ten seconds
    python onnx_model.py --train 500     # a few seconds
"""

import argparse
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nbnorm.integrations.onnx import BatchNormalization

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
FILTERS = 16, 64
STATISTICS = "mean1", "var1", "mean2", "var2"
RIDGE = 100.0


def parameters(rng):
    """Return random filters and initial batch norms."""
    first, second = FILTERS
    filters = rng.standard_normal((first, 1, 5, 5))
    arrays = {
        "filters1": filters - filters.mean(axis=(2, 3), keepdims=True),  # edges, not brightness
        "filters2": rng.standard_normal((second, first, 3, 3)),
    }
    for i, width in enumerate(FILTERS, 1):
        arrays |= {f"{name}{i}": np.zeros(width) for name in ("shift", "mean")}
        arrays |= {f"{name}{i}": np.ones(width) for name in ("scale", "var")}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    # The 10 x 10 outputs of a filter become the means of four squares of 5 x 5.
    return arrays | {"squares": np.array([0, 0, 5, 2, 5, 2]), "inside": np.array([3, 5])}


def network(arrays, *, training):
    """Return the model: in training it returns features and statistics, otherwise scores."""
    nodes = []
    for i, (image, stride) in enumerate((("images", 2), ("relu1", 1)), 1):
        moved = [f"new_mean{i}", f"new_var{i}"] if training else []
        nodes += [
            helper.make_node(
                "Conv", [image, f"filters{i}"], [f"conv{i}"], strides=[stride, stride]
            ),
            helper.make_node(
                "BatchNormalization",
                [f"conv{i}", f"scale{i}", f"shift{i}", f"mean{i}", f"var{i}"],
                [f"norm{i}", *moved],
                training_mode=int(training),
                momentum=0.0,  # of the old statistics
            ),
            helper.make_node("Relu", [f"norm{i}"], [f"relu{i}"]),
        ]
    nodes += [
        helper.make_node("Reshape", ["relu2", "squares"], ["parts"]),
        helper.make_node("ReduceMean", ["parts", "inside"], ["pooled"], keepdims=0),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    results = {"features": 2} | {f"new_{name}": 1 for name in STATISTICS}
    if not training:
        nodes.append(helper.make_node("Gemm", ["features", "weights", "bias"], ["scores"]))
        results = {"scores": 2}
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * ndim)
            for name, ndim in results.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    checker.check_model(model, full_check=True)
    return model


def ridge(features, labels):
    """Return weights and bias that best give a score of 1 to a digit and -1 to the others."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    targets = 2.0 * np.eye(10)[labels] - 1
    square = centred.T @ centred + RIDGE * np.eye(len(mean))
    weights = np.linalg.solve(square, centred.T @ targets)
    bias = targets.mean(axis=0) - mean @ weights
    return {"weights": weights.astype(np.float32), "bias": bias.astype(np.float32)}


def timed(evaluator, images):
    """Return the evaluator's outputs and the seconds it took."""
    begin = time.perf_counter()
    outputs = evaluator.run(None, {"images": images})
    return outputs, time.perf_counter() - begin


def main():
    """Learn and read with both evaluators, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=4000, help="digits, default %(default)s")
    arguments = parser.parse_args()
    if not 1 < arguments.train <= 4000:
        parser.error("--train must be at least 2 and at most 4000")
    with np.load(DIGITS) as file:
        images = file["images"][:, np.newaxis].astype(np.float32) / 255
        labels = file["labels"].astype(np.int64)
    learnt = slice(TEST, TEST + arguments.train)
    start = parameters(np.random.default_rng(0))
    scores = []
    print("BatchNormalization    statistics     reading    read right")
    for name, new_ops in (("ONNX's own", []), ("nbnorm's", [BatchNormalization])):
        trainer = ReferenceEvaluator(network(start, training=True), new_ops=new_ops)
        trainer.run(None, {"images": images[:2]})  # the first call compiles kernels
        (features, *statistics), learning = timed(trainer, images[learnt])
        arrays = start | dict(zip(STATISTICS, statistics, strict=True))
        arrays |= ridge(features, labels[learnt])
        reader = ReferenceEvaluator(network(arrays, training=False), new_ops=new_ops)
        reader.run(None, {"images": images[:2]})
        (found,), reading = timed(reader, images[:TEST])
        right = np.mean(found.argmax(axis=1) == labels[:TEST])
        print(f"{name:<20}{learning:10.2f} s{reading:10.2f} s{right:14.1%}")
        scores.append(found)
    apart = np.abs(scores[1] - scores[0]).max()
    print(f"greatest score {np.abs(scores[0]).max():.2f}, greatest difference {apart:.1e}")


if __name__ == "__main__":
    main()
