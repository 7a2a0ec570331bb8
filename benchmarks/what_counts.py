"""Time masks, lengths and weights beside plain calls: `python benchmarks/what_counts.py`.

All take turns. Prints the least times of plain forward and backward, in milliseconds, and those of
the others as multiples.
"""

import argparse
import time

import numpy as np

import nbnorm

SHAPES = {
    "32 x 256 x 56 x 56": ((32, 256, 56, 56), 1, 3),
    "32 x 56 x 56 x 256": ((32, 56, 56, 256), -1, 2),
    "64 x 512 x 400": ((64, 512, 400), 1, 2),
    "64 x 400 x 512": ((64, 400, 512), -1, 1),
    "256 x 1024": ((256, 1024), 1, None),
}


def kinds(shape, axis, along):
    """Return what counts: of lengths and masks about 70 %."""
    rng = np.random.default_rng(1)
    shared = [1 if i == axis % len(shape) else n for i, n in enumerate(shape)]
    found = {
        "plain": {},
        "lengths": {},
        "mask": {"mask": rng.random(shared) < 0.7},
        "weights": {"weights": rng.random(shared, np.float32)},
        "mask of x's shape": {"mask": rng.random(shape) < 0.7},
    }
    if along is None:
        del found["lengths"]
    else:
        longest = shape[along]
        found["lengths"] = {"lengths": rng.integers(longest // 2, longest + 1, shape[0])}
        found["lengths"]["length_axis"] = along
    return found


def least(calls, rounds):
    """Return the least time of every call, in milliseconds, taking turns."""
    best = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def measure(shape, axis, along, rounds):
    """Return the least times of forward and backward of every kind."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    out, options = np.empty_like(x), kinds(shape, axis, along)
    _, mean, rstd = nbnorm.batch_norm_forward(x, axis=axis)

    def forward(counting):
        return lambda: nbnorm.batch_norm_forward(x, axis=axis, out=out, **counting)

    def backward(counting):
        return lambda: nbnorm.batch_norm_backward(
            dy, x, None, mean, rstd, axis=axis, out=out, **counting
        )

    return [
        least({name: make(counting) for name, counting in options.items()}, rounds)
        for make in (forward, backward)
    ]


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    print(f"{'shape':20} {'pass':9} {'plain, ms':>9}  others, in multiples")
    for name in arguments.shapes:
        passes = measure(*SHAPES[name], arguments.rounds)
        for direction, best in zip(("forward", "backward"), passes, strict=True):
            plain = best.pop("plain")
            others = ", ".join(f"{kind} {ms / plain:.2f}" for kind, ms in best.items())
            print(f"{name:20} {direction:9} {plain:9.2f}  {others}")


if __name__ == "__main__":
    main()
