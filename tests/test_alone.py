"""gamma without beta and beta without gamma: the layer, and conversion to other frameworks."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tolerances import assert_same_bits, assert_within, stored, sums_tolerance

import nbnorm
from nbnorm import BatchNorm, conventions, reference
from nbnorm.distributed import SelfComm, SyncBatchNorm

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

ALONE = {"gamma": ("weight", 1.5), "beta": ("bias", -0.5)}
alone = pytest.mark.parametrize("affine", ALONE)
SHAPE = (6, 3, 5)


def draw(seed, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)


def layer_of(affine, cls=BatchNorm, **options):
    """Return a layer with its one parameter set, and both parameters as the functions take them."""
    layer = cls(3, affine=affine, **{"dtype": np.float64} | options)
    name, value = ALONE[affine]
    layer.parameters[name][...] = value
    given = {"gamma": layer.parameters.get("weight"), "beta": layer.parameters.get("bias")}
    return layer, given


@alone
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_the_oracle(affine, activation, added, training):
    layer, given = layer_of(affine, activation=activation)
    layer.training = training
    x, dy, residual = draw(1), draw(2), draw(3) if added else None
    running = (np.zeros(3), np.ones(3))
    ref = reference.batch_norm_forward(
        x, **given, running_mean=running[0], running_var=running[1], training=training,
        activation=activation, residual=residual,
    )  # fmt: skip
    y = layer.forward(x, residual)
    assert_allclose(y, ref.y.astype(float), rtol=1e-13, atol=1e-13)
    expected = reference.batch_norm_backward(
        dy, x, given["gamma"], ref.mean, ref.rstd, beta=given["beta"], y=ref.y if added else None,
        training=training, activation=activation,
    )  # fmt: skip
    dx = layer.backward(dy)
    dx = dx[0] if added else dx
    assert_allclose(dx, expected.dx.astype(float), rtol=1e-12, atol=1e-13)
    (name, gradient), *others = layer.grads.items()
    assert name == ALONE[affine][0]
    assert not others
    wanted = expected.dgamma if affine == "gamma" else expected.dbeta
    assert_allclose(gradient, wanted.astype(float), rtol=1e-12, atol=1e-13)


@alone
@pytest.mark.parametrize("renorm", [None, nbnorm.Renorm(1.1, 0.1)])
def test_the_gradient_is_that_of_both(affine, renorm):
    layer, _ = layer_of(affine, renorm=renorm)
    both = BatchNorm(3, renorm=renorm, dtype=np.float64)
    name, _ = ALONE[affine]
    both.parameters[name][...] = layer.parameters[name]
    x, dy = draw(1), draw(2)
    assert_array_equal(layer.forward(x), both.forward(x))
    assert_array_equal(layer.backward(dy), both.backward(dy))
    assert_array_equal(layer.grads[name], both.grads[name])


@alone
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_the_gradient_has_the_parameters_dtype_and_digits(affine, dtype):
    """Sums of a half-precision dy exceed float16's 65504: they are rounded once, to float32."""
    layer, _ = layer_of(affine, dtype="float32")
    x, dy = draw(1, dtype), np.full(SHAPE, 30000.0).astype(dtype)
    dy[0] = x[0] * 30000
    layer.forward(x)
    layer.backward(dy)
    name = ALONE[affine][0]
    assert layer.grads[name].dtype == np.float32
    assert layer.grads[name].shape == (3,)
    saved = layer._saved
    of_sum, of_xhat = sums_tolerance(dy, x, saved.mean, saved.rstd, axis=1)
    ref = reference.batch_norm_backward(dy, x, None, saved.mean, saved.rstd)
    expected, error = (ref.dgamma, of_xhat) if affine == "gamma" else (ref.dbeta, of_sum)
    assert_within(layer.grads[name], expected, stored(error, expected, np.float32), name)
    if affine == "beta":
        assert np.abs(expected).min() > 65504


