"""nbnorm.integrations.torch beside PyTorch's own batch normalization."""

import copy
import doctest
import io
import operator
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from children import run_child

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad, gradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402

import nbnorm  # noqa: E402
import nbnorm.integrations.torch as integration  # noqa: E402
from nbnorm.integrations.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    batch_norm,
    convert,
    recalibrate,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.integrations_torch import Bottleneck, resnet50  # noqa: E402

FORWARD = torch.ops.nbnorm.batch_norm.default
BACKWARD = torch.ops.nbnorm.batch_norm_backward.default
SHAPE = (4, 3, 5, 6)
PAIRS = {
    (6, 3): (nn.BatchNorm1d, BatchNorm1d),
    (4, 3, 7): (nn.BatchNorm1d, BatchNorm1d),
    SHAPE: (nn.BatchNorm2d, BatchNorm2d),
    (2, 3, 2, 4, 3): (nn.BatchNorm3d, BatchNorm3d),
}
# Two ways to sum up a few hundred values of size 1: units in the last place of the dtype.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
pairs = pytest.mark.parametrize(("shape", "classes"), PAIRS.items(), ids=str)
last = pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(shape=SHAPE, dtype=torch.float64, *, last=False, grad=False):
    x = torch.randn(shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def parameters(channels=3, dtype=torch.float64, *, grad=False):
    return (
        torch.rand(channels, dtype=dtype).add_(0.5).requires_grad_(grad),
        torch.randn(channels, dtype=dtype).requires_grad_(grad),
    )


def statistics(channels=3, dtype=torch.float64):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype).add_(0.5)


def theirs(x, mean, var, weight=None, bias=None, *args, residual=None, relu=False, **kwargs):
    """The same in PyTorch's functions."""
    y = functional.batch_norm(x, mean, var, weight, bias, *args, **kwargs)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


def close(ours, expected, dtype=torch.float64):
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])


# The function


@last
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "no statistics"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_gradients_and_statistics(dtype, mode, with_residual, relu, affine, last):
    x, dy = drawn(dtype=dtype, last=last, grad=True), drawn(dtype=dtype, last=last)
    residual = drawn(dtype=dtype, last=last, grad=True) if with_residual else None
    weight, bias = parameters(dtype=dtype, grad=True) if affine else (None, None)
    running = statistics(dtype=dtype) if mode != "no statistics" else (None, None)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    results = []
    for function in (batch_norm, theirs):
        mean, var = (t if t is None else t.clone() for t in running)
        y = function(
            x,
            mean,
            var,
            weight,
            bias,
            mode != "evaluation",
            0.3,
            1e-3,
            residual=residual,
            relu=relu,
        )
        results.append((y, mean, var, *torch.autograd.grad(y, inputs, dy)))
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            close(ours, expected, dtype)
            assert ours.dtype == expected.dtype
    y, dx = results[0][0], results[0][3]
    assert y.stride() == dx.stride() == x.stride()


@last
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", ["", "relu", "residual", "residual relu"])
def test_gradcheck(fused, training, affine, last):
    inputs = [
        drawn((3, 2, 2, 3), last=last, grad=True),
        *(parameters(2, grad=True) if affine else ()),
        *([drawn((3, 2, 2, 3), grad=True)] if "residual" in fused else ()),
    ]
    mean, var = statistics(2)

    def function(x, *rest):
        residual = rest[-1] if "residual" in fused else None
        weight, bias = rest[:2] if affine else (None, None)
        statistics = (None, None) if training else (mean, var)
        return batch_norm(
            x, *statistics, weight, bias, training, residual=residual, relu="relu" in fused
        )

    assert gradcheck(function, inputs)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_single_gradients(relu, training, wanted):
    given = {"x": drawn(), "residual": drawn()}
    given["weight"], given["bias"] = parameters()
    given[wanted].requires_grad_()
    results = []
    for function in (batch_norm, theirs):
        y = function(
            given["x"], *statistics_like(), given["weight"], given["bias"], training,
            residual=given["residual"], relu=relu,
        )  # fmt: skip
        results.append(torch.autograd.grad(y.square().sum(), given[wanted]))
    close(*results)


def statistics_like():
    return torch.full((3,), 0.2, dtype=torch.float64), torch.full((3,), 1.5, dtype=torch.float64)


@pytest.mark.parametrize("only", ["weight", "bias"])
def test_one_parameter_without_the_other(only):
    x = drawn(grad=True)
    given = {only: parameters(grad=True)[0]}
    results = []
    for function in (batch_norm, theirs):
        y = function(x, None, None, **given, training=True, relu=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, given[only]])))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


