"""Arrays of other libraries: read without a copy, and returned in their library."""

import importlib
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from refusals import LARGE, SMALL, VALID, refuses, takers
from strategies import dtype_of
from tolerances import assert_same_bits, assert_within, y_tolerance

import nbnorm
from nbnorm import reference

SHAPE = (4, 6, 5, 7)


def drawn(seed=0, shape=SHAPE, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def parameters(seed=9):
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.5, 2, 6).astype("float32"), rng.normal(size=6).astype("float32"))


def strict():
    xp = pytest.importorskip("array_api_strict")
    return xp.asarray, type(xp.zeros(1))


def torch_cpu():
    torch = pytest.importorskip("torch")
    return torch.from_numpy, torch.Tensor


def jax_cpu():
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray, jax.Array


libraries = pytest.mark.parametrize(
    "library", [strict, torch_cpu, jax_cpu], ids=["array-api-strict", "torch", "jax"]
)


def same(result, expected, cls, name="result"):
    """Compare a result's library and bits."""
    assert isinstance(result, cls), f"{name} is a {type(result)}"
    assert_same_bits(np.from_dlpack(result), expected, name)


def statistic(result, expected, cls, name="statistic"):
    """Compare a float64 result; a library without float64 gets a NumPy array."""
    assert isinstance(result, cls if cls.__module__.partition(".")[0] != "jax" else np.ndarray)
    assert_same_bits(np.asarray(result), expected, name)


@libraries
def test_forward_and_backward_give_the_bits_of_numpy(library):
    wrap, cls = library()
    x, residual, dy = drawn(0), drawn(1), drawn(2)
    gamma, beta = parameters()
    options = {"activation": "relu"}
    ref = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, **options)
    got = nbnorm.batch_norm_forward(
        wrap(x), wrap(gamma), wrap(beta), residual=wrap(residual), **options
    )
    same(got.y, ref.y, cls, "y")
    statistic(got.mean, ref.mean, cls, "mean")
    statistic(got.rstd, ref.rstd, cls, "rstd")
    statistics = ref.mean, ref.rstd
    want = nbnorm.batch_norm_backward(dy, x, gamma, *statistics, beta=beta, y=ref.y, **options)
    grads = nbnorm.batch_norm_backward(
        wrap(dy), wrap(x), wrap(gamma), got.mean, got.rstd, beta=wrap(beta), y=got.y, **options
    )
    for name, ours, theirs in zip(want._fields, grads, want, strict=True):
        same(ours, theirs, cls, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "jax.numpy"])
def test_half_precision_gives_the_bits_of_numpy(name, dtype):
    library = pytest.importorskip(name)
    ours = [drawn(i).astype(dtype_of(dtype)) for i in range(3)]
    x, residual, dy = (
        library.asarray(array.astype("float32"), dtype=getattr(library, dtype)) for array in ours
    )
    ref = nbnorm.batch_norm_forward(ours[0], residual=ours[1], activation="relu")
    got = nbnorm.batch_norm_forward(x, residual=residual, activation="relu")
    want = nbnorm.batch_norm_backward(ours[2], ours[0], None, *ref[1:], y=ref.y, activation="relu")
    grads = nbnorm.batch_norm_backward(dy, x, None, *got[1:], y=got.y, activation="relu")
    for a, b in ((got.y, ref.y), (grads.dx, want.dx), (grads.dresidual, want.dresidual)):
        assert type(a) is type(x)
        assert a.dtype == x.dtype
        in_float32 = a.float().numpy() if name == "torch" else np.asarray(a).astype("float32")
        assert_same_bits(in_float32, b.astype("float32"))


