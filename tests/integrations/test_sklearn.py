"""nbnorm.integrations.sklearn against scikit-learn's own scaler, and with scikit-learn's tools."""

import doctest
import importlib
import pickle
from pathlib import Path

import numba
import numpy as np
import pytest
from children import run_child
from numpy.testing import assert_allclose, assert_array_equal
from tolerances import (
    assert_same_bits,
    assert_within,
    m2_tolerance,
    mean_tolerance,
    y_tolerance,
)

pytest.importorskip("sklearn", reason="the integration of scikit-learn needs scikit-learn")

import sklearn
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler as Theirs
from sklearn.utils.estimator_checks import estimator_checks_generator

import nbnorm.integrations.sklearn as integration
from nbnorm import Moments
from nbnorm.integrations.sklearn import StandardScaler

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
ATTRIBUTES = ("n_samples_seen_", "mean_", "var_", "scale_")
OPTIONS = [{}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}]
options = pytest.mark.parametrize("parameters", OPTIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])


@pytest.fixture
def benchmark(monkeypatch):
    """Return the module benchmarks/scaler.py."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.scaler")


def drawn(dtype="float64", rows=2300, columns=4, order="C", nan=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (rows, columns)).astype(dtype)
    if nan:
        x[rng.random(x.shape) < 0.05] = np.nan
        x[:, 1] = np.where(np.isnan(x[:, 1]), 0, x[:, 1])
    return np.asarray(x, order=order)


def weights_of(rows, seed=1):
    weights = np.random.default_rng(seed).random(rows)
    weights[::5] = 0
    return weights


def assert_like_theirs(ours, theirs, dtype):
    """Compare fitted attributes, theirs being computed in float64 from the same data."""
    for name in ATTRIBUTES:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None), name
        assert np.shape(one) == np.shape(other), name
    seen, mean, var, scale = (getattr(theirs, name) for name in ATTRIBUTES)
    assert_allclose(ours.n_samples_seen_, seen, rtol=1e-13)
    assert_array_equal(ours.n_features_in_, theirs.n_features_in_)
    if mean is None or var is None:
        if mean is not None:
            assert_allclose(ours.mean_, mean, rtol=1e-6 if dtype != "float64" else 1e-14)
        return
    moments = Moments(np.broadcast_to(seen, mean.shape), mean, var * seen)
    of_var = m2_tolerance(moments, dtype) / np.maximum(moments.count, 1)
    # scikit-learn also sums in float64, but not in pairs, and so rounds a little more.
    assert_within(ours.mean_, mean, mean_tolerance(moments, dtype) + 1e-14 * np.abs(mean), "mean")
    assert_within(ours.var_, var, of_var + 1e-13 * var, "var")
    root = np.where(scale == 1, 1, np.sqrt(ours.var_))
    assert_within(ours.scale_, root, 0, "scale")


# Checks with arrays of other libraries run in a child process, below.
CHECKS = [
    pytest.param(estimator, check, id=f"{estimator}-{check.func.__name__}-{i}")
    for parameters in OPTIONS
    for i, (estimator, check) in enumerate(estimator_checks_generator(StandardScaler(**parameters)))
    if "array_api" not in check.func.__name__
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_checks_of_estimators(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_their_own_tests_pass():
    """All tests of StandardScaler in scikit-learn's wheel, arrays of other libraries included."""
    code = """
import os, pytest, sklearn.preprocessing as package, sklearn.preprocessing._data as module
from nbnorm.integrations.sklearn import StandardScaler
package.StandardScaler = module.StandardScaler = StandardScaler
try:
    from torch.cuda import is_available
except ImportError:
    is_available = bool
# scikit-learn skips CUDA by how PyTorch was built, not by whether there is a GPU.
chosen = "scaler or Scaler" if is_available() else "(scaler or Scaler) and not cuda"
tests = ["--pyargs", "sklearn.preprocessing.tests.test_data", "-k", chosen]
quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-c", os.devnull]
raise SystemExit(pytest.main([*tests, *quiet]))
"""
    last = run_child("-c", code, SCIPY_ARRAY_API="1").strip().splitlines()[-1]
    assert "failed" not in last
    assert int(last.split(" passed")[0].split()[-1]) > 200


