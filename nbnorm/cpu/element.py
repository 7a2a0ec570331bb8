"""What a pass does with one value, for `intrinsics.each` to do with all of a row or tile.

A coefficient is a number in the row traversal, where all values belong to one channel, and an array
with a number for each column in the column traversal; `at` reads either. Four rows at a time take
one load and one store of the sums for all four, two rows one load of the coefficients for both.
"""

import numpy as np
from numba import types

from nbnorm.cpu.intrinsics import at_once
from nbnorm.cpu.jit import by_types, fused_by_types, none_without, ordered
from nbnorm.cpu.storage import load, store, stored_as_zero


@by_types
def at(value, j):
    """value[j] for an array, the value itself for a number, None for None."""
    if isinstance(value, types.Array):
        return lambda value, j: value[j]
    return lambda value, j: value


@by_types
def either(value, other):
    """The value; the other one for None."""
    if isinstance(value, types.NoneType):
        return lambda value, other: other
    return lambda value, other: value


@fused_by_types
def less(x, hi, u):
    """x u - hi; x - hi without a unit."""
    if isinstance(u, types.NoneType):
        return lambda x, hi, u: x - hi
    return lambda x, hi, u: x * u - hi


@by_types
def times(value, unit):
    """value unit; the value itself without a unit."""
    if isinstance(unit, types.NoneType):
        return lambda value, unit: value
    return lambda value, unit: value * unit


@none_without("b", fused=True)
def normalised(x, hi, u, a, b):
    """y before the activation; backward recomputes the ReLU mask by the same expression."""
    return less(x, hi, u) * a + b


@ordered
def rectified(v, floor):
    """max(v, floor) that lets NaN pass; floor is 0 for ReLU, -inf for no activation."""
    return floor if v <= floor else v


@ordered
def masked(dy, y, v, least, zero):
    """dy where ReLU let the value pass: y > 0, with y as stored or, where that is None, v > least.

    Where both are None there was no activation.
    """
    if y is not None:
        return dy if y > 0 else zero
    if v is not None:
        return dy if v > least else zero
    return dy


@ordered
def gradient(j, dy, x, y, hi, u, a, b, zero):
    """dy[j] as it arrives at the normalisation."""
    v = normalised(load(x, j), at(hi, j), at(u, j), at(a, j), at(b, j))
    return masked(at_once(load(dy, j)), load(y, j), v, stored_as_zero(x), zero)


@ordered
def centred(j, g, x, hi, u, hpq, v):
    """(g v - h) - ((x u - hi) p + q); g v where statistics are constants (no h, p, q)."""
    if hpq is None:
        return times(g, at(v, j))
    h, p, q = hpq
    return less(g, at(h, j), at(v, j)) - normalised(
        load(x, j), at(hi, j), at(u, j), at(p, j), at(q, j)
    )


@ordered
def add_difference(j, x, K, s):
    """Add x - K."""
    s[j] += load(x, j) - at(K, j)


@ordered
def add_differences(j, x, K, s):
    """`add_difference` for four rows."""
    d0 = load(x[0], j) - at(K, j)
    d1 = load(x[1], j) - at(K, j)
    d2 = load(x[2], j) - at(K, j)
    d3 = load(x[3], j) - at(K, j)
    s[j] += (d0 + d1) + (d2 + d3)


@ordered
def add_row(j, x, K, s, q):
    """Add d and d^2, d = x - K."""
    d = load(x, j) - at(K, j)
    s[j] += d
    q[j] += d * d


@ordered
def add_rows(j, x, K, s, q):
    """`add_row` for four rows."""
    d0 = load(x[0], j) - at(K, j)
    d1 = load(x[1], j) - at(K, j)
    d2 = load(x[2], j) - at(K, j)
    d3 = load(x[3], j) - at(K, j)
    s[j] += (d0 + d1) + (d2 + d3)
    q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@ordered
def drain(j, sums, wide):
    """Move sums in x's dtype to float64."""
    wide[j] += sums[j]
    sums[j] = 0