@libraries
def test_split_functions_give_the_bits_of_numpy(library):
    wrap, cls = library()
    x, dy = drawn(0), drawn(2)
    gamma, beta = parameters()
    ref = nbnorm.batch_norm_stats(x)
    got = nbnorm.batch_norm_stats(wrap(x))
    assert type(got.count) is int
    statistic(got.mean, ref.mean, cls, "mean")
    statistic(got.m2, ref.m2, cls, "m2")
    halves = [nbnorm.batch_norm_stats(wrap(part)) for part in (x[:2], x[2:])]
    merged = halves[0].merge(halves[1])
    assert type(merged.mean) is type(got.mean)
    assert merged.count == ref.count
    rstd = got.rstd(1e-5)
    statistic(rstd, ref.rstd(1e-5), cls, "rstd")
    want_y = nbnorm.batch_norm_apply(x, gamma, beta, ref.mean, ref.rstd(1e-5))
    y = nbnorm.batch_norm_apply(wrap(x), wrap(gamma), wrap(beta), got.mean, rstd)
    same(y, want_y, cls, "y")
    want_sums = nbnorm.batch_norm_backward_reduce(dy, x, ref.mean, ref.rstd(1e-5))
    sums = nbnorm.batch_norm_backward_reduce(wrap(dy), wrap(x), got.mean, rstd)
    for ours, theirs in zip(sums, want_sums, strict=True):
        statistic(ours, theirs, cls, "sums")
    want_dx = nbnorm.batch_norm_backward_apply(
        dy, x, gamma, ref.mean, ref.rstd(1e-5), *want_sums, ref.count
    )
    dx = nbnorm.batch_norm_backward_apply(
        wrap(dy), wrap(x), wrap(gamma), got.mean, rstd, *sums, got.count
    )
    same(dx, want_dx, cls, "dx")
    running = wrap(np.zeros(6, "float32")), wrap(np.ones(6, "float32"))
    want_running = np.zeros(6, "float32"), np.ones(6, "float32")
    want_running = nbnorm.update_running_stats(*want_running, ref, inplace=False)
    moved = nbnorm.update_running_stats(*running, got, inplace=False)
    for ours, theirs in zip(moved, want_running, strict=True):
        same(ours, theirs, cls, "running statistics")
    same(running[0], np.zeros(6, "float32"), cls, "running_mean left alone")


@libraries
def test_inference_and_folding_give_the_bits_of_numpy(library):
    wrap, cls = library()
    x, weight, kernel = drawn(), drawn(3, (6, 4)), drawn(4, (6, 2, 3, 3))
    gamma, beta = parameters()
    mean, var = beta[::-1].copy(), gamma[::-1].copy()
    numpy_bn, bn = (gamma, beta, mean, var), tuple(map(wrap, (gamma, beta, mean, var)))
    ref = nbnorm.batch_norm_inference(x, *numpy_bn)
    same(nbnorm.batch_norm_inference(wrap(x), *bn), ref, cls, "y")
    frozen = nbnorm.batch_norm_forward(wrap(x), *bn, training=False)
    same(frozen.y, ref, cls, "y")
    for ours, theirs in (
        (nbnorm.fold_batch_norm(*bn), nbnorm.fold_batch_norm(*numpy_bn)),
        (
            nbnorm.fold_into_linear(wrap(weight), None, *bn),
            nbnorm.fold_into_linear(weight, None, *numpy_bn),
        ),
        (
            nbnorm.fold_into_conv(wrap(kernel), wrap(beta), *bn, groups=2),
            nbnorm.fold_into_conv(kernel, beta, *numpy_bn, groups=2),
        ),
    ):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, cls)


@libraries
def test_float64_arrays(library):
    wrap, cls = library()
    x = drawn(dtype="float64")
    ref = nbnorm.batch_norm_forward(x)
    if library is jax_cpu:
        x = x.astype("float32")  # without x64, JAX has no float64
        ref = nbnorm.batch_norm_forward(x)
    same(nbnorm.batch_norm_forward(wrap(x)).y, ref.y, cls, "y")


@libraries
def test_the_input_of_another_library_is_not_changed(library):
    wrap, cls = library()
    x = wrap(drawn())
    nbnorm.batch_norm_forward(x)
    same(x, drawn(), cls, "x")


@libraries
def test_negative_strides_are_never_exported(library):
    """NumPy views with negative strides work with any library's x; results are the library's."""
    wrap, cls = library()
    residual = drawn(1)[::-1, :, ::-1]
    ref = nbnorm.batch_norm_forward(drawn(), residual=residual)
    got = nbnorm.batch_norm_forward(wrap(drawn()), residual=residual)
    same(got.y, ref.y, cls, "y")
    backwards = nbnorm.batch_norm_forward(residual).y
    assert min(backwards.strides) > 0
    same(wrap(backwards), backwards, cls)


