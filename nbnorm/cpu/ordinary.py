"""Whether a call is ordinary, told by compiled code of the objects that Python has.

In an ordinary call every array is exactly an ndarray of x's dtype, float32 or float64 (mean and
rstd of a backward call are float64); x lies without gaps in the order that kernels walk it, and
what has its shape in the same order; parameters have one axis; what is written shares memory with
nothing else. The general way checks all of it, and more, in Python, and says why.
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
    """What an entry knows of x before it sees it, from `plan.Grid` on.

    After it come `kernels.Work` and x's form, its lengths and its strides.
    """

    N: int
    C: int
    S: int
    tile: int
    fold: int
    per: int
    itemsize: int
    # The address of the class, x's dtype and float64 as `kind_of` tells them, the address of None.
    ndarray: int
    dtype: int
    float64: int
    none: int
    rank: int


SITE, WORK = len(Site._fields), len(Work._fields)


@ordered
def site_of(numbers):
    """`Site` of the object that holds it."""
    n = values(numbers, SITE, np.int64)
    return Site(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11],
    )  # fmt: skip


@ordered
def form_of(numbers, site):
    """Lengths and strides of x."""
    return values(numbers, SITE + WORK + 2 * site.rank, np.int64)[SITE + WORK :]


@ordered
def given(obj, site):
    """Whether an argument is not None."""
    return address(obj) != site.none


@ordered
def parameter(obj, site, dtype, flags):
    """Whether an argument is a vector with a value for every channel, or None."""
    return not given(obj, site) or (
        is_array(obj, site.ndarray, dtype, flags)
        and is_vector(obj, site.C, 8 if dtype == site.float64 else site.itemsize)
    )


@ordered
def like_x(obj, site, form, flags):
    """Whether an argument is x, or an array like it."""
    return is_array(obj, site.ndarray, site.dtype, flags) and has_form(obj, form, site.rank)


@ordered
def like_or_none(obj, site, form):
    """Whether an argument is an array like x, or None."""
    return not given(obj, site) or like_x(obj, site, form, ALIGNED)


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
def writable_apart(out, inplace, tensors, parameters, site, form):
    """Whether `out`, like x, may be written: it is `inplace` or apart from it, and from others."""
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
    """Whether running statistics share memory with nothing else."""
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
    """Whether a forward call is; out is None where a new array takes y."""
    site = site_of(numbers)
    form = form_of(numbers, site)
    flags = WRITABLE if training else ALIGNED
    if not (
        0 <= eps < np.inf
        and abs(momentum) < np.inf
        and (not training or correction < site.N * site.S)  # there are values for a variance
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
    """Whether a backward call is; out is None where a new array takes dx."""
    site = site_of(numbers)
    form = form_of(numbers, site)
    if not (
        like_x(x, site, form, ALIGNED)
        and like_x(dy, site, form, ALIGNED)
        and like_or_none(y, site, form)
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
    there = bytes_of(out, site, site.N * site.C * site.S)
    return apart(there, (data(mean), data(mean) + 8 * site.C)) and (
        apart(there, (data(rstd), data(rstd) + 8 * site.C))
    )
