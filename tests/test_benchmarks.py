"""Benchmarks: peers compute batch normalization, and published numbers follow from the data.

Peers whose library is not installed are skipped, as is torch.compile, which takes seconds for each
function: compare.py checks it, like every peer, before timing it.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from numpy.testing import assert_array_equal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of an installation

from benchmarks import compare, floor, runs, tables, timing  # noqa: E402
from benchmarks.checking import as_array, check  # noqa: E402
from benchmarks.gpu import records  # noqa: E402
from benchmarks.gpu import table as gpu_table  # noqa: E402
from benchmarks.peers import OPS, PEERS, Batch, LeftOut, installed, is_ours, ours_for  # noqa: E402
from benchmarks.shapes import RESNET50  # noqa: E402

PEERS_HERE = [name for name in installed() if not name.startswith("torch.compile")]
CASES = [
    *(((60, 7), "float32", op) for op in OPS),
    *(((3, 5, 4, 6), dtype, op) for dtype in compare.DTYPES for op in OPS),
    *(((2, 3, 2, 3, 4), "float32", op) for op in OPS),
]


@pytest.mark.parametrize(("shape", "dtype", "op"), CASES)
def test_every_peer_is_batch_normalization(shape, dtype, op):
    for name in PEERS_HERE:
        peer = PEERS[name]
        if op not in peer.ops or (peer.last and len(shape) == 2):
            continue
        batch = Batch(shape, dtype, last=peer.last)
        try:
            result = peer.ops[op](batch)()
        except LeftOut:
            continue  # onnxruntime does not support bfloat16
        check(name, op, batch, result)
        first = as_array(result if op in ("forward", "inference") else result[0])
        assert first.shape == shape
        assert first.dtype == dtype
        assert first.strides == batch.x.strides or not peer.reuse


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0.02), ("float64", 0.02), ("float16", 0.02), ("bfloat16", 0.1)]
)
def test_a_peer_that_is_wrong_is_found_out(dtype, error):
    batch = Batch((8, 3, 4, 4), dtype)
    right = PEERS["nbnorm"].ops["forward"](batch)()
    check("somebody", "forward", batch, right)
    wrong = right + np.asarray(error).astype(dtype)
    with pytest.raises(AssertionError, match="somebody forward in"):
        check("somebody", "forward", batch, wrong)


def test_a_step_without_its_mask_is_found_out():
    batch = Batch((8, 3, 4, 4))
    y, *_ = PEERS["nbnorm, new output"].ops["relu"](batch)()
    gradients = PEERS["nbnorm"].ops["backward"](batch)()
    with pytest.raises(AssertionError, match="somebody relu in"):
        check("somebody", "relu", batch, (y, *gradients))


def test_like_is_compared_with_like():
    for name, peer in PEERS.items():
        for op in peer.ops:
            us = ours_for(name, op)
            assert is_ours(us)
            assert (PEERS[us].last, PEERS[us].reuse) == (peer.last, peer.reuse)
    assert ours_for("PyTorch channels-last", "forward") == "nbnorm channels-last"
    assert ours_for("F.batch_norm", "relu") == "nbnorm, new output"


@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_the_floor_reads_and_writes_everything_once(dtype):
    for start in (0, 1, 3):  # y starts at and off a cache line
        for size in (1, 17, 5001):
            x = Batch((size, 1), dtype).x.ravel()
            for name in floor.sweeps(x, x):
                memory = np.full(size + 8, 7, dtype)
                y = memory[start : start + size]
                floor.sweeps(x, y)[name]()
                assert_array_equal(y, x, err_msg=name)
                assert (memory[:start] == 7).all(), name
                assert (memory[start + size :] == 7).all(), name


def test_an_op_has_a_floor():
    assert tuple(floor.FLOORS) == OPS


NUMBER = r"(?:[\d,]+|(?=[\d.]{1,4} )[1-9]\d*\.\d+|0\.0*\d{1,3})"


@pytest.mark.parametrize(
    ("value", "three", "times"),
    [
        (0.00045512, "0.000455", "0.000455"),
        (0.55432, "0.554", "0.55"),
        (2.0, "2", "2.00"),
        (54.6789, "54.7", "54.7"),
        (1234.5, "1,230", "1,230"),
    ],
)
def test_numbers_for_people_have_three_digits(value, three, times):
    assert tables.number(value) == three
    assert tables.multiple(value) == times


def row(op, shape, **milliseconds):
    """Return a row with a floor of 1 ms."""
    times = {name: timing.Times(value, 2 * value) for name, value in milliseconds.items()}
    return runs.Row(op, "float32", shape, 1.0, times)


@pytest.fixture
def run():
    """A run in which PyTorch takes 3 times as long as nbnorm, channels-last twice as long."""
    times = {"nbnorm": 2.0, "nbnorm channels-last": 4.0, "PyTorch": 6.0}
    rows = [row("forward", shape, **times, **{"PyTorch channels-last": 8.0}) for shape in RESNET50]
    rows.append(row("forward", (60, 100), nbnorm=2.0, PyTorch=1.0))
    where = {"cpu": "CPU", "cpus": 2, "threads": 2, "system": "Linux", "date": "2026-01-01"}
    return runs.Run(where | {"versions": {"numpy": "2"}}, ["a command"], {"JAX": "why"}, rows)


def test_a_run_is_read_as_it_was_written(run, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    run.write(one)
    assert runs.Run.read(one) == run
    run._replace(commands=["another"]).write(two)
    assert runs.Run.read(one, two).commands == ["a command", "another"]
    assert runs.Run.read(one, two).rows == run.rows * 2
    run._replace(conditions=run.conditions | {"cpu": "other"}).write(two)
    with pytest.raises(ValueError, match="different conditions"):
        runs.Run.read(one, two)


def test_sums_count_every_layer(run):
    sums = tables.resnet_sums(run.rows)
    assert sums["nbnorm"] == 53 * 2.0
    assert sums["floor"] == 53
    assert tables.resnet_sums(run.rows[1:]) == {}


def test_tables_say_what_was_measured(run):
    report = tables.report(run)
    for text in ["CPU, 2 CPUs", "    a command", "JAX: why", "PyTorch channels-last / nbnorm ch"]:
        assert text in report
    line = re.search(r"^\| 32x64x112x112 +\| (.*)$", report, re.M)[1]
    cells = ["1,000", "2,000 4,000 2.00 fl", "4,000 8,000 4.00 fl"]
    assert re.split(r" +\| ?", line)[:3] == cells
    assert "6,000 12,000 3.00x" in line
    assert "8,000 16,000 2.00x" in line
    means = re.search(r"^\| PyTorch channels-last +\| (.*\)) +\|$", tables.section(run), re.M)[1]
    assert means == "2.00x (2.00x, 32x64x112x112)"
    assert "0.50x, 60x100" in tables.section(run)
    for text in (tables.section(run), tables.page(run)):
        assert re.search(r"^\| floor +\| 53,000 +\|$", text, re.M)
        assert re.search(r"^\| nbnorm +\| 106,000 +\|$", text, re.M)


def test_rows_have_the_digits_that_a_clock_tells(run):
    row = run.rows[0]._replace(floor=0.019537923168620935)
    row = row._replace(times={"nbnorm": timing.Times(0.00454671499755932, 1234567.0)})
    assert row.rounded().floor == 0.01954
    assert row.rounded().times == {"nbnorm": timing.Times(0.004547, 1235000.0)}


def test_ops_of_a_shape_have_one_floor(run):
    """The floor is the fastest sweep of any op; backward moves 1.5 times as much memory."""
    rows = [row(op, (60, 100), nbnorm=9.0)._replace(floor=f) for op, f in
            (("forward", 3.0), ("inference", 2.0), ("backward", 4.5))]  # fmt: skip
    rows.append(row("forward", (2, 3), nbnorm=9.0)._replace(floor=1.0))
    floors = [r.floor for r in run._replace(rows=rows).with_least_floors().rows]
    assert floors == [2.0, 2.0, 3.0, 1.0]


def test_a_section_replaces_what_is_between_the_marks(run):
    readme = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    new = tables.with_section(readme, "new\n")
    assert new == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks <!-- speed"):
        tables.with_section("nothing", "new")


def test_the_readme_is_what_its_data_give():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    published = runs.Run.read(ROOT / "docs" / "speed.json")
    assert tables.with_section(readme, tables.section(published)) == readme


def test_what_is_published_has_no_more_digits_than_it_knows():
    published = runs.Run.read(ROOT / "docs" / "speed.json")
    for text in (tables.section(published), tables.page(published), tables.report(published)):
        text = text.replace(runs.describe(published.conditions), "")  # remove versions
        numbers = re.findall(r"\d[\d,]*\.\d+", text)
        assert len(numbers) > 30
        long = [n for n in numbers if len(re.sub(r"^[0.]+|[.,]", "", n)) > 3]
        assert not long


def test_asv_imports_suites_without_what_may_be_missing():
    conf = json.loads((ROOT / "benchmarks" / "asv.conf.json").read_text())
    suites = ROOT / "benchmarks" / conf["benchmark_dir"]
    everywhere = set(ROOT.glob("benchmarks/**/bench_*.py"))
    assert everywhere == set(suites.glob("bench_*.py")) != set()
    missing = (
        *("torch", "jax", "flax", "keras", "onnx", "onnxruntime", "autograd", "mygrad", "thinc"),
        "sklearn",
        *("dask", "h5py", "cupy", "mpi4py", "pytest", "hypothesis", "matplotlib", "tqdm"),
    )
    code = f"""
