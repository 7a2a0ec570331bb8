"""What each pass does with one value; `intrinsics.each` does it with a whole row or tile.

A coefficient is a scalar in the row traversal, where all values belong to one channel, and an array
with one value per column in the column traversal; `at` reads either. The functions for four rows
load and store sums once for all four, those for two rows load coefficients once for both.
"""

import numpy as np
from numba import types

from nbnorm.cpu.functions import derivative_at, inverts, value_at
from nbnorm.cpu.intrinsics import unconditional
from nbnorm.cpu.jit import (
    by_types,
    fused_by_types,
    inlined,
    inlined_by_types,
    none_without,
    ordered,
)
from nbnorm.cpu.storage import load, store, stored_as_zero


@by_types
def at(value, j):
    """value[j] of an array, a scalar itself, None for None."""
    if isinstance(value, types.Array):
        return lambda value, j: value[j]
    return lambda value, j: value


@by_types
def either(value, other):
    """value, or `other` if value is None."""
    if isinstance(value, types.NoneType):
        return lambda value, other: other
    return lambda value, other: value


@fused_by_types
def deviation(x, hi, u):
    """x u - hi; x - hi if u is None."""
    if isinstance(u, types.NoneType):
        return lambda x, hi, u: x - hi
    return lambda x, hi, u: x * u - hi


@by_types
def times(value, unit):
    """value unit; value if unit is None."""
    if isinstance(unit, types.NoneType):
        return lambda value, unit: value
    return lambda value, unit: value * unit


@none_without("b", fused=True)
def normalised(x, hi, u, a, b):
    """y before residual and activation: (x u - hi) a + b, or None if b is None.

    Backward recomputes it with the same expression.
    """
    return deviation(x, hi, u) * a + b


@inlined_by_types
def taken(x, j, act):
    """x[j] or, if `act` is an inverse and x holds y, v recovered from y[j]."""
    if inverts(act):
        return lambda x, j, act: value_at(load(x, j), act)
    return lambda x, j, act: load(x, j)


@inlined_by_types
def before(x, hi, u, a, b, act):
    """v without the residual, from the result of `taken`."""
    if inverts(act):
        return lambda x, hi, u, a, b, act: x
    return lambda x, hi, u, a, b, act: normalised(x, hi, u, a, b)


@ordered
def rectified(v, floor):
    """max(v, floor), but NaN stays NaN; floor is 0 for ReLU, -inf for no activation."""
    return floor if v <= floor else v


@inlined_by_types
def activate(v, act):
    """act(v); `act` is the floor of `rectified`, or an activation of `functions`."""
    if isinstance(act, types.Number):
        return lambda v, act: rectified(v, act)
    return lambda v, act: value_at(v, act)


@ordered
def masked(dy, y, v, threshold, zero):
    """dy if ReLU let the value pass, else 0.

    The value passed if y > 0 or, where y is None, if v > threshold, v being y before it is stored.
    If both are None there was no activation.
    """
    if y is not None:
        return dy if y > 0 else zero
    if v is not None:
        return dy if v > threshold else zero
    return dy


@inlined
def sloped(dy, residual, v, threshold, act):
    """dy act'(v [+ residual])."""
    if residual is not None:
        v += residual
    return dy * derivative_at(v, act)


@inlined_by_types
def through(dy, y, v, threshold, act):
    """g: dy `masked` if `act` is 0 (ReLU or none), else `sloped`, y being the residual or None."""
    if isinstance(act, types.Number):
        return lambda dy, y, v, threshold, act: masked(dy, y, v, threshold, act)
    return lambda dy, y, v, threshold, act: sloped(dy, y, v, threshold, act)


@inlined
def masked_dy(j, dy, x, y, hi, u, a, b, act):
    """g = dy[j] act'(z)."""
    v = before(taken(x, j, act), at(hi, j), at(u, j), at(a, j), at(b, j), act)
    return through(unconditional(load(dy, j)), load(y, j), v, stored_as_zero(x), act)


@inlined
def centred(j, g, x, hi, u, hpq, v, act):
    """dx / f = (g v - h) - ((x u - hi) p + q), or g v for frozen statistics (hpq is None)."""
    if hpq is None:
        return times(g, at(v, j))
    h, p, q = hpq
    return deviation(g, at(h, j), at(v, j)) - normalised(
        taken(x, j, act), at(hi, j), at(u, j), at(p, j), at(q, j)
    )


@ordered
def add_moment_row(j, x, K, s, q):
    """s += d and, unless q is None, q += d^2, where d = x - K."""
    d = load(x, j) - at(K, j)
    s[j] += d
    if q is not None:
        q[j] += d * d


