"""
Before the nonlinearity or after it?
====================================

Ioffe & Szegedy (2015, section 3.2) normalise Wu, right before the nonlinearity: it is "more likely
to have a symmetric, non-sparse distribution". Others have found it better after the nonlinearity,
or no worse. Here both, and none, in a network of three hidden layers of 100 units that learns
handwritten digits: with sigmoids, and with ReLUs, at a small learning rate and at a large one.
"""

from itertools import product

from perceptron import Network, ReLU, Sigmoid, cross_entropy, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

STEPS, BATCH, SEEDS = 600, 60, 3
RATES = (0.05, 0.5)
PLACES = {"none": None, "before": "before", "after": "after"}

# %%
# Every place sees the same batches. ReLUs start from the weights of He et al. (2015), sigmoids from
# those of Glorot & Bengio (2010): each without batch normalization has a fair chance.


def train(place, activation, rate, seed):
    """Return the accuracy on the test digits after every 30 steps."""
    (images, labels), test = digits()
    rng = np.random.default_rng(seed)
    spread = None if activation is ReLU else 0.1
    sizes = (784, 100, 100, 100, 10)
    network = Network(sizes, rng, batch_norm=place, activation=activation, spread=spread)
    accuracies = []
    for step in range(1, STEPS + 1):
        batch = rng.integers(len(images), size=BATCH)
        network.backpropagate(images[batch], labels[batch])
        network.descend(rate)
        if step % 30 == 0:
            accuracies.append(network.accuracy(*test))
    return accuracies


accuracy = {
    case: np.array([train(PLACES[case[0]], *case[1:], seed) for seed in range(SEEDS)])
    for case in product(PLACES, (Sigmoid, ReLU), RATES)
}