import importlib, pkgutil, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path[:] = [{str(suites.parent)!r}, *(path for path in sys.path if path != {str(ROOT)!r})]
package = importlib.import_module({suites.name!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
    run_child("-c", code)


def test_the_chart_draws_a_bar_for_everyone(run, tmp_path):
    pytest.importorskip("matplotlib")
    chart = importlib.import_module("benchmarks.chart")
    chart.draw(run, tmp_path / "one.svg")
    chart.draw(run, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    with pytest.raises(ValueError, match="shapes were not measured"):
        chart.draw(run._replace(rows=run.rows[-1:]), tmp_path / "none.svg")


def test_comparison_prints_and_writes(tmp_path):
    child = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--op", "forward",
         "--shapes", "60x100", "2x8x4x4", "--peers", "NumPy", "--markdown", "table.md",
         "--json", "speed.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    text = (tmp_path / "table.md").read_text()
    cells = re.search(r"^\| 60x100 +\| (.*) \|$", text, re.M)[1].split(" | ")
    assert float(cells[0].replace(",", "")) > 0
    assert re.fullmatch(rf"{NUMBER} {NUMBER} {NUMBER} fl *", cells[1])
    assert "best of all peers / nbnorm" in text
    assert "python benchmarks/compare.py --op forward" in text
    assert tables.report(runs.Run.read(tmp_path / "speed.json")) == text


# -- the check of a GPU ---------------------------------------------------------------------------

STEPS_THAT_GO_WRONG = """#!/bin/bash
case "$*" in
    *gpu.table*) exec {python} "$@" ;;
    *"versions"*) echo "GPU: MISSING: none"; exit {versions} ;;
    *"smoke and [float64 and rows"*) echo "tests/cuda/a.py::test_smoke[b] FAILED [ 50%]"; exit 1 ;;
    *"-k large"*) sleep 100 ;;
    *"-m pytest"*) echo "tests/cuda/a.py::test_smoke[c] PASSED [100%]" ;;
esac
"""


def gpu_check(folder, *arguments, versions=0, limit="170"):
    """Run check.sh with a Python whose steps fail or hang as told, and a shorter time limit."""
    script = folder / "benchmarks" / "gpu" / "check.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "benchmarks" / "gpu" / "check.sh").read_text()
    assert "170" in text
    script.write_text(text.replace("170", limit))
    (folder / "python").write_text(
        STEPS_THAT_GO_WRONG.format(python=sys.executable, versions=versions)
    )
    (folder / "python").chmod(0o755)
    child = subprocess.run(
        ["bash", script, *arguments],
        env={**os.environ, "PYTHON": folder / "python", "PYTHONPATH": str(ROOT)},
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    return child.returncode, child.stdout


def test_a_step_that_fails_or_hangs_keeps_none_from_running(tmp_path):
    code, said = gpu_check(tmp_path, "results", "smoke", "short", "correct", "profile", limit="1")
    assert code == 1
    assert "smoke float64 rows: exit status 1" in said
    assert "large: exit status 124" in said
    for step in ("smoke bfloat16 columns", "short", "graph", "suite results"):
        assert f"{step}: exit status 0" in said
    text = (tmp_path / "results" / "table.md").read_text()
    assert re.search(r"^\| smoke float64 rows +\| 1 +\| \d+ +\| 0 +\| 1 +\| 0 ", text, re.M)
    assert re.search(r"^\| large +\| out of time ", text, re.M)
    assert "- smoke float64 rows: tests/cuda/a.py::test_smoke[b] FAILED" in text


def test_a_machine_without_what_is_needed_stops_the_check_at_once(tmp_path):
    code, said = gpu_check(tmp_path, "results", versions=1)
    assert code == 1
    assert "stopped: see " in said
    assert said.count("exit status") == 2  # for versions, in the log and in the table
    assert "- versions: GPU: MISSING: none" in said


def test_a_check_without_failures_ends_with_0(tmp_path):
    code, _ = gpu_check(tmp_path, "results", "short")
    assert code == 0
    assert gpu_check(tmp_path, "--smoke")[0] == 1
    assert (tmp_path / "gpu-results" / "table.md").exists()


def test_a_run_without_tests_fails(tmp_path):
    for options in (["--backend", "cupy"], ["--backend", "read-only", "-k", "no_such_name"]):
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options, "tests/test_plan.py"],
            cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert child.returncode != 0, child.stdout


def test_what_was_timed_on_a_gpu_makes_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_RESULTS", str(tmp_path))
    times = {"copy": 10.0, "nbnorm": 20.0, "nbnorm channels-last": 40.0, "nbnorm, read twice": 30.0}
    times |= {"PyTorch": 60.0, "PyTorch channels-last": 50.0}
    for shape in RESNET50:
        for op in ("forward", "backward"):
            row = {name: [least, 2 * least, 5.0] for name, least in times.items()}
            records.add("row", part="timings", shape=shape, dtype="float32", op=op, times=row)
    records.add("left out", name="torch.compile", reason="why")
    with (tmp_path / records.RESULTS).open("a") as file:
        file.write('{"what": "cut o')
    found = records.read(tmp_path / records.RESULTS)
    rows = gpu_table.rows_of(found)
    assert len(rows) == 2 * len(RESNET50)
    line = re.search(r"^\| 32 \| float32 \| forward +\| (.*) \|$", gpu_table.summary(rows), re.M)[1]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells == ["12", "1.06", "2.12", "2.65", "0.50", "2.50x", "2.50x, 32x64x112x112"]
    line = re.search(r"^\| 32x64x112x112 +\| (.*) \|$", gpu_table.table(rows[:1]), re.M)[1]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells == ["10.0", "20.0", "0.50", "40.0", "0.25", "5.00", "1.50x", "3.00x", "1.25x"]
    assert rows[1].share(30.0) == 0.5  # backward moves half as much again as a copy
    assert list(gpu_table.failures(found, "")) == ["- left out: torch.compile: why"]


def test_kernels_that_were_profiled_are_listed(tmp_path):
    file = tmp_path / "profile.csv"
    assert gpu_table.profile(file) == ""
    kernel = "_ZN6nbnorm4cuda4rows5build12_3clocals_3e5statsB2v1B7tailLE"
    file.write_text(
        "==PROF== Connected\n"
        '"ID","Kernel Name","Grid Size","dram__bytes_read.sum","gpu__time_duration.sum"\n'
        '"","","","Mbyte","us"\n'
        f'"0","{kernel}","(6,1,1)","103","40.1"\n'
    )
    text = gpu_table.profile(file)
    assert re.search(r"^\| .*rows.*stats.*\| \(6,1,1\) \| 103 +\| 40.1 +\|$", text, re.M), text
    assert json.dumps("dram__bytes_read").strip('"') in text
