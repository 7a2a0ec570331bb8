"""Any number of threads gives the same bits, serial or parallel, in this process and in others.

Run as a script, this file prints one hash of all results per thread count, for child processes
of the last tests.
"""

import hashlib
import os
import signal
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numba
import numpy as np
import pytest
from children import run_child
from hypothesis import given
from strategies import recipes
from tolerances import assert_same_bits

import nbnorm

# Small shapes stay serial; large ones are split by channels, by samples or within a channel.
SHAPES = [
    (4, 3, 8, 8),
    (60, 100),
    (2, 1, 7, 7),
    (16, 64, 28, 28),
    (8, 256, 7, 7),
    (4, 3, 200, 200),
    (1, 1, 600, 601),
    (20000, 33),
    (64, 4097),
]
CHANNELS_LAST = [(8, 28, 28, 64), (4, 200, 200, 3)]
CASES = [(shape, 1) for shape in SHAPES] + [(shape, -1) for shape in CHANNELS_LAST]
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)


def everything(shape, axis, dtype="float32"):
    """Return all results of one forward and backward, fused and split, as a flat list."""
    rng = np.random.default_rng(len(shape))
    x, dy, residual = ((rng.normal(size=shape) + 7).astype(dtype) for _ in range(3))
    gamma, beta = (rng.normal(size=shape[axis]).astype("float32") for _ in range(2))
    running = [np.zeros(shape[axis], "float32"), np.ones(shape[axis], "float32")]
    options = {"axis": axis, "activation": "relu"}
    forward = nbnorm.batch_norm_forward(x, gamma, beta, *running, axis=axis)
    grads = nbnorm.batch_norm_backward(dy, x, gamma, forward.mean, forward.rstd, axis=axis)
    if dtype == "float64":  # the rest would use the same kernels
        return [*running, *forward, *grads[:3]]
    fused = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, **options)
    arguments = (dy, x, gamma, forward.mean, forward.rstd)
    masked = nbnorm.batch_norm_backward(*arguments, beta=beta, **options)
    added = nbnorm.batch_norm_backward(*arguments, beta=beta, y=fused.y, **options)
    frozen = nbnorm.batch_norm_backward(*arguments, training=False, axis=axis)
    inference = nbnorm.batch_norm_inference(x, gamma, beta, *running, axis=axis)
    moments = nbnorm.batch_norm_stats(x, axis=axis)
    results = [*running, *forward, *fused, *grads[:3], *masked[:3], *added, *frozen[:3], inference]
    return [*results, moments.mean, moments.m2]


@cases
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_thread_gives_the_bits_of_all(shape, axis, dtype, thread_count):
    of_all = everything(shape, axis, dtype)
    numba.set_num_threads(1)
    of_one = everything(shape, axis, dtype)
    assert len(of_one) == len(of_all)
    for ours, theirs in zip(of_one, of_all, strict=True):
        assert_same_bits(ours, theirs)


@given(recipes(dtypes=("float32",), most=200_000))
def test_one_thread_gives_the_bits_of_all_for_any_shape(recipe):
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    results = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        forward = nbnorm.batch_norm_forward(x, gamma, beta, axis=recipe.axis)
        statistics = forward.mean, forward.rstd
        grads = nbnorm.batch_norm_backward(dy, x, gamma, *statistics, axis=recipe.axis)
        results.append([*forward, *grads[:3]])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


