"""CUDA's compiler in a toolkit at CUDA_HOME, without the wheels that contain it.

Numba looks for its wheels, then where the system looks for libraries, which is not where a toolkit
keeps libnvvm. `check.sh` sets CUDA_HOME; kernels are then compiled for the fake driver's device.
"""

import os
import subprocess
import sys
from pathlib import Path

import driver as fake
import pytest

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
void *dlopen(const char *file, int mode) {  /* a system that does not know libnvvm by its name */
    static void *(*real)(const char *, int);
    if (!real) real = dlsym(RTLD_NEXT, "dlopen");
    return real(file && !strncmp(file, "libnvvm.so", 10) ? "libnvvm.is-hidden" : file, mode);
}
"""


@pytest.fixture(scope="module")
def wheels():
    """Return the folder of the wheels with CUDA's compiler."""
    if reason := fake.missing():
        pytest.skip(reason)
    nvvm = pytest.importorskip("nvidia.cu13", reason="the CUDA toolkit's packages (nvidia-*)")
    return Path(nvvm.__path__[0])


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """Return environment variables of a Python with the fake driver and without CUDA's wheels."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for installed in wheels.parents[1].iterdir():
        if installed.name != "nvidia":
            (packages / installed.name).symlink_to(installed)
    (folder / "hidden.c").write_text(HIDDEN)
    library = folder / "hidden.so"
    build = ["cc", "-shared", "-fPIC", "-o", library, folder / "hidden.c", "-ldl"]
    subprocess.run(build, check=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    of_driver = fake.environment(folder)
    return {**own, **of_driver, "LD_PRELOAD": library, "PYTHON": folder / "venv" / "bin" / "python"}


def said_by_the_check(environment, folder, toolkit):
    """Return what check.sh logs about the machine."""
    check = ["bash", ROOT / "benchmarks" / "gpu" / "check.sh", "--smoke", folder]
    child = subprocess.run(
        check, env={**environment, "CUDA_TOOLKIT": toolkit}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 1, child.stderr  # CuPy does not work with the fake driver
    assert "stopped: see " in child.stdout
    return (folder / "log.txt").read_text()


def test_the_check_of_a_gpu_leads_to_a_toolkit(environment, wheels, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "nvvm" / "lib64").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    for library in wheels.glob("lib/lib*.so*"):
        place = "nvvm/lib64" if library.name.startswith("libnvvm.") else "lib64"
        (toolkit / place / library.name).symlink_to(library)
    (toolkit / "nvvm" / "libdevice").symlink_to(wheels / "nvvm" / "libdevice")
    found = said_by_the_check(environment, tmp_path / "found", toolkit)
    assert "versions: compiler: a kernel compiles and loads" in found, found
    assert str(toolkit / "nvvm" / "lib64") in found


def test_without_a_toolkit_the_check_stops_and_says_what_is_missing(environment, tmp_path):
    found = said_by_the_check(environment, tmp_path / "lost", tmp_path / "nothing")
    assert "versions: compiler: MISSING: RuntimeError: CUDA's compiler is incomplete" in found
    assert "set CUDA_HOME to a CUDA toolkit" in found
    assert "nothing can run here without: GPU, libraries, compiler" in found
