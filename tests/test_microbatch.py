"""A batch in parts, read twice, has the results of the whole batch."""

import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import BFLOAT16, Recipe, recipes
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    mean_tolerance,
    merge_tolerance,
    reduced_axes,
    rstd_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import micro_batch_norm_backward, micro_batch_norm_forward, reference

RNG = np.random.default_rng(0)
XS = [RNG.normal(size=(n, 4, 3)) for n in (5, 0, 1, 7)]
DYS = [RNG.normal(size=x.shape) for x in XS]
GAMMA, BETA = RNG.normal(size=(2, 4))


def split(array, axis, cuts):
    """Return an array in parts, cut along its first reduced axis."""
    return np.split(array, cuts, axis=reduced_axes(array.ndim, axis)[0])


@st.composite
def recipes_and_cuts(draw):
    recipe = draw(recipes(most=20_000))
    length = recipe.shape[reduced_axes(len(recipe.shape), recipe.axis)[0]]
    cuts = draw(st.lists(st.integers(0, length), max_size=6).map(sorted))
    return recipe, cuts


@pytest.mark.slow  # many kinds of kernels
@given(drawn=recipes_and_cuts(), activation=st.sampled_from((None, "relu")))
def test_however_a_batch_is_split(drawn, activation):
    """Within the tolerances of one pass: merging parts must not cost digits."""
    recipe, cuts = drawn
    x, dy, axis, eps = recipe.x(), recipe.like_x(4), recipe.axis, recipe.eps
    if not recipe.with_extras:
        activation = None
    gamma, beta = recipe.gamma(), recipe.beta()
    running = recipe.running()
    expected = [array.copy() for array in running]
    xs, dys = split(x, axis, cuts), split(dy, axis, cuts)

    forward = micro_batch_norm_forward(
        xs, gamma, beta, *running, eps=eps, axis=axis, activation=activation
    )
    statistics = forward.mean, forward.rstd
    ref, moments = (
        function(x, axis=axis, **options)
        for function, options in (
            (reference.batch_norm_forward, {"eps": eps}),
            (reference.batch_norm_stats, {}),
        )
    )
    of_mean, of_m2 = merge_tolerance(moments, x, len(xs), axis=axis)
    assert forward.count == moments.count
    assert_within(forward.mean, ref.mean, mean_tolerance(moments, x.dtype) + of_mean, "mean")
    # Half of the relative error of var + eps, to first order; twice that is enough for the rest.
    of_rstd = of_m2 * ref.rstd**3 / moments.count
    allowed = rstd_tolerance(moments, ref.rstd, x.dtype) + of_rstd
    assert_within(forward.rstd, ref.rstd, allowed, "rstd")
    allowed = running_tolerance(moments, *expected, momentum=0.1, correction=1, dtype=x.dtype)
    merging = 0.1 * of_mean, 0.1 * of_m2 / (moments.count - 1)
    whole = (np.asarray(array, np.float64) for array in (moments.mean, moments.m2))
    nbnorm.update_running_stats(*expected, nbnorm.Moments(moments.count, *whole))
    for array, theirs, *errors in zip(running, expected, allowed, merging, strict=True):
        assert_within(array, theirs, stored(sum(errors), theirs, theirs.dtype), "running")

    # Use the returned float64 statistics: where the mean is large, its rounding is the main error.
    ys, along = list(forward.ys), reduced_axes(x.ndim, axis)[0]
    for part, y in zip(xs, ys, strict=True):
        assert (y.shape, y.dtype) == (part.shape, part.dtype)
    expected_y = reference.batch_norm_apply(
        x, gamma, beta, *statistics, axis=axis, activation=activation
    )
    tolerance = y_tolerance(x, gamma, beta, *statistics, axis=axis)
    assert_within(np.concatenate(ys, along), expected_y, tolerance, "y")

    backward = micro_batch_norm_backward(
        dys, xs, gamma, *statistics, forward.count, beta=beta, axis=axis, activation=activation
    )
    masked = np.concatenate(dys, along)
    if activation == "relu":
        masked = np.where(np.concatenate(ys, along) > 0, masked, 0).astype(x.dtype)
    ref_back = reference.batch_norm_backward(masked, x, gamma, *statistics, axis=axis)
    rows = stored(dx_tolerance(masked, x, gamma, *statistics, axis=axis), ref_back.dx, x.dtype)
    assert_within(np.concatenate(list(backward.dxs), along), ref_back.dx, rows, "dx")
    tolerances = sums_tolerance(masked, x, *statistics, axis=axis)
    for name, tolerance in zip(("dbeta", "dgamma"), tolerances, strict=True):
        found, theirs = getattr(backward, name), getattr(ref_back, name)
        assert found.dtype == (x if gamma is None else gamma).dtype
        assert_within(found, theirs, stored(tolerance, theirs, found.dtype), name)


