"""
Small batches
=============

A batch of two tells little about the population: its mean and variance are noise, in training as a
disturbance of every step, and in the running statistics that inference uses. Batch sizes from 2 to
256, for a network of three hidden layers of 100 ReLUs that learns handwritten digits, with batch
normalization and without.
"""

from perceptron import Network, ReLU, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

BATCHES = 2 ** np.arange(1, 9)
IMAGES, RATE, SEEDS = 8000, 0.002, 2  # RATE: for each image of a batch

# %%
# Every network sees 8,000 images, two epochs, whatever the batch size; the learning rate is
# proportional to that, so that a small batch takes more and smaller steps, as is usual.

(images, labels), test = digits()


def error(batch, batch_norm, seed):
    """Return the share of test digits that a network gets wrong after training."""
    rng = np.random.default_rng(seed)
    sizes = (784, 100, 100, 100, 10)
    network = Network(sizes, rng, batch_norm=batch_norm, activation=ReLU, spread=None)
    for _ in range(IMAGES // batch):
        some = rng.integers(len(images), size=batch)
        network.backpropagate(images[some], labels[some])
        network.descend(RATE * batch)
    return 1 - network.accuracy(*test)


errors = {
    name: np.array([[error(batch, place, seed) for batch in BATCHES] for seed in range(SEEDS)])
    for name, place in (("with BN", "before"), ("without BN", None))
}

# %%
# From 16 on batch normalization is ahead. At 4 it is behind, and at 2 it fails: of two values
# nothing is left but which is the greater, :math:`\hat x = \pm 1`. Without batch normalization
# small batches do no harm, and at 256 the learning rate, 0.5, is too much.

figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
for (name, of), color in zip(errors.items(), ("tab:blue", "tab:orange"), strict=True):
    panel.semilogx(BATCHES, of.mean(axis=0), "o-", base=2, color=color, label=name)
    panel.fill_between(BATCHES, of.min(axis=0), of.max(axis=0), color=color, alpha=0.2, lw=0)
panel.set(
    xlabel="batch size", ylabel=f"test error, mean and range of {SEEDS} seeds", ylim=(0, None)
)
panel.set_xticks(BATCHES, BATCHES)
panel.grid(alpha=0.3)
panel.legend(frameon=False)
plt.show()
