"""
Accuracy where the mean is large
================================

How many digits are left of y when x lies far from 0, in standard deviations? Usual implementations
subtract a float32 mean, or take the variance as :math:`E[x^2] - E[x]^2`, and lose a digit with
every factor of ten. nbnorm sums around a shift, merges in float64, and subtracts the mean in two
parts; docs/math.md derives the forms.

Measured are nbnorm, the NumPy recipe of course notes, and those of PyTorch, JAX and onnxruntime
that are installed, as ``python benchmarks/compare.py`` times them. onnxruntime has inference only.
"""

import matplotlib.pyplot as plt
import numpy as np
import runs  # noqa: F401 - makes benchmarks known

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
# x is N(0, 1) plus an offset, float32. The oracle computes in float64 from the same x. Inference
# gets the offset as the running mean, and the running variance 1.


def error(name, op, offset):
    """Return the greatest distance of a peer's y from the oracle's."""
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
# nbnorm stays at float32's rounding of y. In training the others lose about a digit with every
# factor of ten, and JAX two, as it takes the variance as Flax does, :math:`E[x^2] - E[x]^2`: in the
# end that is negative, y is NaN, and the line has a gap. In inference whoever subtracts the mean
# first (nbnorm, NumPy, JAX) keeps all digits, and whoever computes scale x + shift (PyTorch,
# onnxruntime) does not. y is of size 4: an error of 1 is the end.

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
