r"""
A bias that grows without bound
===============================

This example shows why gradients must pass through the statistics. Section 2 of Ioffe & Szegedy
(2015) considers a layer that adds a learned bias b to its input u and subtracts the mean,

.. math:: \hat x = u + b - \mathrm E[u + b].

b has no effect on :math:`\hat x`. A gradient step that treats the mean as a constant changes b all
the same. The loss does not change, so the next step changes b again.
"""

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

rng = np.random.default_rng(0)
u = rng.standard_normal((64, 1))
target = u + 0.5  # out of reach, as the normalised output has mean 0
STEPS, RATE = 1000, 0.1

# %%
# The layer normalises without gamma and beta. ``training=False`` makes the backward pass treat mean
# and rstd as constants. This is right for frozen statistics, and wrong here.


def learn_bias(differentiate_statistics):
    """Return b after every step, and the loss before it."""
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
# With constant statistics b grows by the same amount in every step (left), and the loss does not
# change (right). With the whole gradient b stays at 0 except for rounding, since
# :math:`\sum_i dx_i = 0`. A bias before batch normalization has no use; beta replaces it.

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
