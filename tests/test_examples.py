"""The examples do what they document."""

import gzip
import importlib
import importlib.util
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from numpy.testing import assert_allclose

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PLOTS = sorted(path.stem for path in EXAMPLES.glob("plot_*.py"))


def lacks(*libraries):
    return any(importlib.util.find_spec(name) is None for name in libraries)


needs_examples = pytest.mark.skipif(
    lacks("matplotlib", "tqdm"), reason='needs the extra "examples" (matplotlib and tqdm)'
)
needs_torch = pytest.mark.skipif(lacks("torch"), reason="torch is not installed")


@pytest.fixture
def load(monkeypatch):
    """Return a function that imports an example; restore the variable that it sets."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def run_figure(folder, program, *options):
    """Run an example in this folder; overflow and NaN are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / program), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_figure1(folder, *options):
    return run_figure(folder, "figure1.py", *options)


@needs_examples
def test_figure1_prints_a_table_and_writes_a_figure(tmp_path):
    child = run_figure1(tmp_path, "--steps", "150", "--output", "short.png")
    assert child.returncode == 0, child.stderr
    rows = re.findall(r"^ +(\d+) +(0\.\d{3}|1\.000) +(0\.\d{3}|1\.000)$", child.stdout, re.M)
    assert len(rows) == 20, child.stdout
    step, with_bn, without_bn = rows[-1]
    assert int(step) == 150
    # Ten classes: an untrained network is right once in ten.
    assert float(with_bn) > 0.6
    assert float(without_bn) < 0.3
    ends = r"^with(?:out)? BN, rate 0\.1: [1-9]\d* us a step; accuracy in the end \d\.\d{3}$"
    assert len(re.findall(ends, child.stdout, re.M)) == 2
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["short.png"]


@needs_examples
def test_figure1_runs_for_a_single_step_and_refuses_0(tmp_path):
    assert run_figure1(tmp_path, "--steps", "1").returncode == 0
    assert (tmp_path / "figure1.png").exists()
    for option in ("--steps", "--seeds"):
        child = run_figure1(tmp_path, option, "0")
        assert child.returncode == 2
        assert f"{option} must be at least 1" in child.stderr


@needs_examples
def test_figure1_keeps_finished_seeds_and_draws_the_same_from_them(tmp_path):
    def run(*options):
        child = run_figure1(
            tmp_path, "--steps", "20", "--results", "kept.json", "--output", "drawn.svg", *options
        )
        return child, json.loads((tmp_path / "kept.json").read_text()), child.stderr

    child, first, _ = run("--seeds", "2")
    assert child.returncode == 0, child.stderr
    one, other = "rate 0.1, seed 0", "rate 0.1, seed 1"
    assert list(first["runs"]) == [one, other]
    assert first["runs"][one] != first["runs"][other]
    assert first["command"].endswith("--results kept.json --output drawn.svg --seeds 2")
    drawn = (tmp_path / "drawn.svg").read_bytes()

    child, same, progress = run("--seeds", "2")
    assert "seed" not in progress
    assert same == first
    assert (tmp_path / "drawn.svg").read_bytes() == drawn

    child, more, progress = run("--seeds", "3")
    assert re.findall(r"seed (\d)", progress)[-1] == "2"
    assert {name: more["runs"][name] for name in (one, other)} == first["runs"]
    end = r"^with BN, rate 0\.1: .* in the end 0\.\d{3}, 0\.\d{3} to 0\.\d{3} over 3 seeds$"
    assert re.search(end, child.stdout, re.M), child.stdout
    assert (tmp_path / "drawn.svg").read_bytes() != drawn

    child, rates, progress = run("--rates", "0.1", "2e-3")
    assert list(rates["runs"]) == [*more["runs"], "rate 0.002, seed 0"]
    assert len(re.findall(r"^ +20( +0\.\d{3}){4}$", child.stdout, re.M)) == 1, child.stdout

    child, kept, progress = run("--steps", "30")
    assert child.returncode == 2
    assert "'steps': 20" in progress
    assert kept == rates

    child, _, progress = run("--quick")
    assert child.returncode == 2
    assert "--quick: not allowed with argument --steps" in progress


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    """A folder with MNIST's files, two of them gzipped, and their contents."""
    folder = tmp_path / "some-mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pairs = []
    for part, count, suffix in (("train", 70, ""), ("t10k", 30, ".gz")):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=count, dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        pairs.append((images, labels))
    return folder, pairs


