"""nbnorm.integrations.torch under torch.func, and the transforms that it rejects."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_cases import (  # noqa: E402
    FORWARD,
    SHAPE,
    _seed,  # noqa: F401
    close,
    drawn,
    parameters,
    statistics,
    theirs,
)

from nbnorm.integrations.torch import BatchNorm1d, batch_norm, convert  # noqa: E402


def both(training, *, options=None):
    """Return nbnorm's batch_norm and PyTorch's, as functions of x, weight and bias."""
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
    if training and "vmap" in transform:  # unclear which sample would update them

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
    model[1].num_batches_tracked = None  # a module counts it in place, which torch.func rejects
    ours, x = convert(copy.deepcopy(model), fuse_relu=True), drawn((6, 5))
    results = []
    for m in (ours, model):

        def loss(parameters, m=m):
            return torch.func.functional_call(m, parameters, (x,)).pow(3).sum()

        grads = torch.func.grad(loss)({k: p.detach() for k, p in m.named_parameters()})
        results.append((*grads.values(), *m.buffers()))  # training updates them
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
@pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")  # torch's
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_forward_mode_is_refused(way, what, training):
    """It raises rather than return a tangent of 0."""
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

    expected = NotImplementedError, "no forward-mode derivative"
    if what == "operator" and way == "hessian":
        expected = RuntimeError, "setup_context"  # PyTorch's own error for a custom operator
    with pytest.raises(expected[0], match=expected[1]):
        FORWARD_MODE[way](function, x, v)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_is_refused_by_torch_func(training):
    arguments, (ours, _) = (drawn((3, 3, 2)), *parameters()), both(training)
    inner = torch.func.grad(lambda x: ours(x, *arguments[1:]).pow(3).sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.jacrev(inner)(arguments[0])
