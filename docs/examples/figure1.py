"""Figure 1 of the batch normalization paper, on real digits.

S. Ioffe & C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015), section 4.1: a network of three hidden layers of 100 sigmoids each and a
softmax over ten classes learns handwritten digits in batches of 60, once as it is and once with
every sigmoid's input normalised. (a) accuracy on the test digits; (b, c) how the distribution of
one sigmoid's input moves as the layers before it learn.

NumPy does the matrix products, nbnorm the normalisation, forward and backward. Both networks start
from the same weights and see the same batches. The paper has 60,000 digits to train and 10,000 to
test; here it is 4,000 and 1,000 (data/README.md says whose).

    python figure1.py                    # under a minute, writes figure1.png
    python figure1.py --steps 50000      # the paper's length
"""

import argparse
import os
from itertools import pairwise
from pathlib import Path

# Before NumPy is loaded: threads gain nothing on products this small, and cost a lot where other
# programs run.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib
import numpy as np
from tqdm import tqdm

from nbnorm import BatchNorm

matplotlib.use("Agg")  # draws into a file and needs no display
import matplotlib.pyplot as plt

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
SIZES = (784, 100, 100, 100, 10)
BATCH = 60
PERCENTILES = (15, 50, 85)


class Linear:
    """y = x W. As in all layers here, forward keeps what backward needs."""

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
    """y = x + b, where there is no BatchNorm: that has its own shift, beta (section 3.2)."""

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

    def __init__(self):
        self.parameters = {}

    def forward(self, x):
        """Return y."""
        self.y = (1 + np.tanh(x / 2)) / 2  # the same function, without exp's overflow
        return self.y

    def backward(self, dy):
        """Return dx."""
        return dy * self.y * (1 - self.y)


class Network:
    """Linear layers with sigmoids between them, and where asked a BatchNorm before each sigmoid."""

    def __init__(self, sizes, rng, *, batch_norm, spread=0.05, dtype=np.float32):
        *hidden, last = (
            Linear(rng.normal(0, spread, shape).astype(dtype)) for shape in pairwise(sizes)
        )
        self.layers = []
        for linear, width in zip(hidden, sizes[1:-1], strict=True):
            shift = BatchNorm(width, dtype=dtype) if batch_norm else Bias(width, dtype)
            self.layers += [linear, shift, Sigmoid()]
        self.layers += [last, Bias(sizes[-1], dtype)]

    def backpropagate(self, x, labels):
        """Leave the gradients of the loss in the layers and return the loss."""
        for layer in self.layers:
            x = layer.forward(x)
        loss, dx = cross_entropy(x, labels)
        for layer in reversed(self.layers):
            dx = layer.backward(dx)
        return loss

    def descend(self, rate):
        """Take one step down the gradients."""
        for layer in self.layers:
            for name, parameter in layer.parameters.items():
                parameter -= rate * layer.grads[name]

    def test(self, x, labels):
        """Return the accuracy, under running statistics, and percentiles of a sigmoid's input.

        The sigmoid is the first one of the last hidden layer.
        """
        norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]
        for norm in norms:
            norm.eval()
        for layer in self.layers:
            if layer is self.layers[-3]:
                percentiles = np.percentile(x[:, 0], PERCENTILES)
            x = layer.forward(x)
        for norm in norms:
            norm.train()
        return np.mean(x.argmax(axis=1) == labels), percentiles


def cross_entropy(scores, labels):
    """Return the softmax cross-entropy of a batch, its mean, and the gradient of the scores."""
    rows = np.arange(len(labels))
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    dscores = np.exp(log_p)
    dscores[rows, labels] -= 1
    return -log_p[rows, labels].mean(), dscores / len(labels)


def load_digits():
    """Return (images, labels) to train and to test; an image is a row of 784 values in [0, 1]."""
    with np.load(DIGITS) as digits:
        images = digits["images"].reshape(-1, 784).astype(np.float32) / 255
        labels = digits["labels"]
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def train(steps, seed, rate):
    """Train both networks on the same batches and test them a hundred times on the way.

    Returns the steps of the tests, shape (k,), and a dict from network to its accuracies, shape
    (k,), and percentiles, shape (k, 3).
    """
    (images, labels), test_digits = load_digits()
    networks = {
        "with BN": Network(SIZES, np.random.default_rng(seed), batch_norm=True),
        "without BN": Network(SIZES, np.random.default_rng(seed), batch_norm=False),
    }
    tests = {name: [] for name in networks}
    tested_at = np.unique(np.ceil(np.linspace(0, steps, 101)).astype(int))[1:]
    rng = np.random.default_rng(seed + 1)
    for step in tqdm(range(1, steps + 1), desc="training both networks", unit=" steps"):
        batch = rng.integers(len(images), size=BATCH)
        for network in networks.values():
            network.backpropagate(images[batch], labels[batch])
            network.descend(rate)
        if step in tested_at:
            for name, network in networks.items():
                tests[name].append(network.test(*test_digits))
    return tested_at, {
        name: [np.array(column) for column in zip(*tests[name], strict=True)] for name in networks
    }


def print_table(steps, results):
    """Print test accuracy by step, twenty rows of it."""
    print(f"\n{'':>8}  test accuracy\n{'step':>8}", *(f"{name:>12}" for name in results))
    rows = np.unique(np.ceil(np.linspace(0, len(steps), 21)).astype(int))[1:] - 1
    for row in rows:
        print(f"{steps[row]:>8}", *(f"{accuracy[row]:>12.3f}" for accuracy, _ in results.values()))


def draw(steps, results, output):
    """Write the figure: (a) accuracy, (b, c) percentiles of a sigmoid's input."""
    colors = {"with BN": "tab:blue", "without BN": "tab:orange"}
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(12, 4.4), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(1.5, 1, 1))
    figure.suptitle("Ioffe & Szegedy (2015), Figure 1: batch normalization on handwritten digits")

    left = figure.add_subplot(grid[0])
    for name, (accuracy, _) in results.items():
        left.plot(steps, accuracy, color=colors[name], label=name)
    left.set(title="(a) accuracy on 1,000 test digits", xlabel="step", ylabel="accuracy")
    left.set(ylim=(0, 1), xlim=(0, steps[-1]))
    left.grid(alpha=0.3)
    left.legend(loc="lower right", frameon=False)

    middle = figure.add_subplot(grid[1])
    right = figure.add_subplot(grid[2], sharey=middle)
    for panel, letter, name in ((middle, "b", "without BN"), (right, "c", "with BN")):
        low, median, high = results[name][1].T
        panel.fill_between(steps, low, high, color=colors[name], alpha=0.25, linewidth=0)
        panel.plot(steps, median, color=colors[name])
        for percent, line in zip(PERCENTILES, (low, median, high), strict=True):
            panel.annotate(
                f"{percent} %",
                (steps[-1], line[-1]),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        panel.set(title=f"({letter}) a sigmoid's input {name}", xlabel="step")
        panel.set(xlim=(0, steps[-1]))
        panel.grid(alpha=0.3)
    middle.set_ylabel("15th, 50th and 85th percentile")
    figure.savefig(output, dpi=150)


def main():
    """Train, print the table, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="default %(default)s")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="learning rate, default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("figure1.png"), help="default %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    steps, results = train(arguments.steps, arguments.seed, arguments.rate)
    print_table(steps, results)
    draw(steps, results, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
