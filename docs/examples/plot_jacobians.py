r"""
Two Jacobians
=============

Ioffe & Szegedy (2015, section 3.3) note of a layer with batch normalization that for a scalar a > 0

.. math::

    \frac{\partial\,\mathrm{BN}((aW)u)}{\partial u} = \frac{\partial\,\mathrm{BN}(Wu)}{\partial u},
    \qquad
    \frac{\partial\,\mathrm{BN}((aW)u)}{\partial (aW)}
    = \frac1a \frac{\partial\,\mathrm{BN}(Wu)}{\partial W}.

The scale of the weights does not affect the Jacobian of the layer, and larger weights lead to
smaller gradients. This example computes both Jacobians column by column, with
`nbnorm.batch_norm_jvp`, and looks at their singular values: the paper conjectures that batch
normalization brings those of dy/du close to 1, "which is known to be beneficial for training".
"""

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

N, INPUTS, OUTPUTS = 16, 6, 6
rng = np.random.default_rng(0)
u, W = rng.standard_normal((N, INPUTS)), rng.standard_normal((INPUTS, OUTPUTS))
scales = np.logspace(-2, 2, 9)

# %%
# A column of the Jacobian is the derivative of y = BN(u aW) along one coordinate of u or of aW. A
# tangent tu of u becomes the tangent tu aW of BN's input, and a tangent tW of aW becomes u tW.


def jacobians(a, normalise=True):
    """Return dy/du and dy/d(aW), a column for each coordinate."""
    x = u @ (a * W)
    _, mean, rstd = nbnorm.batch_norm_forward(x, eps=0.0)

    def along(tx):
        if normalise:
            tx = nbnorm.batch_norm_jvp(tx, None, None, x, None, mean, rstd)
        return tx.ravel()

    by_u = [along(tu.reshape(u.shape) @ (a * W)) for tu in np.eye(u.size)]
    by_W = [along(u @ tW.reshape(W.shape)) for tW in np.eye(W.size)]
    return np.stack(by_u, axis=1), np.stack(by_W, axis=1)


found = [jacobians(a) for a in scales]
at_1 = jacobians(1.0)
deviations = np.array(
    [
        [
            np.abs(by_u - at_1[0]).max() / np.abs(at_1[0]).max(),
            np.abs(a * by_W - at_1[1]).max() / np.abs(at_1[1]).max(),
        ]
        for a, (by_u, by_W) in zip(scales, found, strict=True)
    ]
)
singular = {
    name: np.array([np.linalg.svd(jacobians(a, normalise)[0], compute_uv=False) for a in scales])
    for name, normalise in (("BN((aW)u)", True), ("(aW)u", False))
}

# %%
# Both equations hold to float64's rounding. On the left, look at the singular values of dy/du: with
# batch normalization they are the same at every scale of the weights, without it they are
# proportional to a. With it they are near 1 (greatest 1.9, median 0.85), except for two per channel
# that are 0, as y does not change with the mean and the scale of its channel. On the right, the
# greatest singular value of dy/d(aW) falls as 1/a with batch normalization, and without it does not
# depend on a.

figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for color, (name, values) in zip(("C0", "C1"), singular.items(), strict=True):
    lines = panels[0].loglog(
        scales, values[:, [0, N * OUTPUTS // 4, N * OUTPUTS // 2]], color=color
    )
    lines[0].set_label(f"{name}: greatest, upper quarter, median")
    greatest = [np.linalg.norm(jacobians(a, name.startswith("BN"))[1], 2) for a in scales]
    panels[1].loglog(scales, greatest, "o-", color=color, markersize=3, label=name)
panels[0].set(xlabel="scale of the weights, a", ylabel="singular values of dy/du")
panels[1].set(xlabel="scale of the weights, a", ylabel="greatest singular value of dy/d(aW)")
for panel in panels:
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
plt.show()