@last
@pytest.mark.parametrize("parameter_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, parameter_dtype, last):
    pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")
    of_parameters = dtype if parameter_dtype == "same" else torch.float32
    x, dy = drawn(dtype=dtype, last=last, grad=True), drawn(dtype=dtype, last=last)
    weight, bias = parameters(dtype=of_parameters, grad=True)
    running = torch.zeros(3, dtype=of_parameters), torch.ones(3, dtype=of_parameters)
    y = batch_norm(x, *running, weight, bias, True, relu=True)
    grads = torch.autograd.grad(y, [x, weight, bias], dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected_running = torch.zeros(3).double(), torch.ones(3).double()
    expected = theirs(wide[0], *expected_running, *wide[1:], True, relu=True)
    expected_grads = torch.autograd.grad(expected, wide, dy.double())
    for ours, like, reference in zip(
        (y, *grads, *running),
        (x, x, weight, bias, *running),
        (expected, *expected_grads, *expected_running),
        strict=True,
    ):
        assert ours.dtype == like.dtype
        assert ours.shape == like.shape
        close(ours.double(), reference, dtype)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(training)
    ours = convert(copy.deepcopy(model))
    x = drawn(dtype=torch.float32)
    results = []
    for candidate in (ours, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = candidate(x)
        y.float().square().sum().backward()
        results.append((y, candidate[1].weight.grad, candidate[1].running_var))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


LAYOUTS = {
    "channels-last slice": lambda: drawn((4, 3, 7, 8), last=True)[:, :, 1:-1, 1:-1],
    "slice": lambda: drawn((4, 3, 7, 8))[:, :, 1:-1, 1:-1],
    "every other channel": lambda: drawn((4, 6, 5, 6))[:, ::2],
    "every other sample": lambda: drawn((8, 3, 5, 6), last=True)[::2],
    "turned": lambda: drawn((5, 6, 3, 4)).permute(3, 2, 0, 1),
    "expanded": lambda: drawn((1, 3, 5, 1)).expand(4, 3, 5, 6),
    "planes of one value": lambda: drawn((4, 3, 1, 1), last=True),
    "one channel": lambda: drawn((4, 1, 5, 6), last=True),
    "one sample": lambda: drawn((1, 3, 5, 6), last=True),
    "transposed NC": lambda: drawn((3, 8)).t(),
    "NLC": lambda: drawn((4, 7, 3)).transpose(1, 2),
    "volume, channels-last": lambda: drawn((2, 3, 2, 4, 5)).contiguous(
        memory_format=torch.channels_last_3d
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Strides are those of empty_like, as the fakes promise; opcheck compares the two."""
    x = LAYOUTS[layout]()
    running = statistics(x.shape[1])
    torch.library.opcheck(
        FORWARD, (x, None, None, *running, x.clone(), True, 0.1, 1e-5, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    y, mean, rstd, *_ = FORWARD(x, None, None, None, None, x, True, 0.1, 1e-5, True)
    assert y.stride() == torch.empty_like(x).stride()
    close(y, theirs(x, None, None, training=True, residual=x, relu=True))
    grads = BACKWARD(x, x, None, None, mean, rstd, y, True, True, [True] * 4)
    for like in (grads[0], grads[3]):
        assert like.stride() == torch.empty_like(x).stride()


def test_gradient_that_is_expanded():
    x = drawn(grad=True)
    weight, bias = parameters()
    for function in (batch_norm, theirs):
        y = function(x, *statistics(), weight, bias)
        (grad,) = torch.autograd.grad(y.sum(), x)  # a 0 that is expanded
        assert grad.shape == x.shape
    close(grad, torch.autograd.grad(batch_norm(x, *statistics_like()).sum(), x)[0] * 0 + grad)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    x = torch.empty(0, 3, 5, 6, requires_grad=True)
    weight, bias = parameters(dtype=torch.float32, grad=True)
    running = torch.zeros(3), torch.ones(3)
    y = batch_norm(x, *running, weight, bias, training, relu=True)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert not running[0].any()
    assert running[1].eq(1).all()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_a_single_value_per_channel(shape):
    running = torch.zeros(3), torch.ones(3)
    messages = []
    for function in (batch_norm, functional.batch_norm):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            function(torch.ones(shape), *running, training=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert batch_norm(torch.ones(shape), *running).shape == shape


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weight": torch.ones(4)}, ValueError, r"^gamma has shape \(4,\), expected \(3,\)"),
        ({"running_var": None}, ValueError, "running_var is None"),
        ({"residual": torch.ones(4, 3, 5, 1)}, ValueError, "residual has shape"),
        ({"residual": torch.ones(SHAPE).double()}, TypeError, "residual has dtype float64"),
        (
            {"input": torch.ones(SHAPE, dtype=torch.int32)},
            TypeError,
            r"x has dtype int32.*x\.float\(\)",
        ),
        ({"input": torch.ones(3)}, ValueError, "at least 2 dimensions"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_errors_leave_the_statistics_alone(training, given, error, message):
    x = torch.randn(SHAPE)
    mean, var = torch.zeros(3), torch.ones(3)
    arguments = {"input": x, "running_mean": mean, "running_var": var, "training": training}
    with pytest.raises(error, match=message):
        batch_norm(**arguments | given)
    assert not mean.any()
    assert var.eq(1).all()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_have_no_gradient(training, name):
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    before = running[name].clone()
    running[name].requires_grad_()
    for function in (batch_norm, theirs):
        with pytest.raises((TypeError, RuntimeError), match=name) as caught:
            function(torch.randn(SHAPE), *running.values(), training=training)
    assert caught.type is RuntimeError  # theirs; ours is as other integrations' are
    with pytest.raises(TypeError, match=f"{name} requires grad"):
        batch_norm(torch.randn(SHAPE), **running, training=training)
    assert torch.equal(running[name], before)
    with torch.no_grad():
        batch_norm(torch.randn(SHAPE), **running, training=training)
    assert torch.equal(running[name], before) != training


@pytest.mark.parametrize("given", [[1.0], np.ones((4, 3)), None], ids=["list", "ndarray", "None"])
def test_an_input_that_is_no_tensor(given):
    with pytest.raises(TypeError, match=f"^input must be a .*, got {type(given).__name__}$"):
        batch_norm(given, None, None, training=True)


def test_tensors_whose_sign_is_a_bit():
    def turned(shape=SHAPE):
        t = torch.complex(drawn(shape), drawn(shape)).conj().imag
        assert t.is_neg()
        return t

    x, residual, dy, weight, bias = turned(), turned(), turned(), turned((3,)), turned((3,))
    running = turned((3,)), torch.rand(3).double()
    results = []
    for function in (batch_norm, theirs):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        for training in (True, False):
            statistics = (None, None) if training else running
            y = function(
                inputs[0], *statistics, *inputs[1:3], training, residual=inputs[3], relu=True
            )
            results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for ours, expected in zip(results[:2], results[2:], strict=True):
        for got, reference in zip(ours, expected, strict=True):
            close(got, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_whose_sign_is_a_bit_are_not_moved(name, dtype):
    """No copy is moved in their place."""
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    running[name] = torch._neg_view(torch.ones(3, dtype=dtype))
    before = {n: t.clone() for n, t in running.items()}
    with pytest.raises(ValueError, match=rf"^{name} is a .*negative bit.*{name}\.resolve_neg"):
        batch_norm(torch.randn(SHAPE), **running, training=True)
    assert all(torch.equal(running[n], before[n]) for n in running)


@pytest.mark.parametrize("name", ["input", "weight", "running_mean", "residual"])
def test_zeros_without_memory(name):
    arguments = {"input": torch.ones(SHAPE), "weight": torch.ones(3), "residual": torch.ones(SHAPE)}
    arguments |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    arguments[name] = torch._efficientzerotensor(arguments[name].shape)
    theirs = {"input": "x", "weight": "gamma"}
    for training in (True, False):
        with pytest.raises(TypeError, match=rf"^{theirs.get(name, name)} is a ZeroTensor"):
            batch_norm(**arguments, training=training)
    assert arguments["running_var"].eq(1).all()


def normalised(x):
    return batch_norm(x, None, None, training=True)


torch.fx.wrap("normalised")


def test_symbolic_trace_of_the_function():
    with pytest.raises(TypeError, match=r"^input is a torch\.fx\.Proxy.*torch\.fx\.wrap"):
        torch.fx.symbolic_trace(lambda x: batch_norm(x, None, None, training=True))
    x = torch.randn(SHAPE)
    assert torch.equal(torch.fx.symbolic_trace(lambda x: normalised(x))(x), normalised(x))


def test_several_gradients_in_one_pass():
    x, (weight, bias), residual = drawn(grad=True), parameters(grad=True), drawn(grad=True)
    dy, results = drawn((5, *SHAPE)), []
    for function in (batch_norm, theirs):
        y = function(x, None, None, weight, bias, True, residual=residual, relu=True)
        results.append(
            torch.autograd.grad(y, [x, weight, bias, residual], dy, is_grads_batched=True)
        )
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


def test_second_derivative_is_refused():
    x = drawn(grad=True)
    weight, bias = parameters(grad=True)
    y = batch_norm(x, None, None, weight, bias, training=True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.nn\.functional"):
        dx.square().sum().backward()
    # The first is the same with and without a graph of it.
    y = batch_norm(x, None, None, weight, bias, training=True)
    close(torch.autograd.grad(y.square().sum(), x)[0], dx.detach())


def test_what_is_kept_for_backward():
    x, weight, bias = drawn(), *parameters()
    kept = {}
    for name, options in {
        "plain": {},
        "relu": {"relu": True},
        "residual": {"residual": drawn()},
        "both": {"relu": True, "residual": drawn()},
    }.items():
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t
        ):
            batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, **options)
        kept[name] = sorted(tuple(t.shape) for t in tensors)
    assert kept["plain"] == kept["residual"] == sorted([SHAPE, *[(3,)] * 3])
    assert kept["relu"] == sorted([SHAPE, *[(3,)] * 4])
    assert kept["both"] == sorted([SHAPE, SHAPE, *[(3,)] * 3])


def test_an_input_that_was_written_to_is_noticed():
    x = drawn(grad=True)
    y = batch_norm(x * 1, None, None, training=True, relu=True)
    y.add_(1).sum().backward()  # y is not needed
    inside = x * 1
    y = batch_norm(inside, None, None, training=True)
    inside.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_copied(monkeypatch):
    """Arrays that reach nbnorm lie where the tensors do."""
    seen = []
    forward = integration.batch_norm_forward

    def look(x, *args, **kwargs):
        result = forward(x, *args, **kwargs)
        seen.append((x.__array_interface__["data"][0], result.y.__array_interface__["data"][0]))
        return result

    monkeypatch.setattr(integration, "batch_norm_forward", look)
    x = torch.randn(SHAPE)
    y = batch_norm(x, None, None, training=True)
    assert seen == [(x.data_ptr(), y.data_ptr())]


# torch.func


def both(training, *, options=None):
    """batch_norm and PyTorch's, as functions of x, weight and bias."""
    running = statistics()

    def of(function):
        def call(x, weight, bias):
            kept = [t.clone() for t in running]
            return function(x, *kept, weight, bias, training, **options or {})

        return call

    return of(batch_norm), of(theirs)


REVERSE = {
    "grad": lambda f, arguments: torch.func.grad(
        lambda *inputs: f(*inputs).pow(3).sum(), argnums=(0, 1, 2)
    )(*arguments),
    "vjp": lambda f, arguments: torch.func.vjp(f, *arguments)[1](arguments[0]),
    "jacrev": lambda f, arguments: torch.func.jacrev(f, argnums=(0, 1))(*arguments),
    "vmap of grad": lambda f, arguments: torch.func.vmap(
        torch.func.grad(lambda *inputs: f(*inputs).pow(3).sum(), argnums=(0, 1)), (0, None, None)
    )(torch.stack([arguments[0], arguments[0].cos()]), *arguments[1:]),
    "grad of vmap": lambda f, arguments: torch.func.grad(
        lambda x, *rest: torch.func.vmap(f, (1, None, 0))(x, *rest).pow(3).sum(), argnums=(0, 1, 2)
    )(
        torch.stack([arguments[0], arguments[0].cos()], 1),
        arguments[1],
        torch.stack([arguments[2], arguments[2].cos()]),
    ),
}


@pytest.mark.parametrize("options", [{}, {"relu": True}], ids=["plain", "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", REVERSE)
def test_reverse_mode_of_torch_func(transform, training, options):
    arguments = drawn((3, 3, 2)), *parameters()
    ours, expected = both(training, options=options)
    if training and "vmap" in transform:  # whose batch would move them is not told

        def ours(x, weight, bias):
            return batch_norm(x, None, None, weight, bias, True, **options)

        def expected(x, weight, bias):
            return theirs(x, None, None, weight, bias, True, **options)

    results = (REVERSE[transform](f, arguments) for f in (ours, expected))
    for got, reference in zip(*results, strict=True):
        close(got, reference)


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_of_a_converted_model(training):
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU()).double().train(training)
    model[1].num_batches_tracked = None  # which a module counts in place, and torch.func refuses
    ours, x = convert(copy.deepcopy(model), fuse_relu=True), drawn((6, 5))
    results = []
    for m in (ours, model):

        def loss(parameters, m=m):
            return torch.func.functional_call(m, parameters, (x,)).pow(3).sum()

        grads = torch.func.grad(loss)({k: p.detach() for k, p in m.named_parameters()})
        results.append((*grads.values(), *m.buffers()))  # moved in training
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_with_statistics():
    x, mean, var = drawn((2, *SHAPE)), drawn((2, 3)), drawn((2, 3)).square()
    results = []
    for function in (batch_norm, functional.batch_norm):
        moved = mean.clone(), var.clone()
        y = torch.func.vmap(lambda *inputs, f=function: f(*inputs, training=True))(x, *moved)
        results.append((y, *moved, torch.func.vmap(function, (0, None, None))(x, mean[0], var[0])))
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    for function, error in (batch_norm, ValueError), (functional.batch_norm, RuntimeError):
        kept = mean[0].clone(), var[0].clone()
        with pytest.raises(error, match="running_mean"):
            torch.func.vmap(lambda x, f=function, s=kept: f(x, *s, training=True))(x)
        assert torch.equal(kept[0], mean[0])


def in_dual_level(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


FORWARD_MODE = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x, v: torch.func.linearize(f, x)[1](v),
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: f(x).pow(3).sum())(x),
    "dual": in_dual_level,
    "jvp of compiled": lambda f, x, v: torch.func.jvp(
        torch.compile(f, backend="eager"), (x,), (v,)
    ),
    "compiled jvp": lambda f, x, v: torch.compile(
        lambda x, v: torch.func.jvp(f, (x,), (v,)), backend="eager"
    )(x, v),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["function", "module", "operator"])
@pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")  # of its own
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_is_refused(way, what, training):
    """Rather than a tangent of 0."""
    torch._dynamo.reset()
    x, v, running = drawn((3, 3, 2)), drawn((3, 3, 2)), statistics()
    if what == "module":
        function = BatchNorm1d(3, track_running_stats=not training).double().train(training)
    elif what == "function":
        statistics_of = (None, None) if training else running

        def function(x):
            return batch_norm(x, *statistics_of, training=training)

    else:

        def function(x):
            return FORWARD(x, None, None, *running, None, training, 0.1, 1e-5, False)[0]

    expected = NotImplementedError, "no forward mode"
    if what == "operator" and way == "hessian":
        expected = RuntimeError, "setup_context"  # PyTorch's own word on a custom operator
    with pytest.raises(expected[0], match=expected[1]):
        FORWARD_MODE[way](function, x, v)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_is_refused_by_torch_func(training):
    arguments, (ours, _) = (drawn((3, 3, 2)), *parameters()), both(training)
    inner = torch.func.grad(lambda x: ours(x, *arguments[1:]).pow(3).sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.jacrev(inner)(arguments[0])


# The operators


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", ["plain", "relu", "both"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, affine, options, training):
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")
    x = drawn(dtype=dtype, last=True, grad=True)
    weight, bias = parameters(dtype=torch.float32, grad=True) if affine else (None, None)
    residual = drawn(dtype=dtype, last=True, grad=True) if options == "both" else None
    running = statistics(dtype=torch.float32)
    if training and not affine:
        running = None, None
    relu = options != "plain"
    arguments = (x, weight, bias, *running, residual, training, 0.1, 1e-5, relu)
    torch.library.opcheck(FORWARD, arguments, **TOLERANCE)
    y, mean, rstd, *_ = (t.detach() for t in FORWARD(*arguments))
    beta, y = bias if relu and residual is None else None, y if options == "both" else None
    for mask in ([True] * 3 + [y is not None], [False, True, False, False], [True] + [False] * 3):
        torch.library.opcheck(
            BACKWARD,
            (x.detach(), x, weight, beta, mean, rstd, y, training, relu, mask),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_operators_give_the_bits_of_what_is_called_directly(monkeypatch, with_residual, training):
    x, dy = drawn(dtype=torch.float32, grad=True), drawn(dtype=torch.float32)
    weight, bias = parameters(dtype=torch.float32, grad=True)
    residual = drawn(dtype=torch.float32, grad=True) if with_residual else None
    inputs = [x, weight, bias, *([residual] if with_residual else [])]
    start, results = statistics(dtype=torch.float32), []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(integration, "_eager", lambda *_: False)
        running = [t.clone() for t in start]
        y = batch_norm(x, *running, weight, bias, training, residual=residual, relu=True)
        assert ("_Eager" in type(y.grad_fn).__name__) == direct
        results.append((y, *running, *torch.autograd.grad(y, inputs, dy)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_tracing_records_the_operator(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x, weight):
        y = batch_norm(x, None, None, weight, training=True)
        return torch.autograd.grad(y.sum(), weight)

    x, weight = drawn(), parameters(grad=True)[0]
    graph = make_fx(function, tracing_mode=tracing_mode)(x, weight).graph
    targets = [node.target for node in graph.nodes]
    assert FORWARD in targets
    assert BACKWARD in targets


def test_meta_tensors():
    x = torch.empty(2, 3, 4, 5, device="meta")
    layer = BatchNorm2d(3, device="meta")
    assert layer(x).shape == x.shape
    assert layer(x).device.type == "meta"


class Small(nn.Module):
    def __init__(self, norm=BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.first = norm(8)
        self.second = norm(8, affine=False, track_running_stats=False)
        self.block = Bottleneck(8, 4, 2)
        if norm is BatchNorm2d:
            convert(self.block, fuse_relu=True)

    def forward(self, x):
        y = torch.relu(self.first(self.conv(x)))
        return self.block(self.second(y))


def step(model, call, x):
    y = call(x)
    y.square().mean().backward()
    return [
        y.detach(),
        *(parameter.grad for parameter in model.parameters()),
        *(buffer.clone() for buffer in model.buffers()),
    ]


def graphs():
    """A backend that keeps the graphs it was handed, and the list of them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep), seen


@pytest.mark.parametrize("mode", ["train", "eval"])
@last
def test_compiled_model_keeps_the_operators(mode, last):
    torch._dynamo.reset()
    model = Small()
    getattr(model, mode)()
    other = copy.deepcopy(model)
    x = drawn((2, 3, 8, 8), torch.float32, last=last, grad=True)
    backend, seen = graphs()
    expected = step(model, model, x)
    got = step(other, torch.compile(other, backend=backend, fullgraph=True), x)
    assert len(seen) == 2  # one graph forward, one backward: no break
    assert seen[0].count(FORWARD) == 6
    assert seen[1].count(BACKWARD) == 6
    for ours, reference in zip(got, expected, strict=True):
        close(ours, reference, torch.float32)


def test_compiled_for_any_size():
    torch._dynamo.reset()
    layer = BatchNorm1d(3, relu=True)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 9, 6):
        x = torch.randn(n, 3)
        close(compiled(x), layer(x), torch.float32)
    close(other.running_mean, layer.running_mean, torch.float32)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile's own backend needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore")  # of what inductor imports
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, relu=True), nn.Conv2d(4, 2, 1))
    other = copy.deepcopy(model)
    x = drawn((2, 3, 8, 8), torch.float32, last=True, grad=True)
    expected = step(model, model, x)
    got = step(other, torch.compile(other, fullgraph=True), x)
    for ours, reference in zip(got, expected, strict=True):
        close(ours, reference, torch.float32)


def test_export_keeps_the_operator():
    layer = BatchNorm2d(3).eval()
    program = torch.export.export(layer, (torch.randn(SHAPE),))
    assert FORWARD in [node.target for node in program.graph.nodes]
    x = torch.randn(SHAPE)
    close(program.module()(x), layer(x), torch.float32)


# The modules


@pairs
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_modules_do_what_theirs_do(momentum, track, affine, shape, classes):
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    reference, ours = (cls(3, **options, dtype=torch.float64) for cls in classes)
    assert isinstance(ours, classes[0])
    assert repr(ours) == repr(reference)
    ours.load_state_dict(reference.state_dict())
    for training in (True, True, True, False, True, False):
        x = drawn(shape)
        ours.train(training)
        reference.train(training)
        close(ours(x), reference(x))
        for name, expected in reference.state_dict().items():
            close(ours.state_dict()[name], expected)
    reference.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == reference.state_dict().keys()


@pairs
def test_dimensions_are_checked_as_theirs_are(shape, classes):
    x = torch.ones(3) if len(shape) == 2 else torch.ones(3, 3, 3, 3, 3, 3)
    messages = []
    for cls in classes:
        with pytest.raises(ValueError, match="expected") as caught:
            cls(3)(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_fused_module():
    layer, plain = BatchNorm2d(3, relu=True), nn.BatchNorm2d(3)
    assert repr(layer) == repr(plain)[:-1] + ", relu=True)"
    x, residual = torch.randn(2, *SHAPE)
    close(layer(x), torch.relu(plain(x)), torch.float32)
    close(layer(x, residual), torch.relu(plain(x) + residual), torch.float32)
    layer.relu = False
    close(layer(x, residual=residual), plain(x) + residual, torch.float32)


@pytest.mark.parametrize("kind", ["Sequential", "Subclass"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(fused, way, kind):
    kind = nn.Sequential if kind == "Sequential" else Subclass
    layer = convert(kind(nn.BatchNorm2d(3), nn.ReLU(), BatchNorm2d(3, relu=True)), fuse_relu=True)
    layer(torch.randn(SHAPE))
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer)
    assert type(other[0]) is BatchNorm2d
    assert [m.relu for m in other[::2]] == [False, True]
    assert other[0].running_mean is not layer[0].running_mean
    x = torch.randn(SHAPE)
    fused()
    assert torch.equal(layer(x), other(x))
    assert fused() == (True,) * 4
    assert torch.equal(layer[0].running_var, other[0].running_var)


def test_statistics_move_in_place():
    layer = BatchNorm2d(3)
    mean, var = layer.running_mean, layer.running_var
    places, version = (mean.data_ptr(), var.data_ptr()), mean._version
    layer(torch.randn(SHAPE))
    assert layer.running_mean is mean
    assert layer.running_var is var
    assert places == (mean.data_ptr(), var.data_ptr())
    assert mean._version > version
    assert mean.any()
    assert not mean.requires_grad
    before = mean.clone()
    layer.eval()(torch.randn(SHAPE))
    assert torch.equal(mean, before)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training, without):
    layer = BatchNorm2d(3).train(training)
    reference = nn.BatchNorm2d(3).train(training)
    x = torch.randn(SHAPE)
    with without():
        y = layer(x)
        expected = reference(x)
    assert not y.requires_grad
    assert y.is_inference() == (without is torch.inference_mode)
    close(y, expected, torch.float32)
    close(layer.running_var, reference.running_var, torch.float32)


# convert


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm2d(3)
        self.again = self.shared
        self.nested = nn.ModuleDict({"deep": nn.ModuleList([nn.Sequential(nn.BatchNorm1d(4))])})
        self.volume = nn.BatchNorm3d(2)
        self.sync = nn.SyncBatchNorm(3)
        self.lazy = nn.LazyBatchNorm2d()
        self.own = type("Own", (nn.BatchNorm2d,), {})(3)


def test_what_is_converted():
    model = Others()
    shared, parameters = model.shared, dict(model.named_parameters())
    assert convert(model) is model
    assert model.shared is model.again is shared
    assert type(shared) is BatchNorm2d
    assert type(model.nested["deep"][0][0]) is BatchNorm1d
    assert type(model.volume) is BatchNorm3d
    assert type(model.sync) is nn.SyncBatchNorm
    assert type(model.lazy) is nn.LazyBatchNorm2d
    assert type(model.own).__name__ == "Own"
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert type(convert(nn.BatchNorm1d(3))) is BatchNorm1d
    assert type(convert(convert(nn.BatchNorm1d(3)))) is BatchNorm1d
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor"):
        convert(torch.ones(3))


def test_an_empty_batch_moves_no_average():
    layer = BatchNorm1d(3, momentum=None)
    ours = nbnorm.BatchNorm(3, momentum=None)
    for batch in (torch.empty(0, 3), torch.full((4, 3), 9.81), torch.empty(0, 3), torch.ones(2, 3)):
        layer(batch)
        ours.forward(batch)
    assert layer.num_batches_tracked == ours.num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(layer, name).numpy(), getattr(ours, name))


def test_averages_of_a_compiled_module():
    torch.compiler.reset()
    layer = BatchNorm2d(3, momentum=None)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(SHAPE) + 3
        assert torch.equal(compiled(x), other(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("momentum", [float("nan"), float("inf")])
def test_momentum_that_is_not_finite(momentum):
    with pytest.raises(ValueError, match=r"^momentum must be finite, got (nan|inf)"):
        BatchNorm1d(3, momentum=momentum)(torch.randn(4, 3))


def test_recalibrating_with_a_single_sample():
    model = nn.Sequential(BatchNorm1d(3))
    with pytest.raises(ValueError, match="more than 1 value"), recalibrate(model):
        model(torch.randn(1, 3))
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_mode_options_and_hooks_stay():
    layer = nn.BatchNorm2d(3, eps=0.1, momentum=None).eval()
    layer.weight.requires_grad_(False)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    expected = repr(layer)
    convert(layer)
    assert repr(layer) == expected
    assert not layer.training
    assert not layer.weight.requires_grad
    layer(torch.randn(SHAPE, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]


class Subclass(nn.Sequential):
    """As torchvision's blocks of convolution, normalization and activation are."""


@pytest.fixture
def fused(monkeypatch):
    """Whether each normalization since the last look has been asked for ReLU."""
    seen = []
    forward = integration.batch_norm

    def look(*args, relu, **kwargs):
        seen.append(relu)
        return forward(*args, relu=relu, **kwargs)

    monkeypatch.setattr(integration, "batch_norm", look)

    def looked():
        result = tuple(seen)
        seen.clear()
        return result

    return looked


def norm_and_relu(kind=nn.Sequential):
    return kind(nn.BatchNorm2d(3), nn.ReLU())


def test_relu_is_fused_where_the_order_is_known(fused):
    class Reversed(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    relu, shared = nn.ReLU(), nn.BatchNorm2d(3)
    hooked, hooked_relu = norm_and_relu(), norm_and_relu()
    hooked[0].register_forward_hook(lambda *_: None)
    hooked_relu[1].register_forward_pre_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "plain": norm_and_relu().eval(),
            "subclass": norm_and_relu(Subclass),
            "one relu": nn.Sequential(nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3), relu),
            "shared": nn.Sequential(shared, nn.ReLU(), shared),
            "hooked": hooked,
            "hooked relu": hooked_relu,
            "own order": norm_and_relu(Reversed),
            "kind": nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6()),
            "apart": nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()),
        }
    )
    keys, x = list(model.state_dict()), torch.randn(SHAPE)
    expected = {name: part(x) for name, part in copy.deepcopy(model).items()}
    kinds = {name: type(part) for name, part in model.items()}
    convert(convert(model, fuse_relu=True), fuse_relu=True)
    wanted = {
        "plain": (True,),
        "subclass": (True,),
        "one relu": (True, True),
        "shared": (True, False),
        **dict.fromkeys(["hooked", "hooked relu", "own order", "kind", "apart"], (False,)),
    }
    assert list(model.state_dict()) == keys
    for name, part in model.items():
        close(part(x), expected[name], torch.float32)
        assert fused() == wanted[name], name
        assert isinstance(part, kinds[name])
    close(model["plain"][0](x), BatchNorm2d(3).eval()(x), torch.float32)  # a part by itself
    assert not model["plain"][1].training


def replace_norm(model):
    model[1][0] = nn.BatchNorm2d(3).double()


def hook_norm(model):
    model[1][0].register_forward_hook(lambda module, args, y: -y)


def insert(model):
    model[1].insert(1, nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        replace_norm,
        hook_norm,
        insert,
        lambda model: nn.Sequential(model[0], *model[1]),
        lambda model: model[1].__delitem__(1),
        lambda model: nn.Sequential(model[0], model[1][:1]),
    ],
    ids=["sync", "replaced", "hooked", "inserted", "unpacked", "deleted", "sliced"],
)
def test_a_model_that_is_changed_after_fusion(change):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm_and_relu(), nn.Conv2d(3, 2, 1)).double().eval()
    with torch.no_grad():
        model[1][0].running_mean.normal_()
    ours, x = convert(copy.deepcopy(model), fuse_relu=True), drawn()
    ours, model = (change(m) or m for m in (ours, model))
    close(ours(x), model(x))


def test_convolution_folded_after_fusion():
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 1), *norm_and_relu()).eval(), fuse_relu=True)
    x = torch.randn(SHAPE)
    expected = model(x)
    model[0] = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()
    close(model(x), expected, torch.float32)


