"""
Gradients by layer
==================

In a deep network of sigmoids, gradients shrink from layer to layer on their way back, as the slope
of a sigmoid is at most 1/4. Ioffe & Szegedy (2015, section 3.3) conjecture that batch normalization
keeps the singular values of a layer's Jacobian near 1, "which is known to be beneficial for
training". This example measures the gradients of all layers before training, for weights of several
scales.
"""

from perceptron import Linear, Network, digits  # sets NumPy's threads

# isort: split
import matplotlib.pyplot as plt
import numpy as np

DEPTH, WIDTH, BATCH, SEEDS = 10, 100, 512, 5
SCALES = (0.05, 0.1, 0.3)  # standard deviation of the weights
(images, labels), _ = digits()

# %%
# Run one backward pass through ten hidden layers, and take the norm of the gradient with respect to
# each layer's output Wu, relative to that of the last hidden layer.


def gradients(batch_norm, scale, seed):
    """Return the norm of the gradient with respect to the output Wu of every hidden layer."""
    rng = np.random.default_rng(seed)
    sizes = (784, *[WIDTH] * DEPTH, 10)
    network = Network(sizes, rng, batch_norm=batch_norm, spread=scale, dtype=np.float64)
    batch = rng.integers(len(images), size=BATCH)
    found = []
    for layer in [layer for layer in network.layers if isinstance(layer, Linear)][:-1]:
        layer.backward = watched(layer, found)
    network.backpropagate(images[batch].astype(np.float64), labels[batch])
    return found[::-1]


def watched(layer, found):
    """Return the layer's `backward`, which also records the norm of its dy."""
    backward = layer.backward

    def call(dy):
        found.append(np.linalg.norm(dy))
        return backward(dy)

    return call


norms = {
    (name, scale): np.array([gradients(place, scale, seed) for seed in range(SEEDS)])
    for name, place in (("with BN", "before"), ("without BN", None))
    for scale in SCALES
}
relative = {case: (found / found[:, -1:]).mean(axis=0) for case, found in norms.items()}

# %%
# Look at the slope of the lines. Without batch normalization (dotted) each layer divides the
# gradient by 2 (largest weights) to 8 (smallest): over ten layers by up to eight orders of
# magnitude. With it (solid) the lines are level, and the same for all scales; only the gradient of
# the first layer, whose inputs are pixels, is smaller, by a factor of three.

figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, scale), values in relative.items():
    style = "o-" if name == "with BN" else "o:"
    color = f"C{SCALES.index(scale)}"
    panel.semilogy(range(1, DEPTH + 1), values, style, color=color, label=f"{name}, {scale}")
panel.set(xlabel="hidden layer", ylabel="gradient, relative to the last layer")
panel.grid(alpha=0.3)
panel.legend(frameon=False, title="weights' deviation")
plt.show()