@pytest.mark.parametrize("library", [strict, torch_cpu], ids=["array-api-strict", "torch"])
def test_running_statistics_are_updated_in_place(library):
    wrap, cls = library()
    x = drawn()
    expected = np.zeros(6, "float32"), np.ones(6, "float32")
    nbnorm.batch_norm_forward(x, None, None, *expected)
    running = wrap(np.zeros(6, "float32")), wrap(np.ones(6, "float32"))
    nbnorm.batch_norm_forward(wrap(x), None, None, *running)
    for ours, theirs in zip(running, expected, strict=True):
        same(ours, theirs, cls, "running statistics")
    moments = nbnorm.batch_norm_stats(wrap(x))
    running = wrap(np.zeros(6, "float32")), wrap(np.ones(6, "float32"))
    returned = nbnorm.update_running_stats(*running, moments)
    assert returned[0] is running[0]
    assert returned[1] is running[1]
    for ours, theirs in zip(running, expected, strict=True):
        same(ours, theirs, cls, "running statistics")


@pytest.mark.parametrize("library", [strict, torch_cpu], ids=["array-api-strict", "torch"])
def test_out_of_another_library_is_returned_as_the_same_object(library):
    wrap, cls = library()
    x, gamma = drawn(), parameters()[0]
    ref = nbnorm.batch_norm_forward(x, gamma)
    out = wrap(np.zeros(SHAPE, "float32"))
    got = nbnorm.batch_norm_forward(wrap(x), wrap(gamma), out=out)
    assert got.y is out
    same(out, ref.y, cls, "y")
    itself = wrap(x.copy())
    assert nbnorm.batch_norm_forward(itself, wrap(gamma), out=itself).y is itself
    same(itself, ref.y, cls, "y in place")
    dx = wrap(np.zeros(SHAPE, "float32"))
    arguments = (wrap(x), wrap(x), wrap(gamma), got.mean, got.rstd)
    assert nbnorm.batch_norm_backward(*arguments, out=dx).dx is dx
    want = nbnorm.batch_norm_backward(x, x, gamma, ref.mean, ref.rstd)
    same(dx, want.dx, cls, "dx")


def test_results_are_on_the_device_of_x_though_all_of_them_are_cpu_memory():
    xp = pytest.importorskip("array_api_strict")
    for device in xp.__array_namespace_info__().devices():
        x = xp.asarray(drawn(), device=device)
        got = nbnorm.batch_norm_forward(x)
        assert got.y.device == device
        if xp.float64 in xp.__array_namespace_info__().dtypes(device=device).values():
            assert got.mean.device == got.rstd.device == device
        else:
            assert type(got.mean) is type(got.rstd) is np.ndarray
            assert got.mean.dtype == np.float64
        assert nbnorm.batch_norm_backward(x, x, None, *got[1:]).dx.device == device


PARTS = {"all": {}, "groups": {"groups": 2}, "mask": {"mask": np.ones((4, 1, 1, 1), bool)}}
ELSEWHERE = [*product(("gamma", "running_var", "residual", "out"), PARTS), ("mask", "mask")]


@pytest.mark.parametrize(("argument", "parts"), ELSEWHERE)
def test_arrays_on_different_devices_of_one_library(argument, parts):
    xp = pytest.importorskip("array_api_strict")
    arguments = {
        "x": drawn(),
        "gamma": parameters()[0],
        "running_mean": np.zeros(6),
        "running_var": np.ones(6),
        "residual": drawn(1),
        "out": drawn(2),
    }
    here, there = xp.Device("device1"), xp.Device("device2")
    arguments = {
        name: xp.asarray(array, device=there if name == argument else here, copy=True)
        if isinstance(array, np.ndarray)
        else array
        for name, array in (arguments | PARTS[parts]).items()
    }
    with pytest.raises(ValueError, match=rf"^{argument} is on .*device2.*expected .*device1"):
        nbnorm.batch_norm_forward(**arguments)
    assert not xp.any(arguments["running_mean"] != 0)


