"""The output of show_config, for bug reports."""

import platform
import subprocess
import sys

import llvmlite
import llvmlite.binding
import numba
import numpy as np
import pytest

import nbnorm

LABELS = [
    "nbnorm",
    "Python",
    "NumPy",
    "Numba",
    "CPU",
    "threads",
    "threading layer",
    "kernel cache",
    "pool",
    "CUDA",
]


def run(*arguments):
    """Run Python with warnings as errors and return what it prints."""
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows(text):
    """Parse the output into a dict of label and value."""
    return {line[:16].strip(): line[16:] for line in text.splitlines()}


def test_show_config_prints_one_line_a_subject(capsys):
    assert nbnorm.show_config() is None
    page = rows(capsys.readouterr().out)
    assert list(page) == LABELS
    assert page["nbnorm"] == nbnorm.__version__
    assert page["Python"].startswith(platform.python_version())
    assert page["NumPy"] == np.__version__
    assert page["Numba"] == f"{numba.__version__}, llvmlite {llvmlite.__version__}"
    assert page["CPU"].startswith(llvmlite.binding.get_host_cpu_name() + ": ")
    assert page["kernel cache"] == (
        nbnorm.cpu.kernels.cache_folder() or "none: no folder can be written to"
    )


def test_only_features_of_this_host_are_listed(capsys):
    nbnorm.show_config()
    listed = rows(capsys.readouterr().out)["CPU"].partition(": ")[2].split()
    host = llvmlite.binding.get_host_cpu_features()
    if listed != ["none", "of", "note"]:
        assert all(host[name] for name in listed)


def test_threads_are_those_in_use(capsys, thread_count):
    most = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(1)
    nbnorm.show_config()
    assert rows(capsys.readouterr().out)["threads"] == f"1 of {most}"


def test_the_module_runs_and_touches_neither_threads_nor_cuda():
    # In a child process: other tests may have started threads in this one.
    code = (
        "import runpy, sys; runpy.run_module('nbnorm', run_name='__main__');"
        "loaded = [name for name in sys.modules if name.startswith(('numba_cuda', 'cupy',"
        " 'numba.cuda.cudadrv.driver'))]; print('loaded'.ljust(16) + repr(loaded))"
    )
    page = rows(run("-c", code))
    assert list(page) == [*LABELS, "loaded"]
    assert page["loaded"] == "[]"
    ref = f"not chosen yet (asked for: {numba.config.THREADING_LAYER}; priority: "
    assert page["threading layer"].startswith(ref)


def test_the_module_prints_what_the_function_prints():
    assert run("-m", "nbnorm") == run("-c", "import nbnorm; nbnorm.show_config()")


def test_the_chosen_threading_layer_is_named():
    code = (
        "import numba.np.ufunc.parallel, nbnorm;"
        "numba.np.ufunc.parallel._launch_threads();"  # as the first parallel kernel does
        "nbnorm.show_config(); print('ref'.ljust(16) + numba.threading_layer())"
    )
    page = rows(run("-c", code))
    assert page["threading layer"].startswith(page["ref"] + " (asked for: ")


@pytest.mark.parametrize("package", ["numba_cuda", "cupy"])
def test_cuda_packages_are_found_without_being_imported(package, tmp_path):
    def installed(text):
        words = rows(text)["CUDA"].split(", ")
        return dict(zip(("numba_cuda", "cupy"), words, strict=True))[package]

    (tmp_path / f"{package}.py").write_text("raise AssertionError('imported')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nbnorm; nbnorm.show_config()"
    assert installed(run("-c", code)).endswith(" installed")
    assert not installed(run("-c", code)).endswith("not installed")
