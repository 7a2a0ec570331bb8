"""
Small batches
=============

The mean and variance of a small batch are noisy estimates of those of the population. The noise
disturbs every training step and the running statistics that inference uses. This example trains a
network of three hidden layers of 100 ReLUs on handwritten digits, with batch sizes from 2 to 256,
with and without batch normalization.
"""

from perceptron import Network, ReLU, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

BATCHES = 2 ** np.arange(1, 9)
IMAGES, RATE, SEEDS = 8000, 0.002, 2  # RATE: per image of a batch

# %%
# Every network sees 8,000 images, which is two epochs. The learning rate is proportional to the
# batch size, as is usual: small batches take more and smaller steps.

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
# From batches of 16 on, the network with batch normalization has the smaller error. At 4 it has the
# larger one, and at 2 it fails: of two values normalisation leaves only the sign,
# :math:`\hat x = \pm 1`. Without batch normalization small batches do no harm, but at 256 the
# learning rate, 0.5, is too high.

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
