r"""
A bias that grows for ever
==========================

Why the gradient has to go through the statistics: section 2 of Ioffe & Szegedy (2015) takes a layer
that adds a learned bias b to its input u and subtracts the mean,

.. math:: \hat x = u + b - \mathrm E[u + b].

b has no effect on :math:`\hat x`. A gradient step that takes the mean for a constant changes b
all the same, and as the loss stays what it was, it does so again, and again.
"""

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

rng = np.random.default_rng(0)
u = rng.standard_normal((64, 1))
target = u + 0.5  # cannot be reached: the normalised output has the mean 0
STEPS, RATE = 1000, 0.1

# %%
# The layer normalises, and gamma and beta are left out. ``training=False`` in the backward pass
# means that mean and rstd count as constants; it is there for frozen statistics, where this is
# true. Here it is not.


def learn_bias(differentiate_statistics):
    """Return b and the loss after every step."""
    b, biases, losses = 0.0, [], []
    for _ in range(STEPS):
        x = u + b
        y, mean, rstd = nbnorm.batch_norm_forward(x)
        dy = 2 * (y - target) / len(y)
        dx = nbnorm.batch_norm_backward(
            dy, x, None, mean, rstd, training=differentiate_statistics
        ).dx
        b -= RATE * dx.sum()
        biases.append(b)
        losses.append(np.mean((y - target) ** 2))
    return np.array(biases), np.array(losses)


constant_bias, constant_loss = learn_bias(differentiate_statistics=False)
true_bias, true_loss = learn_bias(differentiate_statistics=True)

# %%
# With the statistics as constants b grows by the same amount in every step, and the loss stays
# where it is. With the whole gradient b stays at 0, but for rounding: :math:`\sum_i dx_i = 0`. A
# bias before batch normalization is of no use, and beta takes its place.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for panel, title, constant, true in (
    (left, "bias", constant_bias, true_bias),
    (right, "loss", constant_loss, true_loss),
):
    panel.plot(constant, color="tab:orange", label="statistics taken for constants")
    panel.plot(true, "--", color="tab:blue", label="the whole gradient")
    panel.set(title=title, xlabel="step")
    panel.grid(alpha=0.3)
right.set_ylim(0, 0.5)
left.legend(frameon=False)
plt.show()