@pytest.mark.parametrize("activation", [None, "relu", pytest.param("gelu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("axis", [1, -1, (1, 2)], ids=str)
def test_one_part_gives_the_bits_of_the_whole(axis, dtype, activation):
    recipe = Recipe((6, 4, 3, 5), axis, dtype=dtype)
    x, dy, gamma, beta = recipe.x(), recipe.like_x(4), recipe.gamma(), recipe.beta()
    running, expected = recipe.running(), recipe.running()
    options = {"axis": axis, "activation": activation}
    forward = micro_batch_norm_forward([x], gamma, beta, *running, **options)
    whole = nbnorm.batch_norm_forward(x, gamma, beta, *expected, **options)
    grads = micro_batch_norm_backward([dy], [x], gamma, *forward[1:], beta=beta, **options)
    of_whole = nbnorm.batch_norm_backward(dy, x, gamma, *whole[1:], beta=beta, **options)
    ours = *forward.ys, *forward[1:3], *running, *grads.dxs, *grads[1:]
    theirs = *whole, *expected, *of_whole[:3]
    for array, other in zip(ours, theirs, strict=True):
        assert_same_bits(array, other)


def test_statistics_have_the_bits_of_population_stats():
    forward = micro_batch_norm_forward(XS)
    moments = nbnorm.population_stats(XS)
    assert_same_bits(forward.mean, moments.mean)
    assert_same_bits(forward.rstd, moments.rstd(1e-5))


def test_running_statistics_move_once_with_the_options_given():
    running, expected = [(np.zeros(4), np.ones(4)) for _ in range(2)]
    micro_batch_norm_forward(XS, None, None, *running, momentum=0.3, correction=0)
    whole = nbnorm.population_stats(XS)
    nbnorm.update_running_stats(*expected, whole, momentum=0.3, correction=0)
    for array, other in zip(running, expected, strict=True):
        assert_same_bits(array, other)


# Reading


def through(layer, parts):
    """Return what a layer makes of parts, in ways to be read again."""
    return lambda: (layer(part) for part in parts)


def test_results_are_the_inputs_of_another_layer():
    """Two layers with a function between them, forward and backward; nothing is kept."""
    weight = RNG.normal(size=(4, 4, 1))

    def mixed(y):
        return np.einsum("ncs,cdt->nds", y, weight)

    first = micro_batch_norm_forward(XS, GAMMA, BETA, activation="relu")
    between = through(mixed, first.ys)
    second = micro_batch_norm_forward(between, BETA, GAMMA)
    back = micro_batch_norm_backward(DYS, between, BETA, *second[1:], beta=GAMMA)
    inner = through(lambda d: np.einsum("nds,cdt->ncs", d, weight), back.dxs)
    grads = micro_batch_norm_backward(inner, XS, GAMMA, *first[1:], beta=BETA, activation="relu")

    x, dy = np.concatenate(XS), np.concatenate(DYS)
    ref = nbnorm.batch_norm_forward(x, GAMMA, BETA, activation="relu")
    ref_second = nbnorm.batch_norm_forward(mixed(ref.y), BETA, GAMMA)
    ref_back = nbnorm.batch_norm_backward(dy, mixed(ref.y), BETA, *ref_second[1:])
    inner = np.einsum("nds,cdt->ncs", ref_back.dx, weight)
    ref_grads = nbnorm.batch_norm_backward(inner, x, GAMMA, *ref[1:], beta=BETA, activation="relu")
    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(np.concatenate(list(second.ys)), ref_second.y, **close)
    for name in ("dgamma", "dbeta"):
        np.testing.assert_allclose(getattr(back, name), getattr(ref_back, name), **close)
        np.testing.assert_allclose(getattr(grads, name), getattr(ref_grads, name), **close)
    np.testing.assert_allclose(np.concatenate(list(grads.dxs)), ref_grads.dx, **close)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_layers_in_a_row_read_the_input_as_often_as_the_documentation_says(layers):
    readings = []

    def inputs():
        readings.append(len(readings))
        return iter(XS)

    ys = inputs
    for _ in range(layers):
        ys = micro_batch_norm_forward(ys).ys
    list(ys)
    assert len(readings) == layers + 1


def test_results_can_be_read_again():
    forward = micro_batch_norm_forward(XS)
    assert len(forward.ys) == len(XS)
    for y, again in zip(forward.ys, forward.ys, strict=True):
        assert y is not again
        assert_same_bits(y, again)


def test_one_part_stands_in_memory_at_a_time():
    alive = set()

    def made(shape):
        array = np.random.default_rng(len(shape)).normal(size=shape)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        return array

    most = []

    def parts():
        for _ in range(5):
            most.append(len(alive))
            yield made((6, 4, 3))  # not kept here

    forward = micro_batch_norm_forward(parts, GAMMA, BETA)
    for _ in forward.ys:
        pass
    assert most == [0] * 10
    grads = micro_batch_norm_backward(parts, parts, GAMMA, *forward[1:], beta=BETA)
    for _ in grads.dxs:
        pass
    # dy is there when x is read, and nothing else.
    assert most[10:] == [0, 1] * 10


def test_a_memory_map_in_slices(tmp_path):
    np.save(tmp_path / "x.npy", np.concatenate(XS))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    forward = micro_batch_norm_forward([x[:4], x[4:]], GAMMA)
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", x.dtype, x.shape)
    for rows, y in zip((slice(0, 4), slice(4, None)), forward.ys, strict=True):
        out[rows] = y
    expected = nbnorm.batch_norm_forward(np.array(x), GAMMA).y
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_parts_that_are_all_empty():
    xs = [np.empty((0, 4, 3)), np.empty((2, 4, 0))]
    running = np.zeros(4), np.ones(4)
    forward = micro_batch_norm_forward(xs, None, None, *running)
    assert forward.count == 0
    assert [y.shape for y in forward.ys] == [x.shape for x in xs]
    for array, expected in zip(
        (*forward[1:3], *running), (*np.zeros((3, 4)), np.ones(4)), strict=True
    ):
        assert_same_bits(array, expected)
    grads = micro_batch_norm_backward(xs, xs, None, *forward[1:], beta=None)
    assert_same_bits(grads.dgamma, np.zeros(4))
    assert [dx.shape for dx in grads.dxs] == [x.shape for x in xs]


def test_not_a_number_stays_in_its_channel():
    xs = [x.copy() for x in XS]
    xs[2][0, 1] = np.nan
    ys = np.concatenate(list(micro_batch_norm_forward(xs).ys))
    assert np.isnan(ys[:, 1]).all()
    clean = np.concatenate(list(micro_batch_norm_forward(XS).ys))
    assert_same_bits(np.delete(ys, 1, 1), np.delete(clean, 1, 1))


# What is refused


def forward_of(xs, **options):
    running = np.zeros(4), np.ones(4)
    try:
        return micro_batch_norm_forward(xs, GAMMA, BETA, *running, **options)
    except Exception:
        for array, before in zip(running, (np.zeros(4), np.ones(4)), strict=True):
            assert_same_bits(array, before)
        raise


FEW = "expected more than 1 value per channel when training"
ONE_SHOT = "xs can be read only once (it is a {}), and is read twice; pass a sequence of arrays, or"


@pytest.mark.parametrize(
    ("xs", "error", "message"),
    [
        ((x for x in XS), TypeError, ONE_SHOT.format("generator")),
        (iter(XS), TypeError, ONE_SHOT.format("list_iterator")),
        (map(np.asarray, XS), TypeError, ONE_SHOT.format("map")),
        (np.ones((3, 4)), TypeError, "xs is an array, expected its parts; pass a sequence"),
        (3, TypeError, "xs must be an iterable of arrays, got int"),
        ([], ValueError, "xs has no parts, expected at least one"),
        ([np.ones((1, 4))], ValueError, f"{FEW}, got 1 in all parts together"),
        ([*XS, XS[0].astype("float32")], TypeError, "x has dtype float32, expected float64"),
        ([*XS, XS[0].astype(int)], TypeError, "x has dtype int64"),
        ([*XS, None], TypeError, "x must be a NumPy array"),
        ([*XS, np.ones((2, 5, 3))], ValueError, "gamma has shape (4,), expected (5,)"),
    ],
)  # fmt: skip
def test_forward_refuses(xs, error, message):
    with pytest.raises(error) as raised:
        forward_of(xs)
    assert str(raised.value).startswith(message)


def test_forward_refuses_other_channels_without_parameters():
    with pytest.raises(ValueError, match=r"^x has channel axes of shape \(5,\), expected \(4,\)"):
        micro_batch_norm_forward([*XS, np.ones((2, 5, 3))])


def test_errors_tell_the_part():
    with pytest.raises(TypeError, match="int64") as raised:
        forward_of([*XS, XS[0].astype(int)])
    assert raised.value.__notes__ == ["(part 4)"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1}, ValueError, "eps must be"),
        ({"momentum": np.nan}, ValueError, "momentum must be finite"),
        ({"correction": "x"}, TypeError, "correction must be"),
        ({"axis": 7}, ValueError, "axis"),
        ({"activation": "elu"}, ValueError, "activation must be"),
    ],
)
def test_forward_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        forward_of(XS, **options)


