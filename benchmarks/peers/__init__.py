"""Batch normalization by nbnorm and its peers, as one dict for tests and benchmarks.

The ops, and what their calls return (arrays or tensors in the shape of x and in any order in
memory):

==========  =====================================================================================
forward     training forward, updates running statistics: y
backward    its gradients: dx, dgamma, dbeta
inference   with running statistics: y
relu        a step of BN + ReLU, forward and backward: y, dx, dgamma, dbeta
add+relu    a step of BN + residual + ReLU: y, dx, dgamma, dbeta, dresidual
==========  =====================================================================================

Setting up a peer imports its library; all libraries use Numba's number of threads. `PEERS` includes
peers that are not installed, since their figures may be read from a file; `installed` returns the
installed ones.
"""

import sys
from importlib.util import find_spec

from benchmarks.peers import jax_jit, onnx_runtime, ours, pytorch, recipe
from benchmarks.peers.batch import EPS, MOMENTUM, Batch, Call, LeftOut, Peer

__all__ = [
    "EPS", "MOMENTUM", "OPS", "PASSES", "PEERS", "Batch", "Call", "LeftOut", "Peer",
    "forget_shapes", "installed", "is_ours", "ours_for",
]  # fmt: skip

PASSES = ("forward", "backward", "inference")
OPS = (*PASSES, "relu", "add+relu")

PEERS: dict[str, Peer] = {
    "nbnorm": ours.peer(reuse=True),
    "nbnorm channels-last": ours.peer(last=True, reuse=True),
    "nbnorm, new output": ours.peer(),
    "nbnorm channels-last, new output": ours.peer(last=True),
    "NumPy": recipe.peer(),
    "PyTorch": pytorch.operators(),
    "PyTorch channels-last": pytorch.operators(last=True),
    "F.batch_norm": pytorch.functional(),
    "F.batch_norm channels-last": pytorch.functional(last=True),
    "torch.compile": pytorch.functional(compiled=True),
    "torch.compile channels-last": pytorch.functional(last=True, compiled=True),
    "JAX": jax_jit.peer(),
    "onnxruntime": onnx_runtime.peer(),
}


def installed() -> list[str]:
    """Return the peers whose library is installed."""
    return [name for name, peer in PEERS.items() if find_spec(peer.library)]


def is_ours(name: str) -> bool:
    return name.startswith("nbnorm")


def ours_for(name: str, op: str) -> str:
    """Return the nbnorm peer with the same layout and kind of output."""
    peer = PEERS[name]
    return next(
        n
        for n, p in PEERS.items()
        if is_ours(n) and op in p.ops and (p.last, p.reuse) == (peer.last, peer.reuse)
    )


def forget_shapes() -> None:
    """Drop the functions that torch.compile made for earlier shapes.

    It compiles a function for at most eight shapes, then silently runs it uncompiled.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
