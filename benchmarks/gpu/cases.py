"""What is checked: shapes, places in memory, and data that are hard on statistics."""

import math
from typing import Any, NamedTuple

import numpy as np

Axis = int | tuple[int, ...]
Shape = tuple[int, ...]

ALL = ("normal", "offset", "scales", "first", "extreme", "constant")
NORMAL = ("normal",)
SOME = ("normal", "offset")


class Case(NamedTuple):
    """Arrays of one shape: x and what it is checked with."""

    shape: Shape
    axis: Axis = 1
    place: str = "C"  # of x, as machine.PLACES has it
    others: str = ""  # of dy, residual and results; x's where it is empty
    parameters: str = "float32"
    kinds: tuple[str, ...] = NORMAL

    @property
    def label(self) -> str:
        """Name for people."""
        parts = ["x".join(map(str, self.shape)), f"axis {self.axis}", self.place]
        if self.others:
            parts.append(f"others {self.others}")
        if self.parameters != "float32":
            parts.append(f"parameters {self.parameters}")
        return ", ".join(parts)

    @property
    def elsewhere(self) -> str:
        """Place of everything of x's shape but x."""
        return self.others or self.place


# The first few tell most. Planes of 256 values and more are traversed by rows, smaller ones, (N, C)
# and channels-last by columns; either way 16 bytes at a time where all addresses and strides allow
# it and value by value elsewhere.
CASES: tuple[Case, ...] = (
    Case((4, 8, 16, 16), kinds=ALL),
    Case((9, 16, 14, 14), kinds=ALL),
    Case((60, 96), kinds=ALL),
    Case((4, 24, 9, 10), place="channels-last", kinds=ALL),
    Case((2, 5, 31, 33), kinds=SOME),  # planes of 1023: value by value
    Case((33, 37, 7, 7), kinds=SOME),
    Case((12, 64, 7, 7), kinds=SOME),
    Case((5, 7, 14, 14), kinds=SOME),
    Case((60, 100), place="misaligned", kinds=SOME),
    Case((4, 8, 16, 16), place="misaligned", kinds=SOME),
    Case((1023, 5), kinds=SOME),
    Case((64, 1), kinds=SOME),  # C = 1
    Case((4, 1, 16, 16), kinds=SOME),
    Case((300, 1, 3, 3), kinds=SOME),
    Case((1, 8, 32, 32), kinds=SOME),  # N = 1
    Case((1, 12, 7, 7), kinds=SOME),
    Case((2, 3, 96, 128), kinds=SOME),  # images
    Case((2, 96, 128, 3), axis=-1, kinds=SOME),
    Case((3, 3, 65, 63), place="channels-last", kinds=SOME),
    Case((16, 3, 5, 7), axis=(1, 2, 3), kinds=ALL),  # per activation
    Case((40, 1, 28, 28), axis=(1, 2, 3)),
    Case((2, 4, 3, 12, 11), kinds=SOME),  # a volume
    Case((6, 10, 50), kinds=SOME),
    Case((5, 300, 6), axis=0),
    Case((4, 3, 128, 130), kinds=SOME),  # several chunks of each channel
    Case((3000, 40), kinds=SOME),
    Case((700, 24, 5, 5), kinds=SOME),
    Case((2, 2050)),  # many channels
    Case((2, 513, 3, 2)),
    Case((4, 6, 20, 20), place="apart", kinds=SOME),
    Case((4, 80, 5, 5), place="apart", kinds=SOME),
    Case((60, 256), place="apart"),
    Case((4, 6, 20, 20), place="cropped", kinds=SOME),
    Case((4, 6, 9, 9), place="cropped"),
    Case((4, 6, 20, 20), place="backwards"),
    Case((4, 6, 20, 20), place="F"),
    Case((50, 60), place="F"),
    Case((4, 6, 20, 20), others="channels-last"),
    Case((4, 6, 20, 20), place="channels-last", others="C"),
    Case((4, 6, 20, 20), others="misaligned"),
    Case((4, 24, 7, 7), others="cropped"),
    Case((4, 8, 16, 16), parameters="float64"),
    Case((9, 16, 14, 14), parameters="float64"),
    Case((4, 8, 16, 16), parameters="float16"),
    Case((60, 96), parameters="bfloat16"),
)

# Standard deviations that the mean is from 0: a half keeps few bits of a greater one.
OFFSETS = {"float32": 1e6, "float64": 1e6, "float16": 1e3, "bfloat16": 1e2}
# The scale of a channel, up and down: float32 does not hold its squares, float64 just does.
EXTREMES = {"float32": 1e25, "float64": 1e120}


class Given(NamedTuple):
    """Arguments of the functions, in NumPy."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    eps: float


def kinds_of(case: Case, dtype: str) -> tuple[str, ...]:
    """Return the kinds of data that a dtype can hold."""
    return tuple(kind for kind in case.kinds if kind != "extreme" or dtype in EXTREMES)


def draw(
    case: Case, dtype: str, kind: str, rng: np.random.Generator, parameters: Any = None
) -> Given:
    """Draw the arguments; `parameters` is the dtype of gamma, beta and running statistics."""
    kept = [a % len(case.shape) for a in np.atleast_1d(case.axis)]
    channels = tuple(case.shape[a] for a in sorted(kept))
    wide = parameters or np.dtype("float64" if dtype == "float64" else "float32")
    running = [rng.normal(size=channels), rng.uniform(0.5, 2, channels)]
    x = _data(case.shape, kept, dtype, kind, rng)
    return Given(
        x=x.astype(dtype),
        dy=(rng.normal(size=case.shape) + 0.5).astype(dtype),
        residual=rng.normal(size=case.shape).astype(dtype),
        gamma=(rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels)).astype(wide),
        beta=rng.normal(size=channels).astype(wide),
        running_mean=running[0].astype(wide),
        running_var=running[1].astype(wide),
        eps=0.0 if kind in ("extreme", "constant") else 1e-5,
    )


def _data(
    shape: Shape, kept: list[int], dtype: str, kind: str, rng: np.random.Generator
) -> np.ndarray:
    x = rng.normal(size=shape)
    broad = [n if a in kept else 1 for a, n in enumerate(shape)]
    C = math.prod(broad)
    if kind == "offset":
        return x + OFFSETS[dtype]
    if kind == "scales":  # of channels, over many orders of magnitude
        reach = 1 if dtype == "float16" else 4
        return x * np.logspace(-reach, reach, C).reshape(broad)
    if kind == "first":  # sums are taken around the channel's first value: let it be far off
        first = tuple(slice(None) if a in kept else slice(0, 1) for a in range(len(shape)))
        x[first] = 1e3
        return x
    if kind == "extreme":
        return x * np.resize([1.0, EXTREMES[dtype], 1 / EXTREMES[dtype]], C).reshape(broad)
    if kind == "constant":
        return np.broadcast_to(rng.normal(size=broad), shape)
    return x + 0.25
