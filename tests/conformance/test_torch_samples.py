"""PyTorch's own test samples of batch normalization, computed by nbnorm.

PyTorch's test suite is built on the tables `op_db` and `module_db`. Every sample of
``nn.functional.batch_norm`` and of ``native_batch_norm``, every module input and every invalid
call runs through nbnorm and through PyTorch: in all dtypes of the tables, with contiguous tensors
and with PyTorch's non-contiguous variant. Values, running statistics and gradients are compared
with the oracle in float64: nbnorm's with the tolerances of all other tests, PyTorch's with about
twice those.

The two differ intentionally, as the tests show:

- nbnorm rejects an input without channels, of shape (0,): it has no axis to normalise over.
- nbnorm allows eps = 0 in training: if the variance is 0 too, rstd is 0.
- mean and rstd are float64 for every dtype. In evaluation nbnorm returns the statistics it used,
  PyTorch empty tensors.
- Wrong arguments raise TypeError or ValueError where PyTorch's kernels raise RuntimeError.
- nbnorm rejects third derivatives (RuntimeError) and forward mode of forward mode
  (NotImplementedError).
- Running statistics that require grad raise TypeError, where PyTorch raises RuntimeError.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from tolerances import (
    UNITS,
    assert_within,
    computed,
    dx_tolerance,
    mean_tolerance,
    one_unit,
    rstd_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

torch = pytest.importorskip("torch", reason="PyTorch's samples need PyTorch")
pytest.importorskip("expecttest", reason="PyTorch's internal test tables need expecttest")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import noncontiguous_like  # noqa: E402

import nbnorm  # noqa: E402
import nbnorm.integrations.torch as integration  # noqa: E402
from nbnorm import reference  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow]


class Call(NamedTuple):
    """Arguments of one batch normalization."""

    input: torch.Tensor
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    training: bool
    momentum: float
    eps: float


def call_of(operator, sample):
    """Return a sample's arguments by name."""
    if operator == "native_batch_norm":
        weight, bias, mean, var, training, momentum, eps = sample.args
        return Call(sample.input, mean, var, weight, bias, training, momentum, eps)
    defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
    return Call(sample.input, *sample.args, **defaults | sample.kwargs)


def calls(operator):
    """Return {name: call} of all samples of an operator."""
    (entry,) = (op for op in op_db if op.name == operator and op.dtypes)
    return {
        f"{str(dtype).removeprefix('torch.')}-{number}": call_of(operator, sample)
        for dtype in sorted(entry.dtypes, key=str)
        for number, sample in enumerate(entry.sample_inputs("cpu", dtype, requires_grad=True))
    }


def fresh(tensor, contiguous=True, *, grad=True):
    """Copy a tensor for a call that may write to it; return other values unchanged."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    copy = tensor.detach().clone()
    copy = copy if contiguous else noncontiguous_like(copy)
    return copy.requires_grad_(grad and tensor.requires_grad)


def array_of(tensor):
    """View a tensor as a NumPy array."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def gradient_of(call, contiguous=True):
    """Draw dy."""
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(call.input.shape, generator=generator, dtype=torch.float64)
    return fresh(dy.to(call.input.dtype), contiguous)


class Exact(NamedTuple):
    """A float64 result, and the tolerances of nbnorm and PyTorch."""

    value: np.ndarray
    ours: np.ndarray | float
    theirs: np.ndarray | float


def expected(call, dy):
    """Return {name: Exact} for the results of a call.

    PyTorch gets twice nbnorm's tolerance. In half precision its kernels for strided tensors also
    round each term of a sum over the batch to the input's dtype.
    """
    x, mean, var, weight, bias = map(array_of, call[:5])
    dy, training = array_of(dy), call.training
    ref = reference.batch_norm_forward(
        x, weight, bias, *(None if a is None else a.copy() for a in (mean, var)),
        training=training, momentum=call.momentum, eps=call.eps,
    )  # fmt: skip
    used = {"mean": ref.mean, "rstd": ref.rstd, "axis": 1}
    grads = reference.batch_norm_backward(dy, x, weight, training=training, **used)
    moments = reference.batch_norm_stats(x)
    # Without values there is no mean to derive a tolerance from, and nothing to compare.
    of_dx = dx_tolerance(dy, x, weight, training=training, **used) if x.size else 0
    found = {
        "y": (ref.y, y_tolerance(x, weight, bias, **used)),
        "dx": (grads.dx, of_dx),
        "mean": (ref.mean, mean_tolerance(moments, x.dtype)),
        "rstd": (ref.rstd, rstd_tolerance(moments, ref.rstd, x.dtype)),
        "running_mean": (mean, 0),
        "running_var": (var, 0),
    }
    if mean is not None and training and x.size:
        move = {"momentum": call.momentum, "correction": 1}
        moved = reference.update_running_stats(mean, var, moments, inplace=False, **move)
        errors = running_tolerance(moments, mean, var, dtype=x.dtype, **move)
        found["running_mean"], found["running_var"] = zip(moved, errors, strict=True)
    exact = {name: Exact(value, error, 2 * error) for name, (value, error) in found.items()}
    of_dbias, of_dweight = sums_tolerance(dy, x, **used)
    coarser = float(ml_dtypes.finfo(x.dtype).eps / np.finfo(computed(x.dtype)).eps)
    for name, value, error in (
        ("dweight", grads.dgamma, of_dweight),
        ("dbias", grads.dbeta, of_dbias),
    ):
        once = stored(error, value, x.dtype)
        exact[name] = Exact(value, once, stored(coarser * error, value, x.dtype) + once)
    return exact


