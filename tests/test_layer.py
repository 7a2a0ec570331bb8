"""The layer: state around the functions, in the style of PyTorch's."""

import itertools
import weakref

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import nbnorm
from nbnorm import BatchNorm, reference

SHAPE = (4, 3, 5, 2)
# Layers are compared in float64, on values near 1 and sums of 40 of them.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def draw(seed, shape=SHAPE, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer_of(num_features=3, **options):
    """Return a float64 layer with parameters other than 1 and 0."""
    layer = BatchNorm(num_features, **({"dtype": np.float64} | options))
    for seed, parameter in enumerate(layer.parameters.values()):
        parameter[...] = draw(100 + seed, parameter.shape)
    return layer


def snapshot(layer):
    """Return everything that a failed call must not change."""
    return layer.state_dict() | {f"grad of {name}": g.copy() for name, g in layer.grads.items()}


def assert_same_state(layer, before):
    after = snapshot(layer)
    assert list(after) == list(before)
    for name, array in after.items():
        assert_array_equal(array, before[name], err_msg=name)


def torch_twin(layer, torch):
    """Return PyTorch's layer with the same options and state."""
    twin = torch.nn.BatchNorm2d(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
        dtype=torch.float64,
    )
    twin.load_state_dict({name: torch.as_tensor(a) for name, a in layer.state_dict().items()})
    return twin