@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated:DeprecationWarning")  # but works
@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_fused_models_are_recorded(way):
    torch._dynamo.reset()
    model = convert(norm_and_relu(Subclass), fuse_relu=True).eval()
    x = torch.randn(SHAPE)
    if way == "compile":
        backend, seen = graphs()
        close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x), torch.float32)
        assert seen[0].count(FORWARD) == len(seen[0]) - seen[0].count(operator.getitem)
    elif way == "export":
        program = torch.export.export(model, (x,))
        assert torch.ops.aten.relu.default not in [node.target for node in program.graph.nodes]
        close(program.module()(x), model(x), torch.float32)
    else:
        close(torch.jit.trace(model, x)(x), model(x), torch.float32)


def test_symbolic_trace_with_the_modules_as_leaves():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)

    model, x = convert(norm_and_relu(), fuse_relu=True), torch.randn(SHAPE)
    graph = Tracer().trace(model)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    close(torch.fx.GraphModule(model, graph)(x), model(x), torch.float32)


def run(model, x, labels):
    """Output, then gradients, as vectors in float64."""
    y = model(x)
    functional.cross_entropy(y, labels).backward()
    grads = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    return y.detach().double().flatten(), grads


@pytest.mark.parametrize(("last", "fuse_relu"), [(False, False), (True, True)])
def test_resnet50(last, fuse_relu):
    """In float64 the same; in float32 at most twice as far from that as PyTorch's own.

    Rounding is amplified by 53 layers and by ReLU's turned over by it, which no tolerance in units
    of the last place can foresee: the yardstick is how far PyTorch's own float32 is off.
    """
    model = resnet50(10)
    if last:
        model.to(memory_format=torch.channels_last)
    x, labels = drawn((2, 3, 64, 64), torch.float32, last=last), torch.tensor([3, 7])
    wide = copy.deepcopy(model).double()
    ours, ours_wide = (convert(copy.deepcopy(m), fuse_relu=fuse_relu) for m in (model, wide))
    exact = run(wide, x.double(), labels)
    same = run(ours_wide, x.double(), labels)
    for got, expected in zip(same, exact, strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()
    results = zip(run(ours, x, labels), run(model, x, labels), exact, strict=True)
    for got, reference, expected in results:
        assert (got - expected).norm() <= 2 * (reference - expected).norm()
    for name, buffer in ours_wide.named_buffers():
        torch.testing.assert_close(buffer, wide.get_buffer(name), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            ours.get_buffer(name), buffer.to(ours.get_buffer(name).dtype), rtol=1e-3, atol=1e-4
        )
    for m in (ours_wide, wide):
        m.eval()
    with torch.inference_mode():
        got, expected = ours_wide(x.double()), wide(x.double())
    assert (got - expected).norm() <= 1e-9 * expected.norm()


# recalibrate


BATCHES = (7, 2, 20, 5)


def uneven(dtype=torch.float64):
    """Batches of several sizes, each with a mean of its own."""
    return [drawn((n, 3, 6, 5), dtype) + i for i, n in enumerate(BATCHES)]


def two_layers(norm=nn.BatchNorm2d, dtype=torch.float64, **options):
    """A network whose second normalization sees what the first has made, and dropout."""
    return nn.Sequential(
        *(norm(3, **options), nn.Conv2d(3, 4, 3), nn.Tanh(), norm(4, **options), nn.Dropout()),
    ).to(dtype)


def kept(model):
    """All that recalibration may change by mistake."""
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return modes, hooks, {name: t.clone() for name, t in model.state_dict().items()}


def assert_kept(model, before, changed=()):
    modes, hooks, state = kept(model)
    assert modes == before[0]
    assert hooks == before[1]
    for name, tensor in state.items():
        if not name.endswith(changed):
            assert torch.equal(tensor, before[2][name]), name


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recalibrated_by_all_that_was_seen(dtype, momentum, converted):
    model = two_layers(momentum=momentum, dtype=dtype).eval()
    if converted:
        convert(model)
    model[3].train()
    by_batch = copy.deepcopy(model)
    for norm in (by_batch[0], by_batch[3]):
        norm.track_running_stats, norm.training = False, True
    seen = {0: [], 3: []}
    for i in seen:
        by_batch[i].register_forward_pre_hook(lambda _, inputs, i=i: seen[i].append(inputs[0]))
    before, batches = kept(model), uneven(dtype)
    expected = [by_batch(x) for x in batches]
    with recalibrate(model):
        for x, y in zip(batches, expected, strict=True):
            result = model(x)
            assert torch.equal(result, y)
            assert not result.requires_grad
    assert_kept(model, before, ("running_mean", "running_var"))
    for i, inputs in seen.items():
        values = torch.cat([x.detach().double().transpose(0, 1).flatten(1) for x in inputs], 1)
        close(model[i].running_mean.double(), values.mean(1), dtype)
        close(model[i].running_var.double(), values.var(1), dtype)


def test_modes_may_change_within_the_block():
    """A function that evaluates a model begins with `eval`."""
    model, (x, *_) = two_layers()[:4].train(), uneven()
    with recalibrate(model):
        in_training = model(x)
        assert torch.equal(model.eval()(x), in_training)
        model[3].train()
        assert torch.equal(model(x), in_training)
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            model(x[:1, :, :1, :1])
        assert [model[i].training for i in (0, 3)] == [False, True]
        assert all(model[i].track_running_stats for i in (0, 3))


def test_recalibration_weighs_values_and_update_bn_batches():
    model, batches = two_layers().train(), uneven()
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    with recalibrate(model):
        for x in batches:
            model(x)
    close(model[0].running_var, values.var(1))
    torch.optim.swa_utils.update_bn(batches, model)
    average = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    close(model[0].running_var, average)
    assert (model[0].running_var < 0.7 * values.var(1)).all()  # means between batches left out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recalibration_in_half_precision(dtype):
    model = convert(nn.Sequential(nn.BatchNorm2d(3)))  # parameters in float32
    batches = uneven(dtype)
    with recalibrate(model):
        for x in batches:
            model(x)
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in batches], 1)
    close(model[0].running_mean.double(), values.mean(1), torch.float32)
    close(model[0].running_var.double(), values.var(1), torch.float32)