@needs_examples
def test_figure1_reads_idx_files(load, idx_folder):
    folder, pairs = idx_folder
    for (images, labels), (pixels, numbers) in zip(
        load("figure1").idx_digits(folder), pairs, strict=True
    ):
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images * 255, pixels.reshape(-1, 784))
        np.testing.assert_array_equal(labels, numbers)


@needs_examples
def test_figure1_learns_from_idx_files(tmp_path, idx_folder):
    folder, _ = idx_folder
    child = run_figure1(tmp_path, "--steps", "3", "--data", str(folder), "--results", "kept.json")
    assert child.returncode == 0, child.stderr
    file = json.loads((tmp_path / "kept.json").read_text())
    assert file["settings"]["data"] == "some-mnist"


@needs_examples
def test_figure1_refuses_a_folder_without_the_files_and_files_of_something_else(
    tmp_path, idx_folder
):
    folder, _ = idx_folder
    labels = folder / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, message in (
        (whole[:-1], "is not an IDX file of bytes"),
        (b"\0\0\x0d" + whole[3:], "is not an IDX file of bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 69]) + whole[9:], "for 69 labels"),
    ):
        labels.write_bytes(content)
        child = run_figure1(tmp_path, "--data", str(folder))
        assert child.returncode == 2
        assert message in child.stderr
    labels.unlink()
    child = run_figure1(tmp_path, "--data", str(folder))
    assert child.returncode == 2
    assert "has no train-labels-idx1-ubyte" in child.stderr


@pytest.mark.parametrize("activation", ["Sigmoid", "ReLU"])
@pytest.mark.parametrize("batch_norm", [None, "before", "after"])
def test_gradients_of_the_network_agree_with_differences(load, batch_norm, activation):
    perceptron = load("perceptron")
    rng = np.random.default_rng(0)
    network = perceptron.Network(
        (6, 5, 4, 3), rng, batch_norm=batch_norm, spread=1.0, dtype=np.float64,
        activation=getattr(perceptron, activation),
    )  # fmt: skip
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
    assert len(gradients) == {None: 6, "before": 8, "after": 10}[batch_norm]
    # Central differences of a loss L near 1: errors h^2 L'''/6 and 2^-52 L/h.
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


def test_compiled_loop_trains_as_python_does(load, monkeypatch, capsys):
    example, perceptron = load("compiled_mlp"), load("perceptron")
    rng = np.random.default_rng(0)
    images = rng.random((50, 784)).astype(np.float32)
    labels = rng.integers(10, size=50).astype(np.uint8)
    batches = rng.integers(50, size=(6, 12))
    compiled, by_python = (
        perceptron.Network(example.SIZES, np.random.default_rng(1), batch_norm="before")
        for _ in range(2)
    )
    losses = example.train(images, labels, batches, 0.1, *example.parameters_of(compiled))
    expected = example.train_in_python(by_python, images, labels, batches, 0.1)
    assert expected[-1] < expected[0] - 0.1
    # Float32 matrix products of up to 784 terms are summed in another order, with an error of some
    # sqrt(784) / 2 units in the last place, a few times in six steps.
    assert_allclose(losses, expected, rtol=100 * 2**-23)
    for one, other in zip(
        example.parameters_of(compiled), example.parameters_of(by_python), strict=True
    ):
        for array, expected_array in zip(one, other, strict=True):
            scale = np.abs(expected_array).max()
            assert_allclose(array, expected_array, rtol=0, atol=100 * 2**-23 * scale)

    monkeypatch.setattr("sys.argv", ["compiled_mlp.py", "--quick"])
    example.main()
    rows = re.findall(r"^(compiled loop|Python) .* (\d+\.\d)% +\d+$", capsys.readouterr().out, re.M)
    assert [name for name, _ in rows] == ["compiled loop", "Python"]
    assert min(float(percent) for _, percent in rows) > 60
    assert abs(float(rows[0][1]) - float(rows[1][1])) < 2
    monkeypatch.setattr("sys.argv", ["compiled_mlp.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--steps must be at least 1" in capsys.readouterr().err


@needs_examples
@pytest.mark.skipif(sys.platform != "linux", reason="the example limits memory as Linux does")
def test_population_stats_has_less_memory_than_data(tmp_path):
    child = run_figure(tmp_path, "population_stats.py", "--gib", "0.25")
    assert child.returncode == 0, child.stderr
    assert "341 pictures, 256 MiB" in child.stdout
    assert len(re.findall(r"MemoryError$", child.stdout, re.M)) == 2, child.stdout
    numbers = r"((?: +\d+\.\d +\d+\.\d +[\d.e+-]+){2})"
    rows = re.findall(rf"^(?:red|green|blue){numbers}$", child.stdout, re.M)
    assert len(rows) == 3, child.stdout
    for row in rows:
        mean, _, mean_error, var, _, var_error = map(float, row.split())
        assert 100 < mean < 150
        assert 2000 < var < 4000
        assert max(mean_error, var_error) < 4 * 2.0**-23  # arithmetic in float32
    assert "population statistics: 100%" in child.stderr
    assert not list(tmp_path.iterdir())
    child = run_figure(tmp_path, "population_stats.py", "--gib", "0.0001")
    assert child.returncode == 2
    assert "--gib is too small for a picture" in child.stderr


# Figure 2


@needs_examples
@needs_torch
def test_figure2_prints_a_table_writes_a_figure_and_keeps_finished_runs(tmp_path):
    options = ("--steps", "40", "--results", "kept.json", "--output", "drawn.svg")
    child = run_figure(tmp_path, "figure2.py", *options, "--networks", "BN-x5")
    assert child.returncode == 0, child.stderr
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert list(kept["runs"]) == ["BN-x5, seed 0"]
    child = run_figure(tmp_path, "figure2.py", *options, "--networks", "Baseline", "BN-x5")
    assert child.returncode == 0, child.stderr
    assert "BN-x5" not in child.stderr  # where the progress bar is
    both = json.loads((tmp_path / "kept.json").read_text())
    assert both["runs"]["BN-x5, seed 0"] == kept["runs"]["BN-x5, seed 0"]
    rows = re.findall(r"^(\S+) +(?:\d+|-) +\d+\.\d%$", child.stdout, re.M)
    assert rows == ["Baseline", "BN-x5"]
    assert (tmp_path / "drawn.svg").stat().st_size > 1000
    child = run_figure(tmp_path, "figure2.py", *options, "--changes", "lrn")
    assert child.returncode == 2
    assert "'distortion'" in child.stderr


@needs_examples
@needs_torch
def test_figure2_table_counts_steps_of_the_mean_over_seeds(load):
    def run(*accuracy, diverged=None):
        return {"accuracy": [*accuracy, *[accuracy[-1]] * 37], "diverged": diverged}

    lines = load("figure2").table(
        400,
        {
            "Baseline": [run(0.1, 0.5, 0.8), run(0.1, 0.9, 0.8)],
            "BN-x5": [run(0.5, 0.9, 0.9), run(0.5, 0.7, 0.9)],
            "Sigmoid": [run(0.1, 0.1, 0.1), run(0.1, 0.1, 0.1, diverged=7)],
        },
    )
    assert [line.split() for line in lines[1:]] == [
        ["Baseline", "30", "80.0%", "80.0%", "to", "90.0%"],
        ["BN-x5", "20", "90.0%", "90.0%", "to", "90.0%"],
        ["Sigmoid", "-", "10.0%", "10.0%", "to", "10.0%,", "diverged:", "1", "of", "2"],
    ]
    assert "steps to 80.0%" in lines[0]


@needs_examples
@needs_torch
def test_figure2_normalises_before_every_nonlinearity(load):
    import torch

    figure2 = load("figure2")
    for name, variant in figure2.VARIANTS.items():
        modules = list(figure2.network(variant, figure2.Habits()).modules())
        convolutions = [m for m in modules if isinstance(m, torch.nn.Conv2d)]
        norms = [m for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(convolutions) == 29, name
        assert len(norms) == (29 if variant.batch_norm else 0), name
        assert all(norm.relu != variant.sigmoid for norm in norms), name
        nonlinear = sum(isinstance(m, torch.nn.ReLU | torch.nn.Sigmoid) for m in modules)
        assert nonlinear + sum(norm.relu for norm in norms) == 29, name
        assert all((c.bias is None) == variant.batch_norm for c in convolutions), name


@needs_examples
@needs_torch
def test_figure2_pools_after_the_convolution_what_inception_pools_before(load):
    import torch

    figure2 = load("figure2")
    torch.manual_seed(0)
    conv, pool, _ = figure2.Inception(8, 16, figure2.VARIANTS["Baseline"]).towers[3][0]
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(pool(conv(x)), conv(pool(x)))


@needs_examples
@needs_torch
def test_figure2_shuffles_as_its_habits_say(load):
    import torch

    figure2 = load("figure2")
    images, labels = torch.ones(1024, 1, 28, 28), torch.arange(1024)
    for shuffling in ("none", "within", "across"):
        habits = figure2.Habits(shuffling=shuffling)
        drawn = figure2.batches(images, labels, habits, torch.Generator().manual_seed(0))
        seen = [next(drawn) for _ in range(64)]
        first, second = (torch.cat([y for _, y in seen[i : i + 32]]) for i in (0, 32))
        assert torch.equal(first, second) == (shuffling == "none")
        same_half = torch.isin(first[:512], second[:512]).float().mean()
        assert same_half == 1 if shuffling != "across" else 0.4 < same_half < 0.6
        for epoch in (first, second):
            assert sorted(epoch.tolist()) == list(range(1024))
        assert 0.3 < (seen[0][0] - 1).abs().max() <= 0.8


@needs_examples
@needs_torch
def test_shuffling_and_dropout_keep_finished_runs_and_share_them(
    load, monkeypatch, tmp_path, capsys
):
    """Given accuracies replace the training, which the tests of figure2 run."""
    figure2, example = load("figure2"), load("shuffling_dropout")
    trained = []

    def train(variant, data, seed, rate, steps, habits, progress):
        trained.append((variant, habits))
        return {"accuracy": [0.0] * 30 + [len(trained) / 20] * 10, "diverged": None}

    def run(*options):
        trained.clear()
        monkeypatch.setattr("sys.argv", [example.__file__, *options])
        example.main()
        return re.findall(r"^(Baseline|BN-x5) +(.*\S) +(\d+\.\d%)$", capsys.readouterr().out, re.M)

    monkeypatch.setattr(figure2, "train", train)
    monkeypatch.setattr(example.runs, "one_thread", lambda: None)  # would change this process
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.svg"
    options = "--quick", "--results", str(kept), "--output", str(drawn)
    rows = run(*options)
    assert len(trained) == len(set(trained)) == 10  # twelve cases; the panels share two
    assert json.loads(kept.read_text())["settings"]["steps"] == 100
    found = {row[:2]: row[2] for row in rows}
    assert len(rows) == len(found) == 12
    assert len(set(found.values())) == 10
    assert found["Baseline", "none"] == found["Baseline", "0.4"]
    assert found["BN-x5", "across"] == found["BN-x5", "0"]
    picture = drawn.read_bytes()
    assert run(*options) == rows
    assert not trained
    assert drawn.read_bytes() == picture
    with pytest.raises(SystemExit):
        run("--steps", "39")
    assert "--steps must be at least 40" in capsys.readouterr().err


@needs_examples
@needs_torch
def test_figure2_says_when_a_network_has_diverged(load):
    import torch
    from tqdm import tqdm

    figure2 = load("figure2")
    data = torch.ones(1064, 1, 28, 28), torch.zeros(1064, dtype=torch.int64)
    with tqdm(total=80, disable=True) as progress:
        found = figure2.train(
            figure2.VARIANTS["Baseline"], data, 0, 1e30, 80, figure2.Habits(), progress
        )
    assert 1 < found["diverged"] < 80
    assert len(found["accuracy"]) == 40
    assert found["accuracy"][-1] == 0.1


# Committed results


@needs_examples
@pytest.mark.parametrize(
    "name",
    ["figure1", *(pytest.param(n, marks=needs_torch) for n in ("figure2", "shuffling_dropout"))],
)
def test_committed_results_are_whole_and_of_their_command(name, tmp_path):
    path = ROOT / "docs" / "results" / f"{name}.json"
    before = path.read_bytes()
    python, program, *options = shlex.split(json.loads(before)["command"])
    assert (python, program) == ("python", f"docs/examples/{name}.py")
    drawn = tmp_path / "drawn.svg"
    child = run_figure(ROOT, Path(program).name, *options, "--output", str(drawn))
    assert child.returncode == 0, child.stderr
    assert drawn.read_bytes()[-7:] == b"</svg>\n"
    assert path.read_bytes() == before, "the example trained again"
    # Every row of the table in docs/experiments.md must be a row of the printed table.
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    printed = {tuple(re.split(r"  +", line.strip())) for line in child.stdout.splitlines()}
    table = page.partition(f"](results/{name}.svg)")[2].partition("    python")[0]
    rows = [tuple(re.split(r" \| ", line[2:-2])) for line in table.splitlines() if line[:2] == "| "]
    shown = [row[:4] if name == "figure2" else row for row in rows[1:]]
    assert len(shown) > 4
    assert set(shown) <= printed


# Plots: each runs as in the gallery, and shows what its text states.

RUN_PLOT = """
import pickle, runpy, sys
folder, name, out, *expressions = sys.argv[1:]
sys.path.append(folder)
found = runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
with open(out, "wb") as file:
    pickle.dump([eval(expression, found) for expression in expressions], file)
import matplotlib.pyplot as plt
assert plt.get_fignums(), "no figure"
"""


@pytest.fixture
def plot(tmp_path):
    """Return a function that runs a plot and evaluates expressions in it."""

    def run(name, *expressions):
        out = tmp_path / "values"
        options = "-W", "error::RuntimeWarning", "-c", RUN_PLOT
        run_child(*options, str(EXAMPLES), name, str(out), *expressions, MPLBACKEND="Agg")
        return pickle.loads(out.read_bytes())

    return run


def test_every_plot_is_tested_and_begins_as_the_gallery_wants_it():
    tested = set(re.findall(r'plot\(\s*"(plot_\w+)"', Path(__file__).read_text()))
    assert tested == set(PLOTS)
    for name in PLOTS:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert re.match(r'r?"""\n(.+)\n=+\n\n', text), name
        assert "\n# %%\n" in text, name


@needs_examples
def test_channels_come_out_with_mean_beta_and_deviation_gamma(plot):
    y, gamma, beta, moved = plot("plot_forward", "y", "gamma", "beta", "moved")
    assert_allclose(y.mean(0), beta, rtol=0, atol=1e-5)
    # eps is 4e-5 of the least variance, which lowers the deviation by half as much.
    assert_allclose(y.std(0), gamma, rtol=5e-5)
    assert np.abs(moved - y).max() < 5e-5 * np.abs(y).max()


@needs_examples
def test_scale_of_the_weights(plot):
    (deviations,) = plot("plot_scale_invariance", "deviations")
    # Sums of 100 and 256 float32 terms, with errors of some eight units in the last place.
    rounding = 8 * 2**-23
    assert deviations[0.0].max() < rounding
    assert deviations[1e-5][-1].max() < rounding
    assert (np.diff(deviations[1e-5][:12], axis=0) < 0).all()
    assert deviations[1e-5][0].min() > 0.5


@needs_examples
def test_two_jacobians(plot):
    deviations, singular = plot("plot_jacobians", "deviations", "singular")
    assert deviations.max() < 2**-48
    normalised, plain = singular["BN((aW)u)"], singular["(aW)u"]
    assert_allclose(normalised, np.broadcast_to(normalised[:1], normalised.shape), atol=2**-48)
    assert_allclose(plain[-1], 1e4 * plain[0], rtol=1e-9)


@needs_examples
def test_gradients_vanish_without_batch_normalization(plot):
    (relative,) = plot("plot_gradients_by_layer", "relative")
    for (name, scale), values in relative.items():
        if name == "with BN":
            assert 0.3 < values[0] < 0.5, scale
            assert 0.9 < values[1:].min() <= values[1:].max() < 1.4, scale
        else:
            assert (np.diff(np.log(values)) > 0.5).all(), scale
    assert 1e-9 < relative["without BN", 0.05][0] < 1e-8


@needs_examples
def test_initial_weights(plot):
    accuracy, scales = plot("plot_initial_weights", "accuracy", "SCALES")
    normalised, inputs, neither = (
        accuracy[kind] for kind in ("batch normalization", "normalised inputs", "neither")
    )
    assert scales == (0.001, 0.01, 0.05, 0.2, 1.0)
    assert 0.8 < normalised.min() < normalised.max() < 0.91
    for others in (inputs, neither):
        assert others[:, :2].max() < 0.15
        assert others[:, 3].min() > 0.8
    assert (neither[:, 2] < inputs[:, 2]).all()
    assert inputs[:, 2].max() < 0.5
    assert (inputs[:, 4] < neither[:, 4]).all()
    assert inputs[:, 4].min() > 0.6


@needs_examples
def test_gradient_of_whitening_agrees_with_differences(plot):
    """Central differences of sums near 1, in float64: errors near h^2 and 2^-52 / h."""
    gradient, differences = plot(
        "plot_whitening",
        "whiten_backward(dy := targets[:7, :3], whiten(x := u[:7, :3])[1], True)",
        """np.reshape([
            np.sum(dy * (whiten(x + step)[0] - whiten(x - step)[0])) / 2e-5
            for step in 1e-5 * np.eye(21).reshape(21, 7, 3)
        ], (7, 3))""",
    )
    assert np.abs(gradient).max() > 0.1
    assert_allclose(gradient, differences, rtol=0, atol=1e-7)


@needs_examples
def test_whitening(plot):
    trained, times = plot("plot_whitening", "trained", "times")
    for method in ("whitening", "batch normalization"):
        (through, norm), (constant, grown) = (trained[method, kind].T for kind in (1, 0))
        assert (constant > through)[12:].all()
        assert constant[-100:].min() > through[-1] + 0.2
        assert (np.diff(grown) > 0).all()
        assert 11.5 < grown[-1] / grown[0] < 13
        assert norm[0] < norm[-1] == pytest.approx(1.25 * norm[0], rel=0.03)
    for seen in times.values():  # other processes disturb times: check only that they are positive
        assert len(seen) == 7
        assert min(seen) > 0


@needs_examples
def test_a_bias_grows_for_ever_where_statistics_are_constants(plot):
    bias, loss, true_bias, true_loss = plot(
        "plot_bias", "constant_bias", "constant_loss", "true_bias", "true_loss"
    )
    assert bias[0] > 0.1
    assert_allclose(np.diff(bias), bias[0], rtol=1e-9)
    assert_allclose(loss, loss[0], rtol=1e-9)
    assert np.abs(true_bias).max() < 1e-12
    assert_allclose(true_loss, loss[0], rtol=1e-9)


@needs_examples
def test_before_or_after_the_nonlinearity(plot):
    (accuracy,) = plot("plot_before_after", "accuracy")
    end = {case: runs[:, -1] for case, runs in accuracy.items()}
    start = {case: runs[:, 0] for case, runs in accuracy.items()}
    for rate in (0.05, 0.5):
        for place in ("before", "after"):
            assert end["sigmoids", rate, place].min() > end["sigmoids", rate, "none"].max()
        after, before = (accuracy["sigmoids", rate, p].mean(axis=0) for p in ("after", "before"))
        assert after[-1] > before[-1]
        relus = [end["ReLUs", rate, place].mean() for place in ("before", "after")]
        assert abs(relus[0] - relus[1]) < 0.02
    for place in ("before", "after"):
        assert start["ReLUs", 0.5, place].min() > start["ReLUs", 0.5, "none"].max()


@needs_examples
def test_statistics_at_inference(plot):
    answers, momenta, norms, arrived = plot(
        "plot_inference", "answers", "MOMENTA",
        "[(n.running_mean, n.running_var) for n in network.norms]", "forward(images)[1]",
    )  # fmt: skip
    for step, near in ((50, 0.05), (1000, 0.02)):
        by_momentum, others = answers[step]
        assert others["of the batch, sorted digits"] < 0.5
        assert abs(others["of the batch, 50 digits"] - others["exact"]) < near
        assert by_momentum[0] < others["exact"] - 0.1
        forgotten = [a for a, m in zip(by_momentum, momenta, strict=True) if m * step >= 5]
        assert len(forgotten) >= 3
        assert np.abs(np.array(forgotten) - others["exact"]).max() < near
    # Recalibrated statistics are exact for each layer, except for rounding of the products before.
    for (mean, var), x in zip(norms, arrived, strict=True):
        x = x.astype(np.float64)
        spread = x.std(axis=0)
        assert (np.abs(mean - x.mean(axis=0)) < 1e-5 * (np.abs(mean) + spread)).all()
        assert_allclose(var, x.var(axis=0, ddof=1), rtol=1e-5)


@needs_examples
def test_small_batches(plot):
    errors, sizes = plot("plot_batch_size", "errors", "BATCHES")
    with_bn, without = errors["with BN"].mean(axis=0), errors["without BN"].mean(axis=0)
    assert sizes.tolist() == [2, 4, 8, 16, 32, 64, 128, 256]
    assert with_bn[0] > 0.5
    assert with_bn[1] > without[1]
    assert (with_bn[3:] < without[3:]).all()
    assert without[-1] > 2 * without[:-1].max()


@needs_examples
def test_accuracy_where_the_mean_is_large(plot):
    (errors,) = plot("plot_mean_offset", "errors")
    assert {"nbnorm", "NumPy"} <= errors["forward"].keys()
    for lines in errors.values():
        assert lines["nbnorm"].max() < 2e-6  # four units in the last place of y, which is up to 8
    assert errors["forward"]["NumPy"][-1] > 1e-3


@needs_examples
def test_folding_changes_no_output_and_saves_time(plot):
    errors, times = plot("plot_folding", "errors", "times")
    for (name, width), found in errors.items():
        terms = width * (9 if "convolution" in name else 1)
        # The error of a sum grows with the square root of its number of terms; y is near 5.
        assert max(found) < 8 * 2**-23 * terms**0.5, name
    unfolded, folded = times["linear, 1,000 rows", 16]
    assert folded < unfolded
