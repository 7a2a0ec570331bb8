"""Peers against the oracle, before they are timed."""

import math
from typing import Any

import numpy as np

from benchmarks.peers import EPS, Batch, is_ours
from benchmarks.peers.pytorch import array_of
from nbnorm import reference

# What a result may lose to arithmetic, in units of float32 or float64 (2^-23, 2^-52), at the scale
# of N(0, 1). PyTorch channels-last, which adds up 4 million values one after the other at
# 16x3x512x512, loses 2^15: others may lose 2^17, a hundredth in float32.
OURS, OTHERS = 2.0**8, 2.0**17
# What one or two roundings to the storage type cost, in its units.
STORED = 2.0


def check(name: str, op: str, b: Batch, result: Any) -> None:
    """Raise AssertionError where a peer's result is not batch normalization.

    The first and the last channel are compared. A value that rounding puts on either side of 0 may
    pass ReLU here and not there: gradients of such values are not compared, and a sum of m terms
    may be off by as many as there are of them, a share of m.
    """
    some = [0, -1]
    results = [result] if op in ("forward", "inference") else result
    expected, unsure = _expected(op, b, some)
    stored = float(np.finfo(b.x.dtype).eps) if b.x.dtype.kind == "f" else 2.0**-7  # bfloat16
    loss = (OURS if is_ours(name) else OTHERS) * float(np.finfo(b.gamma.dtype).eps)
    masked = op in ("relu", "add+relu")
    for i, (got, ref) in enumerate(zip(map(as_array, results), expected, strict=True)):
        if ref.ndim == 1:
            # A sum of m terms of either sign.
            error = np.abs(got[..., some].astype(np.float64) - ref) / math.sqrt(b.values)
            allowed = loss + STORED * math.sqrt(stored) * masked
        else:
            error = np.abs(got[:, some].astype(np.float64) - ref)
            allowed = loss + STORED * stored * (1 + np.abs(ref))
            if masked and i > 0:
                error = np.where(unsure < STORED * loss + 4 * STORED * stored, 0, error)
        if not (error < allowed).all():
            raise AssertionError(
                f"{name} {op} in {b.x.dtype.name} at {b.x.shape} is off by {error.max():.2g}"
            )


def as_array(result: Any) -> np.ndarray:
    """Return a result as an array, a tensor's by way of its memory."""
    return array_of(result) if hasattr(result, "detach") else np.asarray(result)


def _expected(op: str, b: Batch, some: list[int]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """What the oracle returns for some channels, and how far ReLU's argument is from 0."""
    x, gamma, beta = b.x[:, some], b.gamma[some], b.beta[some]
    if op == "inference":
        mean, var = b.running_mean[some], b.running_var[some]
        return [reference.batch_norm_inference(x, gamma, beta, mean, var, eps=EPS)], None
    y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, eps=EPS)
    if op == "forward":
        return [y], None
    dy = b.dy[:, some]
    if op == "backward":
        return list(reference.batch_norm_backward(dy, x, gamma, mean, rstd)[:3]), None
    if op == "add+relu":
        y = y + b.residual[:, some]
    after = np.maximum(y, 0)
    gradients = reference.batch_norm_backward(
        dy, x, gamma, mean, rstd, beta=beta, y=after, activation="relu"
    )
    wanted = gradients if op == "add+relu" else gradients[:3]
    return [after, *wanted], np.abs(y)