def test_the_second_device_of_jax():
    pytest.importorskip("jax")
    code = """
import jax, nbnorm
one, other = jax.devices("cpu")
x = jax.device_put(jax.numpy.arange(12, dtype="float32").reshape(4, 3), other)
y = nbnorm.batch_norm_forward(x, jax.device_put(jax.numpy.ones(3), other)).y
print(y.device == other)
try:
    nbnorm.batch_norm_forward(x, jax.device_put(jax.numpy.ones(3), one))
except ValueError as error:
    print(error)
"""
    printed = run_child("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert printed.splitlines() == ["True", "gamma is on cpu:0, expected cpu:1, where x is"]


def test_numpy_parameters_beside_a_tensor():
    wrap, cls = torch_cpu()
    gamma, beta = parameters()
    running = np.zeros(6), np.ones(6)
    got = nbnorm.batch_norm_forward(wrap(drawn()), gamma, beta, *running)
    same(got.y, nbnorm.batch_norm_forward(drawn(), gamma, beta).y, cls, "y")
    assert running[0].any()


@pytest.mark.parametrize("training", [True, False])
def test_jax_arrays_are_read_only(training):
    wrap, _ = jax_cpu()
    x, running = wrap(drawn()), (wrap(np.zeros(6, "float32")), wrap(np.ones(6, "float32")))
    if training:
        with pytest.raises(
            ValueError, match=r"(?s)batch_norm_stats.*update_running_stats.*inplace"
        ):
            nbnorm.batch_norm_forward(x, None, None, *running)
        moments = nbnorm.batch_norm_stats(x)
        with pytest.raises(ValueError, match=r"running_mean.*inplace=False"):
            nbnorm.update_running_stats(*running, moments)
        with pytest.raises(ValueError, match=r"^out\b.*read-only"):
            nbnorm.batch_norm_forward(x, out=x)
    else:
        y = nbnorm.batch_norm_forward(x, None, None, *running, training=False).y
        ref = nbnorm.batch_norm_inference(drawn(), None, None, np.zeros(6), np.ones(6))
        assert_same_bits(np.asarray(y), ref)
    assert_same_bits(np.asarray(running[0]), np.zeros(6, "float32"))
    assert_same_bits(np.asarray(x), drawn())


def test_statistics_come_as_numpy_where_jax_has_no_float64():
    wrap, _ = jax_cpu()
    got = nbnorm.batch_norm_forward(wrap(drawn()))
    assert type(got.mean) is type(got.rstd) is np.ndarray
    assert got.mean.dtype == got.rstd.dtype == np.float64


@pytest.mark.parametrize("argument", ["x", "gamma", "beta", "running_mean", "residual"])
def test_tensor_that_requires_grad(argument):
    torch = pytest.importorskip("torch")
    arguments = {
        "x": drawn(),
        "gamma": parameters()[0],
        "beta": parameters()[1],
        "running_mean": np.zeros(6),
        "running_var": np.ones(6),
        "residual": drawn(1),
    }
    arguments = {name: torch.from_numpy(a) for name, a in arguments.items()}
    arguments[argument].requires_grad_(True)
    with pytest.raises(TypeError, match=rf"^{argument}\b.*nbnorm\.integrations\.torch"):
        nbnorm.batch_norm_forward(**arguments)
    assert not arguments["running_var"].detach().ne(1).any()


def test_tensor_in_channels_last_memory_stays_so():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(drawn()).contiguous(memory_format=torch.channels_last)
    got = nbnorm.batch_norm_forward(x)
    assert got.y.is_contiguous(memory_format=torch.channels_last)
    ref = reference.batch_norm_forward(drawn())
    error = y_tolerance(drawn(), None, None, ref.mean, ref.rstd, axis=1)
    assert_within(got.y.numpy(), ref.y, error, "y")
    dx = nbnorm.batch_norm_backward(x, x, None, got.mean, got.rstd).dx
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_results_given_to_torch_can_be_used_there():
    torch = pytest.importorskip("torch")
    got = nbnorm.batch_norm_forward(torch.from_numpy(drawn()))
    got.y.add_(1)
    assert got.mean.dtype == torch.float64
    other = torch.nn.functional.relu(got.y).sum() + got.mean.sum()
    assert torch.isfinite(other)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_tensor_of_a_dtype_that_is_not_computed_in(dtype):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=rf"^x .*{dtype}"):
        nbnorm.batch_norm_forward(torch.ones(SHAPE, dtype=getattr(torch, dtype)))