def test_a_running_statistic_that_shares_memory_with_a_part():
    shared = np.ones((3, 4, 3))
    with pytest.raises(ValueError, match="running_mean"):
        micro_batch_norm_forward([*XS, shared], None, None, shared[0, :, 0], np.ones(4))


def backward_of(dys=DYS, xs=XS, gamma=GAMMA, count=39, **options):
    statistics = nbnorm.population_stats(XS)
    options = {"beta": BETA, **options}
    return micro_batch_norm_backward(
        dys, xs, gamma, statistics.mean, statistics.rstd(1e-5), count, **options
    )


@pytest.mark.parametrize(
    ("spoilt", "error", "message"),
    [
        ({"dys": iter(DYS)}, TypeError, "dys can be read only once (it is a list_iterator)"),
        ({"xs": iter(XS)}, TypeError, "xs can be read only once (it is a list_iterator)"),
        ({"dys": DYS[:3]}, ValueError, "dys has fewer parts than xs"),
        ({"xs": XS[:3]}, ValueError, "xs has fewer parts than dys"),
        ({"dys": [], "xs": []}, ValueError, "xs has no parts"),
        ({"dys": DYS[::-1]}, ValueError, "dy has shape (7, 4, 3), expected (5, 4, 3)"),
        ({"count": 40}, ValueError, "count is 40, but all parts of xs have 39 values per channel"),
        ({"count": 39.0}, TypeError, "count must be an int, got 39.0"),
        ({"gamma": np.ones(3)}, ValueError, "gamma has shape (3,), expected (4,)"),
        ({"beta": np.ones(3)}, ValueError, "beta has shape (3,), expected (4,)"),
        ({"activation": "elu"}, ValueError, "activation must be"),
    ],
)
def test_backward_refuses(spoilt, error, message):
    with pytest.raises(error) as raised:
        backward_of(**spoilt)
    assert str(raised.value).startswith(message)