@dtypes
@options
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_same_statistics(dtype, parameters, order, nan, weighted):
    if weighted and not any(parameters.get(name, True) for name in ("with_mean", "with_std")):
        parameters = {}  # scikit-learn ignores the weights if it only counts samples
    x = drawn(dtype, order=order, nan=nan)
    weights = weights_of(len(x)) if weighted else None
    ours, theirs = StandardScaler(**parameters), Theirs(**parameters)
    ours.fit(x, sample_weight=weights)
    theirs.fit(x.astype("f8"), sample_weight=None if weights is None else weights.astype(
        "f4" if dtype != "float64" else "f8"))  # fmt: skip
    assert_like_theirs(ours, theirs, dtype)
    assert ours.n_samples_seen_.dtype == ("f8" if weighted else "i8")
    for begin, end in ((0, 700), (700, 701), (701, len(x))):
        theirs.partial_fit(x[begin:end].astype("f8"))
        ours.partial_fit(x[begin:end])
    if not weighted:
        assert_like_theirs(ours, theirs, dtype)


@dtypes
@options
@pytest.mark.parametrize("order", ["C", "F", "strided"])
@pytest.mark.parametrize("copy", [True, False])
def test_the_same_maps(dtype, parameters, order, copy):
    wide = drawn(dtype, rows=2300, columns=8, nan=True, order="C" if order == "strided" else order)
    x = wide[:, ::2]
    scaler = StandardScaler(copy=copy, **parameters).fit(x)
    before, given = x.copy(), x.copy(order="K") if order != "strided" else x
    y = scaler.transform(given)
    assert y.dtype == dtype
    assert (y is given or np.shares_memory(y, given)) == (not copy)
    if copy:
        assert_same_bits(given, before)
    mean = scaler.mean_ if parameters.get("with_mean", True) else np.zeros(4)
    scale = scaler.scale_ if parameters.get("with_std", True) else np.ones(4)
    known = np.nan_to_num(before)
    expected = (known.astype(np.longdouble) - mean) / scale
    tolerance = y_tolerance(known, None, None, mean, 1 / scale, axis=1)
    there = ~np.isnan(before)
    assert_same_bits(np.isnan(y), ~there)
    assert_within(np.where(there, y, 0), np.where(there, expected, 0), tolerance, "y")
    z, back = y.copy(), scaler.inverse_transform(y)
    assert back.dtype == dtype
    known = np.nan_to_num(z)
    expected = known.astype(np.longdouble) * scale + mean
    tolerance = y_tolerance(known, scale, mean, np.zeros(4), np.ones(4), axis=1)
    assert_within(np.where(there, back, 0), np.where(there, expected, 0), tolerance, "x")


def test_another_copy_in_a_call():
    x = drawn()
    scaler = StandardScaler().fit(x)
    y = scaler.transform(x)
    given = x.copy()
    assert np.shares_memory(scaler.transform(given, copy=False), given)
    assert_same_bits(given, y)
    assert np.shares_memory(scaler.inverse_transform(given, copy=False), given)
    assert not np.shares_memory(scaler.set_params(copy=False).transform(x, copy=True), x)


def test_what_cannot_be_written_over_is_copied():
    x = drawn()
    scaler = StandardScaler(copy=False).fit(x)
    y = scaler.transform(x.copy())
    x.flags.writeable = False
    assert_same_bits(scaler.transform(x), y)
    assert_same_bits(scaler.transform(x.astype(">f8")), y)


@pytest.mark.parametrize("kind", [list, np.int32, bool, ">f4", np.longdouble, object])
def test_other_dtypes_become_float64(kind):
    x = drawn(rows=20).round()
    given = x.tolist() if kind is list else x.astype(kind)
    ours, theirs = StandardScaler().fit(given), Theirs().fit(given)
    assert_like_theirs(ours, theirs, "float64")
    assert ours.transform(given).dtype == "float64"