def test_tensor_without_memory():
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match=r"^x "):
        nbnorm.batch_norm_forward(torch.empty(SHAPE, device="meta"))


def negated():
    """Return a lazily negated float32 tensor, and its values."""
    torch = pytest.importorskip("torch")
    values = torch.tensor([[1 + 2j, 3 + 4j], [5 + 7j, 2 + 9j]], dtype=torch.complex64).conj().imag
    assert values.is_neg()
    return values, values.resolve_neg()


def test_tensors_that_are_yet_to_be_negated():
    lazy, right = negated()
    of_channel, of_channel_right = lazy[0], right[0]
    running = [of_channel.resolve_neg().numpy().copy() ** 2 for _ in range(2)]
    forward = nbnorm.batch_norm_forward
    backward = nbnorm.batch_norm_backward
    for got, ref in (
        (forward(lazy, of_channel, of_channel), forward(right, of_channel_right, of_channel_right)),
        (
            backward(lazy, lazy, of_channel, running[0], running[1]),
            backward(right, right, of_channel_right, running[0], running[1]),
        ),
        (nbnorm.batch_norm_stats(lazy)[1:], nbnorm.batch_norm_stats(right)[1:]),
        (nbnorm.population_stats(lazy)[1:], nbnorm.population_stats(right)[1:]),
        (
            nbnorm.fold_batch_norm(of_channel, of_channel, of_channel, running[0]),
            nbnorm.fold_batch_norm(
                of_channel_right, of_channel_right, of_channel_right, running[0]
            ),
        ),
    ):
        for one, other in zip(got, ref, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    layer = nbnorm.BatchNorm(2, track_running_stats=False)
    layer.load_state_dict({"weight": of_channel, "bias": of_channel})
    np.testing.assert_array_equal(layer.parameters["bias"], of_channel_right.numpy())


@pytest.mark.parametrize("name", ["out", "running_mean", "running_var"])
def test_tensors_yet_to_be_negated_are_not_written(name):
    lazy, right = negated()
    running = {n: right[0].clone() for n in ("running_mean", "running_var")}
    given = {**running, "out": right.clone(), name: lazy if name == "out" else lazy[0]}
    with pytest.raises(ValueError, match=rf"^{name} is a tensor with the negative bit"):
        nbnorm.batch_norm_forward(right, **given)
    if name != "out":
        moments = nbnorm.batch_norm_stats(right)
        given = {**running, name: lazy[0]}
        with pytest.raises(ValueError, match=rf"^{name} is a tensor with the negative bit"):
            nbnorm.update_running_stats(moments=moments, **given)


def zeros_without_memory(like):
    """Return a ZeroTensor of an array's shape and dtype, as forward mode uses for tangents."""
    torch = pytest.importorskip("torch")
    return torch._efficientzerotensor(like.shape, dtype=getattr(torch, str(like.dtype)))


@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL, "weight"))
def test_zeros_without_memory(function, argument):
    zeros = zeros_without_memory(VALID[function]()[argument])
    message = rf"^{argument} is a ZeroTensor.*pass {argument}\.clone\(\)"
    refuses(function, TypeError, message, **{argument: zeros})


def test_zeros_without_memory_given_to_layers():
    torch = pytest.importorskip("torch")
    layer = nbnorm.BatchNorm(6)
    before = layer.state_dict()
    zeros = zeros_without_memory(drawn())
    for given in ((zeros,), (torch.ones(SHAPE), zeros)):
        with pytest.raises(TypeError, match=r"^(x|residual) is a ZeroTensor"):
            layer(*given)
    with pytest.raises(TypeError, match=r"^running_var is a ZeroTensor"):
        layer.load_state_dict(before | {"running_var": zeros_without_memory(parameters()[0])})
    with pytest.raises(TypeError, match=r"^data is a ZeroTensor"):
        nbnorm.population_stats([zeros])
    for name, array in layer.state_dict().items():
        assert_same_bits(array, before[name], name)
    layer(torch.ones(SHAPE))
    with pytest.raises(TypeError, match=r"^dy is a ZeroTensor"):
        layer.backward(zeros)
    assert not layer(zeros.clone()).any()


@pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")  # torch's
@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL, "weight"))
def test_tangents_of_forward_mode(function, argument):
    """The tensor's tangent is the reason to refuse; an open level of forward mode alone is not."""
    torch = pytest.importorskip("torch")
    forward_ad = torch.autograd.forward_ad
    given = torch.from_numpy(VALID[function]()[argument])
    message = rf"^{argument} is a dual tensor.*{argument}\.detach\(\).*functional\.batch_norm"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given, torch.ones_like(given))
        refuses(function, TypeError, message, **{argument: dual})
        getattr(nbnorm, function)(**VALID[function]() | {argument: dual.detach()})


@pytest.mark.parametrize("argument", ["x", "gamma", "running_mean", "out"])
def test_real_tensors_where_all_others_are_fake(argument):
    torch = pytest.importorskip("torch")
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    given = torch.from_numpy(VALID["batch_norm_forward"]()[argument])
    for allowed in (False, True):
        with fake.FakeTensorMode(allow_non_fake_inputs=allowed):
            message = rf"^{argument} is a real tensor in a FakeTensorMode.*outside"
            refuses("batch_norm_forward", TypeError, message, **{argument: given})


@pytest.mark.parametrize("function", VALID)
def test_proxies_of_symbolic_tracing(function):
    fx = pytest.importorskip("torch.fx")
    for argument in set(VALID[function]()) & {*LARGE, *SMALL, "weight"}:
        proxy = fx.Proxy(fx.Graph().placeholder("given"))
        message = rf"^{argument} is a torch\.fx\.Proxy.*torch\.fx\.wrap.*leaf module"
        refuses(function, TypeError, message, **{argument: proxy})


def test_a_leaf_of_symbolic_tracing_may_call():
    torch = pytest.importorskip("torch")

    class Leaf(torch.nn.Module):
        def forward(self, x):
            return nbnorm.batch_norm_forward(x).y

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    model, x = torch.nn.Sequential(Leaf()), torch.randn(6, 3)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))


def test_subclass_of_tensor():
    torch = pytest.importorskip("torch")

    class Own(torch.Tensor):
        pass

    x = torch.randn(6, 3)
    for given in (x.as_subclass(Own), torch.nn.Parameter(x, requires_grad=False)):
        y = nbnorm.batch_norm_forward(given).y
        assert type(y) is torch.Tensor
        assert torch.equal(y, nbnorm.batch_norm_forward(x).y)


def test_tensors_that_stand_for_others():
    torch = pytest.importorskip("torch")
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        x = torch.ones(6, 3)
    with pytest.raises(TypeError, match=r"^x is a .*FakeTensor.*nbnorm\.integrations\.torch"):
        nbnorm.batch_norm_forward(x)

    def total(x):
        return nbnorm.batch_norm_forward(x).y.sum()

    for transformed in (torch.func.grad(total), torch.func.vmap(total)):
        with pytest.raises(TypeError, match=r"^x is a tensor of torch\.func.*integrations\.torch"):
            transformed(torch.ones(4, 6, 3))


