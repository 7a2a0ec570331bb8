"""Backward without x: x_hat from y, the forward's `out=x`, and the layer that writes over x."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import VALID, per_channel, refuses
from strategies import DTYPES, Recipe, other_layouts, recipes, writable_layouts
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    from_y_tolerance,
    inverse,
    stored,
    sums_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, reference
from nbnorm.activations import NAMES
from nbnorm.distributed import (
    SelfComm,
    SyncBatchNorm,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

BACKWARD = ("batch_norm_backward", "batch_norm_backward_reduce", "batch_norm_backward_apply")


def forward_of(recipe, **options):
    """Return x, gamma, beta and the result of the forward call."""
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    options = {"eps": recipe.eps, "axis": recipe.axis} | options
    return x, gamma, beta, nbnorm.batch_norm_forward(x, gamma, beta, **options)


@given(recipes(), st.booleans(), other_layouts())
def test_backward_from_y_agrees_with_the_oracle_from_the_stored_y(recipe, training, dy_layout):
    x, gamma, beta, (y, mean, rstd) = forward_of(recipe)
    dy, axis = recipe.like_x(5, dy_layout), recipe.axis
    options = {"beta": beta, "y": y, "training": training, "axis": axis}
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    ref = reference.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    dtype = x.dtype if gamma is None else gamma.dtype
    assert got.dx.dtype == x.dtype
    assert got.dx.strides == y.strides
    assert got.dgamma.dtype == got.dbeta.dtype == dtype
    assert got.dresidual is None
    center, over_gamma, factor = inverse(gamma, beta, rstd, mean)
    error = dx_tolerance(dy, y, factor, center, over_gamma, axis=axis, training=training)
    dbeta_error, dgamma_error = sums_tolerance(dy, y, center, over_gamma, axis=axis)
    assert_within(got.dx, ref.dx, error, "dx")
    assert_within(got.dgamma, ref.dgamma, stored(dgamma_error, ref.dgamma, dtype), "dgamma")
    assert_within(got.dbeta, ref.dbeta, stored(dbeta_error, ref.dbeta, dtype), "dbeta")


@given(recipes(), st.booleans())
def test_backward_from_y_is_that_from_x_but_for_the_rounding_of_y(recipe, training):
    x, gamma, beta, (y, mean, rstd) = forward_of(recipe)
    dy, axis = recipe.like_x(5), recipe.axis
    options = {"training": training, "axis": axis}
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=beta, y=y, **options)
    ref = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    dx_more, dgamma_more = from_y_tolerance(dy, x, gamma, beta, mean, rstd, **options)
    error = dx_tolerance(dy, x, gamma, mean, rstd, **options)
    _, dgamma_error = sums_tolerance(dy, x, mean, rstd, axis=axis)
    dgamma_error = stored(dgamma_error, ref.dgamma, got.dgamma.dtype)
    assert_within(got.dx, ref.dx, error + dx_more, "dx")
    assert_within(got.dgamma, ref.dgamma, dgamma_error + dgamma_more, "dgamma")


LEAKY = nbnorm.activation("leaky_relu", slope=0.25)


def before(y, slope):
    """Return v of y = leaky_relu(v) in y's compute dtype, exact if the slope is a power of two."""
    wide = y.astype(np.float64 if y.dtype == np.float64 else np.float32)
    return np.where(wide > 0, wide, wide / wide.dtype.type(slope))


