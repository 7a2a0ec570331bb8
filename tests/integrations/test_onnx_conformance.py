"""ONNX's own tests of batch normalization, run by nbnorm's backend: node tests and old models."""

import re
import unittest
import warnings
from collections import Counter

import pytest

pytest.importorskip("onnx", "1.19", reason="ONNX's own tests need onnx 1.19")

from onnx.backend.test import BackendTest

import nbnorm.integrations.onnx as integration

pytestmark = pytest.mark.cpu_only

# Tests of nodes use the latest operator set; models, once exported by PyTorch, use set 6.
WANTED = r"test_(batchnorm_|BatchNorm\d).*_cpu"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # overflows in cases of other operators
    SUITE = BackendTest(integration.Backend, __name__)

# Select only the tests wanted; all others would count as skipped.
TESTS = {
    name: test
    for case in SUITE.test_cases.values()
    for name, test in vars(case).items()
    if re.fullmatch(WANTED, name)
}


@pytest.mark.parametrize("name", TESTS)
def test_onnx(name, monkeypatch):
    calls = Counter()

    def counted(name, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(integration, name, call)

    for function in ("batch_norm_forward", "batch_norm_inference"):
        counted(function, getattr(integration, function))
    TESTS[name](unittest.TestCase())
    trains = "training_mode" in name
    assert calls == {"batch_norm_forward" if trains else "batch_norm_inference": 1}


def test_all_of_them_are_found():
    nodes = [name for name in TESTS if name.startswith("test_batchnorm_")]
    assert len(nodes) >= 4
    assert len(TESTS) - len(nodes) >= 5
