"""Ordinary calls in one compiled function: checks, arithmetic and running statistics.

An entry either does all of an ordinary call (see `ordinary`) and returns True, or touches nothing
and returns False. The caller then takes the general path, which alone reports what is wrong, if
anything is. A MemoryError may leave results half written. The arithmetic is that of kernels.py.

Entries take Python objects as they are. `numbers` is an int64 array of what all calls of one shape
have in common: the fields of `ordinary.Site` and `kernels.Work`, x's shape and strides. `of` is the
activation's class in functions.py, and `number` its parameter; for ReLU or none, `of` is None and
`number` the lower bound of y. act(number) is what kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import types

from nbnorm.cpu import kernels
from nbnorm.cpu.intrinsics import new
from nbnorm.cpu.jit import by_types, entry_point, inlined, named, ordered
from nbnorm.cpu.objects import anything, kind_of, values
from nbnorm.cpu.ordinary import (
    SITE,
    WORK,
    Site,
    backward_is_ordinary,
    forward_is_ordinary,
    given,
    site_of,
)

_FLOAT64 = np.dtype(np.float64)


def site_for(
    grid: tuple[int, ...], work: tuple[int, ...], dtype: np.dtype[Any], form: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Return the `numbers` of an entry; `form` is x's shape followed by its strides."""
    identities = id(np.ndarray), kind_of(dtype), kind_of(_FLOAT64), id(None)
    found = Site._make((*grid, dtype.itemsize, *identities, len(form) // 2))
    return np.array((*found, *work, *form), np.int64)


@ordered
def parameter_values(obj, site, default, dtype):
    """gamma or beta, shape (C,), without a copy; an array filled with `default` if it is None.

    An array must have this dtype already: `ordinary.parameter` checks it.
    """
    if given(obj, site):
        return values(obj, site.C, dtype)
    out = new(site.C, dtype)
    for c in range(site.C):
        out[c] = default
    return out


@ordered
def values_or_new(obj, site):
    """The array that a statistic goes to; a temporary one if it is None."""
    if given(obj, site):
        return values(obj, site.C, np.float64)
    return new(site.C, np.float64)


@ordered
def grid_of(site):
    """`plan.Grid` of a site."""
    return site.N, site.C, site.S, site.tile, site.fold, site.per


@ordered
def work_of(numbers):
    """`kernels.Work` of an entry's `numbers`."""
    return kernels.work_of(values(numbers, SITE + WORK, np.int64)[SITE:])


def _tensor(dtype: Any) -> tuple[Any, Any]:
    """Return functions that make the kernels' view of an array like x, and of None."""

    @ordered
    def tensor(obj, site):
        memory = values(obj, site.N * site.C * site.S, dtype)
        return memory, site.C * site.S, site.S

    @ordered
    def absent(obj, site):
        return None

    return tensor, absent


@by_types
def derived(norm, act):
    """`norm` of a backward pass: followed by the activation, unless that is ReLU or none."""
    if isinstance(act, types.Number):
        return lambda norm, act: norm
    return lambda norm, act: (*norm, act)


def _act(of: Any) -> Any:
    """Return the function that turns `number` into what kernels take for an activation."""
    if of is None:
        return inlined(lambda number: number)
    return inlined(named(_name("act", of))(lambda number: of(number)))


def _name(name: str, of: Any) -> str:
    return name if of is None else f"{name}_{of.__name__}"


@lru_cache(maxsize=256)
def forward(traversal: str, dtype: str, added: bool, of: Any = None) -> Callable[..., Any]:
    """Compile the entry of a training forward, with a residual if `added`."""
    passes, kind = getattr(kernels, f"{traversal}_passes"), getattr(np, dtype)
    view, absent = _tensor(kind)
    residual_view = view if added else absent
    forward_pass, move_pass, act = passes.forward, kernels.move_pass, _act(of)

    def forward(
        x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd,
        numbers, eps, momentum, correction, number,
    ):  # fmt: skip
        if not forward_is_ordinary(
            x, gamma, beta, running_mean, running_var, residual, out, numbers,
            eps, momentum, correction, True,
        ):  # fmt: skip
            return False
        site, work = site_of(numbers), work_of(numbers)
        norm = (
            values(mean, site.C, np.float64), values(rstd, site.C, np.float64),
            parameter_values(gamma, site, 1, kind), parameter_values(beta, site, 0, kind),
        )  # fmt: skip
        partial, m2 = new((4, work.chunks, site.C), np.float64), new(site.C, np.float64)
        x_, residual_, y_ = view(x, site), residual_view(residual, site), view(y, site)
        forward_pass(x_, residual_, grid_of(site), work, norm, eps, act(number), partial, m2, y_)
        if given(running_mean, site):
            running = values(running_mean, site.C, kind), values(running_var, site.C, kind)
            move_pass(*running, norm[0], m2, momentum, site.N * site.S - correction)
        return True

    scalars = (types.float64,) * 4
    signature = types.boolean(*(anything,) * 11, *scalars)
    name = _name(f"entry_{traversal}_forward_{dtype}_{added}", of)
    return entry_point(forward, name, signature)


@lru_cache(maxsize=256)
def inference(traversal: str, dtype: str, added: bool, of: Any = None) -> Callable[..., Any]:
    """Compile the entry of inference, which also stores mean and rstd (float64) if given arrays."""
    passes, kind = getattr(kernels, f"{traversal}_passes"), getattr(np, dtype)
    view, absent = _tensor(kind)
    residual_view = view if added else absent
    apply_pass, inference_statistics = passes.apply, kernels.inference_statistics
    act = _act(of)

    def inference(
        x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd,
        numbers, eps, number,
    ):  # fmt: skip
        if not forward_is_ordinary(
            x, gamma, beta, running_mean, running_var, residual, out, numbers,
            eps, 0.0, 0.0, False,
        ):  # fmt: skip
            return False
        site, work = site_of(numbers), work_of(numbers)
        norm = (
            values_or_new(mean, site), values_or_new(rstd, site),
            parameter_values(gamma, site, 1, kind), parameter_values(beta, site, 0, kind),
        )  # fmt: skip
        mean_, var = values(running_mean, site.C, kind), values(running_var, site.C, kind)
        inference_statistics(mean_, var, eps, norm[0], norm[1])
        x_, residual_, y_ = view(x, site), residual_view(residual, site), view(y, site)
        apply_pass(x_, residual_, grid_of(site), work, norm, act(number), y_)
        return True

    signature = types.boolean(*(anything,) * 11, types.float64, types.float64)
    name = _name(f"entry_{traversal}_inference_{dtype}_{added}", of)
    return entry_point(inference, name, signature)


@lru_cache(maxsize=256)
def backward(traversal: str, dtype: str, mask: str, of: Any = None) -> Callable[..., Any]:
    """Compile the entry of a training backward.

    `mask` says where ReLU's mask comes from: "none", "beta", or "y" (with a residual). The
    derivative of another activation comes from "beta", and from the residual in place of "y".
    """
    passes, kind = getattr(kernels, f"{traversal}_passes"), getattr(np, dtype)
    view, absent = _tensor(kind)
    y_view = view if mask == "y" else absent
    backward_pass, act = passes.backward, _act(of)

    @ordered
    def no_beta(beta, site, default, dtype):
        return None

    beta_values = parameter_values if mask == "beta" or of is not None else no_beta

    def backward(
        dy, x, gamma, mean, rstd, beta, y, out, dx, dresidual, dgamma, dbeta, numbers, number
    ):
        if not backward_is_ordinary(dy, x, gamma, mean, rstd, beta, y, out, numbers):
            return False
        site, work = site_of(numbers), work_of(numbers)
        norm = (
            values(mean, site.C, np.float64), values(rstd, site.C, np.float64),
            parameter_values(gamma, site, 1, kind), beta_values(beta, site, 0, kind),
        )  # fmt: skip
        partial = new((2, work.chunks, site.C), np.float64)
        sums = new((2, site.C), np.float64)
        dy_, x_, y_ = view(dy, site), view(x, site), y_view(y, site)
        dx_, dresidual_ = view(dx, site), y_view(dresidual, site)
        backward_pass(
            dy_, x_, y_, grid_of(site), work, derived(norm, act(number)), float(site.N * site.S),
            partial, sums, dx_, dresidual_,
        )  # fmt: skip
        of_beta, of_gamma = values(dbeta, site.C, kind), values(dgamma, site.C, kind)
        for c in range(site.C):
            of_beta[c] = sums[0, c]
            of_gamma[c] = sums[1, c]
        return True

    signature = types.boolean(*(anything,) * 13, types.float64)
    name = _name(f"entry_{traversal}_backward_{dtype}_{mask}", of)
    return entry_point(backward, name, signature)