@given(recipes(), st.booleans(), st.sampled_from([2.0**-2, 2.0**-7, 2.0]))
def test_leaky_relu_is_inverted(recipe, training, slope):
    """Results are as accurate as from v itself: dividing by a power of two loses no digit."""
    act = nbnorm.activation("leaky_relu", slope=slope)
    x, gamma, beta, (y, mean, rstd) = forward_of(recipe, activation=act)
    dy, axis = recipe.like_x(5), recipe.axis
    options = {"beta": beta, "y": y, "training": training, "axis": axis, "activation": act}
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    ref = reference.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    v = before(y, slope)
    through = np.where(v > 0, dy, dy.astype(v.dtype) * v.dtype.type(slope))
    center, over_gamma, factor = inverse(gamma, beta, rstd, mean)
    error = dx_tolerance(through, v, factor, center, over_gamma, axis=axis, training=training)
    dbeta_error, dgamma_error = sums_tolerance(through, v, center, over_gamma, axis=axis)
    dtype = x.dtype if gamma is None else gamma.dtype
    assert_within(got.dx, ref.dx, stored(error, ref.dx, x.dtype), "dx")
    assert_within(got.dgamma, ref.dgamma, stored(dgamma_error, ref.dgamma, dtype), "dgamma")
    assert_within(got.dbeta, ref.dbeta, stored(dbeta_error, ref.dbeta, dtype), "dbeta")
    assert got.dresidual is None


@pytest.mark.parametrize("shape", [(6, 3, 40), (30, 7), (2, 3, 20, 20)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("slope", [0.01, 0.2, 3.0])
def test_leaky_relu_from_y_is_that_from_x_but_for_rounding(shape, dtype, slope):
    recipe = Recipe(shape, 1, dtype=dtype)
    act = nbnorm.activation("leaky_relu", slope=slope)
    x, gamma, beta, (y, mean, rstd) = forward_of(recipe, activation=act)
    dy, options = recipe.like_x(5), {"axis": recipe.axis, "activation": act, "beta": beta}
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, y=y, **options)
    ref = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    through = reference.batch_norm_apply(x, gamma, beta, mean, rstd, axis=recipe.axis)
    through = np.where(through > 0, dy, slope * dy).astype(np.float64)
    dx_more, dgamma_more = from_y_tolerance(
        through, x, gamma, beta, mean, rstd, axis=recipe.axis, training=True
    )
    error = dx_tolerance(through, x, gamma, mean, rstd, axis=recipe.axis)
    _, dgamma_error = sums_tolerance(through, x, mean, rstd, axis=recipe.axis)
    # v is rounded three times rather than once, and the slope is rounded as well.
    assert_within(got.dx, ref.dx, 2 * error + 4 * dx_more, "dx")
    error = stored(2 * dgamma_error, ref.dgamma, got.dgamma.dtype) + 4 * dgamma_more
    assert_within(got.dgamma, ref.dgamma, error, "dgamma")


@pytest.mark.parametrize("activation", [None, LEAKY])
@given(recipes(dtypes=("float32",)), other_layouts())
def test_split_backward_from_y_is_the_fused_one(activation, recipe, dy_layout):
    _, gamma, beta, (y, mean, rstd) = forward_of(recipe, activation=activation)
    dy, options = recipe.like_x(5, dy_layout), {"beta": beta, "y": y, "axis": recipe.axis}
    options["activation"] = activation
    fused = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    sums = nbnorm.batch_norm_backward_reduce(dy, None, mean, rstd, gamma=gamma, **options)
    dx = nbnorm.batch_norm_backward_apply(
        dy, None, gamma, mean, rstd, *sums, recipe.count, **options
    )
    assert_same_bits(dx, fused.dx, "dx")
    assert_same_bits(sums[1].astype(fused.dgamma.dtype), fused.dgamma, "dgamma")
    assert_same_bits(sums[0].astype(fused.dbeta.dtype), fused.dbeta, "dbeta")
    ref = reference.batch_norm_backward_reduce(dy, None, mean, rstd, gamma=gamma, **options)
    center, over_gamma, factor = inverse(gamma, beta, rstd, mean)
    v, through = y, dy
    if activation is not None:
        v = before(y, 0.25)
        through = np.where(v > 0, dy, dy * np.float32(0.25))
    errors = sums_tolerance(through, v, center, over_gamma, axis=recipe.axis)
    for name, total, expected, error in zip(
        ("sum_dy", "sum_dy_xhat"), sums, ref, errors, strict=True
    ):
        assert_within(total, expected, error, name)
    ref_dx = reference.batch_norm_backward_apply(
        dy, None, gamma, mean, rstd, *ref, recipe.count, **options
    )
    error = dx_tolerance(through, v, factor, center, over_gamma, axis=recipe.axis)
    assert_within(dx, ref_dx, error, "dx")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2.0**-100, 1e-30, 1e-3, 1e3, 1e18, 2.0**100])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gamma_of_any_size(dtype, size, scale):
    """beta is 0, so that y keeps all digits of x_hat however small gamma is."""
    recipe = Recipe((6, 3, 40), 1, dtype=dtype, scale=scale, eps=0.0, beta_dtype=None)
    x, dy = recipe.x(), recipe.like_x(5)
    gamma = np.array([1, -1, 0.75]) * size
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, eps=0.0)
    ref = reference.batch_norm_backward(dy, x, gamma, mean, rstd)
    factor = np.abs(gamma * rstd)
    if dtype == "float32" and not ((factor >= 2.0**-126) & (factor <= 2.0**126)).all():
        with pytest.raises(ValueError, match=r"^rstd is .* in channel 0, for which x_hat"):
            nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=None, y=y)
        return
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=None, y=y)
    more, _ = from_y_tolerance(dy, x, gamma, None, mean, rstd, axis=1)
    error = dx_tolerance(dy, x, gamma, mean, rstd, axis=1) + more
    assert_within(got.dx, ref.dx, error, "dx")


