"""Check of peers against the oracle, before they are timed."""

import math
from typing import Any

import numpy as np

from benchmarks.peers import EPS, Batch, is_ours
from benchmarks.peers.pytorch import array_of
from nbnorm import reference

# Errors allowed for arithmetic on values from N(0, 1), in units of the last place of 1 (2^-23 in
# float32, 2^-52 in float64). At 16x3x512x512 PyTorch channels-last adds up 4 million values one
# after another and is off by 2^15 units. Peers are allowed 2^17, which is 0.016 in float32.
OURS, OTHERS = 2.0**8, 2.0**17
# Error allowed for one or two roundings to the storage type, in its units.
STORED = 2.0


def check(name: str, op: str, b: Batch, result: Any) -> None:
    """Raise AssertionError if a peer's result is not batch normalization.

    Compares the first and the last channel. Rounding can put a value near 0 on either side of it,
    so that ReLU passes it in one library but not in another. Gradients of such values are not
    compared, and sums over m values may differ by all of them; their number is proportional to m.
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
    """Return a result as an array, which shares memory with the result if that is a tensor."""
    return array_of(result) if hasattr(result, "detach") else np.asarray(result)


def _expected(op: str, b: Batch, some: list[int]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Return the oracle's results for some channels, and how far ReLU's argument is from 0."""
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
