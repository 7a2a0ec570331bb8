r"""
Whitening, with and without its gradient
========================================

Ioffe & Szegedy (2015, section 2) would like to whiten a layer's inputs: with the mean and the
covariance :math:`\Sigma` of the batch, :math:`\hat x = \Sigma^{-1/2} (x - \mu)` has uncorrelated
components of variance 1. They note two difficulties. Gradient descent must take into account that
:math:`\mu` and :math:`\Sigma` depend on the weights; otherwise weights grow while the loss stays
the same. And :math:`\Sigma^{-1/2}` and its derivatives are expensive, "and not everywhere
differentiable". So they normalise each component separately. This example shows the first
difficulty on a toy problem, and then the cost.
"""

from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np

from nbnorm import batch_norm_backward, batch_norm_forward

EPS = 1e-5

# %%
# Whitening needs the eigenvectors of the covariance. Its gradient is that of a function of a matrix
# (Daleckii & Krein 1965): in the basis of the eigenvectors, the gradient with respect to
# :math:`\Sigma^{-1/2}` is multiplied by :math:`-1 / (\sqrt{s_i s_j} (\sqrt{s_i} + \sqrt{s_j}))`,
# where :math:`s_i` are the eigenvalues of :math:`\Sigma`.


def whiten(x):
    """Return x, (N, C), with mean 0 and covariance 1, and what the gradient needs."""
    centered = x - x.mean(axis=0)
    covariance = centered.T @ centered / len(x)
    values, vectors = np.linalg.eigh(covariance + EPS * np.eye(len(covariance), dtype=x.dtype))
    inverse_root = (vectors / np.sqrt(values)) @ vectors.T
    return centered @ inverse_root, (centered, inverse_root, values, vectors)


def whiten_backward(dy, saved, through):
    """Return dx; the statistics are differentiated if `through`, else they are constants."""
    centered, inverse_root, values, vectors = saved
    dx = dy @ inverse_root
    if not through:
        return dx
    d_root = centered.T @ dy
    roots = np.sqrt(values)
    factors = -1 / (np.outer(roots, roots) * np.add.outer(roots, roots))
    in_basis = vectors.T @ (d_root + d_root.T) @ vectors / 2
    d_covariance = vectors @ (factors * in_basis) @ vectors.T
    dx += 2 / len(dy) * centered @ d_covariance
    return dx - dx.mean(axis=0)


def normalise(x):
    """Return x with mean 0 and variance 1 in each component, and what the gradient needs."""
    y, mean, rstd = batch_norm_forward(x, eps=EPS)
    return y, (x, mean, rstd)


def normalise_backward(dy, saved, through):
    """Return dx; the statistics are differentiated if `through`, else they are constants."""
    x, mean, rstd = saved
    return batch_norm_backward(dy, x, None, mean, rstd, training=through).dx


METHODS = {
    "whitening": (whiten, whiten_backward),
    "batch normalization": (normalise, normalise_backward),
}

# %%
# The toy problem: four outputs y of one normalised linear layer are to match targets of a larger
# variance. No weights W can match them, but some W is best.

rng = np.random.default_rng(0)
ROWS, INPUTS, OUTPUTS, STEPS, RATE = 512, 8, 4, 400, 0.3
u = rng.normal(size=(ROWS, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS))
targets = 3 * np.tanh(u @ rng.normal(0, 0.3, (INPUTS, OUTPUTS)))


def train(method, through):
    """Return the loss and the norm of W at every step, (STEPS, 2)."""
    forward, backward = METHODS[method]
    weight = np.random.default_rng(1).normal(0, 0.5, (INPUTS, OUTPUTS))
    seen = []
    for _ in range(STEPS):
        y, saved = forward(u @ weight)
        error = y - targets
        seen.append((np.sum(error**2) / (2 * ROWS), np.linalg.norm(weight)))
        weight -= RATE * u.T @ backward(error / ROWS, saved, through)
    return np.array(seen)


trained = {(method, through): train(method, through) for method in METHODS for through in (1, 0)}

# %%
# The time of a forward and a backward call, for increasing numbers of components.

WIDTHS = 8, 16, 32, 64, 128, 256, 512


def microseconds(method, width):
    """Return the minimum time of five calls."""
    forward, backward = METHODS[method]
    x, dy = rng.normal(size=(2, 1024, width)).astype(np.float32)
    times = []
    for _ in range(6):
        begin = perf_counter()
        backward(dy, forward(x)[1], True)
        times.append(perf_counter() - begin)
    return 1e6 * min(times[1:])


times = {method: [microseconds(method, width) for width in WIDTHS] for method in METHODS}

# %%
# Look first at the dotted lines. If the statistics are constants, W grows with every step, to
# twelve times its initial norm: each step tries to enlarge outputs that are then normalised again.
# After some ten steps the loss stays above that of the solid lines, where the gradient goes through
# the statistics and the norm of W grows by a quarter. This is so for whitening and for batch
# normalization.
#
# Then look at the right panel, where both axes are logarithmic: time per call in float32. Whitening
# takes about ten times as long as normalising for 8 components, and hundreds of times as long for
# 512: the time of products with x grows with the square of the number of components, that of the
# eigenvectors with its cube.

figure, (losses, norms, cost) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for (method, through), seen in trained.items():
    style = {"color": f"C{list(METHODS).index(method)}", "linestyle": "-" if through else ":"}
    statistics = "" if through else ", constant statistics"
    losses.plot(seen[:, 0] - trained[method, 1][-1, 0] + 1e-4, **style)
    norms.plot(seen[:, 1], label=method + statistics, **style)
losses.set(title="loss, above the least", xlabel="step", yscale="log")
norms.set(title="norm of W", xlabel="step")
norms.legend(frameon=False)
for method, values in times.items():
    cost.loglog(WIDTHS, values, "o-", label=method)
cost.set(title="forward and backward, 1,024 rows", xlabel="components", ylabel="microseconds")
cost.legend(frameon=False)
for panel in (losses, norms, cost):
    panel.grid(alpha=0.3)
plt.show()