@pytest.mark.parametrize("axis", [1, -1, (1, 2, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_layer_agrees_with_the_oracle(axis, activation, with_residual, training):
    x, dy, residual = draw(1), draw(2), draw(3) if with_residual else None
    num_features = SHAPE[1:] if isinstance(axis, tuple) else SHAPE[axis]
    layer = layer_of(num_features, axis=axis, activation=activation)
    layer.running_mean[...] = draw(4, layer.running_mean.shape)
    gamma, beta = layer.parameters["weight"], layer.parameters["bias"]
    running = layer.running_mean.copy(), layer.running_var.copy()
    options = {"axis": axis, "activation": activation}

    ref = reference.batch_norm_forward(
        x, gamma, beta, *running, training=training, residual=residual, **options
    )
    ref_back = reference.batch_norm_backward(
        dy,
        x,
        gamma,
        ref.mean,
        ref.rstd,
        beta=beta,
        y=ref.y if with_residual else None,
        training=training,
        **options,
    )
    comp = (layer.train() if training else layer.eval()).forward(x, residual)
    comp_back = layer.backward(dy)

    np.testing.assert_allclose(comp, ref.y.astype(float), **TOLERANCE)
    dx, *rest = comp_back if with_residual else (comp_back,)
    np.testing.assert_allclose(dx, ref_back.dx.astype(float), **TOLERANCE)
    np.testing.assert_allclose(layer.grads["weight"], ref_back.dgamma.astype(float), **TOLERANCE)
    np.testing.assert_allclose(layer.grads["bias"], ref_back.dbeta.astype(float), **TOLERANCE)
    for dresidual in rest:
        np.testing.assert_allclose(dresidual, ref_back.dresidual.astype(float), **TOLERANCE)


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_layer_agrees_with_torch(momentum, affine, track_running_stats):
    torch = pytest.importorskip("torch")
    layer = layer_of(momentum=momentum, affine=affine, track_running_stats=track_running_stats)
    twin = torch_twin(layer, torch)
    # Training, an evaluation, more training, evaluation.
    for step, mode in enumerate(("train", "train", "eval", "train", "eval")):
        getattr(layer, mode)()
        getattr(twin, mode)()
        x, dy = draw(step), draw(10 + step)
        theirs = torch.from_numpy(x.copy()).requires_grad_()
        ref = twin(theirs)
        twin.zero_grad()
        ref.backward(torch.from_numpy(dy))

        comp = layer.forward(x)
        dx = layer.backward(dy)

        np.testing.assert_allclose(comp, ref.detach().numpy(), **TOLERANCE)
        np.testing.assert_allclose(dx, theirs.grad.numpy(), **TOLERANCE)
        for name, parameter in twin.named_parameters():
            np.testing.assert_allclose(layer.grads[name], parameter.grad.numpy(), **TOLERANCE)
        ref_state, state = twin.state_dict(), layer.state_dict()
        assert list(state) == list(ref_state)
        for name, array in state.items():
            np.testing.assert_allclose(array, ref_state[name].numpy(), **TOLERANCE)


def test_momentum_none_is_algorithm_2():
    layer = BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [draw(seed) * (seed + 1) + seed for seed in range(5)]
    for batch in batches:
        layer.forward(batch)
    m = batches[0].size / 3
    ref_mean = np.mean([batch.mean(axis=(0, 2, 3)) for batch in batches], axis=0)
    ref_var = m / (m - 1) * np.mean([batch.var(axis=(0, 2, 3)) for batch in batches], axis=0)
    np.testing.assert_allclose(layer.running_mean, ref_mean, **TOLERANCE)
    np.testing.assert_allclose(layer.running_var, ref_var, **TOLERANCE)
    assert layer.num_batches_tracked == 5
    x = draw(9)
    scale, shift = nbnorm.fold_batch_norm(None, None, ref_mean, ref_var)
    ref = x * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(layer.eval().forward(x), ref, **TOLERANCE)


def test_merged_moments_give_exact_population_statistics():
    chunks = [draw(seed, (rows, 3)) * (seed + 1) + 10 * seed for seed, rows in enumerate((9, 4, 1))]
    everything = np.concatenate(chunks)
    first, *rest = map(nbnorm.batch_norm_stats, chunks)
    for correction in (0, 1):
        layer = BatchNorm(3, correction=correction, dtype=np.float64)
        layer.running_mean[0] = layer.running_var[1] = np.nan  # must not survive
        mean, var = layer.running_mean, layer.running_var
        layer.set_statistics(first.merge(*rest))
        assert layer.running_mean is mean
        assert layer.running_var is var
        np.testing.assert_allclose(mean, everything.mean(axis=0), **TOLERANCE)
        np.testing.assert_allclose(var, everything.var(axis=0, ddof=correction), **TOLERANCE)
        assert layer.num_batches_tracked == 0


def test_statistics_that_do_not_fit_are_refused():
    layer = layer_of()
    before = snapshot(layer)
    for moments, error, match in (
        (nbnorm.batch_norm_stats(draw(1, (5, 4))), ValueError, r"shape \(3,\), expected \(4,\)"),
        (nbnorm.batch_norm_stats(draw(1, (1, 3))), ValueError, "more than 1 value per channel"),
        (nbnorm.batch_norm_stats(draw(1, (0, 3))), ValueError, r"^moments\.count is 0"),
        (nbnorm.Moments(4, np.zeros(3), np.ones(3, int)), TypeError, "m2 has dtype int64"),
    ):
        with pytest.raises(error, match=match):
            layer.set_statistics(moments)
        assert_same_state(layer, before)
    with pytest.raises(ValueError, match="keeps no running statistics"):
        BatchNorm(3, track_running_stats=False).set_statistics(nbnorm.batch_norm_stats(draw(1)))


def test_evaluation_changes_nothing_and_its_statistics_are_constants():
    layer = layer_of()
    layer.forward(draw(1))
    before = snapshot(layer)
    dy = draw(3)
    layer.eval().forward(draw(2))
    assert_same_state(layer, before)
    dx = layer.backward(dy)
    factor = layer.parameters["weight"] / np.sqrt(layer.running_var + layer.eps)
    np.testing.assert_allclose(dx, dy * factor[:, None, None], **TOLERANCE)


def test_backward_after_evaluation_uses_the_statistics_of_its_forward():
    layer = layer_of(activation="relu").eval()
    dy = draw(3)
    layer.forward(draw(2))
    ref, ref_grads = layer.backward(dy), dict(layer.grads)
    layer.set_statistics(nbnorm.batch_norm_stats(10 * draw(4) + 1))
    assert_array_equal(layer.backward(dy), ref)
    for name, grad in layer.grads.items():
        assert_array_equal(grad, ref_grads[name])


def test_without_running_statistics_evaluation_uses_the_batch():
    layer = layer_of(track_running_stats=False)
    x, dy = draw(1), draw(2)
    ref, ref_dx = layer.forward(x), layer.backward(dy)
    assert_array_equal(layer.eval().forward(x), ref)
    assert_array_equal(layer.backward(dy), ref_dx)
    assert layer.running_mean is None
    assert layer.running_var is None
    assert layer.num_batches_tracked == 0


def test_without_parameters_there_are_no_gradients_of_them():
    layer = BatchNorm(3, affine=False, dtype=np.float64)
    ones = BatchNorm(3, dtype=np.float64)
    x, dy = draw(1), draw(2)
    np.testing.assert_allclose(layer.forward(x), ones.forward(x), **TOLERANCE)
    np.testing.assert_allclose(layer.backward(dy), ones.backward(dy), **TOLERANCE)
    assert layer.parameters == layer.grads == {}


def test_gradients_are_those_of_the_last_backward():
    layer = layer_of()
    assert_array_equal(layer.grads["weight"], np.zeros(3))
    assert_array_equal(layer.grads["bias"], np.zeros(3))
    layer.forward(draw(1))
    layer.backward(draw(2))
    first = layer.grads["bias"]
    kept = first.copy()
    layer.backward(draw(3))
    np.testing.assert_allclose(layer.grads["bias"], draw(3).sum(axis=(0, 2, 3)), **TOLERANCE)
    assert_array_equal(first, kept)


def test_residual_without_activation_has_the_gradient_itself():
    layer, plain = layer_of(), layer_of()
    x, dy, residual = draw(1), draw(2), draw(3)
    y = layer.forward(x, residual)
    np.testing.assert_allclose(y, plain.forward(x) + residual, **TOLERANCE)
    dx, dresidual = layer.backward(dy)
    assert dresidual is dy
    assert_array_equal(dx, plain.backward(dy))


def test_residual_before_relu_has_the_masked_gradient():
    layer, plain = layer_of(activation="relu"), layer_of()
    x, dy, residual = draw(1), draw(2), draw(3)
    y = layer.forward(x, residual)
    z = plain.forward(x) + residual
    np.testing.assert_allclose(y, np.maximum(z, 0), **TOLERANCE)
    dx, dresidual = layer.backward(dy)
    assert_array_equal(dresidual, np.where(y > 0, dy, 0))
    np.testing.assert_allclose(dx, plain.backward(np.where(z > 0, dy, 0)), **TOLERANCE)
    layer.forward(x)  # without a residual there is only one gradient
    assert isinstance(layer.backward(dy), np.ndarray)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_keeps_references_and_y_only_where_it_needs_it(activation, with_residual):
    layer = layer_of(activation=activation)
    x, residual = draw(1), draw(3) if with_residual else None
    alive = {
        "x": weakref.ref(x),
        "y": weakref.ref(layer.forward(x, residual)),
        "residual": weakref.ref(residual) if with_residual else lambda: None,
    }
    del x, residual
    assert alive["x"]() is not None
    assert alive["residual"]() is None
    assert (alive["y"]() is not None) == (with_residual and activation == "relu")
    layer.forward(draw(2))
    assert alive["x"]() is None
    assert alive["y"]() is None


def test_backward_before_forward_is_refused():
    with pytest.raises(RuntimeError, match="backward called before forward"):
        BatchNorm(3).backward(draw(1))


def test_a_refused_call_changes_nothing():
    layer = layer_of()
    x, dy = draw(1), draw(2)
    layer.forward(x)
    dx = layer.backward(dy)
    before = snapshot(layer)
    for bad, error in (
        (draw(1, (4, 2, 5)), ValueError),
        (draw(1, (1, 3)), ValueError),  # one value per channel has no unbiased variance
        (x.astype(int), TypeError),
        (x.tolist(), TypeError),
    ):
        with pytest.raises(error):
            layer.forward(bad)
        assert_same_state(layer, before)
    for bad, error in ((dy[:2], ValueError), (dy.astype(np.float32), TypeError)):
        with pytest.raises(error):
            layer.backward(bad)
        assert_same_state(layer, before)
    assert_array_equal(layer.backward(dy), dx)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_is_not_counted(momentum):
    layer = layer_of(momentum=momentum)
    layer.forward(draw(1))
    before = snapshot(layer)
    y = layer.forward(draw(2, (0, 3, 5, 2)))
    assert y.shape == (0, 3, 5, 2)
    assert_same_state(layer, before)
    assert layer.backward(y).shape == y.shape
    assert_array_equal(layer.grads["bias"], np.zeros(3))


def test_one_value_per_channel_is_enough_without_correction():
    layer = layer_of(correction=0)
    y = layer.forward(draw(1, (1, 3)))
    assert_array_equal(y, layer.parameters["bias"][None])
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, "f4"])
def test_parameters_and_statistics_have_the_dtype_of_the_layer(dtype):
    layer = BatchNorm(3, dtype=dtype)
    y = layer.forward(draw(1, dtype=np.float32))
    layer.backward(y)
    for array in (*layer.parameters.values(), layer.running_mean, layer.running_var):
        assert array.dtype == np.dtype(dtype)
        assert array.shape == (3,)
    for grad in layer.grads.values():
        assert grad.dtype == np.dtype(dtype)
    assert y.dtype == np.float32


@pytest.mark.parametrize("dtype", [int, bool, complex, object, np.longdouble])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"dtype is \w+, expected one of float32"):
        BatchNorm(3, dtype=dtype)


