"""Ordinary calls in one step: checks, arithmetic and running statistics in one compiled function.

A call is ordinary where every array is exactly an ndarray in C order, x and what has its shape are
float32 or float64, and so is what belongs to the channels; outputs share memory with nothing else.
An entry does all of an ordinary call and returns True, or touches nothing and returns False:
whoever asked then goes the general way, which alone explains what is wrong, if anything is. The
arithmetic is that of kernels.py, in its order.

An entry takes the objects that Python has. `site` holds what does not change from call to call of
one shape: an int64 array of the numbers that `Site` names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from nbnorm.cpu import kernels
from nbnorm.cpu.channel import rstd_of
from nbnorm.cpu.jit import entry_point, named, ordered
from nbnorm.cpu.objects import (
    ORDINARY,
    WRITABLE,
    address,
    anything,
    data,
    is_array,
    is_vector,
    same_shape,
    size_of,
    values,
)


class Site(NamedTuple):
    """What an entry knows of x before it sees it."""

    N: int
    C: int
    S: int
    tile: int
    fold: int
    per: int
    chunks: int
    block: int
    blocks: int
    itemsize: int
    # Addresses: the class, x's dtype, float64, None.
    ndarray: int
    dtype: int
    float64: int
    none: int


@ordered
def site_of(numbers):
    """`Site` of the object that holds it."""
    n = values(numbers, 14, np.int64)
    return Site(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13]
    )


@ordered
def given(obj, site):
    """Whether an argument is not None."""
    return address(obj) != site.none


@ordered
def parameter(obj, site, dtype, flags):
    """Whether an argument is a vector with a value for every channel, or None."""
    return not given(obj, site) or (
        is_array(obj, site.ndarray, dtype, flags) and is_vector(obj, site.C)
    )


@ordered
def like(obj, x, site, flags):
    """Whether an argument is an array like x, or None."""
    return not given(obj, site) or (
        is_array(obj, site.ndarray, site.dtype, flags) and same_shape(obj, x)
    )


@ordered
def ordinary(x, site):
    """Whether x is what the site was made for."""
    return is_array(x, site.ndarray, site.dtype, ORDINARY) and (
        size_of(x) == site.N * site.C * site.S
    )


@ordered
def bytes_of(obj, site, size):
    """First byte of an argument of so many values, and the one after its last; 0 of None."""
    if not given(obj, site):
        return 0, 0
    begin = data(obj)
    return begin, begin + size * site.itemsize


@ordered
def apart(a, b):
    """Whether two stretches of memory have no byte in common."""
    return a[1] <= b[0] or b[1] <= a[0]


@ordered
def writable_apart(out, x, inplace, tensors, parameters, site):
    """Whether `out`, like x, may be written: it is `inplace` or apart from it, and from others."""
    if not (given(out, site) and like(out, x, site, WRITABLE)):
        return False
    size = site.N * site.C * site.S
    there = bytes_of(out, site, size)
    at = bytes_of(inplace, site, size)
    if not (there == at or apart(there, at)):
        return False
    for tensor in tensors:
        if not apart(there, bytes_of(tensor, site, size)):
            return False
    for vector in parameters:
        if not apart(there, bytes_of(vector, site, site.C)):
            return False
    return True


@ordered
def statistics_apart(running_mean, running_var, tensors, parameters, site):
    """Whether running statistics share memory with nothing else."""
    mean, var = bytes_of(running_mean, site, site.C), bytes_of(running_var, site, site.C)
    if not apart(mean, var):
        return False
    for tensor in tensors:
        there = bytes_of(tensor, site, site.N * site.C * site.S)
        if not (apart(mean, there) and apart(var, there)):
            return False
    for vector in parameters:
        there = bytes_of(vector, site, site.C)
        if not (apart(mean, there) and apart(var, there)):
            return False
    return True


@ordered
def forward_is_ordinary(x, gamma, beta, running_mean, running_var, residual, out, site, training):
    """Whether a forward call is; out is None where a new array takes y."""
    flags = WRITABLE if training else ORDINARY
    if not (
        ordinary(x, site)
        and parameter(gamma, site, site.dtype, ORDINARY)
        and parameter(beta, site, site.dtype, ORDINARY)
        and parameter(running_mean, site, site.dtype, flags)
        and parameter(running_var, site, site.dtype, flags)
        and like(residual, x, site, ORDINARY)
        and given(running_mean, site) == given(running_var, site)
        and (training or given(running_mean, site))
    ):
        return False
    if given(out, site) and not writable_apart(
        out, x, x, (residual,), (gamma, beta, running_mean, running_var), site
    ):
        return False
    if not (training and given(running_mean, site)):
        return True
    return statistics_apart(running_mean, running_var, (x, residual), (gamma, beta), site)


@ordered
def forward_numbers_fit(site, eps, momentum, correction, training):
    """Whether eps and momentum are in range and there are enough values for the variance."""
    return (
        0 <= eps < np.inf
        and np.abs(momentum) < np.inf
        and (not training or correction < site.N * site.S)
    )


@ordered
def backward_is_ordinary(dy, x, gamma, mean, rstd, beta, y, out, site):
    """Whether a backward call is; out is None where a new array takes dx."""
    if not (
        ordinary(x, site)
        and given(dy, site)
        and like(dy, x, site, ORDINARY)
        and like(y, x, site, ORDINARY)
        and parameter(gamma, site, site.dtype, ORDINARY)
        and parameter(beta, site, site.dtype, ORDINARY)
        and given(mean, site)
        and parameter(mean, site, site.float64, ORDINARY)
        and given(rstd, site)
        and parameter(rstd, site, site.float64, ORDINARY)
    ):
        return False
    if not given(out, site):
        return True
    if not writable_apart(out, x, dy, (x, y), (gamma, beta), site):
        return False
    there = bytes_of(out, site, site.N * site.C * site.S)
    for vector in (mean, rstd):
        if not apart(there, (data(vector), data(vector) + 8 * site.C)):
            return False
    return True


@ordered
def parameter_values(obj, site, instead, dtype):
    """gamma or beta; where it is None, a number for every channel."""
    if given(obj, site):
        return values(obj, site.C, dtype)
    return np.full(site.C, instead, dtype)


@ordered
def new_or(obj, site):
    """Where a statistic goes; nobody wants it where that is None."""
    if given(obj, site):
        return values(obj, site.C, np.float64)
    return np.empty(site.C)


@ordered
def grid_of(site):
    """See `plan.Grid`."""
    return site.N, site.C, site.S, site.tile, site.fold, site.per


def _tensor(dtype: Any) -> tuple[Any, Any]:
    """View of an array like x for the kernels, and the same of an argument that is None."""

    @ordered
    def tensor(obj, site):
        memory = values(obj, site.N * site.C * site.S, dtype)
        return memory, site.C * site.S, site.S

    @ordered
    def absent(obj, site):
        return None

    return tensor, absent


@lru_cache(maxsize=1)
def look_at_forward() -> Callable[..., Any]:
    """Entry that only says whether a forward call is ordinary, for what threads then compute."""

    def look(
        x, gamma, beta, running_mean, running_var, residual, out, numbers, eps, momentum, correction,
        training,
    ):  # fmt: skip
        site = site_of(numbers)
        return forward_numbers_fit(site, eps, momentum, correction, training) and (
            forward_is_ordinary(
                x, gamma, beta, running_mean, running_var, residual, out, site, training
            )
        )

    signature = types.boolean(*(anything,) * 8, *(types.float64,) * 3, types.boolean)
    return entry_point(look, "entry_look_at_forward", signature)


@lru_cache(maxsize=1)
def look_at_backward() -> Callable[..., Any]:
    """`look_at_forward` of a backward call."""

    def look(dy, x, gamma, mean, rstd, beta, y, out, numbers):
        return backward_is_ordinary(dy, x, gamma, mean, rstd, beta, y, out, site_of(numbers))

    return entry_point(look, "entry_look_at_backward", types.boolean(*(anything,) * 9))


@lru_cache(maxsize=64)
def forward(traversal: str, dtype: str, added: bool) -> Callable[..., Any]:
    """Entry of a training forward; whether a residual is `added` decides what is compiled."""
    run, kind = getattr(kernels, traversal), getattr(np, dtype)
    view, absent = _tensor(kind)
    residual_view = view if added else absent
    forward_block, move_all = run.forward_block, kernels.move_all

    def forward(
        x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd,
        numbers, eps, momentum, correction, floor,
    ):  # fmt: skip
        site = site_of(numbers)
        if not forward_numbers_fit(
            site, eps, momentum, correction, True
        ) or not forward_is_ordinary(
            x, gamma, beta, running_mean, running_var, residual, out, site, True
        ):
            return False
        norm = (
            values(mean, site.C, np.float64), values(rstd, site.C, np.float64),
            parameter_values(gamma, site, 1, kind), parameter_values(beta, site, 0, kind),
        )  # fmt: skip
        partial, m2 = np.empty((4, site.chunks, site.C)), np.empty(site.C)
        x_, residual_, y_ = view(x, site), residual_view(residual, site), view(y, site)
        grid = grid_of(site)
        for u in range(site.blocks):
            forward_block(
                x_, residual_, grid, site.block, norm, eps, floor, False, partial, m2, y_, u
            )
        if given(running_mean, site):
            running = values(running_mean, site.C, kind), values(running_var, site.C, kind)
            move_all(*running, norm[0], m2, momentum, site.N * site.S - correction)
        return True

    scalars = (types.float64,) * 4
    signature = types.boolean(*(anything,) * 11, *scalars)
    return entry_point(forward, f"entry_{traversal}_forward_{dtype}_{added}", signature)


@lru_cache(maxsize=64)
def inference(traversal: str, dtype: str, added: bool) -> Callable[..., Any]:
    """Entry of a forward with given mean and variance: rstd, and the mean as float64, as well."""
    run, kind = getattr(kernels, traversal), getattr(np, dtype)
    view, absent = _tensor(kind)
    residual_view = view if added else absent
    apply_unit = run.apply_unit

    def inference(
        x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd,
        numbers, eps, momentum, floor,
    ):  # fmt: skip
        site = site_of(numbers)
        if not forward_numbers_fit(site, eps, momentum, 0.0, False) or not forward_is_ordinary(
            x, gamma, beta, running_mean, running_var, residual, out, site, False
        ):
            return False
        norm = (
            new_or(mean, site), new_or(rstd, site),
            parameter_values(gamma, site, 1, kind), parameter_values(beta, site, 0, kind),
        )  # fmt: skip
        mean_, var = values(running_mean, site.C, kind), values(running_var, site.C, kind)
        for c in range(site.C):
            norm[0][c] = mean_[c]
            norm[1][c] = rstd_of(np.float64(var[c]), eps)
        x_, residual_, y_ = view(x, site), residual_view(residual, site), view(y, site)
        grid = grid_of(site)
        for u in range(site.chunks):
            apply_unit(x_, residual_, grid, site.C, site.chunks, norm, floor, False, y_, u)
        return True

    signature = types.boolean(*(anything,) * 11, *(types.float64,) * 3)
    return entry_point(inference, f"entry_{traversal}_inference_{dtype}_{added}", signature)


@lru_cache(maxsize=64)
def backward(traversal: str, dtype: str, mask: str) -> Callable[..., Any]:
    """Entry of a training backward; ReLU's mask is of "none", "beta", or "y" with a residual."""
    run, kind = getattr(kernels, traversal), getattr(np, dtype)
    view, absent = _tensor(kind)
    y_view = view if mask == "y" else absent
    backward_block = run.backward_block

    @ordered
    def no_beta(beta, site, instead, dtype):
        return None

    beta_values = parameter_values if mask == "beta" else no_beta

    def backward(dy, x, gamma, mean, rstd, beta, y, out, dx, dresidual, dgamma, dbeta, numbers):
        site = site_of(numbers)
        if not backward_is_ordinary(dy, x, gamma, mean, rstd, beta, y, out, site):
            return False
        norm = (
            values(mean, site.C, np.float64), values(rstd, site.C, np.float64),
            parameter_values(gamma, site, 1, kind), beta_values(beta, site, 0, kind),
        )  # fmt: skip
        partial, sums = np.empty((2, site.chunks, site.C)), np.empty((2, site.C))
        dy_, x_, y_ = view(dy, site), view(x, site), y_view(y, site)
        dx_, dresidual_ = view(dx, site), y_view(dresidual, site)
        grid, count = grid_of(site), float(site.N * site.S)
        for u in range(site.blocks):
            backward_block(
                dy_, x_, y_, grid, site.block, norm, count, False, partial, sums, dx_, dresidual_, u
            )
        of_beta, of_gamma = values(dbeta, site.C, kind), values(dgamma, site.C, kind)
        for c in range(site.C):
            of_beta[c] = sums[0, c]
            of_gamma[c] = sums[1, c]
        return True

    signature = types.boolean(*(anything,) * 13)
    return entry_point(backward, f"entry_{traversal}_backward_{dtype}_{mask}", signature)
