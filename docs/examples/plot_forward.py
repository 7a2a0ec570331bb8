"""
What batch normalization does to a batch
========================================

The input has four channels with very different means and spreads. In the output each channel has
mean beta and standard deviation gamma.
"""

# %%
# Make a batch of 256 samples. Its channels have the means 0, 5, -3 and 12 and the standard
# deviations 1, 0.5, 4 and 2.

import matplotlib.pyplot as plt
import numpy as np

import nbnorm

rng = np.random.default_rng(0)
x = rng.normal(loc=(0, 5, -3, 12), scale=(1, 0.5, 4, 2), size=(256, 4)).astype(np.float32)

# %%
# `batch_norm_forward` returns the result, and the mean and 1 / (standard deviation) of each
# channel, which the backward pass needs. gamma scales the last channel, and beta shifts the third.

gamma = np.array([1, 1, 1, 2], np.float32)
beta = np.array([0, 0, 3, 0], np.float32)
y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta)
print("mean", mean.round(2))
print("std ", (1 / rstd).round(2))

# %%
# The histograms show the values before and after, in one colour per channel.

figure, panels = plt.subplots(2, 1, figsize=(7, 4.5), layout="constrained")
for panel, values, title in zip(panels, (x, y), ("x", "y"), strict=True):
    for channel in range(4):
        label = f"channel {channel}"
        panel.hist(values[:, channel], bins=40, range=(-16, 20), alpha=0.7, label=label)
    panel.set_title(title, loc="left", fontweight="bold")
    panel.set_yticks([])
    panel.spines[["top", "right", "left"]].set_visible(False)
panels[0].legend(frameon=False)

# %%
# If all values of a channel are shifted and scaled alike, the result changes only by the effects of
# eps and rounding, since the statistics shift and scale too. A layer before batch normalization
# therefore needs no bias.

moved, *_ = nbnorm.batch_norm_forward(3 * x + 7, gamma, beta)
print("greatest difference", abs(moved - y).max())
