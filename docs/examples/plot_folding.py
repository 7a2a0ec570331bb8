"""
Folded into the layer before it
===============================

At inference batch normalization is a fixed linear map of each channel, so it can be merged with the
linear layer or convolution before it. `fold_into_linear` and `fold_into_conv` return the weight and
the bias of the merged layer, which has the same outputs. This example measures the time saved.
"""

import time

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

rng = np.random.default_rng(0)

# %%
# The layers in NumPy. The convolution, 3x3 and padded by 1, is a matrix product with all windows.


def linear(x, weight, bias):
    """Map (N, inside) to (N, outside)."""
    y = x @ weight.T
    y += bias
    return y


def convolution(x, weight, bias):
    """Map (N, inside, H, W) to (N, outside, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    N, inside, H, W = x.shape
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(N, inside * 9, H * W)
    y = weight.reshape(len(weight), -1) @ columns
    y += bias[:, None]
    return y.reshape(N, -1, H, W)


# %%
# A layer of each kind, in several widths, with random parameters and statistics.

LAYERS = {
    "linear, 1,000 rows": (linear, nbnorm.fold_into_linear, (1000,), ()),
    "3x3 convolution, 8 images of 28x28": (convolution, nbnorm.fold_into_conv, (8,), (28, 28)),
}
WIDTHS = (16, 32, 64, 128)


def prepare(layer, fold, rows, space, width):
    """Return a call of layer and batch norm, a call of the folded layer, and y in float64."""
    x = rng.standard_normal((*rows, width, *space)).astype(np.float32)
    kernel = (3, 3) if space else ()
    fan = width * (9 if space else 1)
    weight = (rng.standard_normal((width, width, *kernel)) / np.sqrt(fan)).astype(np.float32)
    bias, beta, mean = (rng.standard_normal(width).astype(np.float32) for _ in range(3))
    gamma, var = (rng.uniform(0.5, 1.5, width).astype(np.float32) for _ in range(2))
    folded = fold(weight, bias, gamma, beta, mean, var)

    def unfolded(dtype=np.float32):
        y = layer(x.astype(dtype, copy=False), weight.astype(dtype, copy=False), bias)
        return nbnorm.batch_norm_inference(y, gamma, beta, mean, var, out=y)

    return unfolded, lambda: layer(x, *folded), unfolded(np.float64)


def least_time(*calls):
    """Return the minimum time of each call in ms, over twenty rounds."""
    times = np.empty((20, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            row[i] = 1e3 * (time.perf_counter() - begin)
    return times.min(axis=0)


errors, times = {}, {}
for name, layer in LAYERS.items():
    for width in WIDTHS:
        unfolded, folded, expected = prepare(*layer, width)
        errors[name, width] = [np.abs(call() - expected).max() for call in (unfolded, folded)]
        times[name, width] = least_time(unfolded, folded)
greatest = np.max(list(errors.values()), axis=0)
print("greatest error, unfolded and folded: {:.1e}, {:.1e}".format(*greatest))

# %%
# Both forms differ from float64 only by rounding. The labels on the bars give the share of the time
# that is saved. It is larger for narrower layers: the layer's own work grows with the square of the
# width, that of batch normalization with the width.

figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for panel, name in zip(panels, LAYERS, strict=True):
    of_layer = np.array([times[name, width] for width in WIDTHS]).T
    for offset, label, line in zip(
        (-0.2, 0.2), ("layer, then BN", "folded"), of_layer, strict=True
    ):
        panel.bar(np.arange(len(WIDTHS)) + offset, line, 0.4, label=label)
    for i, (before, after) in enumerate(of_layer.T):
        panel.annotate(f"-{1 - after / before:.0%}", (i, before), ha="center", va="bottom")
    panel.set_xticks(range(len(WIDTHS)), WIDTHS)
    panel.set(title=name, xlabel="channels", ylabel="ms")
    panel.margins(y=0.12)
panels[0].legend(frameon=False)
plt.show()