def test_a_shared_module_and_a_named_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = self.again = BatchNorm1d(3).double()

        def forward(self, x, y):
            return self.norm(input=x), self.again(y)

    model, x, y = Twice(), drawn((7, 3)), drawn((4, 3)) + 5
    with recalibrate(model):
        model(x, y)
    close(model.norm.running_mean, torch.cat([x, y]).mean(0))
    close(model.norm.running_var, torch.cat([x, y]).var(0))


def test_what_is_not_recalibrated():
    model, x = Others(), drawn(dtype=torch.float32)
    model.untracked = nn.BatchNorm2d(3, track_running_stats=False)
    parts = model.sync, model.volume, model.untracked
    before = [kept(part) for part in parts]
    with recalibrate(model):
        model.own(x)
        model.lazy(x)
        model.untracked(x)
    for part, was in zip(parts, before, strict=True):
        assert_kept(part, was)
    close(model.own.running_mean, x.mean((0, 2, 3)), torch.float32)
    close(model.lazy.running_mean, 0.1 * x.mean((0, 2, 3)), torch.float32)  # trained as ever


def test_recalibration_that_fails_changes_nothing():
    model = two_layers().eval()
    before = kept(model)

    def interrupted():
        with recalibrate(model):
            model(drawn((7, 3, 6, 5)))
            raise KeyboardInterrupt

    def misfit():
        with recalibrate(model):
            model(drawn((7, 3, 6, 5)))
            model(drawn((7, 2, 6, 5)))

    def nothing_seen():
        with recalibrate(model):
            model[0](drawn((0, 3, 6, 5)))

    for call, error, match in (
        (interrupted, KeyboardInterrupt, None),
        (misfit, RuntimeError, "should contain 2 elements"),
        (nothing_seen, ValueError, "none of the model's batch normalizations has seen a value"),
    ):
        with pytest.raises(error, match=match):
            call()
        assert_kept(model, before)
        assert torch.is_grad_enabled()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got"), recalibrate([model]):
        pass
    with pytest.raises(ValueError, match="has no batch normalization"), recalibrate(nn.ReLU()):
        pass