@pytest.mark.parametrize("activation", [None, "leaky_relu", LEAKY])
def test_the_oracle_from_y_is_the_oracle_from_x(activation):
    recipe = Recipe((4, 3, 5, 2), 1, dtype="float64")
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, activation=activation)
    options = {"beta": beta, "activation": activation}
    for training in (True, False):
        options["training"] = training
        from_x = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
        from_y = reference.batch_norm_backward(dy, None, gamma, mean, rstd, y=y, **options)
        for one, other in zip(from_x[:3], from_y[:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-16, atol=1e-16)


def test_where_rstd_is_0_x_hat_is_0():
    x, dy = np.full((4, 2), 3.0, np.float16), np.ones((4, 2), np.float16)
    beta = np.array([1 / 3, 0.1])  # y is rounded, so y - beta is not 0
    y, mean, rstd = nbnorm.batch_norm_forward(x, None, beta, eps=0.0)
    got = nbnorm.batch_norm_backward(dy, None, None, mean, rstd, beta=beta, y=y)
    assert not got.dx.any()
    assert not got.dgamma.any()
    assert (got.dbeta == 4).all()


@pytest.mark.parametrize("activation", [None, LEAKY])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["y", "gamma"])
def test_nan_and_inf_stay_in_their_channel(value, where, activation):
    recipe = Recipe((5, 4, 30), 1)
    _, gamma, beta, (y, mean, rstd) = forward_of(recipe, activation=activation)
    dy, options = recipe.like_x(5), {"beta": beta, "y": y, "activation": activation}
    clean = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    if where == "y":
        y[2, 1, 3] = value
    else:
        gamma[1] = value
    with np.errstate(all="raise"):
        got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    others = [0, 2, 3]
    assert_same_bits(got.dx[:, others], clean.dx[:, others], "dx")
    assert_same_bits(got.dgamma[others], clean.dgamma[others], "dgamma")
    assert not np.isfinite(got.dx[:, 1]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape):
    y, of_channel = np.zeros(shape, np.float32), np.ones(shape[1])
    got = nbnorm.batch_norm_backward(y, None, of_channel, of_channel, of_channel, beta=None, y=y)
    assert got.dx.shape == shape
    assert not got.dgamma.any()