def assert_close(results, exact, whose):
    """Compare all results that are not None with the exact ones."""
    for name, result in results.items():
        if result is not None:
            actual, tolerance = array_of(result), getattr(exact[name], whose)
            if name in ("mean", "rstd"):  # PyTorch rounds them to the input's dtype
                tolerance = stored(tolerance, exact[name].value, actual.dtype)
            assert_within(actual, exact[name].value, tolerance, name)


def same_kinds(ours, theirs):
    """Assert that dtypes and shapes are PyTorch's."""
    kinds = [
        {name: (t.dtype, t.shape) for name, t in results.items() if t is not None}
        for results in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]


GRADIENTS = "dx", "dweight", "dbias"
SAMPLES = {name: calls(name) for name in ("nn.functional.batch_norm", "native_batch_norm")}
contiguity = pytest.mark.parametrize(
    "contiguous", [True, False], ids=["contiguous", "noncontiguous"]
)


def of_samples(operator, channels=True):
    """Parametrise over the samples with channels, or over those without."""
    chosen = {n: c for n, c in SAMPLES[operator].items() if (c.input.dim() > 1) == channels}
    return pytest.mark.parametrize("call", chosen.values(), ids=chosen)


@pytest.mark.parametrize(
    ("operator", "computed", "refused"),
    [("nn.functional.batch_norm", 10, 2), ("native_batch_norm", 10, 0)],
)
def test_samples_are_not_fewer_than_they_were(operator, computed, refused):
    """The counts are those of PyTorch 2.13 for every dtype; investigate if there are fewer."""
    names = SAMPLES[operator]
    dtypes = {name.partition("-")[0] for name in names}
    assert dtypes == {"float32", "float64", "float16", "bfloat16"}
    with_channels = [call for call in names.values() if call.input.dim() > 1]
    assert len(with_channels) >= computed * len(dtypes)
    assert len(names) - len(with_channels) == refused * len(dtypes)
    assert {call.training for call in with_channels} == {True, False}


# nn.functional.batch_norm, through nbnorm.integrations.torch


@contiguity
@of_samples("nn.functional.batch_norm")
def test_batch_norm(call, contiguous):
    dy = gradient_of(call, contiguous)
    results = []
    for function in (integration.batch_norm, functional.batch_norm):
        given = Call(*(fresh(value, contiguous) for value in call))
        y = function(*given)
        wanted = dict(zip(GRADIENTS, (given.input, given.weight, given.bias), strict=True))
        wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None}
        grads = torch.autograd.grad(y, list(wanted.values()), dy)
        running = {name: getattr(given, name) for name in ("running_mean", "running_var")}
        results.append({"y": y, **dict(zip(wanted, grads, strict=True)), **running})
    exact = expected(call, dy)
    assert_close(results[0], exact, "ours")
    assert_close(results[1], exact, "theirs")
    same_kinds(*results)


@of_samples("nn.functional.batch_norm", channels=False)
def test_an_input_without_channels_is_refused(call):
    given = Call(*map(fresh, call))
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got shape \(0,\)"):
        integration.batch_norm(*given)
    assert functional.batch_norm(*given).shape == (0,)


# native_batch_norm, through the functions on tensors