@ordered
def add_moment_rows(j, x, K, s, q):
    """`add_moment_row` of four rows."""
    d0 = load(x[0], j) - at(K, j)
    d1 = load(x[1], j) - at(K, j)
    d2 = load(x[2], j) - at(K, j)
    d3 = load(x[3], j) - at(K, j)
    s[j] += (d0 + d1) + (d2 + d3)
    if q is not None:
        q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@ordered
def drain(j, sums, wide):
    """Move sums from the compute dtype to float64: wide += sums, sums = 0."""
    wide[j] += sums[j]
    sums[j] = 0


@ordered
def add_half(j, sums, wide, half):
    """wide[j] = sums[j] + sums[j + half], in float64."""
    wide[j] = np.float64(sums[j]) + np.float64(sums[j + half])


@ordered
def copy(j, values, out):
    """out[j] = values[j], in the compute dtype."""
    out[j] = load(values, j)


@ordered
def fill(j, value, out):
    """out[j] = value."""
    out[j] = value


@inlined
def activated(j, x, residual, hi, u, a, b, floor):
    """act((x u - hi) a + b [+ residual]), where act is `floor`."""
    v = normalised(load(x, j), at(hi, j), at(u, j), at(a, j), at(b, j))
    if residual is not None:
        v += load(residual, j)
    return activate(v, floor)


@inlined
def apply(j, x, residual, hi, u, a, b, floor, y):
    """y = act((x u - hi) a + b [+ residual]), where act is `floor`."""
    store(y, j, activated(j, x, residual, hi, u, a, b, floor))


@inlined
def apply_rows(j, x, residual, hi, u, a, b, floor, y):
    """`apply` of two rows."""
    v0 = activated(j, x[0], residual[0], hi, u, a, b, floor)
    v1 = activated(j, x[1], residual[1], hi, u, a, b, floor)
    store(y[0], j, v0)
    store(y[1], j, v1)


@inlined
def add_gradient_row(j, dy, x, y, hi, u, a, b, scale, act, kept, s, t):
    """s += g and t += g (x u - hi) scale, where g = dy act'(z).

    g is stored in `kept` unless that is None; it may be dy itself.
    """
    g = masked_dy(j, dy, x, y, hi, u, a, b, act)
    store(kept, j, g)
    s[j] += g
    t[j] += g * (deviation(taken(x, j, act), at(hi, j), at(u, j)) * at(scale, j))


@inlined
def add_gradient_rows(j, dy, x, y, hi, u, a, b, scale, act, kept, s, t):
    """`add_gradient_row` of four rows."""
    g0 = masked_dy(j, dy[0], x[0], y[0], hi, u, a, b, act)
    g1 = masked_dy(j, dy[1], x[1], y[1], hi, u, a, b, act)
    g2 = masked_dy(j, dy[2], x[2], y[2], hi, u, a, b, act)
    g3 = masked_dy(j, dy[3], x[3], y[3], hi, u, a, b, act)
    store(kept[0], j, g0)
    store(kept[1], j, g1)
    store(kept[2], j, g2)
    store(kept[3], j, g3)
    t0 = g0 * (deviation(taken(x[0], j, act), at(hi, j), at(u, j)) * at(scale, j))
    t1 = g1 * (deviation(taken(x[1], j, act), at(hi, j), at(u, j)) * at(scale, j))
    t2 = g2 * (deviation(taken(x[2], j, act), at(hi, j), at(u, j)) * at(scale, j))
    t3 = g3 * (deviation(taken(x[3], j, act), at(hi, j), at(u, j)) * at(scale, j))
    s[j] += (g0 + g1) + (g2 + g3)
    t[j] += (t0 + t1) + (t2 + t3)


@inlined
def backward_apply(j, dy, x, y, hi, u, a, b, hpq, v, f, act, dx, dresidual):
    """dx = gamma rstd (g - mean(g) - x_hat mean(g x_hat)) and dresidual = g.

    g = dy act'(z). dx and dresidual may be None. Either may be dy itself, which is read first.
    """
    g = masked_dy(j, dy, x, y, hi, u, a, b, act)
    d = centred(j, g, x, hi, u, hpq, v, act)
    store_gradients(j, g, d, f, dx, dresidual)


@ordered
def store_gradients(j, g, d, f, dx, dresidual):
    """dresidual = g and dx = f d; either may be None."""
    store(dresidual, j, g)
    store(dx, j, at(f, j) * d)