def test_num_features_must_fit_the_axes():
    for num_features, axis in (((3, 5), 1), (3, (1, 2)), ((3, 5, 2), (1, 2))):
        with pytest.raises(ValueError, match=r"num_features is .*, expected \d for axis"):
            BatchNorm(num_features, axis=axis)
    for num_features, axis in ((-1, 1), ((3, -1), (1, 2))):
        with pytest.raises(ValueError, match="num_features must not be negative"):
            BatchNorm(num_features, axis=axis)
    with pytest.raises(TypeError):
        BatchNorm(3.0)
    assert BatchNorm((3,), axis=(1,)).running_mean.shape == (3,)
    assert BatchNorm(0).running_mean.shape == (0,)


def test_train_and_eval_return_the_layer():
    layer = BatchNorm(3)
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training


def test_repr_tells_all_options():
    assert repr(BatchNorm(3)) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
        "correction=1, axis=1, activation=None, dtype=float32, training=True)"
    )
    assert repr(BatchNorm((3, 5), axis=(1, 2), activation="relu", momentum=None).eval()) == (
        "BatchNorm((3, 5), eps=1e-05, momentum=None, affine=True, track_running_stats=True, "
        "correction=1, axis=(1, 2), activation='relu', dtype=float32, training=False)"
    )


def test_a_layer_is_called_as_its_forward():
    layer, ref = layer_of(activation="relu"), layer_of(activation="relu")
    x, residual = draw(1), draw(2)
    assert_array_equal(layer(x), ref.forward(x))
    assert_array_equal(layer(x, residual), ref.forward(x, residual))
    assert_array_equal(layer(x, residual=residual), ref.forward(x, residual=residual))
    assert_same_state(layer, snapshot(ref))
    with nbnorm.recalibrate(layer, ref):  # here forward collects moments
        assert_array_equal(layer(x + 1), ref.forward(x + 1))
    assert_same_state(layer, snapshot(ref))


