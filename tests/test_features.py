"""One small case of each feature whose own tests are slow, against the reference."""

import numpy as np
import pytest

import nbnorm
from nbnorm import reference

RNG = np.random.default_rng(5)
X, DY, DDX = RNG.normal(0.5, 2, (3, 12, 5)).astype(np.float32)
GAMMA, BETA = RNG.normal(1, 0.3, (2, 5)).astype(np.float32)


def activation(module):
    y, mean, rstd = module.batch_norm_forward(X, GAMMA, BETA, activation="silu")
    options = {"beta": BETA, "activation": "silu"}
    return y, *module.batch_norm_backward(DY, X, GAMMA, mean, rstd, **options)


def segments(module):
    y, mean, rstd = module.batch_norm_forward(X, GAMMA, BETA, groups=3)
    return y, mean, *module.batch_norm_backward(DY, X, GAMMA, mean, rstd, groups=3)


def what_counts(module):
    mask, weights = X[:, :1] > 0, np.abs(DY)
    x = np.where(mask, X, np.nan).astype(np.float32)
    y, mean, rstd = module.batch_norm_forward(x, GAMMA, BETA, mask=mask)
    grads = module.batch_norm_backward(DY, X, GAMMA, mean, rstd, weights=weights)
    return y, mean, *grads, module.batch_norm_stats(X, weights=weights).m2


def from_y(module):
    y, mean, rstd = module.batch_norm_forward(X, GAMMA, BETA)
    y = np.float32(y)
    return module.batch_norm_backward(DY, None, GAMMA, mean, rstd, beta=BETA, y=y)


def renorm(module):
    running = np.zeros(5), np.ones(5)
    y, mean, rstd, r, d = module.batch_renorm_forward(X, GAMMA, BETA, *running, r_max=1.5)
    return y, r, d, *module.batch_renorm_backward(DY, X, GAMMA, mean, rstd, r, d)


def second_order(module):
    _, mean, rstd = module.batch_norm_forward(X, GAMMA)
    return module.batch_norm_double_backward(DDX, BETA, BETA, DY, X, GAMMA, mean, rstd)


@pytest.mark.parametrize(
    "feature", [activation, segments, what_counts, from_y, renorm, second_order]
)
def test_feature(feature):
    found, expected = feature(nbnorm), feature(reference)
    assert sum(array is not None for array in found) >= 3
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
