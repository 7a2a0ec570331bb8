"""float32 residual and dy with a half-precision x, as PyTorch's autocast gives them."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from strategies import HALVES, LAYOUTS, dtype_of, lay_out, other_layouts, recipes
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, reference

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

halves = pytest.mark.parametrize("dtype", HALVES)


def wide(recipe, stream, layout):
    """Return float32 values of x's shape that half precision cannot represent."""
    values = np.random.default_rng([recipe.seed, stream]).normal(size=recipe.shape)
    if layout == "broadcast":
        return np.broadcast_to(values[..., :1].astype(np.float32), recipe.shape)
    return lay_out(values.astype(np.float32), layout)


@settings(deadline=None)
@given(recipes(dtypes=HALVES), other_layouts(), st.sampled_from((None, "relu")))
def test_the_oracle_agrees(recipe, layout, activation):
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    residual, dy = wide(recipe, 4, layout), wide(recipe, 5, layout)
    options = {"axis": recipe.axis, "activation": activation}
    ref = reference.batch_norm_forward(x, gamma, beta, residual=residual, eps=recipe.eps, **options)
    y, mean, rstd = nbnorm.batch_norm_forward(
        x, gamma, beta, residual=residual, eps=recipe.eps, **options
    )
    assert y.dtype == x.dtype
    error = y_tolerance(x, gamma, beta, ref.mean, ref.rstd, axis=recipe.axis, residual=residual)
    assert_within(y, ref.y, error, "y")
    applied = nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd, residual=residual, **options)
    assert_same_bits(applied, y)
    got = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, y=y, **options)
    masked = np.where(y > 0, dy, 0) if activation else dy
    expected = reference.batch_norm_backward(masked, x, gamma, mean, rstd, axis=recipe.axis)
    error = dx_tolerance(masked, x, gamma, mean, rstd, axis=recipe.axis)
    assert_within(got.dx, expected.dx, error, "dx")
    assert_same_bits(got.dresidual, masked.astype(x.dtype))
    sums = nbnorm.batch_norm_backward_reduce(
        dy, x, mean, rstd, gamma=gamma, beta=beta, y=y, **options
    )
    of_sums = sums_tolerance(masked, x, mean, rstd, axis=recipe.axis)
    for name, found, total, error in zip(
        ("dbeta", "dgamma"), sums, (expected.dbeta, expected.dgamma), of_sums, strict=True
    ):
        assert_within(found, total, error, name)
        rounded = getattr(got, name)
        assert_within(rounded, total, stored(error, total, rounded.dtype), name)


@halves
def test_values_that_halves_hold_give_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(size=(3, 9, 4, 20, 20)).astype(dtype_of(dtype))
    same = nbnorm.batch_norm_forward(x, residual=residual, activation="relu")
    got = nbnorm.batch_norm_forward(x, residual=residual.astype("f4"), activation="relu")
    assert_same_bits(got.y, same.y)
    rest = x, None, same.mean, same.rstd
    options = {"y": same.y, "activation": "relu"}
    expected = nbnorm.batch_norm_backward(dy, *rest, **options)
    for a, b in zip(
        nbnorm.batch_norm_backward(dy.astype("f4"), *rest, **options), expected, strict=True
    ):
        assert_same_bits(a, b)


@halves
def test_nothing_of_xs_size_is_copied(dtype):
    x = np.random.default_rng(0).normal(size=(16, 8, 64, 64)).astype(dtype_of(dtype))
    residual, out = x.astype("f4"), np.empty_like(x)

    def run():
        _, mean, rstd = nbnorm.batch_norm_forward(x, residual=residual, out=out)
        nbnorm.batch_norm_backward(residual, x, None, mean, rstd, out=out)

    run()
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 8


@pytest.mark.parametrize("x_dtype", ["float32", "float64", *HALVES])
@pytest.mark.parametrize("other", ["float32", "float64", *HALVES])
def test_what_is_still_refused(x_dtype, other):
    """Every dtype except that of x, and float32 residual or dy with a half-precision x."""
    x, array = (np.ones((4, 3), dtype_of(dtype)) for dtype in (x_dtype, other))
    statistics = np.zeros(3), np.ones(3)
    mixed = x_dtype in HALVES and other == "float32"
    for name, call in {
        "residual": lambda: nbnorm.batch_norm_inference(x, None, None, *statistics, residual=array),
        "dy": lambda: nbnorm.batch_norm_backward(array, x, None, *statistics),
        "y": lambda: nbnorm.batch_norm_backward(x, x, None, *statistics, y=array),
    }.items():
        if other == x_dtype or (mixed and name != "y"):
            call()
            continue
        with pytest.raises(TypeError, match=f"^{name} has dtype {other}, expected {x_dtype}"):
            call()


