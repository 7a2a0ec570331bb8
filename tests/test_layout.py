"""How arrays are viewed as (N, C, S): what kernels read in place, and what is copied."""

from itertools import product

import numpy as np
import pytest
from strategies import lay_out
from tolerances import assert_same_bits

import nbnorm
from nbnorm._frame import Frame
from nbnorm._layout import PLANE, SAMPLE, Layout, fits, layout_of


def layout(shape, axis=(1,), order=None):
    """Return the layout of a float32 array, contiguous or with its axes in this memory order."""
    strides = [0] * len(shape)
    step = 4
    for i in reversed(order or range(len(shape))):
        strides[i] = step
        step *= shape[i]
    return layout_of(shape, tuple(strides), 4, axis)


@pytest.mark.parametrize(
    ("shape", "axis", "order", "expected"),
    [
        ((4, 3, 5, 6), (1,), None, (4, 3, 30)),
        ((4, 3, 5, 6), (1,), (0, 2, 3, 1), (120, 3, 1)),
        ((4, 3, 5, 6), (3,), None, (60, 6, 1)),
        ((4, 3, 5, 6), (1, 3), None, (4, 18, 5)),  # not adjacent: the layout of a copy
        ((4, 3, 5, 6), (1, 2), None, (4, 15, 6)),
        ((4, 1, 5, 6), (1,), None, (4, 1, 30)),  # an axis of one channel still separates N from S
        ((1, 3, 5, 1), (3,), None, (15, 1, 1)),
    ],
)
def test_axes_before_the_channels_are_n_and_those_after_are_s(shape, axis, order, expected):
    assert layout(shape, axis, order).shape == expected


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1), (3, 2, 1, 0)])
def test_order_in_memory_of_results(order):
    expected = order or (0, 1, 2, 3)
    got = layout((4, 3, 5, 6), (1,), order)
    assert got.dense == expected
    assert got.natural == (got.order == (0, 1, 2, 3))


def test_strides_along_axes_of_one_value_do_not_change_the_order_of_results():
    channels_last = layout_of((1, 3, 5, 6), (4, 4, 72, 12), 4, (1,))
    assert [i for i in channels_last.dense if i] == [2, 3, 1]
    assert layout_of((5, 1, 6), (24, 4, 4), 4, (0,)).dense == (0, 1, 2)


# Long rows, planes too short to be separate in memory, and samples too short to be.
LONG, SHORT, TINY = (4, 3, PLANE), (4, 3, PLANE // 2), (4, 3, 8)
assert SHORT[1] * SHORT[2] >= SAMPLE > TINY[1] * TINY[2]


@pytest.mark.parametrize("shape", [LONG, SHORT, TINY], ids=str)
def test_what_kernels_read_as_it_is(shape):
    _, C, S = shape
    seen = layout(shape)

    def fitting(n, c, s=1, itemsize=4):
        return fits(seen, shape, (n * itemsize, c * itemsize, s * itemsize), itemsize)

    assert fitting(C * S, S)
    assert not fitting(C * S, S, 2)
    assert not fitting(C * S, -S)
    assert not fitting(C * S, 0)
    assert not fitting(C * S, S - 1)
    assert not fitting(-C * S, S)  # kernels expect a single row that starts at the first value
    apart = shape == LONG
    assert fitting(2 * C * S, 2 * S) == apart
    assert fitting(C * S + 5, S) == (shape != TINY)


@pytest.mark.parametrize("shape", [LONG, SHORT, TINY], ids=str)
def test_strides_that_are_no_whole_values_do_not_fit(shape):
    _, C, S = shape
    good = (C * S * 4, S * 4, 4)
    for i, off in product(range(3), (1, 2, 3)):
        strides = tuple(step + off * (i == j) for j, step in enumerate(good))
        assert not fits(layout(shape), shape, strides, 4)


def test_strides_along_axes_of_one_value_do_not_matter():
    seen = layout((1, 3, 5))
    assert isinstance(seen, Layout)
    assert fits(seen, (1, 3, 5), (-40, 20, 4), 4)
    assert fits(layout((4, 1, 300)), (4, 1, 300), (1200, -8, 4), 4)
    assert fits(layout((300, 4, 1)), (300, 4, 1), (16, 4, 400), 4)


def sliced(shape, dtype="float32"):
    """Yield arrays of this shape that are hard or impossible to view as (N, C, S)."""
    step = (slice(None, None, 2), slice(None, None, -1), slice(None, None, -2))
    memory = np.random.default_rng(0).normal(size=[2 * n for n in shape]).astype(dtype)
    for cut in product((slice(None), *step), repeat=len(shape)):
        view = memory[cut]
        yield view[tuple(slice(0, n) for n in shape)]


SHAPES = [(4, 3, 10, 10), (3, 2, 16, 20), (6, 5), (3, 4, 9)]


@pytest.mark.cpu_only  # strides are those of NumPy's memory
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_are_of_the_values_and_as_kernels_take_them(shape):
    for x in sliced(shape):
        frame = Frame(x, 1)
        view = frame.view(x)
        N, C, S = view.shape
        n, c, s = (step // x.itemsize for step in view.strides)
        assert_same_bits(view, np.ascontiguousarray(x).reshape(N, C, S))
        assert S == 1 or s == 1
        assert C == 1 or c >= S
        assert N == 1 or n >= (C - 1) * c + S


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_that_run_backwards_or_have_gaps_give_the_bits_of_their_copies(shape):
    for x in sliced(shape):
        dense = np.ascontiguousarray(x)
        expected = nbnorm.batch_norm_forward(dense)
        y, mean, rstd = nbnorm.batch_norm_forward(x)
        assert_same_bits(y, expected.y, "y")
        nbnorm.batch_norm_forward(x, out=x)
        assert_same_bits(x, expected.y, "y in place")
        grads = nbnorm.batch_norm_backward(x, dense, None, mean, rstd)
        wanted = nbnorm.batch_norm_backward(y, dense, None, mean, rstd)
        assert_same_bits(grads.dx, wanted.dx, "dx")
        assert_same_bits(grads.dgamma, wanted.dgamma, "dgamma")


@pytest.mark.cpu_only  # GPUs cannot read them
@pytest.mark.parametrize("shape", [(4, 3, 20, 20), (4, 3, 10, 10), (40, 6)], ids=str)
def test_a_field_of_records_whose_stride_is_no_whole_value(shape):
    records = np.zeros(shape, [("value", "f4"), ("flag", "i1")])
    x = records["value"]
    x[...] = np.random.default_rng(0).normal(size=shape)
    expected = nbnorm.batch_norm_forward(lay_out(x, "C"))
    for out in (None, np.zeros_like(records)["value"]):
        got = nbnorm.batch_norm_forward(x, out=out)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
    assert not records["flag"].any()
