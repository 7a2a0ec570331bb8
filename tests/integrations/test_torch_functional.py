"""batch_norm of nbnorm.integrations.torch against PyTorch's own function."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_cases import (  # noqa: E402
    BACKWARD,
    CLOSE,
    FORWARD,
    SHAPE,
    _seed,  # noqa: F401
    close,
    drawn,
    last,
    parameters,
    statistics,
    theirs,
)

from nbnorm.integrations.torch import _operators, batch_norm, convert  # noqa: E402


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
    """Results have the strides of empty_like, as do the fake ones; opcheck compares both."""
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
    """The gradient of a sum has strides of 0; with given statistics dx is gamma rstd."""
    x = drawn(grad=True)
    given = *statistics(), *parameters()
    grads = []
    for function in (batch_norm, theirs):
        y = function(x, *given)
        grads += torch.autograd.grad(y.sum(), x)
        assert grads[-1].any()
    close(*grads)


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
    assert caught.type is RuntimeError  # the last is PyTorch's error
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
    """nbnorm raises an error instead of updating a copy."""
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


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")  # PyTorch's
def test_second_derivatives_against_differences(training, relu, with_residual):
    x, (weight, bias) = drawn((4, 3, 5), grad=True), parameters(grad=True)
    residual = drawn((4, 3, 5), grad=True) if with_residual else None
    running = statistics()

    def function(x, weight, bias, residual):
        kept = (r.clone() for r in running)
        return batch_norm(x, *kept, weight, bias, training, residual=residual, relu=relu)

    inputs = x, weight, bias, residual
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [SHAPE, (40, 3)])
@pytest.mark.parametrize("dtype", CLOSE)
def test_second_derivatives_in_every_dtype(dtype, shape):
    """Compare with PyTorch's in float64, computed from the same values."""
    drawn_ = drawn(shape), *parameters(), drawn(shape), drawn(shape)
    given = [t.to(dtype) for t in drawn_]
    results = []
    for function, of in (batch_norm, dtype), (theirs, torch.float64):
        x, weight, bias, dy, ddx = (t.to(of).requires_grad_() for t in given)
        y = function(x, None, None, weight, bias, training=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append(torch.autograd.grad(dx, [x, weight, dy], ddx.detach()))
        assert results[-1][0].dtype == of
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(ours.double() / scale, expected / scale, **CLOSE[dtype])


def test_a_third_derivative_is_refused():
    x, (weight, bias) = drawn(grad=True), parameters(grad=True)
    y = batch_norm(x, None, None, weight, bias, training=True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"up to the second.*torch\.nn\.functional"):
        second.sum().backward()


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
    """nbnorm receives and returns arrays at the tensors' addresses."""
    seen = []
    forward = _operators.batch_norm_forward

    def look(x, *args, **kwargs):
        result = forward(x, *args, **kwargs)
        seen.append((x.__array_interface__["data"][0], result.y.__array_interface__["data"][0]))
        return result

    monkeypatch.setattr(_operators, "batch_norm_forward", look)
    x = torch.randn(SHAPE)
    y = batch_norm(x, None, None, training=True)
    assert seen == [(x.data_ptr(), y.data_ptr())]


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
