"""Results: dtypes, memory order, `out`, and empty inputs."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import SENTINEL, SHAPE, SMALL, VALID, data, refuses, takers, target
from strategies import (
    BFLOAT16,
    DTYPES,
    Recipe,
    empty_shapes_and_axes,
    lay_out,
    other_layouts,
    recipes,
    writable_layouts,
)
from tolerances import assert_same_bits, assert_within, stored

import nbnorm

activations = st.sampled_from((None, "relu"))


def setup_module():
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


@given(recipes(dtypes=("float32",)), activations, writable_layouts())
def test_out_of_any_layout_gets_the_bits_of_a_fresh_result(recipe, activation, layout):
    x, gamma, beta, axis = recipe.x(), recipe.gamma(), recipe.beta(), recipe.axis
    options = {"axis": axis, "eps": recipe.eps, "activation": activation}
    fresh = nbnorm.batch_norm_forward(x, gamma, beta, **options)
    out = lay_out(np.full(x.shape, 7, x.dtype), layout)
    got = nbnorm.batch_norm_forward(x, gamma, beta, out=out, **options)
    assert got.y is out
    assert_same_bits(out, fresh.y, "y")
    applied = lay_out(np.full(x.shape, 7, x.dtype), layout)
    y = nbnorm.batch_norm_apply(
        x, gamma, beta, fresh.mean, fresh.rstd, axis=axis, activation=activation, out=applied
    )
    assert y is applied
    assert_same_bits(y, fresh.y, "y")
    dy = recipe.like_x(5)
    arguments = (dy, x, gamma, fresh.mean, fresh.rstd)
    options = {"beta": beta, "axis": axis, "activation": activation}
    dx = lay_out(np.full(x.shape, 7, x.dtype), layout)
    grads = nbnorm.batch_norm_backward(*arguments, out=dx, **options)
    assert grads.dx is dx
    assert_same_bits(dx, nbnorm.batch_norm_backward(*arguments, **options).dx, "dx")


def is_dense(x):
    """Return whether x fills its memory in some order of its axes."""
    strides = sorted((s, n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)
    expected = x.itemsize
    for stride, n in strides:
        if stride != expected:
            return False
        expected *= n
    return True


@given(recipes(), other_layouts())
def test_results_keep_the_memory_order_of_a_dense_x(recipe, dy_layout):
    x, dy = recipe.x(), recipe.like_x(5, dy_layout)
    forward = nbnorm.batch_norm_forward(x, recipe.gamma(), recipe.beta(), axis=recipe.axis)
    grads = nbnorm.batch_norm_backward(
        dy, x, recipe.gamma(), forward.mean, forward.rstd, axis=recipe.axis
    )
    for result in (forward.y, grads.dx):
        longer = [a for a, n in enumerate(x.shape) if n > 1]
        model = x if is_dense(x) else np.empty(x.shape, x.dtype)
        assert [result.strides[a] for a in longer] == [model.strides[a] for a in longer]
        assert result.flags.writeable
        assert result.flags.aligned
        assert not np.shares_memory(result, x)
    for small in (forward.mean, forward.rstd, grads.dgamma, grads.dbeta):
        assert small.flags.c_contiguous
        assert small.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_parameter_gradients_without_gamma_is_that_of_x(dtype):
    recipe = Recipe((3, 4, 5), 1, dtype=dtype)
    x = recipe.x()
    grads = nbnorm.batch_norm_backward(x, x, None, np.zeros(4), np.ones(4))
    assert grads.dgamma.dtype == grads.dbeta.dtype == x.dtype


def test_bfloat16_parameters_give_bfloat16_gradients():
    recipe = Recipe((8, 4, 5), 1, gamma_dtype="bfloat16")
    x = recipe.x()
    grads = nbnorm.batch_norm_backward(x, x, recipe.gamma(), np.zeros(4), np.ones(4))
    assert grads.dgamma.dtype == grads.dbeta.dtype == BFLOAT16


@given(empty_shapes_and_axes(), st.sampled_from(DTYPES), st.sampled_from((0, 1)))
def test_empty_inputs(shape_and_axis, dtype, correction):
    recipe = Recipe(*shape_and_axis, dtype=dtype, gamma_dtype="float64")
    x = np.empty(recipe.shape, dtype)
    gamma, beta, running = recipe.gamma(), recipe.beta(), recipe.running()
    if 0 < recipe.count <= correction:  # m is defined even without channels
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            nbnorm.batch_norm_forward(x, gamma, beta, correction=correction, axis=recipe.axis)
        correction = 0
    out = np.empty_like(x)
    y, mean, rstd = nbnorm.batch_norm_forward(
        x,
        gamma,
        beta,
        *running,
        correction=correction,
        axis=recipe.axis,
        activation="relu",
        out=out,
    )
    assert y is out
    y = nbnorm.batch_norm_forward(x, gamma, beta, correction=correction, axis=recipe.axis).y
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    zeros = np.zeros(recipe.channels)
    assert_same_bits(mean, zeros, "mean")
    assert_same_bits(rstd, zeros, "rstd")
    for new, old in zip(running, recipe.running(), strict=True):
        assert_same_bits(new, old, "running statistics")
    for training in (True, False):
        grads = nbnorm.batch_norm_backward(
            x, x, gamma, mean, rstd, beta=beta, y=y, training=training, axis=recipe.axis
        )
        assert grads.dx.shape == grads.dresidual.shape == x.shape
        assert_same_bits(grads.dgamma, zeros, "dgamma")
        assert_same_bits(grads.dbeta, zeros, "dbeta")
    moments = nbnorm.batch_norm_stats(x, axis=recipe.axis)
    assert moments.count == recipe.count
    assert_same_bits(moments.mean, zeros, "mean")
    assert_same_bits(moments.m2, zeros, "m2")
    sums = nbnorm.batch_norm_backward_reduce(x, x, mean, rstd, axis=recipe.axis)
    assert_same_bits(sums[0], zeros, "sum_dy")
    assert_same_bits(sums[1], zeros, "sum_dy_xhat")
    arguments = (gamma, mean, rstd, *sums, recipe.count)
    dx = nbnorm.batch_norm_backward_apply(x, x, *arguments, axis=recipe.axis)
    assert dx.shape == x.shape
    for function in (nbnorm.batch_norm_apply, nbnorm.batch_norm_inference):
        assert function(x, gamma, beta, mean, rstd, axis=recipe.axis).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1), (5, 1)])
def test_one_value_per_channel_without_correction_gives_beta(dtype, shape):
    axis = shape.index(5)
    recipe = Recipe(shape, axis, dtype=dtype, offset=1e4)
    x, gamma, beta, running = recipe.x(), recipe.gamma(), recipe.beta(), recipe.running()
    got = nbnorm.batch_norm_forward(x, gamma, beta, *running, correction=0, axis=axis)
    assert_same_bits(got.y.reshape(-1), beta.astype(dtype), "y")
    assert_same_bits(got.mean, x.reshape(-1).astype(np.float64), "mean")
    expected = 0.9 * recipe.running()[1].astype(np.float64)
    assert_within(running[1], expected, stored(0, expected, np.float32), "running_var")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (9, 5), (2, 5, 3000)])
def test_zero_variance_and_zero_eps_gives_rstd_zero_and_beta(dtype, shape):
    recipe = Recipe(shape, 1, dtype=dtype)
    beta = recipe.beta()
    x = np.full(shape, 3.7, dtype)
    got = nbnorm.batch_norm_forward(x, recipe.gamma(), beta, eps=0)
    assert_same_bits(got.rstd, np.zeros(5), "rstd")
    per_channel = beta.astype(dtype).reshape(5, *[1] * (len(shape) - 2))
    assert_same_bits(got.y, np.broadcast_to(per_channel, shape), "y")
    grads = nbnorm.batch_norm_backward(recipe.like_x(5), x, recipe.gamma(), got.mean, got.rstd)
    assert not np.any(grads.dx)
    assert not np.any(grads.dgamma)


@pytest.mark.cpu_only  # CuPy arrays are never read-only
@pytest.mark.parametrize(("function", "argument"), takers("out"))
def test_read_only_out(function, argument):
    refuses(function, ValueError, r"^out\b.*read-only", out=lay_out(target(), "read-only"))


INPUTS_BESIDE_OUT = takers("x", "dy", "residual", "y", functions=[f for f, _ in takers("out")])


@pytest.mark.parametrize(("function", "argument"), INPUTS_BESIDE_OUT)
@pytest.mark.parametrize("shift", [1, 16, 128])
def test_out_that_overlaps_an_input(function, argument, shift):
    memory = np.full(256 + shift, SENTINEL, "float32")
    array = memory[:256].reshape(SHAPE)
    shifted = memory[shift:].reshape(SHAPE)
    for arrays in ({argument: array, "out": shifted}, {argument: shifted, "out": array}):
        refuses(function, ValueError, rf"^out\b.*overlap.*\b{argument}\b", **arrays)


@pytest.mark.parametrize(("function", "argument"), INPUTS_BESIDE_OUT)
def test_out_that_is_an_input_in_another_order(function, argument):
    array = data(shape=(2, 8, 4, 4))
    for view in (array.transpose(0, 1, 3, 2), array[..., ::-1], array[::-1]):
        match = rf"^out\b.*overlap.*\b{argument}\b"
        refuses(function, ValueError, match, **{argument: array, "out": view})


@pytest.mark.parametrize(
    ("function", "argument"), takers(*SMALL, functions=[f for f, _ in takers("out")])
)
def test_out_that_overlaps_a_parameter(function, argument):
    dtype = VALID[function]()[argument].dtype
    out = target()
    parameter = out.reshape(-1).view(dtype)[8:16]
    match = rf"^out\b.*overlap.*\b{argument}\b"
    refuses(function, ValueError, match, **{argument: parameter, "out": out})


def test_x_itself_as_out_is_fine():
    x = data()
    expected = nbnorm.batch_norm_forward(x).y
    assert nbnorm.batch_norm_forward(x, out=x).y is x
    assert_same_bits(x, expected)
    x = data()
    same = x[:]  # another object with the same memory and strides
    assert nbnorm.batch_norm_forward(x, out=same).y is same
    assert_same_bits(x, expected)


def test_dy_itself_as_out_is_fine():
    dy, x = data(seed=1), data()
    expected = nbnorm.batch_norm_backward(dy, x, None, np.zeros(8), np.ones(8)).dx
    assert nbnorm.batch_norm_backward(dy, x, None, np.zeros(8), np.ones(8), out=dy).dx is dy
    assert_same_bits(dy, expected)


def test_interleaved_arrays_that_share_no_element_are_fine():
    memory = np.zeros((2, 16, 4, 4), "float32")
    x, out = memory[:, 0::2], memory[:, 1::2]
    x[...] = data()
    expected = nbnorm.batch_norm_forward(data()).y
    assert nbnorm.batch_norm_forward(x, out=out).y is out
    assert_same_bits(out, expected)
    assert_same_bits(x, data(), "x")


def test_neighbouring_columns_of_one_matrix_are_fine():
    memory = np.zeros((30, 20), "float32")
    x, out = memory[:, :10], memory[:, 10:]
    x[...] = data(shape=(30, 10))
    expected = nbnorm.batch_norm_forward(data(shape=(30, 10))).y
    nbnorm.batch_norm_forward(x, out=out)
    assert_same_bits(out, expected)
    assert_same_bits(x, data(shape=(30, 10)), "x")


@pytest.mark.parametrize("argument", ["out", "running_mean", "running_var"])
def test_broadcast_array_cannot_be_written_to(argument):
    x = Recipe((4, 3, 5), (1,)).x()
    arrays = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    shape = x.shape if argument == "out" else (3,)
    memory = np.full(1, 7, np.float32)
    arrays[argument] = np.lib.stride_tricks.as_strided(memory, shape, (0,) * len(shape))
    with pytest.raises(ValueError, match=rf"^{argument} is an array whose elements share"):
        nbnorm.batch_norm_forward(x, **arrays)
    assert memory[0] == 7


def test_out_of_overlapping_elements():
    memory = np.zeros(40, np.float32)
    out = np.lib.stride_tricks.as_strided(memory, (10, 3), (4, 4))
    with pytest.raises(ValueError, match=r"^out is an array whose elements share memory"):
        nbnorm.batch_norm_forward(np.ones((10, 3), np.float32), out=out)
    assert not memory.any()


def test_out_whose_steps_are_not_nested_but_meet_nowhere():
    memory = np.zeros(40, np.float32)
    out = np.lib.stride_tricks.as_strided(memory, (2, 3), (12, 8))
    x = data(shape=(2, 3))
    nbnorm.batch_norm_forward(x, out=out)
    assert_same_bits(np.array(out), nbnorm.batch_norm_forward(x).y)


def test_x_as_out_with_another_stride_along_an_axis_of_one():
    base = data(shape=(4, 6, 8)).copy()
    expected = nbnorm.batch_norm_forward(base[:1]).y
    out = base[0][None]
    assert out.strides != base[:1].strides
    assert nbnorm.batch_norm_forward(base[:1], out=out).y is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("other", ["running_mean", "x"])
def test_running_statistics_that_share_memory(other):
    x = data(shape=(8, 3)).copy()
    running = np.ones(3, np.float32)
    pair = (running, running) if other == "running_mean" else (x[0], running)
    before = x.copy()
    with pytest.raises(ValueError, match="share memory"):
        nbnorm.batch_norm_forward(x, None, None, *pair)
    assert_same_bits(x, before)
    assert (running == 1).all()


@pytest.mark.parametrize("correction", [np.int8(1), np.uint8(1), np.float16(1), True])
def test_correction_of_a_narrow_type_is_not_computed_in_it(correction):
    x = data(shape=(20000, 2))
    narrow, wide = ([np.zeros(2), np.zeros(2)] for _ in range(2))
    nbnorm.batch_norm_forward(x, None, None, *narrow, correction=correction)
    nbnorm.batch_norm_forward(x, None, None, *wide, correction=1)
    assert_same_bits(narrow[1], wide[1])


@pytest.mark.cpu_only  # GPUs cannot read them
def test_unaligned_arrays_of_every_kind():
    def unaligned(array):
        return lay_out(array, "unaligned")

    x, small = data(shape=(6, 4, 5)).astype(np.float64), np.linspace(1, 2, 4)
    expected = nbnorm.batch_norm_forward(x, small, small)
    got = nbnorm.batch_norm_forward(unaligned(x), unaligned(small), unaligned(small))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
