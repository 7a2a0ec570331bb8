"""nbnorm.integrations.thinc against the oracle, and in thinc's own machinery."""

import doctest
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from numpy.testing import assert_allclose, assert_array_equal
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

pytest.importorskip("thinc", reason="the integration of thinc needs thinc")

from thinc.api import (
    SGD,
    Adam,
    Config,
    Linear,
    Model,
    Ragged,
    Relu,
    chain,
    data_validation,
    fix_random_seed,
    registry,
    residual,
    with_array,
)

import nbnorm
import nbnorm.integrations.thinc as integration
from nbnorm import reference
from nbnorm.integrations.thinc import BatchNorm

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.hosts import thinc as benchmark  # noqa: E402

EXAMPLE = ROOT / "docs" / "examples" / "thinc_mlp.py"
LEAKY = nbnorm.activation("leaky_relu", slope=0.2)
PARAMETERS = ("G", "b", "running_mean", "running_var")
SHAPES = [((6, 3), -1), ((4, 5, 3), -1), ((2, 4, 5, 3), -1), ((4, 3, 5), 1), ((4, 3, 2, 5), 1)]
shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)


def drawn(seed, shape=(6, 3), dtype="f"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer_of(nO=3, dtype="f", **options):
    """Return a layer whose parameters and statistics differ from the initial ones."""
    layer = BatchNorm(nO, **options).initialize()
    rng = np.random.default_rng(9)
    for name in PARAMETERS:
        layer.set_param(name, rng.uniform(0.5, 1.5, nO).astype(dtype))
    return layer


def state(layer):
    return {name: layer.get_param(name).copy() for name in PARAMETERS}


# Values and gradients


@pytest.mark.parametrize("activation", ["silu", "leaky_relu", LEAKY], ids=str)
@pytest.mark.parametrize("is_train", [True, False])
def test_other_activations(is_train, activation):
    layer = layer_of(dtype="d", eps=1e-3, activation=activation)
    X, dY = drawn(0, dtype="d"), drawn(1, dtype="d")
    G, b, mean, var = state(layer).values()
    options = {"axis": -1, "activation": activation}
    ref = reference.batch_norm_forward(X, G, b, mean, var, training=is_train, eps=1e-3, **options)
    back = reference.batch_norm_backward(
        dY, X, G, ref.mean, ref.rstd, beta=b, training=is_train, **options
    )
    Y, backprop = layer(X, is_train=is_train)
    assert_allclose(Y, ref.y, rtol=1e-11, atol=1e-11)
    assert_allclose(backprop(dY), back.dx, rtol=1e-11, atol=1e-11)
    assert_allclose(layer.get_grad("G"), back.dgamma, rtol=1e-11, atol=1e-11)
    assert_allclose(layer.get_grad("b"), back.dbeta, rtol=1e-11, atol=1e-11)
    same = BatchNorm(3, eps=1e-3, activation=activation).from_bytes(layer.to_bytes())
    assert_same_bits(same.predict(X), layer.predict(X))


@shapes
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("dtype", ["f", "d", "e"])
def test_layer_agrees_with_the_oracle(dtype, is_train, activation, shape, axis):
    options = {"axis": axis, "activation": activation}
    layer = layer_of(eps=1e-3, momentum=0.3, **options)
    X, dY = drawn(0, shape, dtype), drawn(1, shape, dtype)
    G, b, mean, var = state(layer).values()
    running = mean.copy(), var.copy()
    ref = reference.batch_norm_forward(
        X, G, b, *running, training=is_train, eps=1e-3, momentum=0.3, **options
    )
    statistics = ref.mean, ref.rstd
    ref_back = reference.batch_norm_backward(
        dY, X, G, *statistics, beta=b, training=is_train, **options
    )
    masked = dY if activation is None else np.where(ref.y > 0, dY, 0).astype(dtype)

    Y, backprop = layer(X, is_train=is_train)
    dX = backprop(dY)

    assert Y.dtype == dX.dtype == X.dtype
    assert_within(Y, ref.y, y_tolerance(X, G, b, *statistics, axis=axis), "Y")
    tolerance = dx_tolerance(masked, X, G, *statistics, axis=axis, training=is_train)
    assert_within(dX, ref_back.dx, tolerance, "dX")
    sums = sums_tolerance(masked, X, *statistics, axis=axis)
    for name, expected, tolerance in (
        ("b", ref_back.dbeta, sums[0]),
        ("G", ref_back.dgamma, sums[1]),
    ):
        gradient = layer.get_grad(name)
        assert_within(gradient, expected, stored(tolerance, expected, np.float32), f"d{name}")
    if is_train:
        moments = reference.batch_norm_stats(X, axis=axis)
        tolerances = running_tolerance(
            moments, mean, var, momentum=0.3, correction=1, dtype=X.dtype
        )
        for name, expected, tolerance in zip(PARAMETERS[2:], running, tolerances, strict=True):
            assert_within(layer.get_param(name), expected, tolerance, name)
    else:
        assert_same_bits(layer.get_param("running_mean"), mean)
        assert_same_bits(layer.get_param("running_var"), var)


@shapes
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("is_train", [True, False])
def test_gradients_agree_with_differences(is_train, activation, shape, axis):
    layer = layer_of(dtype="d", axis=axis, activation=activation, momentum=0.0)
    X, weights = drawn(2, shape, "d"), drawn(3, shape, "d")
    weights /= np.abs(weights).sum()  # a loss of about 1
    _, backprop = layer(X, is_train=is_train)
    gradients = [(X, backprop(weights.copy()))]
    gradients += [(layer.get_param(name), layer.get_grad(name)) for name in ("G", "b")]
    # Central differences of a loss L near 1: errors h^2 L'''/6 and 2^-52 L/h.
    h = 1e-5
    linear = layer_of(dtype="d", axis=axis, momentum=0.0)(X, is_train=is_train)[0]
    assert np.abs(linear).min() > 20 * h  # no step crosses ReLU's kink
    for array, gradient in gradients:
        expected = np.empty_like(array)
        for i, value in np.ndenumerate(array):
            losses = []
            for array[i] in (value - h, value + h):
                losses.append((layer(X, is_train=is_train)[0] * weights).sum())
            array[i] = value
            expected[i] = (losses[1] - losses[0]) / (2 * h)
        assert np.abs(gradient).max() > 1e-3
        assert_allclose(gradient, expected, rtol=0, atol=1e-9)


def test_gradients_add_up_until_they_are_used():
    layer, X = layer_of(), drawn(0)
    one, two = drawn(1), drawn(2)
    first, second = layer.begin_update(X), layer.begin_update(2 * X)
    dX = second[1](two), first[1](one)  # two batches at once, in either order
    sums = layer.get_grad("G").copy(), layer.get_grad("b").copy()
    alone = []
    for batch, dY, result in ((2 * X, two, dX[0]), (X, one, dX[1])):
        other = layer_of()
        assert_same_bits(other.begin_update(batch)[1](dY), result)
        alone.append((other.get_grad("G"), other.get_grad("b")))
    for got, *parts in zip(sums, *alone, strict=True):
        assert_same_bits(got, parts[0] + parts[1])


def test_a_large_mean_costs_no_digits():
    X = drawn(0, (500, 3))
    offset = X + np.float32(2**20)
    expected = (offset - np.float64(2**20)).astype("f")  # the digits of X that remain
    Y, _ = BatchNorm(3).initialize().begin_update(offset)
    assert_allclose(Y, BatchNorm(3).initialize().begin_update(expected)[0], rtol=0, atol=1e-6)


def test_an_empty_batch_changes_nothing():
    layer = layer_of()
    before = state(layer)
    Y, backprop = layer.begin_update(drawn(0, (0, 3)))
    assert Y.shape == backprop(Y).shape == (0, 3)
    for name, value in state(layer).items():
        assert_same_bits(value, before[name])


# thinc's operations on layers


def test_width_is_inferred():
    X, Y = drawn(0, (6, 5)), drawn(1, (6, 2))
    layer = BatchNorm()
    assert (layer.has_dim("nO"), layer.has_dim("nI")) == (None, None)
    assert layer.initialize(X) is layer
    assert (layer.get_dim("nO"), layer.get_dim("nI")) == (5, 5)
    for name, value in zip(PARAMETERS, (1, 0, 0, 1), strict=True):
        assert_same_bits(layer.get_param(name), np.full(5, value, "f"))
    assert BatchNorm().initialize(Y=Y).get_dim("nI") == 2
    assert BatchNorm(7).initialize().get_param("G").shape == (7,)
    assert BatchNorm(7).get_dim("nI") == 7
    assert BatchNorm(axis=1).initialize(drawn(0, (2, 3, 4, 5))).get_dim("nO") == 3
    # A chain's Y is not the Y of a layer in it.
    network = chain(Linear(4), BatchNorm(), Linear(), BatchNorm()).initialize(X, Y)
    assert [layer.get_dim("nO") for layer in network.layers] == [4, 4, 2, 2]
    assert network.get_dim("nO") == 2


def test_initialize_twice_is_initialize_once():
    X = drawn(0)
    layer = BatchNorm().initialize(X)
    before = state(layer)
    layer.initialize(X)
    layer.begin_update(X)
    for name, value in state(layer.initialize(X)).items():
        assert_same_bits(value, before[name])


@pytest.mark.parametrize("way", ["bytes", "disk", "dict", "copy"])
def test_state_goes_where_the_model_goes(way, tmp_path):
    def network(**options):
        return chain(Linear(4), BatchNorm(**options), Linear(2))

    X = drawn(0, (20, 5))
    model = network(eps=0.1, momentum=0.3, activation="relu").initialize(X)
    for _ in range(3):
        model.begin_update(X)
    expected = model.predict(X)
    if way == "copy":
        other = model.copy()
    else:
        other = network()  # not even initialised
        if way == "bytes":
            other.from_bytes(model.to_bytes())
        elif way == "disk":
            model.to_disk(tmp_path / "model")
            other.from_disk(tmp_path / "model")
        else:
            other.from_dict(model.to_dict())
    assert_same_bits(other.predict(X), expected)
    assert other.layers[1].attrs == model.layers[1].attrs
    assert other.to_bytes() == model.to_bytes()
    # The copy trains independently.
    one, two = (m.begin_update(X)[0] for m in (model, other))
    assert_same_bits(one, two)
    other.begin_update(X)
    assert (model.predict(X) != other.predict(X)).any()


@pytest.mark.parametrize("optimizer", [Adam(0.1, L2=0.1), SGD(0.1)], ids=["Adam", "SGD"])
def test_optimizers_move_parameters_and_leave_statistics(optimizer):
    layer = layer_of()
    _, backprop = layer.begin_update(drawn(0))
    backprop(drawn(1))
    before = state(layer)
    layer.finish_update(optimizer)
    assert set(optimizer.averages) == {(layer.id, "G"), (layer.id, "b")}
    after = state(layer)
    for name in ("G", "b"):
        assert (after[name] != before[name]).all()
        assert not layer.get_grad(name).any()
    for name in ("running_mean", "running_var"):
        assert_same_bits(after[name], before[name])


def test_momentum_may_be_changed():
    layer = layer_of()
    before = state(layer)
    layer.attrs["momentum"] = 0.0
    layer.begin_update(drawn(0))
    assert_array_equal(layer.get_param("running_mean"), before["running_mean"])
    layer.attrs["momentum"] = 1.0
    layer.begin_update(drawn(0))
    assert_allclose(layer.get_param("running_mean"), drawn(0).mean(axis=0), atol=1e-6)


CONFIG = """
[model]
@layers = "chain.v1"

[model.*.first]
@layers = "Linear.v1"
nO = 5

[model.*.second]
@layers = "nbnorm.BatchNorm.v1"
momentum = 0.25
activation = "relu"
"""


def test_a_config_knows_it():
    model = registry.resolve(Config().from_str(CONFIG))["model"]
    expected = chain(Linear(5), BatchNorm(momentum=0.25, activation="relu"))
    assert model.layers[1].attrs == expected.layers[1].attrs
    X = drawn(0)
    model.initialize(X)
    assert (model.begin_update(X)[0] >= 0).all()
    with pytest.raises(ValueError, match="momentums"):
        registry.resolve(Config().from_str(CONFIG.replace("momentum", "momentums")))


def test_a_config_needs_no_import():
    load = "from thinc.api import registry; print(registry.layers.get('nbnorm.BatchNorm.v1'))"
    assert run_child("-c", load).startswith("<function BatchNorm")


def test_lists_ragged_and_residual():
    parts = [drawn(0, (4, 3)), drawn(1, (1, 3)), drawn(2, (5, 3))]
    expected = layer_of().begin_update(np.concatenate(parts))[0]
    model = with_array(layer_of())
    assert_same_bits(np.concatenate(model.begin_update(parts)[0]), expected)
    ragged = Ragged(np.concatenate(parts), np.array([4, 1, 5], "i"))
    Y, backprop = with_array(layer_of()).begin_update(ragged)
    assert_same_bits(Y.data, expected)
    assert backprop(Y).data.shape == (10, 3)
    X, dY = drawn(3), drawn(4)
    Y, backprop = residual(layer_of()).begin_update(X)
    plain, backprop_plain = layer_of().begin_update(X)
    assert_allclose(Y, X + plain)
    assert_allclose(backprop(dY), dY + backprop_plain(dY))


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3), (2, 4, 5, 3)], ids=str)
def test_thinc_accepts_the_types(shape):
    with data_validation(True):
        assert BatchNorm().initialize(drawn(0, shape)).get_dim("nO") == 3