def test_recalibration_interrupted_at_any_call_leaves_no_module_in_training():
    """As by Ctrl-C: a signal's handler runs where a call has returned."""
    code, step, left = integration._collecting.__wrapped__.__code__, 0, 0

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_back is None or frame.f_back.f_code is not code:
            return trace
        left -= event == "return"
        if left == 0:
            left = -1
            raise KeyboardInterrupt
        return trace

    while left <= 0:
        step += 1
        left = step
        model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with recalibrate(model):
                pass
        except (KeyboardInterrupt, ValueError):
            pass
        finally:
            sys.settrace(before)
        x = torch.tensor([[1.0], [3.0]])
        torch.testing.assert_close(model(x), x, atol=1e-4, rtol=1e-4)
        assert not model[0].training
        assert model[0].track_running_stats
    assert step > 6


def test_a_compiled_model_is_recalibrated():
    torch._dynamo.reset()
    batches, models = uneven(torch.float32), []
    for way in ("eager", "compiled before", "compiled and called before"):
        torch.manual_seed(0)
        model = convert(two_layers(dtype=torch.float32)).eval()
        run = model if way == "eager" else torch.compile(model, backend="eager", fullgraph=True)
        if way == "compiled and called before":
            run(batches[0])
        with recalibrate(run):
            for x in batches:
                run(x)
        models.append((model, run))
    (ref, _), *others = models
    for model, run in others:
        for i in (0, 3):
            assert torch.equal(model[i].running_mean, ref[i].running_mean)
            assert torch.equal(model[i].running_var, ref[i].running_var)
        close(run(batches[0]), ref(batches[0]), torch.float32)


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(integration, optionflags=options)
    assert failed == 0
    assert attempted > 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(60, 10), (5, 3, 4, 6)])