@pytest.mark.parametrize("mask", [(1, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 1), (1, 1, 1, 1)])
def test_output_mask(mask):
    recipe = Recipe((4, 6, 9), 1)
    _, gamma, beta, (y, mean, rstd) = forward_of(recipe)
    arguments = (recipe.like_x(5), None, gamma, mean, rstd)
    full = nbnorm.batch_norm_backward(*arguments, beta=beta, y=y)
    mask = tuple(map(bool, mask))
    some = nbnorm.batch_norm_backward(*arguments, beta=beta, y=y, output_mask=mask)
    for wanted, one, other in zip(mask, some, full, strict=True):
        if wanted and other is not None:
            assert_same_bits(one, other)
        else:
            assert one is None


@given(recipes(dtypes=("float32",)), writable_layouts())
def test_out_may_be_dy(recipe, layout):
    _, gamma, beta, (y, mean, rstd) = forward_of(recipe)
    options = {"beta": beta, "y": y, "axis": recipe.axis}
    dy = recipe.like_x(5, layout)
    expected = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options).dx
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, out=dy, **options).dx
    assert got is dy
    assert_same_bits(got, expected)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    recipe = Recipe((4, 3, 5), 1)
    _, gamma, beta, (y, mean, rstd) = forward_of(recipe)
    arrays = [recipe.like_x(5), gamma, mean, rstd, beta, y]
    dy, *parameters, y_ = map(torch.from_numpy, arrays)
    got = nbnorm.batch_norm_backward(dy, None, *parameters[:3], beta=parameters[3], y=y_)
    expected = nbnorm.batch_norm_backward(arrays[0], None, gamma, mean, rstd, beta=beta, y=y)
    for ours, theirs in zip(expected[:3], got[:3], strict=True):
        assert isinstance(theirs, torch.Tensor)
        assert_same_bits(theirs.numpy(), ours)


# What is refused


def spoiled(function, **more):
    """Return replacements for valid arguments: no x, no activation, and `more` without out."""
    gone = {"x": None, "activation": None}
    return {name: value for name, value in (gone | more).items() if name != "out"}


@pytest.mark.parametrize("function", BACKWARD)
@pytest.mark.parametrize("name", ["gamma", "rstd"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-310, 2.0**-141, -(2.0**141), np.nan, np.inf])
def test_gamma_and_rstd_that_cannot_be_divided_by(function, name, value):
    array = per_channel("float64")
    array[3] = value
    arguments = spoiled(function, **{name: array})
    if not np.isfinite(value) or (name == "rstd" and value == 0):
        getattr(nbnorm, function)(**VALID[function]() | arguments)
        return
    match = rf"^{name} is {value:g} in channel 3, for which x_hat = .*; pass x".replace("+", r"\+")
    refuses(function, ValueError, match, **arguments)


def test_gamma_of_0_among_several_channel_axes():
    y, gamma = np.ones((2, 3, 4)), np.ones((3, 4))
    gamma[2, 1] = 0
    with pytest.raises(ValueError, match=r"^gamma is 0 in channel \(2, 1\), for"):
        nbnorm.batch_norm_backward(y, None, gamma, gamma, gamma, beta=None, y=y, axis=(1, 2))


@pytest.mark.parametrize("function", BACKWARD)
@pytest.mark.parametrize("name", sorted({*NAMES} - {"leaky_relu"}))
def test_activation_that_cannot_be_inverted(function, name):
    match = rf"^activation={name!r} cannot be inverted, so.*; pass x"
    refuses(function, ValueError, match, **spoiled(function, activation=name))


@pytest.mark.parametrize("function", BACKWARD)
@pytest.mark.parametrize("slope", [0.0, -0.5, 2.0**-1050, 1e200])
def test_slope_that_cannot_be_divided_by(function, slope):
    act = nbnorm.activation("leaky_relu", slope=slope)
    match = r"^activation=.* cannot be inverted with slope=.*; pass x"
    refuses(function, ValueError, match, **spoiled(function, activation=act))
    if slope < 1:
        with pytest.raises(ValueError, match=r"cannot be inverted with .*; use inplace=False"):
            BatchNorm(3, activation=act, inplace=True)


