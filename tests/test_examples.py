"""The examples do what they say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

ROOT = Path(__file__).resolve().parents[1]
FIGURE1 = ROOT / "docs" / "examples" / "figure1.py"
POPULATION_STATS = ROOT / "docs" / "examples" / "population_stats.py"

needs_examples = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "tqdm")),
    reason='needs the extra "examples" (matplotlib and tqdm)',
)


@pytest.fixture
def figure1(monkeypatch):
    """The example as a module; the variable that it sets is put back afterwards."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    spec = importlib.util.spec_from_file_location("figure1", FIGURE1)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_figure1(folder, *options):
    return run_example(FIGURE1, folder, *options)


def run_example(script, folder, *options):
    """Run an example in this folder; an overflow or a NaN on the way is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(script), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_examples
def test_figure1_prints_a_table_and_writes_a_figure(tmp_path):
    child = run_figure1(tmp_path, "--steps", "150", "--output", "short.png")
    assert child.returncode == 0, child.stderr
    rows = re.findall(r"^ +(\d+) +(0\.\d{3}|1\.000) +(0\.\d{3}|1\.000)$", child.stdout, re.M)
    assert len(rows) == 20, child.stdout
    step, with_bn, without_bn = rows[-1]
    assert int(step) == 150
    # Ten classes: a network that has learnt nothing is right once in ten.
    assert float(with_bn) > 0.6
    assert float(without_bn) < 0.3
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["short.png"]


@needs_examples
def test_figure1_runs_for_a_single_step_and_says_no_to_none(tmp_path):
    assert run_figure1(tmp_path, "--steps", "1").returncode == 0
    assert (tmp_path / "figure1.png").exists()
    child = run_figure1(tmp_path, "--steps", "0")
    assert child.returncode == 2
    assert "--steps must be at least 1" in child.stderr


@needs_examples
@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_of_the_network_agree_with_differences(figure1, batch_norm):
    rng = np.random.default_rng(0)
    network = figure1.Network(
        (6, 5, 4, 3), rng, batch_norm=batch_norm, spread=1.0, dtype=np.float64
    )
    x, labels = rng.standard_normal((7, 6)), rng.integers(3, size=7)
    for layer in network.layers:
        for parameter in layer.parameters.values():
            parameter += 0.3 * rng.standard_normal(parameter.shape)
    network.backpropagate(x, labels)
    gradients = [
        (parameter, layer.grads[name].copy())
        for layer in network.layers
        for name, parameter in layer.parameters.items()
    ]
    assert len(gradients) == (8 if batch_norm else 6)
    # Central differences of a loss L near 1: off by h^2 L'''/6 and by 2^-52 L/h.
    h = 1e-5
    for parameter, gradient in gradients:
        expected = np.empty_like(parameter)
        for i, value in np.ndenumerate(parameter):
            losses = []
            for parameter[i] in (value - h, value + h):
                losses.append(network.backpropagate(x, labels))
            parameter[i] = value
            expected[i] = (losses[1] - losses[0]) / (2 * h)
        assert np.abs(gradient).max() > 1e-3
        assert_allclose(gradient, expected, rtol=0, atol=1e-9)


@needs_examples
@pytest.mark.skipif(sys.platform != "linux", reason="the example limits memory as Linux does")
def test_population_stats_has_less_memory_than_data(tmp_path):
    child = run_example(POPULATION_STATS, tmp_path, "--gib", "0.25")
    assert child.returncode == 0, child.stderr
    assert "341 pictures, 256 MiB" in child.stdout
    assert len(re.findall(r"MemoryError$", child.stdout, re.M)) == 2, child.stdout
    rows = re.findall(r"^(?:red|green|blue)((?: +[\d.e+-]+){6})$", child.stdout, re.M)
    assert len(rows) == 3, child.stdout
    for row in rows:
        mean, _, mean_error, var, _, var_error = map(float, row.split())
        assert 100 < mean < 150
        assert 2000 < var < 4000
        assert max(mean_error, var_error) < 4 * 2.0**-23  # arithmetic in float32
    assert "population statistics: 100%" in child.stderr
    assert not list(tmp_path.iterdir())
    child = run_example(POPULATION_STATS, tmp_path, "--gib", "0.0001")
    assert child.returncode == 2
    assert "--gib is too small for a picture" in child.stderr