@ordered
def add_half(j, sums, wide, half):
    """Add the upper half of the sums to the lower half, in float64."""
    wide[j] = np.float64(sums[j]) + np.float64(sums[j + half])


@ordered
def copy(j, values, out):
    """out = values."""
    out[j] = values[j]


@ordered
def fill(j, value, out):
    """out = value."""
    out[j] = value


@ordered
def activated(j, x, residual, hi, u, a, b, floor):
    """max((x u - hi) a + b [+ residual], floor)."""
    v = normalised(load(x, j), at(hi, j), at(u, j), at(a, j), at(b, j))
    if residual is not None:
        v += load(residual, j)
    return rectified(v, floor)


@ordered
def normalise(j, x, residual, hi, u, a, b, floor, y):
    """y = max((x u - hi) a + b [+ residual], floor)."""
    store(y, j, activated(j, x, residual, hi, u, a, b, floor))


@ordered
def normalise_rows(j, x, residual, hi, u, a, b, floor, y):
    """`normalise` for two rows."""
    v0 = activated(j, x[0], residual[0], hi, u, a, b, floor)
    v1 = activated(j, x[1], residual[1], hi, u, a, b, floor)
    store(y[0], j, v0)
    store(y[1], j, v1)


@ordered
def add_gradient_row(j, dy, x, y, hi, u, a, b, scale, zero, s, t):
    """Add g and g (x u - hi) scale, g = dy masked by ReLU."""
    g = gradient(j, dy, x, y, hi, u, a, b, zero)
    s[j] += g
    t[j] += g * (less(load(x, j), at(hi, j), at(u, j)) * at(scale, j))


@ordered
def add_gradient_rows(j, dy, x, y, hi, u, a, b, scale, zero, s, t):
    """`add_gradient_row` for four rows."""
    g0 = gradient(j, dy[0], x[0], y[0], hi, u, a, b, zero)
    g1 = gradient(j, dy[1], x[1], y[1], hi, u, a, b, zero)
    g2 = gradient(j, dy[2], x[2], y[2], hi, u, a, b, zero)
    g3 = gradient(j, dy[3], x[3], y[3], hi, u, a, b, zero)
    t0 = g0 * (less(load(x[0], j), at(hi, j), at(u, j)) * at(scale, j))
    t1 = g1 * (less(load(x[1], j), at(hi, j), at(u, j)) * at(scale, j))
    t2 = g2 * (less(load(x[2], j), at(hi, j), at(u, j)) * at(scale, j))
    t3 = g3 * (less(load(x[3], j), at(hi, j), at(u, j)) * at(scale, j))
    s[j] += (g0 + g1) + (g2 + g3)
    t[j] += (t0 + t1) + (t2 + t3)


@ordered
def differentiate(j, dy, x, y, hi, u, a, b, hpq, v, f, zero, dx, dresidual):
    """dx = gamma rstd (g - mean(g) - x_hat mean(g x_hat)), dresidual = g; g = dy masked by ReLU.

    Each is written where it is wanted. dy may be either of them: it is read first.
    """
    g = gradient(j, dy, x, y, hi, u, a, b, zero)
    d = centred(j, g, x, hi, u, hpq, v)
    put(j, g, d, f, dx, dresidual)


@ordered
def put(j, g, d, f, dx, dresidual):
    """Write dresidual = g and dx = f d, each where it is wanted."""
    if dresidual is not None:
        store(dresidual, j, g)
    if dx is not None:
        store(dx, j, at(f, j) * d)


@ordered
def differentiate_rows(j, dy, x, y, hi, u, a, b, hpq, v, f, zero, dx, dresidual):
    """`differentiate` for two rows."""
    g0 = gradient(j, dy[0], x[0], y[0], hi, u, a, b, zero)
    g1 = gradient(j, dy[1], x[1], y[1], hi, u, a, b, zero)
    d0 = centred(j, g0, x[0], hi, u, hpq, v)
    d1 = centred(j, g1, x[1], hi, u, hpq, v)
    put(j, g0, d0, f, dx[0], dresidual[0])
    put(j, g1, d1, f, dx[1], dresidual[1])
