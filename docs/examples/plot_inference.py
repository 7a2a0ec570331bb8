"""
Which statistics at inference?
==============================

In training a batch is normalised by its own mean and variance; at inference there may be no batch,
and population statistics take their place. Four ways to them, for a network that has learnt
handwritten digits:

- a moving average of training's batches (``running_mean``, ``running_var``), by momentum;
- the average over all batches (``momentum=None``, Algorithm 2 of Ioffe & Szegedy 2015);
- the exact statistics of all training digits under the final weights: `Moments.merge`;
- those of the batch that is asked about, as in training.
"""

from perceptron import Network, cross_entropy, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

from nbnorm import BatchNorm, batch_norm_stats, update_running_stats

STEPS, BATCH, RATE = 1000, 60, 0.5
MOMENTA = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

(images, labels), (test_images, test_labels) = digits()
rng = np.random.default_rng(0)
network = Network((784, 100, 100, 100, 10), rng, batch_norm="before", spread=0.1)

# %%
# One training keeps the moving averages of all momenta: beside the layer's own, others are moved by
# `update_running_stats` with the moments of the same batches. None stands for 1 / number of batches.

averages = {
    momentum: [(np.zeros(100, np.float32), np.ones(100, np.float32)) for _ in network.norms]
    for momentum in (*MOMENTA, None)
}
for step in range(1, STEPS + 1):
    batch = rng.integers(len(images), size=BATCH)
    network.backpropagate(images[batch], labels[batch])
    ...
