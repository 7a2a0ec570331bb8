"""Train a multilayer perceptron in mygrad, with nbnorm's batch normalization and without.

Three hidden layers of 100 ReLUs and a softmax over ten classes learn handwritten digits
(data/README.md names the source) by gradient descent. Both networks start from the same small
weights and see the same batches. Batch normalization with scale, shift and ReLU is one operation.
mygrad's own batch norm has no running statistics, which are needed to test a network.

    python mygrad_mlp.py               # a few seconds
    python mygrad_mlp.py --steps 5000
"""

import argparse
import os
import time
from itertools import pairwise
from pathlib import Path

# Before NumPy is imported: threads do not speed up products this small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mygrad as mg
import numpy as np
from mygrad.nnet import relu, softmax_crossentropy

import nbnorm
from nbnorm.integrations.mygrad import batch_norm

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
SIZES = (784, 100, 100, 100, 10)
BATCH = 60


class Layer:
    """y = x W + shift, or y = BN(x W) with batch normalization, followed by ReLU if `active`.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the weight.
    inside, outside : int
        Width of x and of y.
    normalised : bool
        Whether the layer has batch normalization.
    active : bool
        Whether the layer has a ReLU.

    Attributes
    ----------
    parameters : list of mygrad.Tensor
        The trained tensors: weight (inside, outside), shift (outside,), and scale (outside,) with
        batch normalization.
    """

    def __init__(self, rng, inside, outside, *, normalised, active):
        self.weight = mg.tensor(rng.normal(0, 0.05, (inside, outside)).astype(np.float32))
        self.shift = mg.zeros(outside, dtype=np.float32)
        self.parameters = [self.weight, self.shift]
        self.normalised, self.active = normalised, active
        if normalised:
            self.scale = mg.ones(outside, dtype=np.float32)
            self.parameters.append(self.scale)
            self.statistics = np.zeros(outside, np.float32), np.ones(outside, np.float32)

    def __call__(self, x, training):
        """Return y, (N, outside), for x, (N, inside)."""
        y = x @ self.weight
        if self.normalised:
            return batch_norm(
                y,
                self.scale,
                self.shift,
                *self.statistics,
                training=training,
                activation="relu" if self.active else None,
            )
        y = y + self.shift
        return relu(y) if self.active else y


def digits():
    """Read the digits.

    Returns
    -------
    images : ndarray (5000, 784) of float32
        Rows of values in [0, 1].
    labels : ndarray (5000,) of int
        0 to 9.
    """
    with np.load(DIGITS) as file:
        images = file["images"].reshape(-1, 784).astype(np.float32) / 255
        return images, file["labels"].astype(int)


def network(rng, normalised):
    """Return the layers of a network; the last has neither batch normalization nor ReLU."""
    *hidden, last = pairwise(SIZES)
    return [
        *(Layer(rng, *widths, normalised=normalised, active=True) for widths in hidden),
        Layer(rng, *last, normalised=False, active=False),
    ]


def scores(layers, x, training):
    """Return the scores of ten classes, (N, 10), for images (N, 784)."""
    for layer in layers:
        x = layer(x, training)
    return x


def train(layers, images, labels, steps, rate):
    """Train in place by gradient descent; return the loss of every step."""
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(steps):
        batch = rng.integers(len(images), size=BATCH)
        loss = softmax_crossentropy(scores(layers, images[batch], training=True), labels[batch])
        loss.backward()
        for parameter in parameters:
            parameter.data -= rate * parameter.grad
        losses.append(loss.item())
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
        layers = network(np.random.default_rng(0), normalised)
        begin = time.perf_counter()
        losses = train(layers, images[TEST:], labels[TEST:], arguments.steps, arguments.rate)
        seconds = time.perf_counter() - begin
        with mg.no_autodiff:
            answers = scores(layers, images[:TEST], training=False).data.argmax(axis=1)
        print(
            f"{name:<12}{losses[0]:12.3f}{np.mean(losses[-20:]):12.3f}"
            f"{np.mean(answers == labels[:TEST]):12.1%}{seconds:10.1f}"
        )


if __name__ == "__main__":
    main()
