"""Arrays that share memory in ways that are hard to detect: rejected before anything is written."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from refusals import data, refuses, takers
from strategies import lay_out
from tolerances import assert_same_bits

import nbnorm

INPLACE = [(f, a) for f, a in takers("x", "dy") if (a == "dy") == ("backward" in f)]
INPLACE = [(f, a) for f, a in INPLACE if (f, "out") in takers("out")]


@pytest.mark.parametrize(("function", "argument"), INPLACE)
def test_out_that_begins_where_an_input_does_but_takes_longer_steps(function, argument):
    """The first value and the shape are the same, yet y would overwrite x before it is read."""
    memory = data(shape=(3, 8, 4, 4))
    array, out = memory[:2], memory[::2]
    match = rf"^out overlaps {argument} in memory but is not {argument}$"
    refuses(function, ValueError, match, **{argument: array, "out": out})
    refuses(function, ValueError, match, **{argument: out, "out": array})


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((3, 4), (6, 4)),  # 12 = 2 * 6 = 3 * 4
        ((4, 4, 2), (6, 4, 9)),
        ((2, 2, 4), (5, 4, 1)),  # each step exceeds the extent of one axis, but not of both
        ((3, 4), (-6, 4)),
        ((2, 3), (2, 1)),
    ],
)
def test_out_with_elements_that_share_a_place(shape, steps):
    memory = np.zeros(100, np.float32)
    out = as_strided(memory[40:], shape, [4 * step for step in steps])
    with pytest.raises(ValueError, match=r"^out is an array whose elements share memory"):
        nbnorm.batch_norm_forward(data(shape=shape), out=out)
    assert not memory.any()


@pytest.mark.parametrize(
    ("shape", "steps"),
    [((3, 4), (5, 4)), ((2, 3), (3, 2)), ((3, 4), (-7, 2)), ((3, 2), (2, 1)), ((1, 4), (0, 2))],
)
def test_out_with_elements_that_share_no_place(shape, steps):
    memory = np.zeros(100, np.float32)
    out = as_strided(memory[40:], shape, [4 * step for step in steps])
    x = data(shape=shape)
    nbnorm.batch_norm_forward(x, out=out, correction=0)
    assert_same_bits(np.array(out), nbnorm.batch_norm_forward(x, correction=0).y)


@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize("shared", ["running_mean", "running_var"])
def test_running_statistics_within_x(shared, place):
    x = data(shape=(8, 3))
    running = {"running_mean": np.ones(3, "float32"), "running_var": np.ones(3, "float32")}
    running[shared] = x[place]
    with pytest.raises(ValueError, match=rf"^{shared} and x share memory"):
        nbnorm.batch_norm_forward(x, **running)
    assert_same_bits(x, data(shape=(8, 3)), "x")
    for name, array in running.items():
        assert name == shared or (array == 1).all()


# Deciding whether these two arrays share an element takes longer than a pass over them.
HARD = (8, 4, 9, 7), (735, 3505, 1051, 123), (705, 183, 1134, 3359)


@pytest.mark.cpu_only  # other backends copy such arrays
def test_overlap_that_is_too_hard_to_decide_is_refused():
    shape, steps, out_steps = HARD
    memory = data(shape=(50_000,))
    before = memory.copy()
    x = as_strided(memory, shape, [4 * step for step in steps])
    out = as_strided(memory[2187:], shape, [4 * step for step in out_steps])
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(x, out, max_work=1 << 16)
    with pytest.raises(ValueError, match=r"^out overlaps x in memory"):
        nbnorm.batch_norm_forward(x, out=out)
    assert_same_bits(memory, before)


def test_layouts_that_overlap_nothing_are_not_hard():
    """Every pair of practical layouts is decided, and not rejected as too hard."""
    for first in ("every second", "reversed", "padded rows", "channels last"):
        for second in ("every second row", "reversed rows", "padded rows", "Fortran"):
            x, out = (lay_out(data(), layout) for layout in (first, second))
            nbnorm.batch_norm_forward(x, out=out)
