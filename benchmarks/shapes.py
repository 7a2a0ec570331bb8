"""The shapes that benchmarks measure. The channel axis is axis 1."""

from typing import NamedTuple

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """Why a shape is measured, and how often it occurs in one pass through ResNet-50."""

    why: str
    count: int = 0


_N = 32

# The 53 batch norms of ResNet-50 (with the stride in the 3 x 3 convolution, as in torchvision) for
# images of 224 x 224.
RESNET50: dict[Shape, Entry] = {
    (_N, C, side, side): Entry("ResNet-50", count)
    for C, side, count in [
        (64, 112, 1),
        (64, 56, 6),
        (256, 56, 4),
        (128, 56, 1),
        (128, 28, 7),
        (512, 28, 5),
        (256, 28, 1),
        (256, 14, 11),
        (1024, 14, 7),
        (512, 14, 1),
        (512, 7, 5),
        (2048, 7, 4),
    ]
}

SHAPES: dict[Shape, Entry] = RESNET50 | {
    (60, 100): Entry("hidden layer and batch of the paper's Figure 1"),
    (256, 1024): Entry("(N, C) that stays in a core's cache"),
    (4096, 512): Entry("(N, C) that does not"),
    (16, 3, 512, 512): Entry("images: fewer channels than cores"),
    (8, 16, 32, 32): Entry("small images"),
    (2, 8, 4, 4): Entry("tiny: nothing but the call"),
    (4, 32, 16, 64, 64): Entry("a volume, NCDHW"),
}

SMALL: tuple[Shape, ...] = ((2, 8, 4, 4), (60, 100))
QUICK: tuple[Shape, ...] = ((60, 100), (8, 16, 32, 32), (_N, 256, 14, 14))


def name_of(shape: Shape) -> str:
    """Return the shape as text, such as 32x256x56x56."""
    return "x".join(map(str, shape))


def shape_of(name: str) -> Shape:
    """Return (32, 256, 56, 56) for 32x256x56x56; raise ValueError for anything else."""
    shape = tuple(map(int, name.split("x")))
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"expected a shape such as 32x256x56x56, got {name}")
    return shape