@dtypes
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_calls_along_borders_give_the_same_bits(dtype, nan, weighted, thread_count):
    x = drawn(dtype, rows=6500, nan=nan)
    weights = weights_of(len(x)).astype("f4") if weighted else None
    whole = StandardScaler().fit(x, sample_weight=weights)
    for borders in ([1000, 6000], [3000], range(1000, 6500, 1000)):
        numba.set_num_threads(1 if borders == [3000] else thread_count)
        in_calls = StandardScaler()
        for begin, end in zip([0, *borders], [*borders, len(x)], strict=True):
            of_call = None if weights is None else weights[begin:end]
            in_calls.partial_fit(x[begin:end], sample_weight=of_call)
        for name in ATTRIBUTES:
            assert_same_bits(getattr(in_calls, name), getattr(whole, name), name)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_partial_fit_far_from_zero_keeps_twelve_digits(chunk, benchmark):
    """The claim of docs/scaler.md; the error of scikit-learn's scaler is greater than 1e-12."""
    x = np.random.default_rng(0).normal(1e8, 1.0, (3000, 3))
    ours, theirs = StandardScaler(), Theirs()
    for begin in range(0, len(x), chunk):
        ours.partial_fit(x[begin : begin + chunk])
        theirs.partial_fit(x[begin : begin + chunk])
    assert max(benchmark.errors(ours, x)) < 1e-14
    assert max(benchmark.errors(theirs, x)) > 1e-12


@dtypes
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e3 / 7, 3e4])
def test_constant_features_are_not_scaled(dtype, order, value):
    x = drawn(dtype, rows=3300, order=order)
    x[:, 2] = value
    scaler = StandardScaler().fit(x[:1234]).partial_fit(x[1234:])
    assert scaler.scale_[2] == 1
    assert scaler.var_[2] == 0
    assert scaler.mean_[2] == x[0, 2]
    assert not scaler.transform(x)[:, 2].any()


@pytest.mark.parametrize("rows", [10, 3000])
def test_nearly_constant_features_are_theirs(rows):
    sizes = 10.0 ** np.arange(-20, 3)
    x = 1 + np.where(np.arange(rows) % 2, 1, -1)[:, None] * sizes
    ours, theirs = StandardScaler().fit(x), Theirs().fit(x)
    assert_array_equal(ours.scale_ == 1, theirs.scale_ == 1)
    assert 5 < (ours.scale_ == 1).sum() < 15


def test_a_feature_without_values():
    x = drawn(rows=1100)
    x[:, 3] = np.nan
    ours = StandardScaler().fit(x)
    assert_array_equal(ours.n_samples_seen_, [1100, 1100, 1100, 0])
    assert np.isnan([ours.mean_[3], ours.var_[3], ours.scale_[3]]).all()
    assert np.isnan(ours.transform(x)[:, 3]).all()
    more = drawn(rows=50, seed=2)
    ours.partial_fit(more)
    assert_allclose(ours.mean_[3], more[:, 3].mean(), rtol=1e-14)
    assert_allclose(ours.var_[3], more[:, 3].var(), rtol=1e-13)


@dtypes
@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
def test_inf_is_refused_and_changes_nothing(dtype, value, nan):
    x = drawn(dtype, nan=nan)
    scaler = StandardScaler(copy=False).fit(x)
    before = {name: np.copy(getattr(scaler, name)) for name in ATTRIBUTES}
    bad = x.copy()
    bad[1700, 2] = value
    given, weights = bad.copy(), np.ones(len(x))
    weights[1700] = 0
    calls = {
        "partial_fit": lambda: scaler.partial_fit(bad),
        "weighted": lambda: scaler.partial_fit(bad, sample_weight=weights),
        "transform": lambda: scaler.transform(bad),
        "inverse_transform": lambda: scaler.inverse_transform(bad),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"^Input X contains infinity"):
            call()
    assert_same_bits(bad, given)
    again = StandardScaler().fit(x).partial_fit(x[:3])
    scaler.partial_fit(x[:3])
    for name, value_before in before.items():
        assert_same_bits(getattr(scaler, name), getattr(again, name), name)
        assert not np.array_equal(value_before, getattr(again, name))
    with pytest.raises(ValueError, match=r"^Input X contains infinity"):
        StandardScaler().fit(bad)


