"""Train the network of Figure 1 in one compiled loop.

The network of figure1.py, with three hidden layers of 100 sigmoids and batch normalization before
each, learns handwritten digits (data/README.md names the source) in batches of 60. Numba compiles
the whole training into one function: selecting the batch, matrix products, batch normalization
forward and backward, running statistics, and gradient descent.

The program also trains the same network in Python, from the same weights and on the same batches.
The results differ by the rounding of matrix products: the compiled loop computes them in loops,
Python with BLAS.

    python compiled_mlp.py                # under a minute, compiling included
    python compiled_mlp.py --steps 20000
    python compiled_mlp.py --quick        # a hundred steps
"""

import argparse
import time

from perceptron import Network, digits  # before NumPy, whose threads it sets

# isort: split
import numpy as np
from numba import njit

import nbnorm

SIZES = (784, 100, 100, 100, 10)
BATCH = 60


@njit(fastmath={"contract"})
def product(a, b):
    """Return the matrix product; Numba's own needs SciPy."""
    out = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    whole = a.shape[1] // 4 * 4
    for i in range(a.shape[0]):
        row = out[i]
        for k in range(0, whole, 4):  # four rows of b per pass over `row`
            for j in range(row.size):
                row[j] += (a[i, k] * b[k, j] + a[i, k + 1] * b[k + 1, j]) + (
                    a[i, k + 2] * b[k + 2, j] + a[i, k + 3] * b[k + 3, j]
                )
        for k in range(whole, a.shape[1]):
            for j in range(row.size):
                row[j] += a[i, k] * b[k, j]
    return out


@njit
def cross_entropy(scores, labels):
    """Return the mean softmax cross-entropy of a batch, and dscores, its gradient."""
    loss, dscores = 0.0, np.empty_like(scores)
    for i in range(len(labels)):
        shifted = scores[i] - scores[i].max()
        total = np.exp(shifted).sum()
        loss += np.log(total) - shifted[labels[i]]
        dscores[i] = np.exp(shifted) / total
        dscores[i, labels[i]] -= 1
    return loss / len(labels), dscores / len(labels)


@njit
def train(images, labels, batches, rate, weights, gammas, betas, means, variances, bias):
    """Train in place, one step per batch of indices; return the loss of every step.

    `weights` has a matrix per layer; `gammas`, `betas`, `means` and `variances` have an array per
    hidden layer; `bias` is added to the scores.
    """
    rate = images.dtype.type(rate)
    losses = np.empty(len(batches))
    for step in range(len(batches)):
        outputs = [images[batches[step]]]  # of every layer, after the images
        products = []
        normalised = []
        for k in range(len(gammas)):
            products.append(product(outputs[k], weights[k]))
            forward = nbnorm.batch_norm_forward(
                products[k], gammas[k], betas[k], means[k], variances[k]
            )
            normalised.append(forward)
            outputs.append(1 / (1 + np.exp(-forward.y)))
        scores = product(outputs[-1], weights[-1]) + bias
        losses[step], gradient = cross_entropy(scores, labels[batches[step]])

        bias -= rate * gradient.sum(axis=0)
        for k in range(len(gammas), -1, -1):  # `gradient` is that of layer k's product
            of_weight = product(outputs[k].T, gradient)
            if k > 0:
                output = outputs[k]
                gradient = product(gradient, np.ascontiguousarray(weights[k].T))
                gradient = gradient * output * (1 - output)
                gradient, dgamma, dbeta, _ = nbnorm.batch_norm_backward(
                    gradient, products[k - 1], gammas[k - 1],
                    normalised[k - 1].mean, normalised[k - 1].rstd,
                )  # fmt: skip
                gammas[k - 1][:] -= rate * dgamma
                betas[k - 1][:] -= rate * dbeta
            weights[k][:] -= rate * of_weight
    return losses


def parameters_of(network):
    """Return the arrays of a network in the form that `train` takes and updates."""
    weights = tuple(layer.parameters["weight"] for layer in network.layers[::3])
    gammas = tuple(norm.parameters["weight"] for norm in network.norms)
    betas = tuple(norm.parameters["bias"] for norm in network.norms)
    means = tuple(norm.running_mean for norm in network.norms)
    variances = tuple(norm.running_var for norm in network.norms)
    return weights, gammas, betas, means, variances, network.layers[-1].parameters["bias"]


def train_in_python(network, images, labels, batches, rate):
    """Train in Python, with a call per layer; return the loss of every step."""
    losses = []
    for batch in batches:
        losses.append(network.backpropagate(images[batch], labels[batch]))
        network.descend(rate)
    return np.array(losses)


def main():
    """Train both ways and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000, help="default %(default)s")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="learning rate, default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="train for a hundred steps")
    arguments = parser.parse_args()
    steps = 100 if arguments.quick else arguments.steps
    if steps < 1:
        parser.error("--steps must be at least 1")
    (images, labels), test = digits()
    batches = np.random.default_rng(1).integers(len(images), size=(steps, BATCH))
    compiled, by_python = (
        Network(SIZES, np.random.default_rng(0), batch_norm="before") for _ in range(2)
    )
    begin = time.perf_counter()
    train(images, labels, batches[:0], arguments.rate, *parameters_of(compiled))
    print(f"compiled in {time.perf_counter() - begin:.1f} s\n")
    nbnorm.warmup((BATCH, SIZES[1]))

    print("trained by      first loss   last loss    accuracy   us a step")
    for name, network in (("compiled loop", compiled), ("Python", by_python)):
        begin = time.perf_counter()
        if network is compiled:
            losses = train(images, labels, batches, arguments.rate, *parameters_of(network))
        else:
            losses = train_in_python(network, images, labels, batches, arguments.rate)
        microseconds = 1e6 * (time.perf_counter() - begin) / steps
        print(
            f"{name:<14}{losses[0]:12.4f}{np.mean(losses[-20:]):12.4f}"
            f"{network.accuracy(*test):12.1%}{microseconds:12.0f}"
        )


if __name__ == "__main__":
    main()