@cases
def test_nothing_is_written_around_out(shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    results = []
    for _ in range(2):
        memory = np.full(x.size + 128, 12345, "float32")
        out = memory[64:-64].reshape(shape)
        if not results:
            forward = nbnorm.batch_norm_forward(x, axis=axis, out=out)
        else:
            nbnorm.batch_norm_backward(x, x, None, *forward[1:], axis=axis, out=out)
        results.append(memory)
    for memory in results:
        assert (memory[:64] == 12345).all()
        assert (memory[-64:] == 12345).all()
        assert not (memory[64:-64] == 12345).any()


def test_calls_from_several_python_threads_give_the_same_bits():
    shapes = [(60, 100), (16, 64, 28, 28), (8, 256, 7, 7), (4, 3, 200, 200)]
    expected = [everything(shape, 1) for shape in shapes]
    found = {}

    def work(i):
        found[i] = [everything(shapes[(i + j) % 4], 1) for j in range(4)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        for j, results in enumerate(found[i]):
            for ours, theirs in zip(results, expected[(i + j) % 4], strict=True):
                assert_same_bits(ours, theirs)


CONCURRENT = """
import threading
import numba
import test_threads
from test_threads import everything
shapes = [(16, 64, 28, 28), (8, 256, 7, 7), (4, 3, 200, 200)]
expected = [everything(shape, 1) for shape in shapes]
print(numba.threading_layer())
def work(i):
    for j in range(6):
        k = (i + j) % 3
        results = everything(shapes[k], 1)
        wrong = [a.tobytes() != b.tobytes() for a, b in zip(results, expected[k], strict=True)]
        if any(wrong):
            print("wrong")
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

FORKED = """
import os
import sys
from test_threads import everything
if sys.argv[1] == "small":  # a serial call starts no threads
    everything((10, 6), 1)
else:
    everything((16, 64, 28, 28), 1)
child = os.fork()
if child == 0:
    results = everything((8, 256, 7, 7), 1)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""

WITHIN_A_TURN = """
import faulthandler
faulthandler.dump_traceback_later(60, exit=True)
from test_threads import everything
from nbnorm.cpu.threads import turn
everything((16, 64, 28, 28), 1)
with turn(True):  # like a signal handler that runs between two of its lines
    everything((16, 64, 28, 28), 1)
print("done")
"""

# Only an interrupt ends the loop: if one were swallowed, it would run until the time limit.
INTERRUPTED = """
import faulthandler, signal
faulthandler.dump_traceback_later(120, exit=True)
import numpy as np
import nbnorm
from nbnorm import pool
x = np.random.default_rng(0).normal(size=(16, 64, 32, 32)).astype("float32")
def step():
    y, mean, rstd = nbnorm.batch_norm_forward(x)
    return y, nbnorm.batch_norm_backward(y, x, None, mean, rstd).dx
expected = [array.copy() for array in step()]
armed, caught = False, 0
def handler(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
def loop():
    while True:
        step()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0011, 0.0011)
while caught < 500:
    armed = True
    try:
        loop()
    except KeyboardInterrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
results = step()
assert all((a == b).all() for a, b in zip(results, expected))
del results
idle = pool.idle()[0]
assert pool._pool._in_use() == 0 and 0 < idle <= 2 * x.nbytes, idle
print("done")
"""


def in_this_folder(code):
    return f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_concurrent_calls_on_every_threading_layer(layer):
    if not has_layer(layer):
        pytest.skip(f"Numba has no {layer} layer here")
    printed = run_child("-c", in_this_folder(CONCURRENT), **environment_of(layer))
    assert printed.split() == [layer]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("before", ["small", "large"])
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_a_forked_child_can_call(layer, before):
    if not has_layer(layer):
        pytest.skip(f"Numba has no {layer} layer here")
    printed = run_child("-c", in_this_folder(FORKED), before, **environment_of(layer))
    assert printed.split() == ["0"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
@pytest.mark.parametrize("code", [WITHIN_A_TURN, INTERRUPTED], ids=["within a turn", "interrupted"])
def test_no_interrupt_hangs_a_program(layer, code):
    if not has_layer(layer):
        pytest.skip(f"Numba has no {layer} layer here")
    if code is INTERRUPTED and not hasattr(signal, "setitimer"):
        pytest.skip("no timer signals on this system")
    assert run_child("-c", in_this_folder(code), **environment_of(layer)).split() == ["done"]


def has_layer(layer):
    """Return whether Numba can start this threading layer, in a child process."""
    code = "import numba; numba.get_num_threads(); print(numba.threading_layer())"
    try:
        return run_child("-c", code, **environment_of(layer)).strip() == layer
    except AssertionError:
        return False


def environment_of(layer):
    """Return the environment of a process that uses this threading layer.

    The tbb package keeps its library where the system does not look for it.
    """
    environment = {"NUMBA_THREADING_LAYER": layer}
    if layer == "tbb":
        with suppress(PackageNotFoundError):
            found = [path.locate() for path in files("tbb") or [] if path.name == "libtbb.so.12"]
            folders = [str(Path(path).resolve().parent) for path in found]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    return environment


def test_more_threads_than_cores_give_the_same_bits():
    hashes = run_child(__file__, NUMBA_NUM_THREADS="8").split()
    assert len(hashes) == 5
    assert set(hashes) == {hash_of_everything()}


def hash_of_everything():
    """Return one hash of the bits of all results of all cases."""
    digest = hashlib.sha256()
    for shape, axis in CASES:
        for result in everything(shape, axis):
            digest.update(np.ascontiguousarray(result).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    for count in (8, 5, 3, 2, 1):
        numba.set_num_threads(count)
        print(hash_of_everything())