@inlined
def backward_apply_rows(j, dy, x, y, hi, u, a, b, hpq, v, f, act, dx, dresidual):
    """`backward_apply` of two rows."""
    g0 = masked_dy(j, dy[0], x[0], y[0], hi, u, a, b, act)
    g1 = masked_dy(j, dy[1], x[1], y[1], hi, u, a, b, act)
    d0 = centred(j, g0, x[0], hi, u, hpq, v, act)
    d1 = centred(j, g1, x[1], hi, u, hpq, v, act)
    store_gradients(j, g0, d0, f, dx[0], dresidual[0])
    store_gradients(j, g1, d1, f, dx[1], dresidual[1])


@ordered
def products(j, ddx, dy, x, hi, scale):
    """d, d t, g, g t and d g, where d = ddx, g = dy and t = (x - hi) scale."""
    d, g = load(ddx, j), load(dy, j)
    t = deviation(load(x, j), at(hi, j), None) * at(scale, j)
    return d, d * t, g, g * t, d * g


@ordered
def add_second_row(j, ddx, dy, x, hi, scale, sums):
    """Add `products` to the five sums."""
    d, dt, g, gt, dg = products(j, ddx, dy, x, hi, scale)
    s_d, s_dt, s_g, s_gt, s_dg = sums
    s_d[j] += d
    s_dt[j] += dt
    s_g[j] += g
    s_gt[j] += gt
    s_dg[j] += dg


@ordered
def pairwise(p, q, r, s):
    """p + q + r + s, in pairs."""
    return (p + q) + (r + s)


@ordered
def add_second_rows(j, ddx, dy, x, hi, scale, sums):
    """`add_second_row` of four rows."""
    d0, dt0, g0, gt0, dg0 = products(j, ddx[0], dy[0], x[0], hi, scale)
    d1, dt1, g1, gt1, dg1 = products(j, ddx[1], dy[1], x[1], hi, scale)
    d2, dt2, g2, gt2, dg2 = products(j, ddx[2], dy[2], x[2], hi, scale)
    d3, dt3, g3, gt3, dg3 = products(j, ddx[3], dy[3], x[3], hi, scale)
    s_d, s_dt, s_g, s_gt, s_dg = sums
    s_d[j] += pairwise(d0, d1, d2, d3)
    s_dt[j] += pairwise(dt0, dt1, dt2, dt3)
    s_g[j] += pairwise(g0, g1, g2, g3)
    s_gt[j] += pairwise(gt0, gt1, gt2, gt3)
    s_dg[j] += pairwise(dg0, dg1, dg2, dg3)


@ordered
def tangent(j, tx, x, hi, ahpq):
    """ty = a (tx - h) + ((x - hi) p + q), also for tx = ddx and ty = ddy."""
    a, h, p, q = ahpq
    along = at(a, j) * (load(tx, j) - at(h, j))
    return along + normalised(load(x, j), at(hi, j), None, at(p, j), at(q, j))


@none_without("bkst")
def curvature(j, ddx, dy, x, hi, ahpq, bkst):
    """dx = b (ddx - h) + p (dy - k) + ((x - hi) s + t); None without coefficients."""
    _, h, p, _ = ahpq
    b, k, s, t = bkst
    along = at(b, j) * (load(ddx, j) - at(h, j)) + at(p, j) * (load(dy, j) - at(k, j))
    return along + normalised(load(x, j), at(hi, j), None, at(s, j), at(t, j))


@ordered
def second_apply(j, ddx, dy, x, hi, ahpq, bkst, ddy, dx):
    """ddy (or ty) = `tangent` and, unless bkst is None, dx = `curvature`."""
    first = tangent(j, ddx, x, hi, ahpq)
    second = curvature(j, ddx, dy, x, hi, ahpq, bkst)
    store(ddy, j, first)
    store(dx, j, second)


def is_mask(w):
    """Whether w is a mask or one of its values, by type."""
    return getattr(w, "dtype", w) == types.uint8


@by_types
def weight_at(w, j, like):
    """The weight of value j, in the dtype of `like`: 0 or 1 if it is a mask."""
    if is_mask(w):
        return lambda w, j, like: like.dtype.type(at(w, j) != 0)
    return lambda w, j, like: like.dtype.type(at(w, j))


@by_types
def weight64(w, j):
    """The weight of value j in float64: 0 or 1 if it is a mask, 1 if w is None."""
    if isinstance(w, types.NoneType):
        return lambda w, j: 1.0
    if is_mask(w):
        return lambda w, j: 1.0 if at(w, j) != 0 else 0.0
    return lambda w, j: np.float64(at(w, j))