def test_forward_leaves_x_alone_which_backward_needs():
    layer, x, residual = layer_of(activation="relu"), draw(1), draw(2)
    layer(x, residual)
    layer.backward(draw(3))
    assert_array_equal(x, draw(1))
    assert_array_equal(residual, draw(2))


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("view", [False, True])
def test_running_statistics_that_are_a_parameter_are_refused(statistic, parameter, view):
    layer, state = layer_of(), layer_of().state_dict()
    shared = layer.parameters[parameter]
    setattr(layer, statistic, shared[:] if view else shared)
    before, x = snapshot(layer), draw(1)
    gamma = {"weight": "gamma", "bias": "beta"}[parameter]
    with pytest.raises(ValueError, match=f"^{statistic} and {gamma} share memory"):
        layer(x)
    for write in (
        lambda: layer.load_state_dict(state),
        lambda: layer.set_statistics(nbnorm.batch_norm_stats(x)),
    ):
        with pytest.raises(ValueError, match=f"^{statistic} and {parameter} share memory"):
            write()
    assert_same_state(layer, before)
    layer.eval()(x)  # nothing is written


def test_state_of_the_own_arrays_in_another_order():
    layer = layer_of()
    layer(draw(1))
    before = layer.state_dict()
    swapped = {"weight": layer.running_var, "running_var": layer.parameters["weight"]}
    layer.load_state_dict(before | swapped)
    assert_array_equal(layer.parameters["weight"], before["running_var"])
    assert_array_equal(layer.running_var, before["weight"])


