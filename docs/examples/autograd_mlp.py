"""Train a multilayer perceptron in HIPS autograd, with nbnorm's batch normalization and without.

Three hidden layers of 100 ReLUs and a softmax over ten classes learn handwritten digits
(data/README.md names the source) by gradient descent. Both networks start from the same small
weights and see the same batches. Batch normalization with scale, shift and ReLU is one call.

Running statistics are not parameters: autograd does not differentiate them, and batch_norm updates
them in place.

    python autograd_mlp.py               # a few seconds
    python autograd_mlp.py --steps 5000
"""

import argparse
import os
import time
from itertools import pairwise
from pathlib import Path

# Before NumPy is imported: threads do not speed up products this small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import autograd.numpy as np
from autograd import value_and_grad

import nbnorm
from nbnorm.integrations.autograd import batch_norm

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
SIZES = (784, 100, 100, 100, 10)
BATCH = 60


def digits():
    """Read the digits.

    Returns
    -------
    images : ndarray (5000, 784) of float32
        Rows of values in [0, 1].
    labels : ndarray (5000,) of uint8
        0 to 9.
    """
    with np.load(DIGITS) as file:
        return file["images"].reshape(-1, 784).astype(np.float32) / 255, file["labels"]


def network(rng, normalised):
    """Make a network.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the weights.
    normalised : bool
        Whether hidden layers have batch normalization.

    Returns
    -------
    parameters : list of dict of str to ndarray
        For each layer "weight" (inside, outside) and "shift" (outside,), and "scale" (outside,)
        if it has batch normalization.
    statistics : list of (running_mean, running_var)
        For each layer with batch normalization.
    """
    parameters = [
        {
            "weight": rng.normal(0, 0.05, (inside, outside)).astype(np.float32),
            "shift": np.zeros(outside, np.float32),
        }
        for inside, outside in pairwise(SIZES)
    ]
    statistics = []
    if normalised:
        for layer in parameters[:-1]:
            layer["scale"] = np.ones_like(layer["shift"])
            statistics.append((np.zeros_like(layer["shift"]), np.ones_like(layer["shift"])))
    return parameters, statistics


def scores(parameters, statistics, x, training):
    """Return the scores of ten classes, (N, 10), for images (N, 784)."""
    *hidden, last = parameters
    for i, layer in enumerate(hidden):
        x = x @ layer["weight"]
        if statistics:
            x = batch_norm(
                x,
                layer["scale"],
                layer["shift"],
                *statistics[i],
                training=training,
                activation="relu",
            )
        else:
            x = np.maximum(x + layer["shift"], 0)
    return x @ last["weight"] + last["shift"]


def cross_entropy(parameters, statistics, images, labels):
    """Return the mean softmax cross-entropy of a batch."""
    z = scores(parameters, statistics, images, training=True)
    z = z - np.max(z, axis=1, keepdims=True)
    log_p = z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))
    return -np.mean(log_p[np.arange(len(labels)), labels])


def train(parameters, statistics, images, labels, steps, rate):
    """Train in place by gradient descent; return the loss of every step."""
    backpropagate = value_and_grad(cross_entropy)
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(steps):
        batch = rng.integers(len(images), size=BATCH)
        loss, gradients = backpropagate(parameters, statistics, images[batch], labels[batch])
        for layer, gradient in zip(parameters, gradients, strict=True):
            for name, parameter in layer.items():
                parameter -= rate * gradient[name]
        losses.append(loss)
    return losses


def main():
    """Train both networks and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="default %(default)s")
    parser.add_argument(
        "--rate", type=float, default=0.05, help="learning rate, default %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    images, labels = digits()
    nbnorm.warmup((BATCH, SIZES[1]), activation="relu")  # the first call compiles
    print("batch norm    first loss   last loss    accuracy   seconds")
    for name, normalised in (("nbnorm", True), ("none", False)):
        parameters, statistics = network(np.random.default_rng(0), normalised)
        begin = time.perf_counter()
        losses = train(
            parameters, statistics, images[TEST:], labels[TEST:], arguments.steps, arguments.rate
        )
        seconds = time.perf_counter() - begin
        answers = scores(parameters, statistics, images[:TEST], training=False).argmax(axis=1)
        print(
            f"{name:<12}{losses[0]:12.3f}{np.mean(losses[-20:]):12.3f}"
            f"{np.mean(answers == labels[:TEST]):12.1%}{seconds:10.1f}"
        )


if __name__ == "__main__":
    main()