@ordered
def add_value(j, sums, values):
    """sums[j] += values[j]; values of a mask are 0 or 1."""
    sums[j] += weight_at(values, j, sums)


@ordered
def add_weighted_row(j, x, w, K, s, q, m):
    """s += w d, q += w d^2 and, unless m is None, m += w, where d = x - K.

    Where w is 0, x may be anything.
    """
    weight, along, square = weighted_deviation(j, x, w, K, s)
    s[j] += along
    q[j] += square
    if m is not None:
        m[j] += weight


@by_types
def weighted_deviation(j, x, w, K, like):
    """w, w d and w d^2 of value j, where d = x - K; all 0 where w is 0, whatever x is."""

    def weighted(j, x, w, K, like):
        weight = weight_at(w, j, like)
        d = unconditional(load(x, j)) - at(K, j)
        d = d if weight != 0 else weight
        along = weight * d
        return weight, along, along * d

    def masked(j, x, w, K, like):
        d = unconditional(load(x, j)) - at(K, j)
        d = d if at(w, j) != 0 else like.dtype.type(0)
        return weight_at(w, j, like), d, d * d

    return masked if is_mask(w) else weighted


@ordered
def add_weighted_rows(j, x, w, K, s, q, m):
    """`add_weighted_row` of four rows."""
    w0, s0, q0 = weighted_deviation(j, x[0], w[0], K, s)
    w1, s1, q1 = weighted_deviation(j, x[1], w[1], K, s)
    w2, s2, q2 = weighted_deviation(j, x[2], w[2], K, s)
    w3, s3, q3 = weighted_deviation(j, x[3], w[3], K, s)
    s[j] += pairwise(s0, s1, s2, s3)
    q[j] += pairwise(q0, q1, q2, q3)
    if m is not None:
        m[j] += pairwise(w0, w1, w2, w3)


@ordered
def add_first_row(j, x, w, K, s, m):
    """s += x - K and m += 1 where the weight is not 0; the first such x becomes K."""
    v, before, zero = unconditional(load(x, j)), K[j], s.dtype.type(0)
    first = v if m[j] == 0 else before
    counts = at(w, j) != 0
    K[j] = first if counts else before
    s[j] += v - first if counts else zero
    m[j] += s.dtype.type(counts)


@inlined
def apply_weighted(j, x, w, other, residual, hi, u, a, b, floor, y):
    """`apply`, but y = other where the weight is 0, unless `other` is None."""
    v = activated(j, x, residual, hi, u, a, b, floor)
    if other is not None:
        v = v if at(w, j) != 0 else other
    store(y, j, v)


@inlined
def add_weighted_gradient_row(j, dy, x, w, y, hi, u, a, b, scale, act, s, t):
    """`add_gradient_row` where the weight is not 0."""
    zero = s.dtype.type(0)
    g = masked_dy(j, dy, x, y, hi, u, a, b, act)
    along = g * (deviation(taken(x, j, act), at(hi, j), at(u, j)) * at(scale, j))
    s[j] += g if at(w, j) != 0 else zero
    t[j] += along if at(w, j) != 0 else zero


@inlined
def centred_by(weight, j, g, x, hi, u, hpq, v, act):
    """dx / f = (g v - w h) - w ((x u - hi) p + q), or g v for frozen statistics (hpq is None)."""
    if hpq is None:
        return times(g, at(v, j))
    h, p, q = hpq
    return (times(g, at(v, j)) - weight * at(h, j)) - weight * normalised(
        taken(x, j, act), at(hi, j), at(u, j), at(p, j), at(q, j)
    )


@inlined_by_types
def weighted_centred(j, w, g, x, hi, u, hpq, v, act, like):
    """`centred` if w is a mask, else `centred_by` the weight."""
    if is_mask(w):
        return lambda j, w, g, x, hi, u, hpq, v, act, like: centred(j, g, x, hi, u, hpq, v, act)
    return lambda j, w, g, x, hi, u, hpq, v, act, like: centred_by(
        weight_at(w, j, like), j, g, x, hi, u, hpq, v, act
    )


@inlined
def backward_apply_weighted(j, dy, x, w, y, hi, u, a, b, hpq, v, f, act, like, dx, dresidual):
    """`backward_apply` where the weight is not 0; elsewhere dx = dresidual = 0."""
    counts, zero = at(w, j) != 0, like.dtype.type(0)
    g = masked_dy(j, dy, x, y, hi, u, a, b, act)
    d = at(f, j) * weighted_centred(j, w, g, x, hi, u, hpq, v, act, like)
    store(dresidual, j, g if counts else zero)
    store(dx, j, d if counts else zero)