@contiguity
@of_samples("native_batch_norm")
def test_native_batch_norm(call, contiguous):
    dy = gradient_of(call, contiguous)
    exact = expected(call, dy)
    ours, theirs = (
        Call(*(fresh(value, contiguous, grad=False) for value in call)) for _ in range(2)
    )
    x, running_mean, running_var, weight, bias, training, momentum, eps = ours
    got = nbnorm.batch_norm_forward(
        x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps
    )
    want = torch.native_batch_norm(
        *(theirs.input, theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var),
        *(training, momentum, eps),
    )
    assert got.mean.dtype == got.rstd.dtype == torch.float64
    statistics = ("mean", "rstd") if training else ()  # for evaluation see the next test
    for given, outputs, whose in ((ours, got, "ours"), (theirs, want, "theirs")):
        results = dict(zip(("y", *statistics), outputs, strict=False))
        for name in ("running_mean", "running_var"):
            results[name] = getattr(given, name)
        assert_close(results, exact, whose)
    for mask in product((True, False), repeat=3):
        grads = nbnorm.batch_norm_backward(
            dy, x, weight, *got[1:], training=training, output_mask=(*mask, False)
        )
        native = torch.ops.aten.native_batch_norm_backward(
            *(dy, theirs.input, theirs.weight, theirs.running_mean, theirs.running_var),
            *(*want[1:], training, eps, list(mask)),
        )
        results = [dict(zip(GRADIENTS, found, strict=True)) for found in (grads[:3], native)]
        for asked, name in zip(mask, GRADIENTS, strict=True):
            assert [result[name] is not None for result in results] == [asked, asked], name
        assert_close(results[0], exact, "ours")
        assert_close(results[1], exact, "theirs")
        same_kinds(*results)


@of_samples("native_batch_norm")
def test_statistics_in_evaluation_are_those_that_were_used(call):
    x, mean, var, weight, bias, *_ = (fresh(value, grad=False) for value in call)
    if mean is None:
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    got = nbnorm.batch_norm_forward(x, weight, bias, mean, var, training=False, eps=call.eps)
    assert_within(got.mean.numpy(), array_of(mean), 0, "mean")
    rstd = 1 / np.sqrt(array_of(var).astype(np.longdouble) + call.eps)
    assert_within(got.rstd.numpy(), rstd, UNITS * one_unit(rstd, np.float64), "rstd")
    want = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.1, call.eps)
    assert [t.numel() for t in want[1:]] == [0, 0]


# Modules


MODULES = {
    info.module_cls: getattr(integration, info.module_cls.__name__)
    for info in module_db
    if info.module_cls.__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
}


def module_cases(kind):
    """Return {name: PyTorch's sample} for each module, dtype and mode."""
    found = {}
    for info, dtype, training in product(module_db, (torch.float32, torch.float64), (True, False)):
        if info.module_cls not in MODULES or dtype not in info.dtypes:
            continue
        make = getattr(info, kind)
        inputs = make(info, "cpu", dtype, requires_grad=True, training=training)
        for number, given in enumerate(inputs):
            mode = "training" if training else "evaluation"
            name = f"{info.module_cls.__name__}-{str(dtype)[6:]}-{mode}-{number}"
            found[name] = info.module_cls, dtype, training, given
    return found


MODULE_INPUTS = module_cases("module_inputs_func")
MODULE_ERRORS = module_cases("module_error_inputs_func")


def built(cls, dtype, training, constructor_input):
    """Return PyTorch's module and nbnorm's, with the same parameters and statistics."""
    arguments, options = constructor_input.args, constructor_input.kwargs
    theirs, ours = (
        c(*arguments, **options, dtype=dtype).train(training) for c in (cls, MODULES[cls])
    )
    generator = torch.Generator().manual_seed(3)
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_inputs_of_modules_are_not_fewer_than_they_were():
    assert len(MODULES) == 3
    assert len(MODULE_INPUTS) >= (8 + 7 + 7) * 2 * 2
    assert len(MODULE_ERRORS) >= 3 * 2 * 2 * 2


@contiguity
@pytest.mark.parametrize(
    ("cls", "dtype", "training", "inputs"), MODULE_INPUTS.values(), ids=MODULE_INPUTS
)
def test_modules(cls, dtype, training, inputs, contiguous):
    modules = built(cls, dtype, training, inputs.constructor_input)
    ours = modules[0]
    tracked = ours.running_mean is not None
    (x,) = inputs.forward_input.args
    call = Call(
        *(x, ours.running_mean, ours.running_var, ours.weight, ours.bias),
        training=training or not tracked,
        momentum=1.0 if ours.momentum is None else ours.momentum,
        eps=ours.eps,
    )
    dy = gradient_of(call, contiguous)
    exact = expected(Call(*map(fresh, call)), dy)
    results = []
    for module in modules:
        x = fresh(call.input, contiguous)
        y = module(x)
        y.backward(dy)
        result = {"y": y, "dx": x.grad}
        for name, parameter in (("dweight", module.weight), ("dbias", module.bias)):
            result[name] = None if parameter is None else parameter.grad
        for name in ("running_mean", "running_var"):
            result[name] = getattr(module, name)
        results.append(result)
    assert_close(results[0], exact, "ours")
    assert_close(results[1], exact, "theirs")
    same_kinds(*results)
    states = [module.state_dict() for module in modules]
    assert list(states[0]) == list(states[1])
    counts = [state.get("num_batches_tracked") for state in states]
    assert counts[0] == counts[1]
    assert counts[0] == (int(training) if tracked else None)