def readings(*sources):
    """Return a function that returns the next source at each call."""
    remaining = iter(sources)
    return lambda: next(remaining)


FIRST = f"and dtype {XS[0].dtype} at the first reading"


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (XS[:3], f"part 3 of xs had shape (7, 4, 3) {FIRST}, and now no data"),
        ([*XS, XS[0]], "part 4 of xs had no data at the first reading, and now shape (5, "),
        (XS[::-1], f"part 0 of xs had shape (5, 4, 3) {FIRST}, and now shape (7, "),
        ([x.astype(np.float16) for x in XS], f"part 0 of xs had shape (5, 4, 3) {FIRST}, and now"),
        (iter(()), f"part 0 of xs had shape (5, 4, 3) {FIRST}, and now no data"),
    ],
)
def test_parts_that_change_between_readings(later, message):
    forward = micro_batch_norm_forward(readings(XS, later))
    with pytest.raises(ValueError, match="every reading must yield the same parts") as raised:
        list(forward.ys)
    assert str(raised.value).startswith(message)
    if len(later if isinstance(later, list) else []) == len(XS):
        backward = backward_of(dys=readings(DYS, DYS), xs=readings(XS, later))
        with pytest.raises(ValueError, match=r"^part 0 of xs had"):
            list(backward.dxs)


@pytest.mark.parametrize("returned", [XS[0], None])
def test_a_function_that_returns_no_parts(returned):
    kind = type(returned).__name__
    with pytest.raises(
        TypeError, match=f"^xs is a function that returned {kind}, expected an iter"
    ):
        micro_batch_norm_forward(lambda: returned)


def test_a_function_that_returns_the_same_iterator_twice():
    same = iter(XS)
    with pytest.raises(ValueError, match=r"^part 0 of xs had shape .* and now no data"):
        list(itertools.islice(micro_batch_norm_forward(lambda: same).ys, 1))


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_arrays_of_other_libraries(library):
    module = pytest.importorskip(library)
    xs, dys = ([module.from_dlpack(part) for part in parts] for parts in (XS, DYS))
    gamma, beta = map(module.from_dlpack, (GAMMA, BETA))
    forward = micro_batch_norm_forward(xs, gamma, beta)
    grads = micro_batch_norm_backward(dys, xs, gamma, *forward[1:], beta=beta)
    ref = micro_batch_norm_forward(XS, GAMMA, BETA)
    ref_grads = micro_batch_norm_backward(DYS, XS, GAMMA, *ref[1:], beta=BETA)
    ours = *forward.ys, *forward[1:3], *grads.dxs, *grads[1:]
    theirs = *ref.ys, *ref[1:3], *ref_grads.dxs, *ref_grads[1:]
    assert {type(array) for array in ours} == {type(xs[0])}
    for array, other in zip(ours, theirs, strict=True):
        assert_same_bits(np.from_dlpack(array), other)