@pytest.mark.parametrize("function", BACKWARD[:1])
def test_a_residual_is_not_taken_back(function):
    more = {"residual": VALID[function]()["y"], "activation": "leaky_relu"}
    refuses(function, ValueError, r"^residual is given, and y", **spoiled(function, **more))


@pytest.mark.parametrize(
    ("function", "name"),
    [*((f, "beta") for f in BACKWARD), ("batch_norm_backward_reduce", "gamma")],
)
def test_parameters_that_must_be_named(function, name):
    arguments = {**VALID[function](), **spoiled(function)}
    del arguments[name]
    with pytest.raises(ValueError, match=rf"^{name} is not given, and x_hat.*{name}=None.*its x="):
        getattr(nbnorm, function)(**arguments)


@pytest.mark.parametrize("function", BACKWARD)
def test_errors_name_y(function):
    y = VALID[function]()["y"]
    refuses(function, TypeError, r"^y has dtype int32", **spoiled(function, y=y.astype(np.int32)))
    match = r"^y must have at least 2 dimensions"
    refuses(function, ValueError, match, **spoiled(function, y=y[0, 0, 0]))
    match = r"^dy has shape .*, the shape of y$"
    refuses(function, ValueError, match, **spoiled(function, dy=y[:1]))
    match = r"^dy has dtype float64.*, the dtype of y$"
    refuses(function, TypeError, match, **spoiled(function, dy=y.astype(np.float64)))
    refuses(function, TypeError, r"^x .*NoneType", **spoiled(function, y=None))


@pytest.mark.parametrize("function", ["batch_norm_backward", "batch_norm_backward_apply"])
def test_out_must_not_overlap_y(function):
    y = VALID[function]()["y"]
    arguments = {"x": None, "activation": None, "y": y, "out": y}
    refuses(function, ValueError, r"^out overlaps y in memory", **arguments)


@pytest.mark.parametrize("function", BACKWARD)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_y_in_the_memory_of_x(function, activation):
    """Shared memory is the only sign by which a functional call can see that x was overwritten."""
    x = VALID[function]()["x"]
    match = r"^x and y share memory, so y was written over x"
    for y in (x, x[:], x[::-1]):
        refuses(function, ValueError, match, x=x, y=y, activation=activation)


def test_compiled_code_refuses_to_do_without_x():
    import numba

    call = numba.njit(lambda dy, p: nbnorm.batch_norm_backward(dy, None, p, p, p, p))
    with pytest.raises(numba.TypingError, match="x must be an array"):
        call(np.ones((4, 3)), np.ones(3))


# The layer


def layers(**options):
    """Return a layer and its twin that writes over x, with the same parameters."""
    pair = [BatchNorm(3, inplace=inplace, **options) for inplace in (False, True)]
    for layer in pair:
        for seed, parameter in enumerate(layer.parameters.values()):
            parameter[...] = np.random.default_rng(seed).uniform(0.5, 2, 3) * (-1, 1, 1)
    return pair


@pytest.mark.parametrize("activation", [None, LEAKY])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_layer_in_place(dtype, affine, training, activation):
    recipe = Recipe((4, 3, 50), 1, dtype=dtype)
    x, dy = recipe.x(), recipe.like_x(5)
    plain, inplace = layers(dtype=dtype, affine=affine, activation=activation)
    plain.training = inplace.training = training
    y, mine = plain.forward(x), x.copy()
    assert inplace.forward(mine) is mine
    assert_same_bits(mine, y, "y")
    assert_same_bits(inplace.running_var, plain.running_var, "running_var")
    dx, got = plain.backward(dy), inplace.backward(dy)
    saved, gamma, beta = plain._saved, *(plain.parameters.get(n) for n in ("weight", "bias"))
    options = {"axis": 1, "training": training}
    more, _ = from_y_tolerance(dy, x, gamma, beta, saved.mean, saved.rstd, **options)
    error = 2 * dx_tolerance(dy, x, gamma, saved.mean, saved.rstd, **options) + more
    assert_within(got, dx, error, "dx")
    assert set(inplace.grads) == set(plain.grads)
    assert mine is inplace._saved.y
    assert inplace._saved.x is None