@pytest.mark.parametrize(
    ("cls", "dtype", "training", "error"), MODULE_ERRORS.values(), ids=MODULE_ERRORS
)
def test_an_eps_of_0_is_allowed_in_training_and_one_below_never(cls, dtype, training, error):
    inputs = error.module_error_input
    assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
    ours, theirs = built(cls, dtype, training, inputs.constructor_input)
    (x,) = inputs.forward_input.args
    before = fresh(ours.running_mean), fresh(ours.running_var)
    if training or theirs.eps < 0:
        with pytest.raises(error.error_type, match="eps must be"):
            theirs(x)
    if ours.eps < 0:
        with pytest.raises(error.error_type, match="eps must be"):
            ours(x)
        assert ours.running_mean.equal(before[0])
        assert ours.running_var.equal(before[1])
    else:
        assert ours.eps == 0
        y = ours(torch.ones_like(x))
        if training:
            assert y.equal(ours.bias.view(-1, *[1] * (x.dim() - 2)).expand_as(x))
        else:
            torch.testing.assert_close(y, theirs(torch.ones_like(x)))


# What raises


def test_operators_have_no_errors_in_the_table():
    """If PyTorch adds error inputs, test them here; those of the modules are tested above."""
    assert all(op.error_inputs_func is None for op in op_db if op.name in SAMPLES)


SHAPE = (4, 3, 5)
WRONG = {
    "short running_mean": ({"running_mean": torch.zeros(2)}, ValueError, RuntimeError),
    "long running_var": ({"running_var": torch.ones(4)}, ValueError, RuntimeError),
    "short weight": ({"weight": torch.ones(2)}, ValueError, RuntimeError),
    "long bias": ({"bias": torch.ones(4)}, ValueError, RuntimeError),
    "no statistics to normalise with": (
        {"running_mean": None, "running_var": None, "training": False},
        *(ValueError, RuntimeError),
    ),
    "one value per channel": ({"input": torch.ones(1, 3, 1)}, ValueError, ValueError),
    "integers": ({"input": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, RuntimeError),
    "complex numbers": (
        {"input": torch.ones(SHAPE, dtype=torch.complex64)},
        TypeError,
        RuntimeError,
    ),
    "integers for a weight": (
        {"weight": torch.ones(3, dtype=torch.int32)},
        *(TypeError, RuntimeError),
    ),
    "negative eps": ({"eps": -1e-5}, ValueError, ValueError),
    "no tensor": (
        {"input": [[1.0, 2.0], [3.0, 4.0]]},
        TypeError,
        (TypeError, AttributeError),
    ),
}


@pytest.mark.parametrize(("spoilt", "our_error", "their_error"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_raise_in_both(spoilt, our_error, their_error):
    for function, error in (
        (integration.batch_norm, our_error),
        (functional.batch_norm, their_error),
    ):
        right = {
            "input": torch.ones(SHAPE),
            "running_mean": torch.full((3,), 0.25),
            "running_var": torch.full((3,), 1.75),
            "training": True,
        }
        function(**right)
        given = right | spoilt
        left = {name: fresh(given[name]) for name in ("running_mean", "running_var")}
        with pytest.raises(error):
            function(**given)
        if function is integration.batch_norm:
            for name, tensor in left.items():
                assert tensor is None or tensor.equal(given[name])


# For the first dual tensor, PyTorch calls torch.jit.script, which it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@of_samples("nn.functional.batch_norm")
def test_second_derivatives_and_forward_mode(call):
    """Compare with differences in float64, as PyTorch's own tests do."""
    given = Call(*map(fresh, call))
    if given.input.dtype != torch.float64:
        y = integration.batch_norm(*given)
        (dx,) = torch.autograd.grad(y.square().sum(), given.input, create_graph=True)
        dx.sum().backward()
        assert given.input.grad.isfinite().all()
        return

    def function(x, weight, bias):
        mean, var = (fresh(t, grad=False) for t in call[1:3])
        return integration.batch_norm(x, mean, var, weight, bias, *given[5:])

    inputs = given.input, given.weight, given.bias
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)