def test_state_with_arrays_in_common_comes_apart():
    """Exporters merge equal arrays; the layer's arrays must still be separate."""
    shared, layer = np.full(3, 2.0), layer_of()
    names = ("weight", "bias", "running_mean", "running_var")
    layer.load_state_dict(dict.fromkeys(names, shared) | {"num_batches_tracked": 0})
    layer(draw(1))
    assert_array_equal(layer.parameters["weight"], shared)


# state_dict and load_state_dict


def test_state_is_copied_in_and_out():
    layer, other = layer_of(), layer_of()
    layer.forward(draw(1))
    own = [*layer.parameters.values(), layer.running_mean, layer.running_var]
    state = layer.state_dict()
    assert not any(np.shares_memory(a, b) for a, b in itertools.product(state.values(), own))
    targets = [*other.parameters.values(), other.running_mean, other.running_var]
    other.load_state_dict(state)
    # The layer's arrays stay the same objects, so that an optimizer's references remain valid.
    for array, target in zip(
        (*other.parameters.values(), other.running_mean, other.running_var), targets, strict=True
    ):
        assert array is target
        assert not any(np.shares_memory(array, value) for value in state.values())
    assert_same_state(other, snapshot(other) | layer.state_dict())
    assert other.num_batches_tracked == 1


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_state_goes_to_torch_and_back(affine, track_running_stats):
    torch = pytest.importorskip("torch")
    options = {"affine": affine, "track_running_stats": track_running_stats}
    layer = layer_of(**options, dtype=np.float32)
    layer.forward(draw(1))
    twin = torch.nn.BatchNorm2d(3, **options)
    assert list(layer.state_dict()) == list(twin.state_dict())
    twin.load_state_dict({name: torch.as_tensor(a) for name, a in layer.state_dict().items()})
    for name, array in layer.state_dict().items():
        theirs = twin.state_dict()[name].numpy()
        assert theirs.dtype == array.dtype
        assert_array_equal(theirs, array)
    twin(torch.from_numpy(draw(2, dtype=np.float32)))
    back = BatchNorm(3, **options)
    back.load_state_dict(twin.state_dict())
    for name, array in back.state_dict().items():
        assert_array_equal(array, twin.state_dict()[name].numpy())
    assert back.num_batches_tracked == (2 if track_running_stats else 0)