def test_a_network_learns():
    """Classes that only the product of the two inputs separates, with badly scaled inputs."""
    fix_random_seed(0)
    X = drawn(0, (400, 2))
    Y = np.stack([X[:, 0] * X[:, 1] > 0, X[:, 0] * X[:, 1] <= 0], axis=1).astype("f")
    X = X * np.float32(1e-2) + np.float32(5)
    model = chain(
        BatchNorm(), Linear(16), BatchNorm(activation="relu"), Relu(16), BatchNorm(), Linear(2)
    )
    model.initialize(X, Y)
    optimizer = Adam(0.01)
    losses = []
    for _ in range(150):
        guess, backprop = model.begin_update(X)
        losses.append(((guess - Y) ** 2).mean())
        backprop((guess - Y) / len(X))
        model.finish_update(optimizer)
    assert losses[-1] < 0.1 < 0.2 < losses[0]
    assert (model.predict(X).argmax(axis=1) == Y.argmax(axis=1)).mean() > 0.95
    start = 0.9**150  # weight of the initial 0 and 1 of the statistics
    moments = reference.batch_norm_stats(X)
    mean, var = (model.layers[0].get_param(name) for name in PARAMETERS[2:])
    assert_allclose(mean, (1 - start) * moments.mean, rtol=1e-5)  # 150 roundings of 2^-24
    assert_allclose(var, (1 - start) * moments.var(correction=1) + start, rtol=1e-5)