def test_what_is_timed_computes_the_same(shape, dtype):
    from autodiff import assert_like_with_like

    from benchmarks.hosts import torch as host

    assert host.name() == f"PyTorch {torch.__version__}"
    calls = {
        name: lambda call=call: tuple(tensor.numpy() for tensor in call())
        for name, call in host.calls(shape, dtype).items()
    }
    assert_like_with_like(calls, shape, dtype)


@pytest.mark.parametrize("shared", ["weight", "bias", "running_var"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", ["eager", "recorded", "compiled", "recalibrate"])
def test_statistics_that_share_memory_with_a_parameter(how, momentum, shared):
    """As exporters merge equal arrays: the update would change the parameter as well."""
    layer = BatchNorm1d(3, momentum=momentum)
    layer.running_mean = getattr(layer, shared).data
    before = layer.running_mean.clone()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    def run():
        if how == "recalibrate":
            with recalibrate(layer):
                layer(x)
        with torch.set_grad_enabled(how != "eager"):
            (compiled if how == "compiled" else layer)(x)

    with pytest.raises(ValueError, match="share memory"):
        run()
    torch.testing.assert_close(layer.running_mean, before, rtol=0, atol=0)


HOSTED = """
import numpy as np, torch, nbnorm
from nbnorm.cpu import threads

def results():
    x = np.random.default_rng(0).normal(size=(16, 64, 28, 28)).astype("float32")
    y, mean, rstd = nbnorm.batch_norm_forward(x)
    return [y, mean, rstd, *nbnorm.batch_norm_backward(y, x, None, mean, rstd)[:3]]

own, pool = results(), threads.pool()
import nbnorm.integrations.torch
hosted = results()
print(threads.pool() != pool, all(a.tobytes() == b.tobytes() for a, b in zip(own, hosted)))
torch.set_num_threads(1)
print(threads.count())
"""


def test_kernels_run_on_the_threads_that_pytorch_has():
    """Its pool and Numba's would spin against each other: 20 ms for what takes 1."""
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        pytest.skip("this PyTorch has no OpenMP library of its own")
    printed = run_child("-c", HOSTED, NUMBA_THREADING_LAYER="omp", NUMBA_NUM_THREADS="2")
    assert printed.split() == ["True", "True", "1"]


FORKED = """
import os, signal, numpy as np, torch, nbnorm
import nbnorm.integrations.torch
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).add_(1)  # starts PyTorch's threads
torch.ones(10_000_000).add_(1)
pid = os.fork()
if not pid:
    signal.alarm(60)  # ends a child that waits for threads of its parent's
    y = nbnorm.batch_norm_forward(np.ones((64, 64, 28, 28), "float32"))[0]
    os._exit(0 if (y == 0).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_after_pytorch_had_started_its_threads_does_not_hang():
    assert run_child("-c", FORKED, NUMBA_NUM_THREADS="2").split() == ["0"]


def test_other_threading_layers_keep_their_threads():
    printed = run_child("-c", HOSTED, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2")
    assert printed.split() == ["False", "True", "2"]
