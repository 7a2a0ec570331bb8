"""nbnorm, into existing memory (`out=`) or with new results."""

from functools import partial

import nbnorm
from benchmarks.peers.batch import EPS, MOMENTUM, Batch, Call, Peer


def peer(*, last: bool = False, reuse: bool = False) -> Peer:
    def forward(b: Batch) -> Call:
        out = b.out if reuse else None
        return lambda: nbnorm.batch_norm_forward(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var,
            momentum=MOMENTUM, eps=EPS, out=out,
        ).y  # fmt: skip

    def backward(b: Batch) -> Call:
        out = b.out if reuse else None
        _, mean, rstd = nbnorm.batch_norm_forward(b.x, b.gamma, b.beta, eps=EPS)
        return lambda: nbnorm.batch_norm_backward(b.dy, b.x, b.gamma, mean, rstd, out=out)[:3]

    def inference(b: Batch) -> Call:
        out = b.out if reuse else None
        return lambda: nbnorm.batch_norm_inference(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var, eps=EPS, out=out
        )

    ops = {"forward": forward, "backward": backward, "inference": inference}
    if not reuse:
        ops |= {"relu": partial(_step, add=False), "add+relu": partial(_step, add=True)}
    return Peer(ops, last, reuse)


def _step(b: Batch, *, add: bool) -> Call:
    residual = b.residual if add else None

    def call() -> tuple:
        y, mean, rstd = nbnorm.batch_norm_forward(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var,
            momentum=MOMENTUM, eps=EPS, residual=residual, activation="relu",
        )  # fmt: skip
        gradients = nbnorm.batch_norm_backward(
            b.dy, b.x, b.gamma, mean, rstd, beta=b.beta, y=y if add else None, activation="relu"
        )
        return (y, *gradients) if add else (y, *gradients[:3])

    return call
