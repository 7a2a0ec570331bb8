r"""
Scale of the weights
====================

Batch normalization removes the scale of the weights before it (Ioffe & Szegedy 2015, section 3.3):
for a > 0

.. math::

    \mathrm{BN}((aW)u) = \mathrm{BN}(Wu), \qquad
    \frac{\partial\ell}{\partial (aW)} = \frac1a \frac{\partial\ell}{\partial W}, \qquad
    \frac{\partial\ell}{\partial u} \text{ the same.}

Larger weights get smaller gradients, so training stays stable at larger learning rates. The
equations hold for eps = 0. This example measures how far they hold for the usual 1e-5.
"""

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

rng = np.random.default_rng(0)
u = rng.standard_normal((256, 100)).astype(np.float32)
W = 0.1 * rng.standard_normal((100, 50)).astype(np.float32)  # outputs of variance 1
dy = rng.standard_normal((256, 50)).astype(np.float32)
scales = np.logspace(-3, 3, 24)

# %%
# Run one linear layer forward and backward, with its weights multiplied by a. In exact arithmetic
# and with eps = 0 none of the three results depends on a.


def results(a, eps):
    """Return y, a dL/d(aW) and dL/du."""
    weight = (a * W).astype(np.float32)
    x = u @ weight
    y, mean, rstd = nbnorm.batch_norm_forward(x, eps=eps)
    dx = nbnorm.batch_norm_backward(dy, x, None, mean, rstd).dx
    return y, a * (u.T @ dx), dx @ weight.T


def deviation(eps):
    """Return the relative distance of the results from those at a = 1 and eps = 0: (scales, 3)."""
    expected = results(1.0, 0.0)
    return np.array(
        [
            [
                np.linalg.norm(got - want) / np.linalg.norm(want)
                for got, want in zip(results(a, eps), expected, strict=True)
            ]
            for a in scales
        ]
    )


deviations = {eps: deviation(eps) for eps in (0.0, 1e-5)}

# %%
# With eps = 0 (left) only float32's rounding remains, about 1e-7 at every scale. With eps = 1e-5
# (right) small weights deviate: x has a variance of about :math:`a^2`, which at a = 1e-3 is below
# eps, so the outputs and the gradients are too small. For large a the effect of eps vanishes.

figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for panel, (eps, lines) in zip(panels, deviations.items(), strict=True):
    for line, label in zip(lines.T, ("y", "a dL/d(aW)", "dL/du"), strict=True):
        panel.loglog(scales, line, "o-", markersize=3, label=label)
    panel.set(title=f"eps = {eps:g}", xlabel="scale of the weights, a")
    panel.grid(alpha=0.3)
panels[0].set_ylabel("relative deviation from a = 1, eps = 0")
panels[0].legend(frameon=False)
plt.show()
