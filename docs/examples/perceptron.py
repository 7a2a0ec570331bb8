"""A multilayer perceptron in NumPy and nbnorm, which the examples train on the digits in data/.

Like `nbnorm.BatchNorm`, a layer has the methods `forward`, which saves what `backward` needs, and
`backward`, which maps the gradient of its output to that of its input. `parameters` and `grads` are
dicts by name.
"""

import os
from itertools import pairwise
from pathlib import Path

# Set before NumPy is imported: threads do not speed up products this small, and slow them down a
# lot if other programs run.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from nbnorm import BatchNorm

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000


class Linear:
    """y = x W."""

    def __init__(self, weight):
        self.parameters = {"weight": weight}
        self.grads = {}

    def forward(self, x):
        """Return y."""
        self.x = x
        return x @ self.parameters["weight"]

    def backward(self, dy):
        """Return dx; the gradient of W goes to `grads`."""
        self.grads["weight"] = self.x.T @ dy
        return dy @ self.parameters["weight"].T


class Bias:
    """y = x + b. Not needed before BatchNorm, which has its own shift, beta (section 3.2)."""

    def __init__(self, num_features, dtype):
        self.parameters = {"bias": np.zeros(num_features, dtype)}
        self.grads = {}

    def forward(self, x):
        """Return y."""
        return x + self.parameters["bias"]

    def backward(self, dy):
        """Return dx; the gradient of b goes to `grads`."""
        self.grads["bias"] = dy.sum(axis=0)
        return dy


class Sigmoid:
    """y = 1 / (1 + exp(-x))."""

    parameters = {}  # noqa: RUF012 - always empty

    def forward(self, x):
        """Return y."""
        self.y = (1 + np.tanh(x / 2)) / 2  # the same function, without exp's overflow
        return self.y

    def backward(self, dy):
        """Return dx."""
        return dy * self.y * (1 - self.y)


class ReLU:
    """y = max(x, 0)."""

    parameters = {}  # noqa: RUF012 - always empty

    def forward(self, x):
        """Return y."""
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy):
        """Return dx."""
        return dy * (self.y > 0)


class Network:
    """Linear layers with nonlinearities between them, and optional batch normalization.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of every hidden layer and of the output.
    rng : numpy.random.Generator
        Draws the weights, from a normal distribution.
    batch_norm : {None, "before", "after"}
        Whether hidden layers are normalised, and where: before the nonlinearity or after it.
    activation : type, default Sigmoid
        The nonlinearity: Sigmoid or ReLU.
    spread : float or None, default 0.05
        Standard deviation of the weights. None means sqrt(2 / inputs), as in He et al. (2015).
    dtype : floating dtype, default float32
        Dtype of all parameters.
    """

    def __init__(
        self, sizes, rng, *, batch_norm=None, activation=Sigmoid, spread=0.05, dtype=np.float32
    ):
        *hidden, last = (
            Linear(rng.normal(0, spread or (2 / shape[0]) ** 0.5, shape).astype(dtype))
            for shape in pairwise(sizes)
        )
        self.layers = []
        for linear, width in zip(hidden, sizes[1:-1], strict=True):
            normalised = BatchNorm(width, dtype=dtype) if batch_norm else Bias(width, dtype)
            if batch_norm == "after":
                self.layers += [linear, Bias(width, dtype), activation(), normalised]
            else:
                self.layers += [linear, normalised, activation()]
        self.layers += [last, Bias(sizes[-1], dtype)]

    @property
    def norms(self):
        """The batch normalization layers."""
        return [layer for layer in self.layers if isinstance(layer, BatchNorm)]

    def forward(self, x, training=False):
        """Return the scores of the classes, (N, classes), for inputs (N, inputs)."""
        for norm in self.norms:
            norm.training = training
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backpropagate(self, x, labels):
        """Store the gradients of the loss in the layers, and return the loss."""
        loss, dx = cross_entropy(self.forward(x, training=True), labels)
        for layer in reversed(self.layers):
            dx = layer.backward(dx)
        return loss

    def descend(self, rate):
        """Take one step of gradient descent."""
        for layer in self.layers:
            for name, parameter in layer.parameters.items():
                parameter -= rate * layer.grads[name]

    def accuracy(self, x, labels):
        """Return the share of correct answers, with running statistics."""
        return np.mean(self.forward(x).argmax(axis=1) == labels)


def cross_entropy(scores, labels):
    """Return the mean softmax cross-entropy of a batch, and dscores, its gradient."""
    rows = np.arange(len(labels))
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    dscores = np.exp(log_p)
    dscores[rows, labels] -= 1
    return -log_p[rows, labels].mean(), dscores / len(labels)


def digits():
    """Return (images, labels) to train and to test; images are rows of 784 values in [0, 1]."""
    with np.load(DIGITS) as file:
        images = file["images"].reshape(-1, 784).astype(np.float32) / 255
        labels = file["labels"]
    return (images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:])
