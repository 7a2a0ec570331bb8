"""Every tolerance of the suite, derived from the storage dtype; none was tuned to pass.

A result may be `UNITS` units in the last place of its storage dtype away from the oracle, at the
scale of its terms: x - mean, the factor, the shift and the store round once each, and the float32
sums of a cache tile add about as much again. Tolerances are computed in longdouble, which is
exact enough for float64.
"""

from typing import NamedTuple

import numpy as np

UNITS = 4


def axes_of(ndim, axis):
    """Return the channel axes as an ascending tuple."""
    return tuple(sorted(a % ndim for a in np.atleast_1d(axis)))


def channels_of(shape, axis):
    """Return the shape of parameters and statistics."""
    return tuple(shape[a] for a in axes_of(len(shape), axis))


def reduced_axes(ndim, axis):
    """Return the axes to reduce."""
    return tuple(a for a in range(ndim) if a not in axes_of(ndim, axis))


def spread(parameter, x, axis):
    """Return a parameter (None: 1) in longdouble, shaped to broadcast against x."""
    if parameter is None:
        return np.longdouble(1)
    kept = axes_of(x.ndim, axis)
    shape = [x.shape[a] if a in kept else 1 for a in range(x.ndim)]
    # bfloat16 converts to longdouble only through float64, which holds it exactly.
    return np.asarray(parameter).astype(np.float64, copy=False).reshape(shape) * np.longdouble(1)


def one_unit(scale, dtype):
    """Return the unit in the last place of numbers of this size in this type."""
    info = np.finfo(dtype) if np.dtype(dtype).name != "bfloat16" else np.finfo(np.float32)
    size = np.minimum(np.abs(scale), info.max / 2).astype(info.dtype)  # max has no successor
    unit = np.spacing(size).astype(np.longdouble)
    return unit if np.dtype(dtype).name != "bfloat16" else unit * 2**16


def relative_unit(dtype):
    """Return the greatest relative distance between neighbours: 2^-23 for float32."""
    return np.longdouble(np.finfo(dtype).eps)


def computed(dtype):
    """Return the dtype in which statistics and sums of data of this dtype are computed."""
    return np.float64 if dtype == np.float64 else np.float32


def widened(array):
    """Return an array in longdouble, via float64 for bfloat16."""
    return array.astype(np.float64 if array.itemsize == 2 else np.longdouble) * np.longdouble(1)


class Terms(NamedTuple):
    """Terms of the results of one call, in longdouble, broadcastable against x."""

    xhat: np.ndarray
    factor: np.ndarray  # gamma * rstd
    mean_rounding: np.ndarray  # effect on y of half a unit of the float64 mean


def terms_of(x, gamma, mean, rstd, axis):
    """Return x_hat, gamma * rstd and the effect of the mean's own rounding."""
    mean, rstd = spread(mean, x, axis), spread(rstd, x, axis)
    factor = rstd * spread(gamma, x, axis)
    return Terms(
        (widened(x) - mean) * rstd, factor, np.abs(mean * factor) * np.longdouble(2) ** -53
    )


def _most(values, axis):
    """Return the greatest magnitude in each channel, keeping dimensions."""
    return np.max(
        np.abs(widened(values)), axis=reduced_axes(values.ndim, axis), keepdims=True, initial=0
    )


def y_tolerance(x, gamma, beta, mean, rstd, *, axis, residual=None):
    """Four units at the greatest of gamma * x_hat, beta, residual and their sum in the channel.

    For float64 the returned mean is itself rounded; its effect on y is added.
    """
    xhat, _, mean_rounding = terms_of(x, gamma, mean, rstd, axis)
    terms = [xhat * spread(gamma, x, axis)]
    if beta is not None:
        terms.append(spread(beta, x, axis))
    if residual is not None:
        terms.append(widened(residual))
    parts = [*terms, sum(terms)]
    scale = _most(parts[0], axis)
    for part in parts[1:]:
        scale = np.maximum(scale, _most(np.broadcast_to(part, x.shape), axis))
    tolerance = UNITS * one_unit(scale, x.dtype)
    return tolerance + mean_rounding if x.dtype == np.float64 else tolerance