def test_values_that_sum_beyond_the_dtype_are_finite():
    x = np.full((100, 2), 3e38, np.float32)
    scaler = StandardScaler().fit(x)
    assert_array_equal(scaler.mean_, x[0].astype(float))
    assert not scaler.transform(x).any()


def test_checks_can_be_turned_off():
    x = drawn()
    x[3, 0] = np.inf
    with sklearn.config_context(assume_finite=True):
        y = StandardScaler().fit(x).transform(x)
    assert np.isfinite(y[:, 1:]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: StandardScaler(with_mean="no").fit(x), "'with_mean' parameter"),
        (lambda x: StandardScaler().fit(x[:, 0]), "Expected 2D array"),
        (lambda x: StandardScaler().fit(x[:0]), "0 sample"),
        (lambda x: StandardScaler().fit(x, sample_weight=-np.ones(len(x))), "Negative values"),
        (lambda x: StandardScaler().fit(x, sample_weight=[1.0]), "sample_weight.shape"),
        (lambda x: StandardScaler().fit(x).partial_fit(x[:, :2]), "X has 2 features"),
        (lambda x: StandardScaler().fit(x).transform(x[:, :2]), "X has 2 features"),
        (lambda x: StandardScaler().fit(x).inverse_transform(x[:, :2]), "X has 2 features"),
        (lambda x: StandardScaler().fit(sparse.csr_array(x)), "Cannot center sparse"),
        (lambda x: StandardScaler().fit(x).transform(sparse.csr_array(x)), "Cannot center sparse"),
        (lambda x: StandardScaler().transform(x), "not fitted yet"),
        (lambda x: StandardScaler().inverse_transform(x), "not fitted yet"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((ValueError, NotFittedError), match=message):
        call(drawn())


def test_weights_are_frequencies():
    x, times = drawn(nan=True), np.random.default_rng(1).integers(0, 4, 2300)
    weighted = StandardScaler().fit(x, sample_weight=times.astype(float))
    repeated = StandardScaler().fit(x.repeat(times, axis=0))
    assert_array_equal(weighted.n_samples_seen_, repeated.n_samples_seen_)
    assert_allclose(weighted.mean_, repeated.mean_, rtol=1e-14)
    assert_allclose(weighted.scale_, repeated.scale_, rtol=1e-14)


@pytest.mark.parametrize("library", ["pandas", "polars"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_frames(library, dtype):
    frame = pytest.importorskip(library).DataFrame
    x, names = drawn(dtype, nan=True), ["a", "b", "c", "d"]
    given = frame(dict(zip(names, x.T, strict=True)))
    scaler = StandardScaler().set_output(transform=library)
    y = scaler.fit_transform(given)
    assert isinstance(y, frame)
    assert list(y.columns) == list(scaler.get_feature_names_out()) == names
    assert list(scaler.feature_names_in_) == names
    y, theirs = y.to_numpy(), Theirs().fit_transform(given)
    assert y.dtype == theirs.dtype  # they make float64 of polars' float32
    assert_allclose(y, theirs, rtol=1e-5, atol=1e-5)
    assert_allclose(scaler.inverse_transform(y), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="feature names should match"):
        scaler.transform(given[["b", "a", "c", "d"]])


def test_in_a_pipeline():
    x = drawn()
    y = x @ np.arange(4.0) + 1
    weights = weights_of(len(x))
    ours, theirs = (make_pipeline(make(), LinearRegression()) for make in (StandardScaler, Theirs))
    for model in ours, theirs:
        model.fit(x, y, standardscaler__sample_weight=weights)
    assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-10)
    again = clone(ours).fit(x, y)
    assert_allclose(again.predict(x), y, rtol=1e-10)


def test_it_is_theirs_to_others():
    assert isinstance(StandardScaler(), Theirs)
    assert StandardScaler().get_params() == Theirs().get_params()
    assert repr(StandardScaler(with_std=False)) == "StandardScaler(with_std=False)"


def test_a_copy_goes_on():
    x = drawn(nan=True)
    whole, half = StandardScaler().fit(x), StandardScaler().fit(x[:1500])
    loaded = pickle.loads(pickle.dumps(half)).partial_fit(x[1500:])
    half.partial_fit(x[1500:])
    for name in ATTRIBUTES:
        assert_same_bits(getattr(loaded, name), getattr(half, name), name)
        assert_allclose(getattr(half, name), getattr(whole, name), rtol=1e-14)
    assert len(pickle.dumps(whole)) < 20_000  # no data in it


def test_attributes_suffice_to_go_on():
    """They may come from a file or, as here, from scikit-learn's own scaler."""
    x = drawn(nan=True)
    whole, theirs = StandardScaler().fit(x), Theirs().fit(x[:1500])
    ours = StandardScaler()
    vars(ours).update(vars(theirs))
    ours.partial_fit(x[1500:])
    for name in ATTRIBUTES:
        assert_allclose(getattr(ours, name), getattr(whole, name), rtol=1e-14)


@pytest.mark.parametrize("form", ["csr_array", "csc_array", "csr_matrix"])
@pytest.mark.parametrize("with_std", [True, False])
def test_sparse_matrices(form, with_std):
    x = drawn(nan=True)
    x[x < 2] = 0
    given = getattr(sparse, form)(x)
    ours, theirs = (make(with_mean=False, with_std=with_std) for make in (StandardScaler, Theirs))
    for scaler in ours, theirs:
        scaler.fit(given)
    for name in ATTRIBUTES:
        assert_array_equal(getattr(ours, name), getattr(theirs, name))
    y = ours.transform(given)
    assert sparse.issparse(y)
    assert_array_equal(y.toarray(), theirs.transform(given).toarray())
    assert_allclose(ours.inverse_transform(y).toarray(), x, rtol=1e-15)
    assert_allclose(ours.transform(x), y.toarray(), rtol=1e-15)


def test_dense_and_sparse_calls_may_alternate():
    x = drawn(nan=True)
    whole = StandardScaler(with_mean=False).fit(x)
    scaler = StandardScaler(with_mean=False)
    for begin, end, form in (
        (0, 700, np.asarray),
        (700, 900, sparse.csr_array),
        (900, 1000, sparse.csc_array),
        (1000, 2300, np.asarray),
    ):
        scaler.partial_fit(form(x[begin:end]))
    for name in ATTRIBUTES:
        assert_allclose(getattr(scaler, name), getattr(whole, name), rtol=1e-13)


def test_callbacks_are_called():
    class Callback:
        def __init__(self):
            self.called = []

        def setup(self, *args, **kwargs):
            self.called.append("setup")

        def on_fit_task_begin(self, *args, **kwargs):
            self.called.append("begin")

        def on_fit_task_end(self, *args, **kwargs):
            self.called.append("end")

        def teardown(self, *args, **kwargs):
            self.called.append("teardown")

    found = []
    for make in (StandardScaler, Theirs):
        callback = Callback()
        make().set_callbacks(callback).fit(drawn())
        found.append(callback.called)
    assert found[0] == found[1] == ["setup", "begin", "end", "teardown"]


def test_nothing_else_is_imported():
    code = (
        "import sys, nbnorm.integrations\n"
        "assert 'sklearn' not in sys.modules\n"
        "import nbnorm.integrations.sklearn\n"
        "assert not {'torch', 'mygrad', 'thinc', 'onnx'} & set(sys.modules)"
    )
    run_child("-c", code)


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(integration, optionflags=options)
    assert failed == 0
    assert attempted > 4


def test_benchmark(benchmark):
    x = np.array([1.0, 2.0, 4.0]) * 2.0**-1040
    mean, var = benchmark.exact(x)
    assert (3 * mean, 9 * var) == (7 * benchmark.Fraction(x[0]), 14 * benchmark.Fraction(x[0]) ** 2)
    lines = benchmark.accuracy(rows=3000, columns=2)
    assert [line[0] for line in lines[1:]] == ["1", "10000", "1e+08"]
    lines = benchmark.speed(rows=50, columns=3, rounds=1)
    assert len(lines) == 1 + 3 * 4