def test_compiled_code_calls_and_does_not_trace():
    torch = pytest.importorskip("torch")
    x = torch.randn(6, 3)

    def twice(x):
        return 2 * nbnorm.batch_norm_forward(x).y

    assert torch.equal(torch.compile(twice, backend="eager")(x), twice(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"nbnorm\.integrations\.torch can be compiled"):
        torch.compile(twice, backend="eager", fullgraph=True)(x)


def test_jax_tracers():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(12.0).reshape(4, 3)

    def y(x):
        return nbnorm.batch_norm_forward(x).y

    for transformed in (jax.jit(y), jax.vmap(y), jax.grad(lambda x: y(x).sum())):
        with pytest.raises(TypeError, match=r"^x is a JAX tracer.*jax\.pure_callback"):
            transformed(x)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    got = jax.jit(lambda x: jax.pure_callback(y, like, x))(x)
    np.testing.assert_array_equal(got, y(x))


@pytest.fixture(scope="module")
def jax_example():
    """Return jax, the names of the example in docs/integrations.md, and its loss by JAX alone."""
    jax = pytest.importorskip("jax")
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.partition("\n## JAX\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    names = {"__name__": "example"}
    exec(compile(block, "integrations.md, JAX", "exec"), names)

    def expected(x, gamma, beta):
        axes = tuple(i for i in range(x.ndim) if i != 1)
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        gamma, beta = (array.reshape(mean.shape) for array in (gamma, beta))
        return (((x - mean) / jax.numpy.sqrt(var + 1e-5) * gamma + beta) ** 3).sum()

    return jax, names, expected


def alike(got, expected):
    """Compare with gradients of JAX's own functions, which use float32 throughout."""
    for ours, theirs in zip(got, expected, strict=True):
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        scale = float(abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


def test_the_example_of_jax_differentiates(jax_example):
    jax, names, expected = jax_example
    x, (gamma, beta) = drawn(), parameters()
    arguments = tuple(map(jax.numpy.asarray, (x, gamma, beta)))
    y = jax.jit(names["batch_norm"])(*arguments)
    ref = nbnorm.batch_norm_forward(x, gamma, beta)
    assert_same_bits(np.asarray(y), ref.y, "y")
    grads = jax.jit(jax.grad(names["loss"], (0, 1, 2)))(*arguments)
    alike(grads, jax.grad(expected, (0, 1, 2))(*arguments))
    dy = jax.jit(lambda y: 3 * y**2)(y)
    want = nbnorm.batch_norm_backward(np.asarray(dy), x, gamma, ref.mean, ref.rstd)
    _, pulled = jax.vjp(names["batch_norm"], *arguments)
    for ours, theirs in zip(pulled(dy), want[:3], strict=True):
        assert_same_bits(np.asarray(ours), theirs)


def test_the_example_of_jax_under_vmap(jax_example):
    jax, names, expected = jax_example
    xs = jax.numpy.asarray(drawn(shape=(3, *SHAPE)))
    gamma, beta = map(jax.numpy.asarray, parameters())
    got, want = (
        jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(xs, gamma, beta)
        for loss in (names["loss"], expected)
    )
    alike(got, want)


def test_the_example_of_jax_has_one_derivative(jax_example):
    jax, names, _ = jax_example
    x, gamma, beta = map(jax.numpy.asarray, (drawn(), *parameters()))

    def slope(x):
        return jax.grad(names["loss"])(x, gamma, beta).sum()

    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(slope)(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(names["loss"], (x, gamma, beta), (x, gamma, beta))


@pytest.mark.parametrize("x", [[[1.0, 2.0]], ((1.0, 2.0),)], ids=["list", "tuple"])
def test_what_numpy_can_convert(x):
    with pytest.raises(TypeError, match=r"^x must be .*; np\.asarray\(x\) makes an array of it$"):
        nbnorm.batch_norm_forward(x)


def test_frames_of_other_libraries():
    class Frame:
        """Like pandas', xarray's and dask's: no DLPack, but convertible to NumPy."""

        def __array__(self, dtype=None, copy=None):
            return drawn()

    with pytest.raises(TypeError, match=r"Frame; np\.asarray\(gamma\) makes an array of it$"):
        nbnorm.batch_norm_forward(drawn(), Frame())


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_are_told_the_remedy(dtype):
    with pytest.raises(TypeError, match=rf"^x has dtype {dtype}.*x\.astype\(np\.float32\)"):
        nbnorm.batch_norm_forward(np.ones((4, 3), dtype))


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_integers_of_other_libraries(library, dtype):
    xp = pytest.importorskip(library)
    x = np.random.default_rng(0).integers(0, 100, (6, 5, 4), dtype)
    given = xp.from_dlpack(x)
    moments = nbnorm.batch_norm_stats(given, axis=-1)
    y = nbnorm.batch_norm_inference(given, None, None, moments.mean, moments.var(), axis=-1)
    assert type(y) is type(xp.zeros(1))
    expected = nbnorm.batch_norm_stats(x, axis=-1)
    assert_same_bits(moments.m2, expected.m2)
    y_ = nbnorm.batch_norm_inference(x, None, None, expected.mean, expected.var(), axis=-1)
    assert_same_bits(y, y_)


@pytest.mark.parametrize(
    ("library", "remedy"),
    [
        ("torch", r"; convert it with gamma\.float\(\)"),
        ("jax.numpy", r"; convert it with gamma\.astype\(np\.float32\)"),
        ("array_api_strict", ""),  # their arrays have no method for it
    ],
)
def test_integers_of_other_libraries_are_told_theirs(library, remedy):
    xp = pytest.importorskip(library)
    with pytest.raises(TypeError, match=rf"^gamma has dtype int32.* or bfloat16{remedy}$"):
        nbnorm.batch_norm_forward(drawn(), xp.ones(6, dtype=xp.int32))


@pytest.mark.parametrize("kind", ["numpy", "torch", "torch, conjugated"])
def test_complex_arrays_are_told_to_pass_their_parts(kind):
    x = np.ones((4, 3), "complex64")
    if kind != "numpy":
        x = pytest.importorskip("torch").from_numpy(x)
    if "conjugated" in kind:
        x = x.conj()
    with pytest.raises(
        TypeError, match=r"^x .*complex64.*; pass x\.real and x\.imag, separately or"
    ):
        nbnorm.batch_norm_forward(x)
    for part in (x.real, x.imag):
        nbnorm.batch_norm_forward(part)


def test_subclass_of_ndarray(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, drawn())
    x = np.load(path, mmap_mode="r")
    assert isinstance(x, np.memmap)
    got = nbnorm.batch_norm_forward(x)
    ref = nbnorm.batch_norm_forward(drawn())
    assert type(got.y) is np.ndarray
    assert_same_bits(got.y, ref.y, "y")
    with pytest.raises(ValueError, match=r"^out\b.*read-only"):
        nbnorm.batch_norm_forward(drawn(), out=x)


def test_masked_array():
    with pytest.raises(TypeError, match=r"^x is a masked array"):
        nbnorm.batch_norm_forward(np.ma.masked_less(drawn(), 0))


class Wrapped:
    """An object with only the DLPack protocol; results cannot be returned in its library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Sliceable(Wrapped):
    """Also has what population_stats needs; results are returned by NumPy's from_dlpack."""

    __module__ = "numpy"

    def __init__(self, array):
        super().__init__(array)
        self.shape = array.shape

    def __getitem__(self, index):
        return type(self)(self.array[index])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("named", [None, "<dtype: {}>", "lib.{}"])
def test_integers_of_objects_whose_dtype_has_another_name_or_none(dtype, named):
    x = np.random.default_rng(0).integers(0, 100, (7, 3)).astype(dtype)
    wrapped = Sliceable(x)
    if named:
        wrapped.dtype = type("Dtype", (), {"__str__": lambda self: named.format(dtype)})()
    for call in (
        nbnorm.batch_norm_stats,
        lambda x: nbnorm.batch_norm_inference(x, None, None, np.ones(3), np.ones(3)),
        lambda x: nbnorm.population_stats([x, x]),
    ):
        got, want = ((r,) if isinstance(r, np.ndarray) else r for r in (call(wrapped), call(x)))
        for ours, theirs in zip(got, want, strict=True):
            assert_same_bits(np.asarray(ours), np.asarray(theirs))
    if dtype != "float32":
        with pytest.raises(TypeError, match=f"^residual must be None if x has dtype {dtype}"):
            nbnorm.batch_norm_inference(
                wrapped, None, None, np.ones(3), np.ones(3), residual=np.ones((7, 3))
            )


def test_other_object_with_dlpack():
    gamma = parameters()[0]
    got = nbnorm.batch_norm_forward(drawn(), Wrapped(gamma))
    assert_same_bits(got.y, nbnorm.batch_norm_forward(drawn(), gamma).y, "y")