def dx_tolerance(dy, x, gamma, mean, rstd, *, axis, training=True):
    """Four units at gamma * rstd * (|dy| + |sum_dy| / m + |x_hat| * |sum_dy_xhat| / m).

    `dy` is the gradient at the batch norm's own output: masked if there was a ReLU.
    """
    xhat, factor, _ = terms_of(x, gamma, mean, rstd, axis)
    dy = widened(dy)
    scale = _most(dy, axis)
    if training:
        over = reduced_axes(x.ndim, axis)
        mean_dy = np.mean(dy, axis=over, keepdims=True, dtype=np.longdouble)
        mean_dy_xhat = np.mean(dy * xhat, axis=over, keepdims=True)
        scale = scale + np.abs(mean_dy) + _most(xhat, axis) * np.abs(mean_dy_xhat)
    return UNITS * one_unit(np.abs(factor) * scale, x.dtype)


def inverse(gamma, beta, rstd, like):
    """Return the (mean, rstd, gamma) that give y, in place of x, the same x_hat and gamma rstd.

    They are beta, 1 / gamma and gamma^2 rstd. `like` has the shape of a parameter.
    """
    gamma = np.ones(like.shape) if gamma is None else gamma.astype(np.float64)
    beta = np.zeros(like.shape) if beta is None else beta.astype(np.float64)
    return beta, (rstd != 0) / gamma, gamma * gamma * rstd


def from_y_tolerance(dy, x, gamma, beta, mean, rstd, *, axis, training=True):
    """Return the extra error of dx and dgamma if they are computed from y rather than from x.

    An error e of y causes an error e / |gamma| of x_hat, and so up to e / |gamma| times the sum of
    |dy| in the sum of dy x_hat. In dx / (gamma rstd), the error of x_hat mean(dy x_hat) is each
    factor times the error of the other, plus the product of both errors.
    """
    over = reduced_axes(x.ndim, axis)
    xhat, factor, _ = terms_of(x, gamma, mean, rstd, axis)
    error = y_tolerance(x, gamma, beta, mean, rstd, axis=axis) / np.abs(spread(gamma, x, axis))
    error = np.broadcast_to(error, x.shape).max(axis=over, keepdims=True, initial=0)
    dy = widened(dy)
    mean_error = np.mean(np.abs(dy), axis=over, keepdims=True) * error
    mean_dy_xhat = np.mean(dy * xhat, axis=over, keepdims=True)
    product = _most(xhat, axis) * mean_error + error * (np.abs(mean_dy_xhat) + mean_error)
    count = dy.size // max(mean_error.size, 1)
    return np.abs(factor) * product * training, mean_error.reshape(mean.shape) * count


def sums_tolerance(dy, x, mean, rstd, *, axis):
    """Four units at the sum of absolute terms, for sum_dy and sum_dy_xhat."""
    xhat = terms_of(x, None, mean, rstd, axis).xhat
    over = reduced_axes(x.ndim, axis)
    return tuple(
        UNITS * one_unit(np.sum(np.abs(terms), axis=over), computed(x.dtype))
        for terms in (widened(dy), widened(dy) * xhat)
    )


def ty_tolerance(tx, tgamma, tbeta, x, gamma, mean, rstd, *, axis, training=True):
    """Four units at the greatest terms of ty (and ddy), with means of absolute values.

    The terms are gamma * rstd * (tx - mean - xhat * mean), tgamma * xhat and tbeta.
    """
    xhat, factor, _ = terms_of(x, gamma, mean, rstd, axis)
    scale = np.zeros((1,) * x.ndim, np.longdouble)
    if tx is not None:
        t, mean_t, mean_t_xhat = _centred(tx, xhat, axis, training)
        scale = np.abs(factor) * (t + mean_t + _most(xhat, axis) * mean_t_xhat)
    if tgamma is not None:
        scale = scale + np.abs(spread(tgamma, x, axis)) * _most(xhat, axis)
    if tbeta is not None:
        scale = scale + np.abs(spread(tbeta, x, axis))
    return UNITS * one_unit(scale, x.dtype)