# Errors: they are raised before anything is written


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer: layer.begin_update(drawn(0, (6, 4))), ValueError, r"gamma has shape \(3,\)"),
        (lambda layer: layer.begin_update(drawn(0, (1, 3))), ValueError, "more than 1 value"),
        (lambda layer: layer.begin_update(drawn(0, (3,))), ValueError, "at least 2 dimensions"),
        (lambda layer: layer.begin_update(drawn(0).astype("i")), TypeError, "x has dtype int32"),
        (lambda layer: layer.begin_update(drawn(0).tolist()), TypeError, "x must be a NumPy array"),
        (
            lambda layer: layer.begin_update(drawn(0))[1](drawn(0, dtype="d")),
            TypeError,
            "dy has dtype float64, expected float32",
        ),
        (
            lambda layer: layer.begin_update(drawn(0))[1](drawn(0, (5, 3))),
            ValueError,
            r"dy has shape \(5, 3\), expected \(6, 3\)",
        ),
        (lambda layer: layer.initialize(drawn(0, (6, 4))), ValueError, "nO.* from 3 to 4"),
        (lambda layer: layer.initialize([drawn(0)]), TypeError, r"got list; with_array"),
        (lambda _: BatchNorm().initialize(), ValueError, "nO.*value unset"),
        (lambda _: BatchNorm().predict(drawn(0)), KeyError, "not been allocated"),
        (lambda _: BatchNorm(axis=2).initialize(drawn(0)), ValueError, "axis 2 is out of range"),
        (lambda _: BatchNorm(axis=(1, 2)), TypeError, r"axis must be an int, got \(1, 2\)"),
        (
            lambda _: BatchNorm(3, activation="elu").initialize().predict(drawn(0)),
            ValueError,
            "activation must be None, an `nbnorm.activation` or one of .*, got 'elu'",
        ),
        (
            lambda _: BatchNorm(3, eps=-1.0).initialize().predict(drawn(0)),
            ValueError,
            "eps must be finite and not negative",
        ),
        (
            lambda _: BatchNorm(3, momentum=float("nan")).initialize().begin_update(drawn(0)),
            ValueError,
            "momentum must be finite, got nan",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    layer = layer_of(momentum=0.0)
    before = state(layer)
    with pytest.raises(error, match=message):
        call(layer)
    assert not layer.grad_names
    for name, value in state(layer).items():
        assert_same_bits(value, before[name])


# CuPy arrays


def test_arrays_on_a_gpu_stay_there():
    """Run on the CUDA simulator with a stand-in for CuPy, whose arrays NumPy cannot convert."""
    run_child(str(Path(__file__).with_name("thinc_on_gpu.py")))


# The example, the benchmark and the documentation


def test_example():
    out = run_child(str(EXAMPLE), "--epochs", "2")
    rows = re.findall(r"^(without|with BN) +([\d.]+)% +([\d.]+)% +[\d.]+ s$", out, re.M)
    assert [name for name, *_ in rows] == ["without", "with BN"]
    # Ten classes, two epochs of 4,000 digits: without BN the network has hardly learnt.
    assert float(rows[1][1]) > 80
    assert float(rows[1][2]) > max(85, float(rows[0][2]))
    assert "saved and loaded: the same answers" in out


@pytest.mark.parametrize("shape", [(60, 7), (3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_benchmark_compares_like_with_like(dtype, shape):
    assert benchmark.name().startswith("thinc ")
    calls = benchmark.calls(shape, dtype)
    assert list(calls) == ["host", "nbnorm"]
    unit = np.finfo(dtype).eps
    for _ in range(2):  # the second call starts from the first one's state
        host, ours = (call() for call in calls.values())
        assert len(host) == len(ours) == 6
        for got, expected in zip(ours, host, strict=True):
            assert got.dtype == expected.dtype
            # NumPy's own sums have errors of some units at the size of the terms.
            assert_allclose(got, expected, rtol=0, atol=100 * unit * max(1, np.abs(host[0]).max()))


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(integration, optionflags=options)
    assert failed == 0
    assert attempted > 10


def test_a_layer_is_a_model():
    assert type(BatchNorm(3)) is Model
    assert BatchNorm(3).name == "batchnorm"