def test_layer_in_place_keeps_one_tensor_less():
    """Four layers in a row keep only their y, all in the memory of the one input."""
    shape = (8, 3, 64, 64)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    limit = nbnorm.set_pool_limit(0)  # the pool would keep the memory of freed results
    try:
        peaks = {}
        for inplace in (False, True):
            stack = [BatchNorm(3, inplace=inplace) for _ in range(4)]
            peaks[inplace] = peak_of(stack, x)
    finally:
        nbnorm.set_pool_limit(limit)
    assert peaks[False] // x.nbytes == 5  # the copy of x, and a y for each layer
    assert peaks[True] // x.nbytes == 1


def peak_of(stack, x):
    """Return the peak memory, in bytes, of a forward pass through layers with a copy of x."""
    for layer in stack:
        layer.forward(x.copy())  # compiles
        layer._saved = None
    gc.collect()
    tracemalloc.start()
    value = x.copy()
    for layer in stack:
        value = layer.forward(value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_a_layer_whose_activation_is_set_later_checks_it():
    layer, x = BatchNorm(3, inplace=True), np.ones((4, 3), np.float32)
    layer.activation = "silu"
    with pytest.raises(ValueError, match=r"^activation='silu' cannot .*; use inplace=False"):
        layer.forward(x)
    assert (x == 1).all()


def test_what_a_layer_in_place_refuses():
    with pytest.raises(ValueError, match=r"^activation='relu' cannot be .*; use inplace=False"):
        BatchNorm(3, activation="relu", inplace=True)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    layer, before = BatchNorm(3, inplace=True), x.copy()
    with pytest.raises(ValueError, match=r"^residual is given"):
        layer.forward(x, x.copy())
    layer.parameters["weight"][1] = 0
    with pytest.raises(ValueError, match=r"^gamma is 0 in channel 1"):
        layer.forward(x)
    layer.parameters["weight"][1] = 1
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"^x is read-only; inplace=True"):
        layer.forward(x)
    assert_same_bits(x, before)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


def test_a_layer_in_place_evaluates_with_a_gamma_of_0_but_does_not_differentiate():
    layer, x = BatchNorm(3, inplace=True).eval(), np.ones((4, 3), np.float32)
    layer.parameters["weight"][1] = 0
    layer.forward(x)
    with pytest.raises(ValueError, match=r"^gamma is 0 in channel 1"):
        layer.backward(x.copy())


def test_repr_says_in_place():
    assert "inplace=True" in repr(BatchNorm(3, inplace=True))
    assert "inplace" not in repr(BatchNorm(3))


@pytest.mark.parametrize("activation", [None, LEAKY])
def test_synchronised(activation):
    recipe = Recipe((4, 3, 50), 1)
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    comm = SelfComm()
    act = {"activation": activation}
    y, mean, rstd, count = sync_batch_norm_forward(x, gamma, beta, out=x, comm=comm, **act)
    options = {"beta": beta, "y": y} | act
    got = sync_batch_norm_backward(dy, None, gamma, mean, rstd, count, comm=comm, **options)
    expected = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, **options)
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        assert_same_bits(ours, theirs)
    layer = SyncBatchNorm(3, comm=comm, inplace=True, **act)
    alone = BatchNorm(3, inplace=True, **act)
    x = recipe.x()
    assert layer.forward(x) is x
    alone.forward(recipe.x())
    assert_same_bits(layer.backward(dy), alone.backward(dy))
