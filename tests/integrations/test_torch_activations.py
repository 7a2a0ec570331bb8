"""Activations other than ReLU in nbnorm.integrations.torch, against PyTorch's own functions."""

import copy
import pickle

import pytest
from of_users import doubled, squared

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_cases import _seed, close, drawn, parameters, statistics  # noqa: E402, F401

import nbnorm  # noqa: E402
from nbnorm.activations import TABLE  # noqa: E402
from nbnorm.integrations.torch import BatchNorm2d, _functional, batch_norm, convert  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # each activation compiles its own kernels
    # PyTorch warns about itself when it first uses forward mode.
    pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning"),
]

LEAKY = nbnorm.activation("leaky_relu", slope=0.2)
FUNCTIONS = {
    "leaky_relu": functional.leaky_relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    LEAKY: lambda v: functional.leaky_relu(v, 0.2),
}
every = pytest.mark.parametrize("activation", FUNCTIONS, ids=str)
modes = pytest.mark.parametrize("training", [True, False])
added = pytest.mark.parametrize("added", [True, False])


def arguments(training, added, dtype=torch.float64):
    """Return the running statistics, and the tensors that are differentiated."""
    running = (None, None) if training else statistics(dtype=dtype)
    inputs = [drawn(dtype=dtype, grad=True), *parameters(dtype=dtype, grad=True)]
    return running, inputs + [drawn(dtype=dtype, grad=True)] * added


def ours(running, training, activation):
    def function(x, weight, bias, residual=None):
        options = {"residual": residual, "activation": activation}
        return batch_norm(x, *running, weight, bias, training, **options)

    return function


def theirs(running, training, activation):
    def function(x, weight, bias, residual=None):
        v = functional.batch_norm(x, *running, weight, bias, training)
        return FUNCTIONS[activation](v if residual is None else v + residual)

    return function


def test_every_activation_has_a_function_of_theirs():
    assert set(_functional._FUNCTIONS) == set(TABLE)


@every
@modes
@added
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(activation, training, added, dtype):
    running, inputs = arguments(training, added, dtype)
    results = []
    for function in (ours, theirs):
        y = function(running, training, activation)(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, y.detach().cos())))
    for mine, expected in zip(*results, strict=True):
        close(mine, expected, dtype)


@every
@modes
@added
def test_gradcheck(activation, training, added):
    running, inputs = arguments(training, added)
    assert gradcheck(ours(running, training, activation), inputs)


@pytest.mark.parametrize("activation", ["silu", LEAKY], ids=str)
@modes
@added
def test_what_pytorch_computes_after_the_batch_norm(activation, training, added):
    """Second derivatives, forward mode and gradients in batches."""
    running, inputs = arguments(training, added)
    function = ours(running, training, activation)
    assert gradgradcheck(function, inputs, atol=1e-4)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)


def test_one_tensor_as_input_and_residual():
    for training in (True, False):
        running, (x, *others) = arguments(training, False)
        found = []
        for function in (ours, theirs):
            y = function(running, training, "silu")(x, *others, x)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append((first, *torch.autograd.grad(first.square().sum(), (x, *others))))
        for mine, expected in zip(*found, strict=True):
            close(mine, expected)


def test_evaluation_keeps_the_statistics_that_it_used():
    """The running statistics may change between the passes."""
    running, (x, *others) = arguments(False, False)
    y = ours(running, False, "silu")(x, *others)
    expected = torch.autograd.grad(
        theirs([r.clone() for r in running], False, "silu")(x, *others).square().sum(), x
    )
    for r in running:
        r += 1
    close(*torch.autograd.grad(y.square().sum(), x, create_graph=True), *expected)


@modes
def test_torch_func(training):
    running, (x, *others) = arguments(training, False)
    found = []
    for function in (ours(running, training, "gelu"), theirs(running, training, "gelu")):

        def loss(x, *others, f=function):
            return f(x, *others).square().sum()

        found.append((torch.func.grad(loss)(x, *others), torch.func.hessian(loss, 1)(x, *others)))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected)


@pytest.mark.parametrize("activation", ["hardswish", LEAKY], ids=str)
def test_a_compiled_module(activation):
    torch.compiler.reset()
    module = BatchNorm2d(3, activation=activation)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    x = drawn((4, 3, 5, 5), dtype=torch.float32, grad=True)
    found = []
    for layer in (module, compiled):
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        close(one, other, torch.float32)
    close(module.running_var, compiled.running_var, torch.float32)


def test_modules():
    module = BatchNorm2d(3, activation=LEAKY)
    x, residual = drawn((4, 3, 5, 5), dtype=torch.float32), drawn((4, 3, 5, 5), dtype=torch.float32)
    expected = functional.leaky_relu(nn.BatchNorm2d(3)(x) + residual, 0.2)
    close(module(x, residual), expected, torch.float32)
    assert "activation=activation('leaky_relu', slope=0.2)" in repr(module)
    assert "activation" not in repr(BatchNorm2d(3))
    again = pickle.loads(pickle.dumps(module)).eval()
    close(again(x), module.eval()(x), torch.float32)
    with module._collecting() as seen:
        close(module(x, residual), expected, torch.float32)
    assert seen.total().count == 100


def test_relu_by_name():
    x = drawn((4, 3, 5))
    same = batch_norm(x, None, None, training=True, relu=True)
    for activation in ("relu", nbnorm.activation("relu")):
        found = batch_norm(x, None, None, training=True, activation=activation)
        assert torch.equal(found, same)
        found = batch_norm(x, None, None, training=True, relu=True, activation=activation)
        assert torch.equal(found, same)


def test_a_relu_that_follows_another_activation_is_not_fused():
    model = nn.Sequential(BatchNorm2d(3, activation=LEAKY), nn.ReLU())
    x = drawn((4, 3, 5, 5), dtype=torch.float32)
    expected = model(x)
    assert torch.equal(convert(model, fuse_relu=True)(x), expected)


@modes
@added
def test_functions_of_the_users_own(training, added):
    act = nbnorm.activation(squared, doubled)
    running, inputs = arguments(training, added)
    function = ours(running, training, act)
    assert gradcheck(function, inputs)
    refused = pytest.raises(NotImplementedError, match=r"^activation\('squared'\) has functions of")
    with refused:
        torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    with refused:
        torch.func.grad(lambda x: function(x, *inputs[1:]).sum())(inputs[0])
    with refused, forward_ad.dual_level():
        function(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "elu"}, r"^activation must be None, an .*, got 'elu'"),
        ({"relu": True, "activation": "silu"}, r"^relu=True and activation='silu' are both given"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(drawn(), None, None, training=True, **options)
    with pytest.raises(ValueError, match=message):
        BatchNorm2d(3, **options)