@alone
def test_state_copies_and_repr(affine):
    layer, _ = layer_of(affine)
    layer.forward(draw(1))
    name, other = ALONE[affine][0], {"gamma": "bias", "beta": "weight"}[affine]
    state = layer.state_dict()
    assert list(state) == [name, "running_mean", "running_var", "num_batches_tracked"]
    loaded, _ = layer_of(affine)
    loaded.parameters[name][...] = 9
    loaded.load_state_dict(state)
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(twin.eval().forward(draw(2)), copy.deepcopy(layer).eval().forward(draw(2)))
    with pytest.raises(ValueError, match=rf"unexpected keys \['{other}'\]"):
        layer.load_state_dict(state | {other: state[name]})
    assert f"affine='{affine}', " in repr(layer)


@alone
def test_over_ranks(affine):
    layer, _ = layer_of(affine)
    ranks, _ = layer_of(
        affine, lambda *args, **options: SyncBatchNorm(*args, comm=SelfComm(), **options)
    )
    x, dy = draw(1), draw(2)
    assert_array_equal(ranks.forward(x), layer.forward(x))
    assert_array_equal(ranks.backward(dy), layer.backward(dy))
    name = ALONE[affine][0]
    assert_array_equal(ranks.grads[name], layer.grads[name])
    assert list(ranks.grads) == [name]


@pytest.mark.parametrize("bad", [None, "weight", "both", 2, (), ["gamma"], ("gamma", "beta"), {}])
def test_other_values_of_affine_are_refused(bad):
    with pytest.raises(ValueError, match="affine must be a bool, 'gamma' or 'beta', got"):
        BatchNorm(3, affine=bad)


def test_booleans_of_numpy_are_booleans():
    assert list(BatchNorm(3, affine=np.True_).parameters) == ["weight", "bias"]
    assert BatchNorm(3, affine=np.False_).parameters == {}


@alone
def test_folding(affine):
    layer, given = layer_of(affine)
    layer.forward(draw(1))
    scale, shift = nbnorm.fold_batch_norm(
        *given.values(), layer.running_mean, layer.running_var, eps=layer.eps
    )
    x = draw(2)
    assert_allclose(
        layer.eval().forward(x), x * scale[:, None] + shift[:, None], rtol=1e-12, atol=1e-12
    )


SWITCHES = {
    "torch": {"gamma": {"affine": True, "bias": False}, "beta": {"affine": True, "bias": True}},
    "keras": {"gamma": {"scale": True, "center": False}, "beta": {"scale": False, "center": True}},
    "flax": {
        "gamma": {"use_scale": True, "use_bias": False},
        "beta": {"use_scale": False, "use_bias": True},
    },
    "caffe": {"gamma": {"scale": True, "bias_term": False}, "beta": {"scale": True}},
    "chainer": {
        "gamma": {"use_gamma": True, "use_beta": False},
        "beta": {"use_gamma": False, "use_beta": True},
    },
    "onnx": {"gamma": {}, "beta": {}},
    "mxnet": {"gamma": {"fix_gamma": False}, "beta": {"fix_gamma": True}},
    "gluon": {"gamma": {"scale": True}, "beta": {"scale": False}},
}


@alone
@pytest.mark.parametrize("framework", conventions.CONVENTIONS)
def test_frameworks_get_it_and_give_it_back(framework, affine):
    layer, _ = layer_of(affine, axis=1)
    layer.forward(draw(1))
    arrays, options = conventions.dump(framework, layer)
    assert options.items() >= SWITCHES[framework][affine].items()
    axis = {} if "axis" in options else {"axis": 1}
    back = conventions.load(framework, arrays, **axis, **options)
    kept = framework in ("keras", "flax", "chainer") or (
        affine == "gamma" and framework in ("torch", "caffe")
    )  # the others also store the missing parameter, as 1 or 0
    assert back.affine == (affine if kept else True)
    assert_allclose(
        back.eval().forward(draw(2)), layer.eval().forward(draw(2)), rtol=1e-6, atol=1e-6
    )
    for name, value in {"weight": 1, "bias": 0}.items():
        if name not in layer.parameters and name in back.parameters:
            assert_array_equal(back.parameters[name], np.full(3, value))


# Hosts


