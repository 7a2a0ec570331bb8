"""A user-defined activation, compiled once for all tests of a process."""

import numba


@numba.njit
def squared(v):
    return v * v


@numba.njit
def doubled(v):
    """The derivative of `squared`."""
    return v + v
