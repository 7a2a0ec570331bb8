"""
Before the nonlinearity or after it?
====================================

Ioffe & Szegedy (2015, section 3.2) normalise Wu, the input of the nonlinearity, because it is "more
likely to have a symmetric, non-sparse distribution". This example normalises before, after, and not
at all, in networks of three hidden layers of 100 sigmoids or ReLUs that learn handwritten digits at
a small and at a large learning rate.
"""

from perceptron import Network, ReLU, Sigmoid, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

PLACES = {"none": None, "before": "before", "after": "after"}
ACTIVATIONS = {"sigmoids": Sigmoid, "ReLUs": ReLU}
RATES = (0.05, 0.5)
STEPS, BATCH, SEEDS, TEST_EVERY = 400, 60, 3, 40

# %%
# All networks start from the same weights, drawn as in He et al. (2015), and see the same batches.

(images, labels), test = digits()


def train(place, activation, rate, seed):
    """Train a network; return its test accuracy after every `TEST_EVERY` steps."""
    rng = np.random.default_rng(seed)
    sizes = (784, 100, 100, 100, 10)
    network = Network(sizes, rng, batch_norm=place, activation=activation, spread=None)
    accuracies = []
    for step in range(1, STEPS + 1):
        batch = rng.integers(len(images), size=BATCH)
        network.backpropagate(images[batch], labels[batch])
        network.descend(rate)
        if step % TEST_EVERY == 0:
            accuracies.append(network.accuracy(*test))
    return accuracies


accuracy = {
    (name, rate, place): np.array(
        [train(PLACES[place], activation, rate, seed) for seed in range(SEEDS)]
    )
    for name, activation in ACTIVATIONS.items()
    for rate in RATES
    for place in PLACES
}

# %%
# Compare the colours in each panel. With sigmoids, batch normalization in either place is far
# better than none; with ReLUs at the large rate it makes training steadier. Which place is better
# depends on the nonlinearity. With sigmoids, "after" is ahead throughout (at the large rate by
# three percentage points at the end). With ReLUs the ranges of the two places overlap.

figure, panels = plt.subplots(
    2, 2, figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained"
)
steps = TEST_EVERY * np.arange(1, STEPS // TEST_EVERY + 1)
cases = [(name, rate) for name in ACTIVATIONS for rate in RATES]
for panel, (name, rate) in zip(panels.flat, cases, strict=True):
    for place, color in zip(PLACES, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        runs = accuracy[name, rate, place]
        panel.plot(steps, runs.mean(axis=0), color=color, label=place)
        panel.fill_between(steps, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2, lw=0)
    panel.set_title(f"{name}, learning rate {rate}")
    panel.grid(alpha=0.3)
panels[0, 0].legend(title="batch norm", frameon=False)
figure.supxlabel("step")
figure.supylabel(f"test accuracy, mean and range of {SEEDS} seeds")
plt.show()
