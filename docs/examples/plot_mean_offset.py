"""
Accuracy for large means
========================

This example measures the error of y if the mean of x is large compared with its standard deviation.
Most implementations subtract a float32 mean, or compute the variance as
:math:`E[x^2] - E[x]^2`, and lose a digit or more with every factor of ten. nbnorm sums around a
shift, merges in float64, and subtracts the mean in two parts; docs/math.md derives the formulas.

The peers are those of ``python benchmarks/compare.py``: NumPy as in course notes, and PyTorch, JAX
and onnxruntime if they are installed. onnxruntime has inference only.
"""

import matplotlib.pyplot as plt
import numpy as np
import runs  # noqa: F401 - makes `benchmarks` importable

# isort: split
from benchmarks.checking import as_array
from benchmarks.peers import EPS, PEERS, Batch, installed
from nbnorm import reference

SHAPE = (16, 8, 28, 28)
OFFSETS = 10.0 ** np.arange(7)
NAMES = {
    "forward": ("nbnorm", "NumPy", "PyTorch", "PyTorch channels-last", "JAX"),
    "inference": ("nbnorm", "NumPy", "PyTorch", "JAX", "onnxruntime"),
}

COLORS = {name: f"C{i}" for i, name in enumerate((*NAMES["forward"], "onnxruntime"))}

# %%
# x is N(0, 1) plus an offset, in float32. The reference implementation computes in float64 from the
# same x. Inference uses the offset as running mean and 1 as running variance.


def error(name, op, offset):
    """Return the greatest error of a peer's y."""
    peer = PEERS[name]
    batch = Batch(SHAPE, last=peer.last)
    batch.x += np.float32(offset)
    batch.running_mean[:], batch.running_var[:] = offset, 1
    if op == "forward":
        expected = reference.batch_norm_forward(batch.x, batch.gamma, batch.beta, eps=EPS).y
    else:
        expected = reference.batch_norm_inference(
            batch.x, batch.gamma, batch.beta, batch.running_mean, batch.running_var, eps=EPS
        )
    return float(np.abs(as_array(peer.ops[op](batch)()) - expected).max())


errors = {
    op: {
        name: np.array([error(name, op, offset) for offset in OFFSETS])
        for name in names
        if name in installed()
    }
    for op, names in NAMES.items()
}

# %%
# The error of nbnorm stays at float32's rounding of y. In training NumPy and PyTorch lose about a
# digit with every factor of ten. JAX loses two, because it computes the variance as in Flax,
# :math:`E[x^2] - E[x]^2`; where that becomes negative, y is NaN and the line has a gap. In
# inference libraries that subtract the mean first (nbnorm, NumPy, JAX) keep all digits, and those
# that compute scale x + shift (PyTorch, onnxruntime) do not. An error of 1 leaves no digit of y.

figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for panel, (op, lines) in zip(panels, errors.items(), strict=True):
    for name, line in lines.items():
        width = 4 if name == "nbnorm" else 1.5
        panel.loglog(OFFSETS, line, "o-", lw=width, ms=4, color=COLORS[name], label=name)
    panel.set(title=op, xlabel="mean / standard deviation")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
panels[0].set_ylabel("greatest error of y")
plt.show()