def second_dx_tolerance(ddx, ddgamma, dy, x, gamma, mean, rstd, *, axis, training=True):
    """Four units at the greatest terms of the second derivative's dx (docs/math.md).

    The terms are b (ddx - mean), p (dy - mean) and xhat times sums of products; every sum is taken
    over absolute values.
    """
    xhat, factor, _ = terms_of(x, gamma, mean, rstd, axis)
    r, factor = np.abs(spread(rstd, x, axis)), np.abs(factor)
    e = np.longdouble(0) if ddgamma is None else np.abs(spread(ddgamma, x, axis))
    g, mean_g, mean_g_xhat = _centred(dy, xhat, axis, training)
    scale = e * (g + mean_g + _most(xhat, axis) * mean_g_xhat)
    if ddx is not None and training:
        d, mean_d, mean_d_xhat = _centred(ddx, xhat, axis, training)
        mean_dg = np.mean(
            np.abs(widened(ddx) * widened(dy)), axis=reduced_axes(x.ndim, axis), keepdims=True
        )
        along_xhat = mean_dg + mean_d * mean_g + 3 * mean_d_xhat * mean_g_xhat
        scale = scale + factor * (
            mean_g_xhat * (d + mean_d) + mean_d_xhat * (g + mean_g) + _most(xhat, axis) * along_xhat
        )
    return UNITS * one_unit(r * scale, x.dtype)


def second_dgamma_tolerance(ddx, dy, x, mean, rstd, *, axis, training=True):
    """Four units at the sum of absolute terms, as for dgamma itself."""
    xhat, _, _ = terms_of(x, None, mean, rstd, axis)
    over = reduced_axes(x.ndim, axis)
    _, mean_d, mean_d_xhat = _centred(ddx, xhat, axis, training)
    _, mean_g, mean_g_xhat = _centred(dy, xhat, axis, training)
    terms = np.abs(widened(ddx) * widened(dy)) + mean_d * mean_g + mean_d_xhat * mean_g_xhat
    scale = np.sum(terms * np.abs(spread(rstd, x, axis)), axis=over)
    return UNITS * one_unit(scale, computed(x.dtype))


def _centred(values, xhat, axis, training):
    """Return the greatest magnitude, mean |v| and mean |v xhat|; means are 0 if not training."""
    v = np.abs(widened(values))
    zero = np.zeros((1,) * v.ndim, np.longdouble)
    if not training:
        return _most(v, axis), zero, zero
    over = reduced_axes(v.ndim, axis)
    means = (np.mean(u, axis=over, keepdims=True) for u in (v, v * np.abs(xhat)))
    return _most(v, axis), *means


def mean_tolerance(moments, dtype):
    """Four units at the standard deviation, and the rounding of the mean to float64."""
    std = np.sqrt(moments.m2 / np.maximum(moments.count, 1))
    return UNITS * one_unit(std, computed(dtype)) + one_unit(moments.mean, np.float64)


def _relative_spread_tolerance(moments, dtype):
    """Return the relative error allowed for a standard deviation."""
    relative = UNITS * relative_unit(computed(dtype))
    if dtype == np.float64:  # merging chunks rounds means to float64
        var = np.asarray(moments.m2 / np.maximum(moments.count, 1), np.longdouble)
        std = np.sqrt(np.where(var > 0, var, np.inf))
        relative = relative + np.abs(moments.mean) / std * np.longdouble(2) ** -53
    return relative


def m2_tolerance(moments, dtype):
    """Twice the relative error of a standard deviation: M2 is proportional to its square."""
    return 2 * _relative_spread_tolerance(moments, dtype) * moments.m2