def test_state_of_bfloat16_goes_to_torch():
    torch = pytest.importorskip("torch")
    layer, twin = BatchNorm(3, dtype=ml_dtypes.bfloat16), torch.nn.BatchNorm2d(3).bfloat16()
    layer.running_mean[...] = [0.1, 1e30, -3.0]
    state = {name: torch.as_tensor(a.astype("f8")) for name, a in layer.state_dict().items()}
    twin.load_state_dict(state)
    assert_array_equal(twin.running_mean.float(), layer.running_mean.astype("f4"))


def test_state_is_rounded_to_the_dtype_of_the_layer():
    state = layer_of().state_dict()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        layer = BatchNorm(3, dtype=dtype)
        layer.load_state_dict(state)
        for name, array in layer.parameters.items():
            assert array.dtype == dtype
            assert_array_equal(array, state[name].astype(dtype))


def test_state_that_does_not_fit_is_refused():
    layer, state = layer_of(), layer_of().state_dict()
    state = {name: array + 1 for name, array in state.items()}
    before = snapshot(layer)
    without_var = {name: array for name, array in state.items() if name != "running_var"}
    for bad, error, match in (
        (without_var, ValueError, r"missing keys \['running_var'\] and unexpected keys \[\]"),
        (state | {"gamma": 1}, ValueError, r"missing keys \[\] and unexpected keys \['gamma'\]"),
        (
            state | {"running_var": np.ones(4)},
            ValueError,
            r"running_var has shape \(4,\), expected \(3,\)",
        ),
        (state | {"bias": np.ones(())}, ValueError, r"bias has shape \(\), expected \(3,\)"),
        (state | {"running_mean": np.ones(3, int)}, TypeError, "running_mean has dtype int64"),
        (state | {"running_var": [1.0, 1.0, 1.0]}, TypeError, "running_var must be a NumPy array"),
        (state | {"num_batches_tracked": 1.5}, TypeError, "num_batches_tracked must be an integer"),
        (
            state | {"num_batches_tracked": np.array(-1)},
            ValueError,
            "num_batches_tracked must not be negative, got -1",
        ),
    ):
        with pytest.raises(error, match=match):
            layer.load_state_dict(bad)
        assert_same_state(layer, before)


@pytest.mark.parametrize("absent", ["affine", "track_running_stats"])
def test_state_of_a_layer_with_other_options_is_refused(absent):
    less = BatchNorm(3, **{absent: False})
    with pytest.raises(ValueError, match="unexpected keys"):
        less.load_state_dict(BatchNorm(3).state_dict())
    with pytest.raises(ValueError, match="missing keys"):
        BatchNorm(3).load_state_dict(less.state_dict())


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_arrays_of_other_libraries_go_through_the_layer(library):
    xp = pytest.importorskip(library)
    ours, theirs = layer_of(dtype=np.float32), layer_of(dtype=np.float32)
    x, dy, residual = (draw(seed, dtype=np.float32) for seed in (1, 2, 3))
    ref, ref_dx = ours.forward(x, residual), ours.backward(dy)[0]
    comp = theirs.forward(xp.asarray(x), xp.asarray(residual))
    dx, _ = theirs.backward(xp.asarray(dy))
    assert type(comp) is type(dx) is type(xp.asarray(x))
    assert_array_equal(np.from_dlpack(comp), ref)
    assert_array_equal(np.from_dlpack(dx), ref_dx)
    for name, grad in theirs.grads.items():
        assert_array_equal(np.from_dlpack(grad), ours.grads[name])
    assert_array_equal(theirs.running_var, ours.running_var)


def test_parameters_of_non_native_byte_order():
    with pytest.raises(TypeError, match=r"^dtype is >f4"):
        nbnorm.BatchNorm(3, dtype=">f4")
