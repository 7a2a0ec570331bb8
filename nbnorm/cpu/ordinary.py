"""Compiled checks of whether a call is ordinary.

In an ordinary call every array is exactly an ndarray of x's dtype, float32 or float64 (mean and
rstd of a backward call are float64). x has no gaps and a memory order that kernels support, which
is also that of arrays of its shape. Parameters have one axis. Arrays that are written share memory
with nothing else. The general path checks all of this and more, in Python, and raises the errors.
"""

from typing import NamedTuple

import numpy as np

from nbnorm.cpu.jit import ordered
from nbnorm.cpu.kernels import Work
from nbnorm.cpu.objects import (
    ALIGNED,
    WRITABLE,
    address,
    data,
    has_form,
    is_array,
    is_vector,
    values,
)


class Site(NamedTuple):
    """What an entry knows about x in advance, beginning with the fields of `plan.Grid`.

    In memory `kernels.Work` and x's form follow: its shape, then its strides.
    """

    N: int
    C: int
    S: int
    tile: int
    fold: int
    per: int
    itemsize: int
    # The address of numpy.ndarray, `kind_of` x's dtype and of float64, the address of None.
    ndarray: int
    dtype: int
    float64: int
    none: int
    rank: int


SITE, WORK = len(Site._fields), len(Work._fields)


@ordered
def site_of(numbers):
    """`Site` from the `numbers` of an entry."""
    n = values(numbers, SITE, np.int64)
    return Site(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11],
    )  # fmt: skip


@ordered
def form_of(numbers, site):
    """Shape of x followed by its strides."""
    return values(numbers, SITE + WORK + 2 * site.rank, np.int64)[SITE + WORK :]


@ordered
def given(obj, site):
    """Whether an argument is not None."""
    return address(obj) != site.none


@ordered
def parameter(obj, site, dtype, flags):
    """Whether an argument is None or has shape (C,), this dtype and these flags."""
    return not given(obj, site) or (
        is_array(obj, site.ndarray, dtype, flags)
        and is_vector(obj, site.C, 8 if dtype == site.float64 else site.itemsize)
    )


@ordered
def like_x(obj, site, form, flags):
    """Whether an argument has x's dtype, shape and strides, and these flags."""
    return is_array(obj, site.ndarray, site.dtype, flags) and has_form(obj, form, site.rank)


@ordered
def like_or_none(obj, site, form):
    """Whether an argument is None, or an array like x."""
    return not given(obj, site) or like_x(obj, site, form, ALIGNED)


@ordered
def bytes_of(obj, site, size):
    """Address of the first of `size` values, and of the byte after the last; 0, 0 for None."""
    if not given(obj, site):
        return 0, 0
    begin = data(obj)
    return begin, begin + size * site.itemsize


@ordered
def apart(a, b):
    """Whether two ranges of memory have no byte in common."""
    return a[1] <= b[0] or b[1] <= a[0]


@ordered
def writable_apart(out, inplace, tensors, parameters, site, form):
    """Whether `out` is like x and can be written without changing an input that is still needed.

    It must be `inplace` itself or apart from it, and apart from all tensors and parameters.
    """
    if not like_x(out, site, form, WRITABLE):
        return False
    size = site.N * site.C * site.S
    there = bytes_of(out, site, size)
    at = bytes_of(inplace, site, size)
    if not (there == at or apart(there, at)):
        return False
    shared = 0
    for tensor in tensors:
        shared += not apart(there, bytes_of(tensor, site, size))
    for vector in parameters:
        shared += not apart(there, bytes_of(vector, site, site.C))
    return shared == 0


@ordered
def statistics_apart(running_mean, running_var, tensors, parameters, site):
    """Whether running statistics share memory neither with each other nor with an array."""
    mean, var = bytes_of(running_mean, site, site.C), bytes_of(running_var, site, site.C)
    shared = 0 if apart(mean, var) else 1
    for tensor in tensors:
        there = bytes_of(tensor, site, site.N * site.C * site.S)
        shared += not (apart(mean, there) and apart(var, there))
    for vector in parameters:
        there = bytes_of(vector, site, site.C)
        shared += not (apart(mean, there) and apart(var, there))
    return shared == 0


@ordered
def forward_is_ordinary(
    x, gamma, beta, running_mean, running_var, residual, out, numbers,
    eps, momentum, correction, training,
):  # fmt: skip
    """Whether a forward call is ordinary; out is None if y goes to a new array."""
    site = site_of(numbers)
    form = form_of(numbers, site)
    flags = WRITABLE if training else ALIGNED
    if not (
        0 <= eps < np.inf
        and abs(momentum) < np.inf
        and (not training or correction < site.N * site.S)  # enough values for a variance
        and like_x(x, site, form, ALIGNED)
        and parameter(gamma, site, site.dtype, ALIGNED)
        and parameter(beta, site, site.dtype, ALIGNED)
        and parameter(running_mean, site, site.dtype, flags)
        and parameter(running_var, site, site.dtype, flags)
        and like_or_none(residual, site, form)
        and given(running_mean, site) == given(running_var, site)
        and (training or given(running_mean, site))
    ):
        return False
    if given(out, site) and not writable_apart(
        out, x, (residual,), (gamma, beta, running_mean, running_var), site, form
    ):
        return False
    if not (training and given(running_mean, site)):
        return True
    return statistics_apart(running_mean, running_var, (x, residual), (gamma, beta), site)


@ordered
def backward_is_ordinary(dy, x, gamma, mean, rstd, beta, y, out, numbers):
    """Whether a backward call is ordinary; out is None if dx goes to a new array."""
    site = site_of(numbers)
    form = form_of(numbers, site)
    size = site.N * site.C * site.S
    if not (
        like_x(x, site, form, ALIGNED)
        and like_x(dy, site, form, ALIGNED)
        and like_or_none(y, site, form)
        and apart(bytes_of(x, site, size), bytes_of(y, site, size))  # else y was written over x
        and parameter(gamma, site, site.dtype, ALIGNED)
        and parameter(beta, site, site.dtype, ALIGNED)
        and given(mean, site)
        and parameter(mean, site, site.float64, ALIGNED)
        and given(rstd, site)
        and parameter(rstd, site, site.float64, ALIGNED)
    ):
        return False
    if not given(out, site):
        return True
    if not writable_apart(out, dy, (x, y), (gamma, beta), site, form):
        return False
    there = bytes_of(out, site, size)
    return apart(there, (data(mean), data(mean) + 8 * site.C)) and (
        apart(there, (data(rstd), data(rstd) + 8 * site.C))
    )
