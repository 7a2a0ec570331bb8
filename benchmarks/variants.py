"""Time variants of batch normalization relative to plain calls: `python benchmarks/variants.py`.

Calls are interleaved. Prints the minimum time of plain forward and backward, in milliseconds, and
the variants as multiples of it: masks, lengths and weights (`counts`), activations, renorm.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import nbnorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import alternate

# The shapes, their channel axis, and the axis of lengths.
COUNTS = {
    (32, 256, 56, 56): (1, 3),
    (32, 56, 56, 256): (-1, 2),
    (64, 512, 400): (1, 2),
    (64, 400, 512): (-1, 1),
    (256, 1024): (1, None),
}
PLAIN = [(32, 256, 56, 56), (32, 64, 56, 56), (8, 64, 28, 28), (256, 512)]
ACTIVATIONS = ("relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "sigmoid", "tanh")


class Arrays:
    """Arguments of one shape, and the calls of both passes with any options."""

    def __init__(self, shape, axis=1):
        rng = np.random.default_rng(0)
        self.shape, self.axis, C = shape, axis, shape[axis]
        self.x, self.dy = rng.standard_normal((2, *shape), np.float32)
        self.affine = rng.uniform(0.5, 2, C).astype(np.float32), np.zeros(C, np.float32)
        self.running = np.zeros(C, np.float32), np.ones(C, np.float32)
        _, self.mean, self.rstd = nbnorm.batch_norm_forward(self.x, *self.affine, axis=axis)
        self.out = np.empty_like(self.x)

    def forward(self, **options):
        return lambda: nbnorm.batch_norm_forward(
            self.x, *self.affine, *self.running, axis=self.axis, out=self.out, **options
        )

    def backward(self, **options):
        gamma, beta = self.affine
        if "activation" in options:
            options["beta"] = beta
        return lambda: nbnorm.batch_norm_backward(
            self.dy, self.x, gamma, self.mean, self.rstd, axis=self.axis, out=self.out, **options
        )


def counts(shape):
    """Return plain calls, and calls with lengths, weights, and masks that keep about 70 % of x."""
    axis, along = COUNTS[shape]
    arrays, rng = Arrays(shape, axis), np.random.default_rng(1)
    shared = [1 if i == axis % len(shape) else n for i, n in enumerate(shape)]
    kinds = {"plain": {}}
    if along is not None:
        lengths = rng.integers(shape[along] // 2, shape[along] + 1, shape[0])
        kinds["lengths"] = {"lengths": lengths, "length_axis": along}
    kinds["mask"] = {"mask": rng.random(shared) < 0.7}
    kinds["weights"] = {"weights": rng.random(shared, np.float32)}
    kinds["mask of x's shape"] = {"mask": rng.random(shape) < 0.7}
    return both(arrays, kinds)


def activations(shape):
    """Return calls with every activation."""
    kinds = {"plain": {}} | {name: {"activation": name} for name in ACTIVATIONS}
    return both(Arrays(shape), kinds)


def both(arrays, kinds):
    """Return the calls of both passes with the options of every kind."""
    return {
        name: {kind: make(**options) for kind, options in kinds.items()}
        for name, make in (("forward", arrays.forward), ("backward", arrays.backward))
    }


def renorm(shape):
    """Return calls of batch norm and of batch renormalization."""
    arrays = Arrays(shape)
    gamma, _ = arrays.affine
    _, mean, rstd, r, d = nbnorm.batch_renorm_forward(arrays.x, *arrays.affine, *arrays.running)
    return {
        "forward": {
            "plain": arrays.forward(),
            "renorm": lambda: nbnorm.batch_renorm_forward(
                arrays.x, *arrays.affine, *arrays.running, out=arrays.out
            ),
        },
        "backward": {
            "plain": arrays.backward(),
            "renorm": lambda: nbnorm.batch_renorm_backward(
                arrays.dy, arrays.x, gamma, mean, rstd, r, d, out=arrays.out
            ),
        },
    }


VARIANTS = {
    "counts": (counts, COUNTS),
    "activations": (activations, PLAIN),
    "renorm": (renorm, PLAIN),
}


def main():
    """Print a table of every variant asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - set(VARIANTS):
        parser.error(f"expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    for variant in arguments.variants or VARIANTS:
        make, shapes = VARIANTS[variant]
        print(f"{'shape':20} {'pass':9} {'plain, ms':>9}  variants, in multiples of plain")
        for shape in shapes:
            for direction, calls in make(shape).items():
                times = alternate(calls, arguments.rounds)
                best = {kind: 1e3 * found.least for kind, found in times.items()}
                plain = best.pop("plain")
                others = ", ".join(f"{kind} {ms / plain:.2f}" for kind, ms in best.items())
                name = " x ".join(map(str, shape))
                print(f"{name:20} {direction:9} {plain:9.3f}  {others}", flush=True)


if __name__ == "__main__":
    main()
