"""Time the second derivative in nbnorm and in PyTorch: `python benchmarks/second_order.py`.

The two libraries alternate, each in its own processes, so that idle threads of one do not slow down
the other. Prints the minimum over all rounds, in milliseconds. PyTorch's time is that of
`torch.autograd.grad` through the gradient of `torch.nn.functional.batch_norm`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import in_turns, least

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (256, 1024), (4096, 512)]


def nbnorm_call(x, dy, ddx, gamma):
    """Return nbnorm's second derivative of these arrays, as a function without arguments."""
    import nbnorm

    _, mean, rstd = nbnorm.batch_norm_forward(x, gamma)
    directions = ddx, gamma, gamma
    return lambda: nbnorm.batch_norm_double_backward(*directions, dy, x, gamma, mean, rstd)


def torch_call(x, dy, ddx, gamma):
    """Return PyTorch's second derivative of these arrays, as a function without arguments."""
    import torch

    x, dy, weight = (torch.from_numpy(a).requires_grad_() for a in (x, dy, gamma))
    bias = torch.zeros_like(weight).requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    grads = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    directions = torch.from_numpy(ddx), weight.detach(), weight.detach()
    return lambda: torch.autograd.grad(grads, (dy, x, weight), directions, retain_graph=True)


CALLS = {"nbnorm": nbnorm_call, "torch": torch_call}


def times(library):
    """Return the minimum time for each shape."""
    rng, found = np.random.default_rng(0), []
    for shape in SHAPES:
        x, dy, ddx = (rng.standard_normal(shape, np.float32) for _ in range(3))
        call = CALLS[library](x, dy, ddx, np.ones(shape[1], np.float32))
        found.append({library: least(call)})
    return found


def main():
    """Print a table of all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library", choices=CALLS, help="print one round of one library as JSON")
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(times(arguments.library)))
        return
    print(f"{'shape':18} {'nbnorm':>8} {'torch':>8} {'ratio':>6}")
    for shape, best in zip(SHAPES, in_turns(__file__, CALLS, arguments.rounds), strict=True):
        ours, theirs = best["nbnorm"], best["torch"]
        print(f"{' x '.join(map(str, shape)):18} {ours:8.2f} {theirs:8.2f} {theirs / ours:6.1f}")


if __name__ == "__main__":
    main()