def with_host(name, differentiate, affine, dtype="float32", of="float32"):
    """Compare a host's y and gradients with the functions'."""
    pytest.importorskip(name)
    x, dy = draw(1, dtype), draw(2, dtype)
    parameter = np.array([0.5, -2.0, 3.0], of)
    y, gradients = differentiate(x, dy, affine, parameter)
    given = {affine: parameter}
    ref = nbnorm.batch_norm_forward(x, **given)
    assert_array_equal(y, ref.y)
    both = {"gamma": np.ones(3, of), "beta": np.zeros(3, of)} | given
    expected = nbnorm.batch_norm_backward(
        dy, x, both["gamma"], ref.mean, ref.rstd, beta=both["beta"]
    )
    dx, gradient = gradients
    assert_array_equal(dx, expected.dx)
    assert gradient.dtype == parameter.dtype
    assert_array_equal(gradient, expected.dgamma if affine == "gamma" else expected.dbeta)


def with_torch(x, dy, affine, parameter):
    import torch

    from nbnorm.integrations.torch import batch_norm

    x, parameter = (torch.from_numpy(a).requires_grad_() for a in (x, parameter))
    name = {"gamma": "weight", "beta": "bias"}[affine]
    y = batch_norm(x, None, None, training=True, **{name: parameter})
    y.backward(torch.from_numpy(dy))
    return y.detach().numpy(), (x.grad.numpy(), parameter.grad.numpy())


def with_autograd(x, dy, affine, parameter):
    from autograd import make_vjp

    from nbnorm.integrations.autograd import batch_norm

    vjp, y = make_vjp(lambda args: batch_norm(args[0], **{affine: args[1]}))((x, parameter))
    return y, vjp(dy)


def with_mygrad(x, dy, affine, parameter):
    import mygrad

    from nbnorm.integrations.mygrad import batch_norm

    x, parameter = mygrad.tensor(x), mygrad.tensor(parameter)
    y = batch_norm(x, **{affine: parameter})
    y.backward(dy)
    return y.data, (x.grad, parameter.grad)


HOSTS = {"torch": with_torch, "autograd": with_autograd, "mygrad": with_mygrad}


@alone
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("host", HOSTS)
def test_in_hosts(host, dtype, affine):
    with_host(host, HOSTS[host], affine, dtype)


@pytest.mark.parametrize("affine", [True, False, "gamma", "beta"])
def test_in_thinc(affine, tmp_path):
    pytest.importorskip("thinc")
    from nbnorm.integrations.thinc import BatchNorm as Layer

    x, dy = draw(1, "f").reshape(-1, 3), draw(2, "f").reshape(-1, 3)
    model = Layer(affine=affine).initialize(x)
    ours = BatchNorm(3, affine=affine, axis=-1)
    names = {"weight": "G", "bias": "b"}
    assert set(model.param_names) == {"running_mean", "running_var"} | {
        names[name] for name in ours.parameters
    }
    for name, array in ours.parameters.items():
        array[...] = [0.5, -2.0, 3.0]
        model.set_param(names[name], array.copy())
    y, backprop = model.begin_update(x)
    assert_array_equal(y, ours.forward(x))
    assert_array_equal(backprop(dy), ours.backward(dy))
    for name, gradient in ours.grads.items():
        assert_array_equal(model.get_grad(names[name]), gradient)
    assert set(model.grad_names) == {names[name] for name in ours.grads}
    again = Layer(affine=affine).initialize(x).from_bytes(model.to_bytes())
    assert_array_equal(again.predict(x), model.predict(x))


def test_thinc_refuses_other_values():
    pytest.importorskip("thinc")
    from nbnorm.integrations.thinc import BatchNorm as Layer

    with pytest.raises(ValueError, match="affine must be a bool, 'gamma' or 'beta', got 'G'"):
        Layer(affine="G")


@alone
def test_modules_of_torch(affine):
    torch = pytest.importorskip("torch")
    from nbnorm.integrations.torch import BatchNorm1d

    module = BatchNorm1d(3)
    setattr(module, {"gamma": "bias", "beta": "weight"}[affine], None)
    layer = BatchNorm(3, affine=affine)
    x = draw(1, "f")
    assert_array_equal(module(torch.from_numpy(x)).detach().numpy(), layer.forward(x))
    assert list(module.state_dict()) == list(layer.state_dict())