def merge_tolerance(moments, x, merges, *, axis):
    """Return what a number of merges of parts of x adds to the errors of mean and M2.

    Each merge rounds the mean by at most half a unit of float64 at |x|. Through differences of two
    means, that moves M2 in proportion to the standard deviation.
    """
    half_unit = np.longdouble(2) ** -53
    most = np.max(np.abs(x), axis=reduced_axes(x.ndim, axis), initial=0).astype(np.float64)
    lost = merges * half_unit * most
    count = max(moments.count, 1)
    std = np.sqrt(moments.m2 / count)
    of_m2 = 4 * merges * half_unit * moments.m2 + count * (4 * lost * std + 4 * lost**2)
    return lost, of_m2


def rstd_tolerance(moments, rstd, dtype):
    """Four units relative, like the standard deviation that it is computed from."""
    return _relative_spread_tolerance(moments, dtype) * np.abs(rstd)


def running_tolerance(moments, running_mean, running_var, *, momentum, correction, dtype):
    """Errors of the batch's statistics times momentum, plus one rounding to the running dtype.

    The rounding is one unit, not half, at the scale of the terms: (1 - momentum) * running and
    momentum * batch are rounded to float64 before they are added.
    """
    divisor = np.maximum(moments.count - correction, 1)
    batch = (
        (running_mean, moments.mean, mean_tolerance(moments, dtype)),
        (running_var, moments.m2 / divisor, m2_tolerance(moments, dtype) / divisor),
    )
    return tuple(
        abs(momentum) * error
        + one_unit(
            np.maximum(
                np.abs((1 - momentum) * running.astype(np.float64)),
                np.abs(momentum * new),
            ),
            running.dtype,
        )
        for running, new, error in batch
    )


def renorm_tolerance(moments, running_var, r, d, dtype, eps):
    """Errors of r and d: those of the standard deviation and mean over the running deviation.

    Clipping magnifies neither. Each rounds three times in float64: r in two roots and a quotient,
    d in a difference, a root and a quotient. The running variance is exact.
    """
    running_std = np.sqrt(running_var.astype(np.longdouble) + np.longdouble(eps))
    of_r = (_relative_spread_tolerance(moments, dtype) + 3 * relative_unit(np.float64)) * np.abs(r)
    of_d = mean_tolerance(moments, dtype) / running_std + 3 * one_unit(d, np.float64)
    return of_r, of_d


def stored(tolerance, expected, dtype):
    """Add to a tolerance the rounding of storing `expected` in this dtype."""
    return tolerance + one_unit(np.asarray(expected), dtype)


def assert_within(actual, expected, tolerance, name):
    """Fail with index, values and error if any element is out of tolerance."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    if actual.dtype.name == "bfloat16":
        actual = actual.astype(np.float32)
    actual, expected = actual.astype(np.longdouble), expected.astype(np.longdouble)
    tolerance = np.broadcast_to(tolerance, actual.shape)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        error = np.abs(actual - expected)
    close = (error <= tolerance) | (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if close.all():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(close, 0, np.nan_to_num(error / tolerance, nan=np.inf))
    worst = np.unravel_index(np.argmax(excess), actual.shape)
    raise AssertionError(
        f"{name}: {np.sum(~close)} of {close.size} too far away, the worst at "
        f"{tuple(int(i) for i in worst)}: {actual[worst]} against {expected[worst]}, error "
        f"{error[worst]:.3g} where {tolerance[worst]:.3g} is allowed ({excess[worst]:.3g} times)"
    )


def assert_same_bits(actual, expected, name="result"):
    """Fail unless shape, dtype and every bit agree; NaN equals itself, 0 differs from -0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, not {expected.dtype}"
    ours, theirs = (
        np.ascontiguousarray(a).reshape(-1, 1).view(np.uint8) for a in (actual, expected)
    )
    differ = np.flatnonzero((ours != theirs).any(axis=1))
    if differ.size:
        first = np.unravel_index(differ[0], actual.shape)
        raise AssertionError(
            f"{name}: {differ.size} of {actual.size} elements differ in bits, first at "
            f"{tuple(int(i) for i in first)}: {actual[first]!r} against {expected[first]!r}"
        )