def test_strides_in_bytes_do_not_make_a_view():
    """A view of every second half has the strides of dense float32, and vice versa."""
    rng = np.random.default_rng(0)
    for layout in LAYOUTS:
        x = lay_out(rng.normal(size=(40, 1)).astype("f2"), layout)
        for residual in (
            rng.normal(size=(40, 1)).astype("f4"),
            rng.normal(size=(80, 1)).astype("f4")[::2],
            np.asfortranarray(rng.normal(size=(40, 3)).astype("f4"))[:, :1],
        ):
            y = nbnorm.batch_norm_inference(
                x, None, None, np.zeros(1), np.ones(1), eps=0.0, residual=residual
            )
            assert_array_equal(y, (x.astype("f4") + residual).astype("f2"))


def test_dx_over_a_wider_dy_is_refused():
    dy = np.ones((4, 3), np.float32)
    x, statistics = np.ones((4, 3), np.float16), (np.zeros(3), np.ones(3))
    out = dy.view(np.float16)[:, ::2]  # dy's address, shape and strides
    with pytest.raises(ValueError, match=r"^out overlaps dy in memory but is not dy"):
        nbnorm.batch_norm_backward(dy, x, None, *statistics, out=out)
    assert_array_equal(dy, np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"^out has dtype float32, expected float16"):
        nbnorm.batch_norm_backward(dy, x, None, *statistics, out=dy)


def test_the_layer():
    layer = BatchNorm(3, activation="relu")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3, 5)).astype(ml_dtypes.bfloat16)
    residual, dy = rng.normal(size=(2, 8, 3, 5)).astype("f4")
    y = layer.forward(x, residual)
    dx, dresidual = layer.backward(dy)
    assert y.dtype == dx.dtype == dresidual.dtype == x.dtype
    assert layer.grads["weight"].dtype == np.float32
    assert_array_equal(dresidual, np.where(y > 0, dy, 0).astype(x.dtype))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_torchs_autocast(relu, compiled):
    """A convolution's bfloat16 x, a float32 residual: gradients have their arguments' dtypes."""
    torch = pytest.importorskip("torch")
    from nbnorm.integrations.torch import BatchNorm2d

    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 4, 1), BatchNorm2d(4, relu=relu)
    x, identity = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5, requires_grad=True)

    def step(x, identity):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return norm(conv(x), identity)

    run = torch.compile(step, backend="aot_eager") if compiled else step
    y = run(x, identity)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert identity.grad.dtype == norm.weight.grad.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = torch.nn.functional.batch_norm(
            conv(x).float(), None, None, norm.weight, norm.bias, training=True
        )
    expected = plain + identity.detach()
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(identity.grad, 2 * y.detach().float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("host", ["autograd", "mygrad"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_in_hosts_have_their_arguments_dtypes(host, activation):
    pytest.importorskip(host)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 6, 3)).astype(np.float16)
    residual = rng.normal(size=(6, 3)).astype(np.float32)
    if host == "autograd":
        from autograd import make_vjp

        from nbnorm.integrations.autograd import batch_norm

        vjp, y = make_vjp(
            lambda args: batch_norm(args[0], residual=args[1], activation=activation)
        )((x, residual))
        dx, dresidual = vjp(dy)
    else:
        import mygrad

        from nbnorm.integrations.mygrad import batch_norm

        given = mygrad.tensor(x), mygrad.tensor(residual)
        result = batch_norm(given[0], residual=given[1], activation=activation)
        result.backward(dy)
        y, (dx, dresidual) = result.data, (tensor.grad for tensor in given)
    assert y.dtype == dx.dtype == np.float16
    assert dresidual.dtype == np.float32
    assert_array_equal(dresidual, np.where(y > 0, dy, 0) if activation else dy)
