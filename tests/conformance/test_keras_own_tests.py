"""Keras's own tests of batch normalization pass with nbnorm in its NumPy backend.

A child process (keras_nbnorm.py) runs the tests in Keras's wheel: those of the layer, of
`keras.ops.batch_normalization` and of `keras.ops.moments`. A training step of the layer is
`batch_norm_forward`, including moving averages in Keras's convention (momentum weighs the old
average, the variance is biased); evaluation is `batch_norm_inference`; moments are
`batch_norm_stats`.

nbnorm's own masks and batch renormalization are not used. Keras's tests of both run too: Keras's
layer computes masked statistics and the correction, and nbnorm does the rest.
"""

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from children import run_child

# Do not import Keras here: its backend must not affect these tests.
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("keras") is None, reason="Keras's tests need Keras"),
]

FORWARD, INFERENCE, STATS = "batch_norm_forward", "batch_norm_inference", "batch_norm_stats"

# Number of cases of each test, and the nbnorm functions that each case calls.
COMPUTED = {
    "BatchNormalizationTest.test_bn_basics": (1, {FORWARD}),
    "BatchNormalizationTest.test_correctness": (16, {FORWARD, INFERENCE}),
    "BatchNormalizationTest.test_input_fully_masked": (1, {INFERENCE}),
    "BatchNormalizationTest.test_masked_broadcast_normalization": (1, {INFERENCE}),
    "BatchNormalizationTest.test_renorm_basics": (1, {STATS, INFERENCE}),
    "BatchNormalizationTest.test_renorm_correctness": (1, {STATS, INFERENCE}),
    "BatchNormalizationTest.test_renorm_inference": (1, {INFERENCE}),
    "BatchNormalizationTest.test_trainable_behavior": (1, {FORWARD, INFERENCE}),
    "NNOpsCorrectnessTest.test_batch_normalization": (1, {INFERENCE}),
    "NNOpsCorrectnessTest.test_moments": (1, {STATS}),
}
# Tests of arguments, initial values, configuration and symbolic shapes pass without nbnorm.
NOTHING_TO_COMPUTE = {
    "BatchNormalizationTest.test_large_value_within_autocast_scope",
    "BatchNormalizationTest.test_renorm_invalid_clipping_keys",
    "BatchNormalizationTest.test_renorm_stddev_initializer",
    "BatchNormalizationTest.test_serialization",
    "NNOpsDynamicShapeTest.test_batch_normalization",
    "NNOpsDynamicShapeTest.test_moments",
    "NNOpsStaticShapeTest.test_batch_normalization",
    "NNOpsStaticShapeTest.test_moments",
}
# Keras cannot run these on NumPy.
CANNOT_RUN = {
    "BatchNormalizationTest.test_bachnorm_ignore_masked_values": (6, "Keras cannot fit() on NumPy"),
    "NNOpsCorrectnessTest.test_moments_sync": (1, "only implemented for TF"),
    "NNOpsCorrectnessTest.test_moments_sync_with_distribution_strategy": (
        *(2, "only implemented for TF"),
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return {test: [outcomes of its cases]}."""
    script = Path(__file__).with_name("keras_nbnorm.py")
    home = tmp_path_factory.mktemp("keras")  # Keras writes its configuration here
    printed = run_child(str(script), KERAS_BACKEND="numpy", KERAS_HOME=str(home))
    found = defaultdict(list)
    for name, case in json.loads(printed).items():
        found[name.rstrip("0123456789")].append(case)
    return found


def test_all_of_them_are_known(cases):
    """Fail if Keras adds, renames or drops a test; add it to a table above."""
    assert set(cases) == {*COMPUTED, *NOTHING_TO_COMPUTE, *CANNOT_RUN}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_by_nbnorm(cases, name):
    number, functions = COMPUTED[name]
    for case in cases[name]:
        assert case["outcome"] == "passed", case["details"]
        assert set(case["calls"]) == functions
    assert len(cases[name]) == number


@pytest.mark.parametrize("name", sorted(NOTHING_TO_COMPUTE))
def test_nothing_to_compute(cases, name):
    (case,) = cases[name]
    assert case["outcome"] == "passed", case["details"]
    assert not case["calls"]


@pytest.mark.parametrize("name", CANNOT_RUN)
def test_cannot_run_on_numpy(cases, name):
    number, reason = CANNOT_RUN[name]
    assert len(cases[name]) == number
    for case in cases[name]:
        assert case["outcome"] == "skipped"
        assert reason in case["details"]
