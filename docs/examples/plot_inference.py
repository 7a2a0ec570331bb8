"""
Which statistics at inference?
==============================

Training normalises a batch by its own mean and variance. Inference may have no batch, and uses
statistics of the population instead. Compare four kinds, for a network that learns digits:

- a moving average over the training batches (``running_mean``, ``running_var``), by momentum;
- the plain average over all batches so far (``momentum=None``);
- exact statistics of all training digits under the current weights, by `Moments.merge`;
- the statistics of the test batch itself, as in training.
"""

from perceptron import Network, cross_entropy, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

from nbnorm import BatchNorm, batch_norm_stats, update_running_stats

BATCH, RATE, ASKED_AT = 60, 0.5, (50, 1000)
MOMENTA = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

(images, labels), (test_images, test_labels) = digits()
rng = np.random.default_rng(0)
network = Network((784, 100, 100, 100, 10), rng, batch_norm="before", spread=None)
averages = {
    momentum: [(np.zeros(100, np.float32), np.ones(100, np.float32)) for _ in network.norms]
    for momentum in (*MOMENTA, None)
}

# %%
# In every training step, the moments of each batch normalization's input update its averages for
# all momenta. Momentum None is the plain average: a new batch has the weight 1 / number of batches.


def forward(x, training=False):
    """Return the scores, and the input of every batch normalization."""
    arrived = []
    for layer in network.layers:
        if isinstance(layer, BatchNorm):
            layer.training = training
            arrived.append(x)
        x = layer.forward(x)
    return x, arrived


def learn(step):
    """Take one step of training."""
    batch = rng.integers(len(images), size=BATCH)
    scores, arrived = forward(images[batch], training=True)
    for i, x in enumerate(arrived):
        moments = batch_norm_stats(x)
        for momentum, statistics in averages.items():
            weight = 1 / step if momentum is None else momentum
            update_running_stats(*statistics[i], moments, momentum=weight)
    _, dx = cross_entropy(scores, labels[batch])
    for layer in reversed(network.layers):
        dx = layer.backward(dx)
    network.descend(RATE)


# %%
# Exact statistics are computed layer by layer, as a layer's input depends on the layers before it.


def set_exact_statistics():
    """Give every batch normalization the statistics of all training digits."""
    for i, norm in enumerate(network.norms):
        first, *rest = (batch_norm_stats(forward(part)[1][i]) for part in np.split(images, 10))
        norm.set_statistics(first.merge(*rest))


def accuracy():
    """Return the test accuracy with the current statistics."""
    return np.mean(forward(test_images)[0].argmax(axis=1) == test_labels)


def accuracy_of_batches(order):
    """Return the test accuracy with statistics of each batch, of digits in this order."""
    scores = [forward(test_images[part], training=True)[0] for part in np.split(order, 20)]
    return np.mean(np.concatenate(scores).argmax(axis=1) == test_labels[order])


def ask():
    """Return accuracies: a list for the momenta, and a dict for the other statistics."""
    others = {
        "of the batch, 50 digits": accuracy_of_batches(np.arange(len(test_labels))),
        "of the batch, sorted digits": accuracy_of_batches(np.argsort(test_labels, kind="stable")),
    }
    found = []
    for statistics in averages.values():
        for norm, (mean, var) in zip(network.norms, statistics, strict=True):
            norm.running_mean[:], norm.running_var[:] = mean, var
        found.append(accuracy())
    *by_momentum, others["plain average (momentum=None)"] = found
    set_exact_statistics()
    others["exact"] = accuracy()
    return by_momentum, others


answers = {}
for step in range(1, max(ASKED_AT) + 1):
    learn(step)
    if step in ASKED_AT:
        answers[step] = ask()

# %%
# If the digits come in random order, the statistics of the batch are almost as good as the exact
# ones. If they are sorted, first the zeros, then the ones, and so on, these statistics fail: the
# answer for a digit depends on the other digits of the batch. A moving average starts at a mean of
# 0 and a variance of 1, and needs a few times 1 / momentum steps to forget them. Averages that have
# forgotten them reach the accuracy of the exact statistics to within three percentage points after
# 50 steps, and within one after 1,000. Even momentum 1, which keeps only the last batch, is good
# enough here.

figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for panel, (step, (by_momentum, others)) in zip(panels, answers.items(), strict=True):
    panel.semilogx(MOMENTA, by_momentum, "o-", label="moving average")
    for i, (name, value) in enumerate(others.items(), 1):
        panel.axhline(value, color=f"C{i}", linestyle="--", label=name)
    panel.set(title=f"after {step} steps", xlabel="momentum")
    panel.grid(alpha=0.3)
panels[0].set_ylabel("test accuracy")
panels[1].legend(title="statistics", frameon=False, fontsize=8)
plt.show()
