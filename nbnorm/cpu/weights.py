"""Weights of values, as the traversals of values with weights read them.

In those traversals x is a tuple (view of x, weights, fill), which the passes of kernels.py hand on.
The weights are a view like x's, whose stride along c is None if all channels share them. For S = 1
that view may be replaced by (memory, stride of n): one weight per sample, also shared. Weights are
uint8 (a mask, weights of 0 and 1) or of the compute dtype.
"""

from numba import types

from nbnorm.cpu import element
from nbnorm.cpu.intrinsics import each, piece, row
from nbnorm.cpu.jit import by_types, none_without, ordered

# Planes of this many values or more are traversed by rows, where all channels can read the same
# weights. Columns need a weight for each value, or for each sample if S = 1.
WEIGHTED_PLANE = 32


@by_types
def weights_of(w, n, c, s, size):
    """Weights of x[n, c, s : s + size]: an array, or the one weight of sample n; None for None."""
    if isinstance(w, types.NoneType):
        return lambda w, n, c, s, size: None
    if len(w.types) == 2:
        return lambda w, n, c, s, size: w[0][n * w[1]]
    if isinstance(w.types[2], types.NoneType):
        return lambda w, n, c, s, size: piece((w[0], w[1], 0), n, c, s, size)
    return lambda w, n, c, s, size: piece(w, n, c, s, size)


@by_types
def own(w, sums):
    """`sums` if each channel has weights of its own; None if all share them."""
    if len(w.types) == 2 or isinstance(w.types[2], types.NoneType):
        return lambda w, sums: None
    return lambda w, sums: sums


@none_without("fill")
def filled(fill, like):
    """fill in the compute dtype; None for None."""
    return like.dtype.type(fill)


@by_types
def counts(w, n):
    """Whether sample n counts; True if its values have weights of their own."""
    if len(w.types) == 2:
        return lambda w, n: w[0][n * w[1]] != 0
    return lambda w, n: True


@by_types
def sample_weight(w, n):
    """Weight of sample n; 0 if its values have weights of their own."""
    if len(w.types) > 2:
        return lambda w, n: 0.0
    return lambda w, n: element.weight64(w[0], n * w[1])


def masks_samples(w):
    """Whether w, by type, is a mask of samples, so that each value that counts has weight 1."""
    return len(w.types) == 2 and element.is_mask(w.types[0])


@by_types
def alike(w, n, other):
    """Whether two samples have the same weight; True if their values have weights of their own."""
    if len(w.types) == 2:
        return lambda w, n, other: w[0][n * w[1]] == w[0][other * w[1]]
    return lambda w, n, other: True


@ordered
def beside(w, n, r0, r1):
    """Whether sample n of r0 <= n < r1 does not count, but one of its neighbours does.

    Such rows are prefetched (see `prefetch`): otherwise normalising 32 x 56 x 56 x 256 with 30 % of
    the rows masked at random took 14.9 ms, twice as long as without a mask.
    """
    if counts(w, n):
        return False
    return (n > r0 and counts(w, n - 1)) or (n + 1 < r1 and counts(w, n + 1))


@ordered
def weigh_unit(w, N, S, partial, u):
    """partial[u] = sums of weights over an equal share of the samples."""
    parts, C = partial.shape
    view, sums = (w, C * S, S), row(partial, u)
    for n in range(u * N // parts, (u + 1) * N // parts):
        if S == 1:
            each(C, element.add_value, (sums, piece(view, n, 0, 0, C)))
            continue
        for c in range(C):
            sums[c] += sum_of_weights(piece(view, n, c, 0, S))


@by_types
def sum_of_weights(w):
    """Sum of an array of weights, in float64; the number of values of a mask."""

    def count(w):
        found = 0
        for i in range(w.size):
            found += w[i] != 0
        return float(found)

    def add(w):
        found = 0.0
        for i in range(w.size):
            found += w[i]
        return found

    return count if w.dtype == types.uint8 else add
