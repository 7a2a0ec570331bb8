"""The launcher with a CUDA driver that records launches and runs nothing (driver.py).

Tests marked `under_the_driver` run in one child process, in the order written here. Run as a
script, `python tests/cuda/test_launch.py` prints the host time of each call.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import traceback
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from math import inf
from types import SimpleNamespace
from unittest.mock import Mock

import driver as fake
import numpy as np
import pytest

_bodies = {}

SHARED = 227 << 10  # bytes of shared memory per block on sm_90

F32, F64, F16 = np.dtype("float32"), np.dtype("float64"), np.dtype("float16")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    if reason := fake.missing():
        pytest.skip(reason)
    return fake.environment(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def outcomes(environment):
    from children import run_child

    return json.loads(run_child("-W", "error", __file__, "all", **environment))


def under_the_driver(body):
    _bodies[body.__name__] = body

    def test(outcomes):
        said, error = outcomes[body.__name__]
        print(said, end="")
        assert error is None, error

    test.__doc__ = body.__doc__
    return test


# -- arguments of launches ------------------------------------------------------------------------


def tensor(dtype, *, rows, gap=0):
    """Return a tensor of rows or of columns, with a gap after each sample and row."""
    N, C, S = (3, 5, 512) if rows else (6, 16, 8)
    row = S + gap if rows else S
    return fake.Array((N, C, S), dtype, (C * row + gap, row, 1))


def channels(dtype=F64, size=None):
    return fake.Array(size or 16, dtype)


def view(rows, name, short, array, absent=False):
    """Return a tensor's arguments; a kernel that does not use the tensor ignores its strides."""
    strides = [stride // array.itemsize for stride in array.strides]
    expected = {name: array.data.ptr, f"{short}n": strides[0], f"{short}c": strides[1]}
    if not rows:
        del expected[f"{short}c"]
    return {key: None if absent and key != name else value for key, value in expected.items()}


def geometry(rows, x):
    """Return the plan of a pass over aligned tensors, and its numbers as kernel arguments."""
    from nbnorm.cuda.plan import plan

    N, C, S = x.shape
    cut = plan(N, C, S, x.itemsize, 16)
    if rows:
        vectors = S // cut.width
        numbers = {"C": C, "vectors": vectors, "total": N * vectors}
    else:
        numbers = {"C": C, "S": S, "N": N, "group": cut.group, "readers": cut.readers}
    return cut, {**numbers, "length": cut.length, "chunks": cut.chunks}


def names_of(launch):
    """Return the names of the arguments."""
    from nbnorm.cuda import kernels

    module, name = launch.kernel.split(".")
    if name in ("finish_sums", "finish_second_sums"):
        kernel = getattr(kernels, name)("float32")
    elif name in ("forward", "backward"):
        kernel = getattr(kernels.fused(module, "float32", 4, False), name)
    elif module == "channel" or name == "finish_weighted":
        kernel = getattr(kernels, name)
    elif module == "weighted":
        kernel = getattr(kernels.weighted("float32"), name)
    else:
        kernel = getattr(kernels.build(module, "float32", 4), name)
    return list(inspect.signature(kernel.py_func).parameters)


def arguments_of(launch):
    return dict(zip(names_of(launch), launch.arguments, strict=True))


def types_of(launch):
    return dict(zip(names_of(launch), launch.types, strict=True))


def check(launch, kernel, grid, cluster=1, shared=0, **expected):
    """Compare a launch with the expected arguments; arrays stand for their addresses."""
    assert (launch.kernel, launch.grid, launch.block) == (kernel, (grid, 1, 1), (256, 1, 1))
    assert (launch.cluster, launch.shared) == (cluster, shared)
    seen = arguments_of(launch)
    assert set(seen) == set(expected)
    for name, value in expected.items():
        if isinstance(value, fake.Array):
            value = value.data.ptr
        if value is not None:
            assert (seen[name], type(seen[name])) == (value, type(value)), (
                f"{kernel}: {name} = {value!r}, but the driver got {seen[name]!r}"
            )


LAYOUTS = [
    (rows, dtype, gap)
    for rows in (True, False)
    for dtype, gap in ((F32, 0), (F32, 4), (F16, 0), (F16, 8))
]


@under_the_driver
def test_forward_hands_over_addresses_strides_and_numbers(driver, backend):
    for rows, dtype, gap in LAYOUTS:
        x, residual, y = (tensor(dtype, rows=rows, gap=gap * i) for i in (1, 2, 0))
        N, C, S = x.shape
        gamma, beta = channels(F32, C), channels(F32, C)
        cut, numbers = geometry(rows, x)
        traversal = "rows" if rows else "columns"
        for added, relu in ((True, False), (False, True)):
            cupy.allocated.clear()
            stats, finish, apply = driver.during(
                backend.forward,
                x,
                gamma,
                beta,
                1e-5,
                residual if added else None,
                "relu" if relu else None,
                y,
            )
            mean, m2, rstd = driver.returned
            (partial,) = (a for a in cupy.allocated if len(a.shape) == 3)
            assert partial.shape == (2, C, cut.chunks)
            check(
                stats, f"{traversal}.stats", cut.blocks,
                **view(rows, "x", "x", x), **numbers, partial=partial, mean=mean, again=0,
            )  # fmt: skip
            check(
                finish, "channel.finish_moments", -(-C // 8), partial=partial, C=C,
                chunks=cut.chunks, count=float(N * S), eps=1e-5, mean=mean, m2=m2, rstd=rstd,
            )  # fmt: skip
            check(
                apply, f"{traversal}.apply", cut.blocks, **view(rows, "x", "x", x),
                **view(rows, "residual", "r", residual if added else x, absent=not added),
                **view(rows, "y", "y", y), **numbers, mean=mean, rstd=rstd, gamma=gamma, beta=beta,
                floor=0.0 if relu else -inf, added=int(added),
            )  # fmt: skip


@under_the_driver
def test_backward_hands_over_addresses_strides_and_numbers(driver, backend):
    for rows, dtype, gap in LAYOUTS:
        x, dy, y, dx, dresidual = (tensor(dtype, rows=rows, gap=gap * i) for i in (1, 0, 2, 3, 4))
        N, C, S = x.shape
        gamma, beta = channels(F32, C), channels(F32, C)
        mean, rstd = channels(F64, C), channels(F64, C)
        cut, numbers = geometry(rows, x)
        traversal = "rows" if rows else "columns"
        for mask, wanted in ((0, 1), (1, 2), (2, 3)):
            cupy.allocated.clear()
            given = {
                "beta": beta if mask else None,
                "y": y if mask == 2 else None,
                "dx": dx if wanted & 1 else None,
                "dresidual": dresidual if wanted & 2 else None,
            }
            backward_reduce, finish, backward_apply = driver.during(
                backend.backward, dy, x, gamma, mean, rstd, **given
            )
            sums = driver.returned
            (partial,) = (a for a in cupy.allocated if len(a.shape) == 3)
            assert (partial.shape, sums.shape) == ((2, C, cut.chunks), (2, C))
            common = {
                **view(rows, "dy", "dy", dy), **view(rows, "x", "x", x),
                **view(rows, "y", "y", y if mask == 2 else x, absent=mask != 2), **numbers,
                "mean": mean, "rstd": rstd, "gamma": gamma, "mask": mask,
                "beta": beta if mask == 1 else gamma,
            }  # fmt: skip
            check(
                backward_reduce,
                f"{traversal}.backward_reduce",
                cut.blocks,
                **common,
                partial=partial,
            )
            check(
                finish, "channel.finish_sums", -(-C // 8), partial=partial, C=C,
                chunks=cut.chunks, mean=mean, rstd=rstd, sums=sums,
            )  # fmt: skip
            check(
                backward_apply, f"{traversal}.backward_apply", cut.blocks, **common,
                **view(rows, "dx", "dx", dx if wanted & 1 else x, absent=not wanted & 1),
                **view(
                    rows, "dresidual", "r", dresidual if wanted & 2 else x, absent=not wanted & 2
                ),
                sums=sums, count=float(N * S), training=1, wanted=wanted,
            )  # fmt: skip
        (evaluated,) = driver.during(
            backend.backward_apply, dy, x, gamma, mean, rstd, None, 7, None, None, dx, None
        )
        arguments = arguments_of(evaluated)
        assert (arguments["training"], arguments["count"]) == (0, 7.0)


def weighted(x, weights, /, **tensors):
    """Return the plan of a pass with weights, and the arguments that follow from its tensors."""
    from nbnorm.cuda.plan import plan

    (N, C, S), values = x.shape, weights.values
    cut, found = plan(N, C, S, x.itemsize, 1), {}
    for name, (short, array) in tensors.items():
        strides = [stride // array.itemsize for stride in array.strides]
        found |= {name: array, f"{short}n": strides[0], f"{short}c": strides[1]}
    strides = (S, 0) if values.shape[1] == 1 else (C * S, S)
    found |= {"weights": values, "wn": strides[0], "wc": strides[1], "C": C, "S": S, "N": N}
    return cut, {**found, "group": cut.group, "length": cut.length, "chunks": cut.chunks}


@under_the_driver
def test_weights_are_handed_over_with_their_strides_and_numbers(driver, backend):
    for rows, dtype, gap, shared, of in (
        (True, F32, 4, True, np.dtype("uint8")),
        (False, F16, 8, False, F32),
        (True, F64, 0, False, F64),
    ):
        x, residual, y, dy, dx = (tensor(dtype, rows=rows, gap=gap * i) for i in range(5))
        N, C, S = x.shape
        values, count = fake.Array((N, 1 if shared else C, S), of), channels(F64, C)
        weights = SimpleNamespace(values=values, count=count, fill=7.5 if shared else None)
        gamma, beta = channels(F32, C), channels(F32, C)
        cupy.allocated.clear()
        *launches, apply = driver.during(
            backend.forward, x, gamma, beta, 1e-5, residual, "relu", y, weights=weights
        )
        mean, m2, rstd = driver.returned
        cut, read = weighted(x, weights, x=("x", x))
        (partial,) = (a for a in cupy.allocated if len(a.shape) == 3)
        assert partial.shape == (3, C, cut.chunks)
        assert len(launches) == (4 if dtype == F64 else 2)
        for again, (stats, finish) in enumerate(zip(launches[::2], launches[1::2], strict=True)):
            check(
                stats, "weighted.stats", cut.blocks, **read, partial=partial, mean=mean,
                again=again,
            )  # fmt: skip
            check(
                finish, "weighted.finish_weighted", -(-C // 8), partial=partial, C=C,
                chunks=cut.chunks, eps=1e-5, again=again, mean=mean, m2=m2, rstd=rstd,
            )  # fmt: skip
        _, read = weighted(x, weights, x=("x", x), residual=("r", residual), y=("y", y))
        check(
            apply, "weighted.apply", cut.blocks, **read, mean=mean, rstd=rstd, gamma=gamma,
            beta=beta, floor=0.0, added=1, fill=7.5 if shared else 0.0, fills=int(shared),
        )  # fmt: skip
        assert types_of(apply)["weights"] == f"{of}*"
        backward_reduce, finish, backward_apply = driver.during(
            backend.backward, dy, x, gamma, mean, rstd, None, y, dx, None, weights=weights
        )
        sums, common = driver.returned, {"mean": mean, "rstd": rstd, "gamma": gamma, "mask": 2}
        read = {"dy": ("dy", dy), "x": ("x", x), "y": ("y", y)}
        written = {"dx": ("dx", dx), "dresidual": ("r", x)}  # x stands in for an unwanted result
        check(
            backward_reduce, "weighted.backward_reduce", cut.blocks,
            **weighted(x, weights, **read)[1], **common, beta=gamma, partial=None,
        )  # fmt: skip
        check(
            finish, "channel.finish_sums", -(-C // 8), partial=None, C=C, chunks=cut.chunks,
            mean=mean, rstd=rstd, sums=sums,
        )  # fmt: skip
        check(
            backward_apply, "weighted.backward_apply", cut.blocks,
            **weighted(x, weights, **read, **written)[1], **common, beta=gamma, sums=sums,
            counts=count, training=1, wanted=1,
        )  # fmt: skip


@under_the_driver
def test_the_second_order_hands_over_addresses_strides_and_numbers(driver, backend):
    for rows, dtype, gap in LAYOUTS:
        ddx, dy, x, ddy, dx = (tensor(dtype, rows=rows, gap=gap * i) for i in range(5))
        N, C, S = x.shape
        gamma, mean, rstd, ddgamma, ddbeta = (channels(F64, C) for _ in range(5))
        cut, numbers = geometry(rows, x)
        traversal = "rows" if rows else "columns"
        read = {
            **view(rows, "ddx", "ddx", ddx), **view(rows, "dy", "dy", dy),
            **view(rows, "x", "x", x), **numbers, "mean": mean,
        }  # fmt: skip
        for training in (True, False):
            count = float(N * S) if training else inf
            cupy.allocated.clear()
            reduce, finish, coefficients, apply = driver.during(
                backend.double_backward,
                ddx, dy, x, gamma, mean, rstd, ddgamma, ddbeta, training, ddy, dx,
            )  # fmt: skip
            partial, sums, table, dgamma = cupy.allocated
            assert (partial.shape, sums.shape) == ((5, C, cut.chunks), (5, C))
            assert (table.shape, dgamma.shape) == ((7, C), (C,))
            assert driver.returned is dgamma
            check(
                reduce, f"{traversal}.second_reduce", cut.blocks, **read, rstd=rstd, partial=partial
            )
            check(
                finish, "channel.finish_second_sums", -(-C // 8), partial=partial, C=C,
                chunks=cut.chunks, count=count, mean=mean, rstd=rstd, sums=sums,
            )  # fmt: skip
            of_channels = {
                "mean": mean, "rstd": rstd, "gamma": gamma, "tgamma": ddgamma, "tbeta": ddbeta,
                "C": C,
            }  # fmt: skip
            check(
                coefficients, "channel.second_table", 1, **of_channels, sums=sums,
                count=count, curved=1, table=table, dgamma=dgamma,
            )  # fmt: skip
            check(
                apply, f"{traversal}.second_apply", cut.blocks, **read, table=table, curved=1,
                **view(rows, "ddy", "ddy", ddy), **view(rows, "dx", "dx", dx),
            )  # fmt: skip
        cupy.allocated.clear()
        reduce, finish, coefficients, apply = driver.during(
            backend.jvp, ddx, x, gamma, mean, rstd, ddgamma, ddbeta, True, ddy
        )
        partial, sums, table, dgamma = cupy.allocated
        assert (reduce.kernel, finish.kernel) == (
            f"{traversal}.backward_reduce", "channel.finish_sums"
        )  # fmt: skip
        assert arguments_of(reduce)["dy"] == ddx.data.ptr
        check(
            coefficients, "channel.second_table", 1, **of_channels, sums=sums,
            count=float(N * S), curved=0, table=table, dgamma=dgamma,
        )  # fmt: skip
        check(
            apply, f"{traversal}.second_apply", cut.blocks, **view(rows, "ddx", "ddx", ddx),
            **view(rows, "dy", "dy", x, absent=True), **view(rows, "x", "x", x), **numbers,
            mean=mean, **view(rows, "ddy", "ddy", ddy), **view(rows, "dx", "dx", x, absent=True),
            table=table, curved=0,
        )  # fmt: skip


@contextmanager
def fused(driver, shared=SHARED, clusters=True):
    """Give devices this much shared memory, so that forward and backward read memory once."""
    from nbnorm.cuda import launch

    def be(*resources):
        driver.resources(*resources)
        launch._limits.cache_clear()

    be(shared, clusters)
    try:
        yield
    finally:
        be(0, False)


# One chunk per channel, several, and enough for blocks to keep two or more each.
LARGE = [(3, 5, 512), (100, 3, 512), (400, 2, 512), (6, 16, 8), (700, 16, 8), (4000, 2, 24)]


@under_the_driver
def test_forward_and_backward_that_read_memory_once_are_one_launch(driver, backend):
    from nbnorm.cuda.plan import residence

    clusters = set()
    for shape in LARGE:
        N, C, S = shape
        rows, traversal = S >= 256, "rows" if S >= 256 else "columns"
        x, residual, y, dy, dx, dresidual = (fake.Array(shape, F32) for _ in range(6))
        gamma, beta = channels(F32, C), channels(F32, C)
        cut, numbers = geometry(rows, x)
        kept = residence(cut, 1, SHARED, True)
        with fused(driver):
            cupy.allocated.clear()
            (forward,) = driver.during(backend.forward, x, gamma, beta, 1e-5, residual, "relu", y)
            mean, m2, rstd = driver.returned
            (partial,) = (a for a in cupy.allocated if len(a.shape) == 3)
            check(
                forward, f"{traversal}.forward", kept.grid, kept.blocks, kept.shared,
                **view(rows, "x", "x", x), **view(rows, "residual", "r", residual),
                **view(rows, "y", "y", y), **numbers, blocks=kept.blocks, each=kept.each,
                count=float(N * S), eps=1e-5, partial=partial, mean=mean, m2=m2, rstd=rstd,
                gamma=gamma, beta=beta, floor=0.0, added=1,
            )  # fmt: skip
            clusters.add((kept.blocks, kept.each))
            kept = residence(cut, 2, SHARED, True)
            if kept is None:
                continue
            cupy.allocated.clear()
            rest = dy, x, gamma, mean, rstd, None, y, dx, dresidual
            (backward,) = driver.during(backend.backward, *rest)
            (partial,) = (a for a in cupy.allocated if len(a.shape) == 3)
            check(
                backward, f"{traversal}.backward", kept.grid, kept.blocks, kept.shared,
                **view(rows, "dy", "dy", dy), **view(rows, "x", "x", x), **view(rows, "y", "y", y),
                **view(rows, "dx", "dx", dx), **view(rows, "dresidual", "r", dresidual),
                **numbers, blocks=kept.blocks, each=kept.each, mean=mean, rstd=rstd, gamma=gamma,
                beta=gamma, partial=partial, sums=driver.returned, count=float(N * S), mask=2,
                wanted=3,
            )  # fmt: skip
    assert (1, 1) in clusters
    assert any(blocks > 1 and each == 1 for blocks, each in clusters)
    assert any(blocks > 1 and each > 1 for blocks, each in clusters)


@under_the_driver
def test_kept_chunks_and_sums_may_exceed_48_kb(driver, backend):
    """A block has 48 KB by default, including a kernel's own shared memory."""
    for N, C, S in ((118, 256, 49), (4, 3, 1 << 13), (30, 3, 1 << 13)):
        x, y = fake.Array((N, C, S), F32), fake.Array((N, C, S), F32)
        with fused(driver):
            args = x, channels(F32, C), channels(F32, C), 1e-5, None, None, y
            assert len(driver.during(backend.forward, *args)) == 1


@under_the_driver
def test_what_a_device_cannot_keep_is_read_twice(driver, backend):
    for shape in LARGE:
        _, C, S = shape
        x, y = fake.Array(shape, F32), fake.Array(shape, F32)
        args = x, channels(F32, C), channels(F32, C), 1e-5, None, None, y
        for shared, clusters, within in ((1 << 12, True, 0), (SHARED, False, 1)):
            with fused(driver, shared, clusters):
                launches = driver.during(backend.forward, *args)
            few = geometry(S >= 256, x)[0].chunks <= within
            assert len(launches) == (1 if few else 3), (shape, shared, clusters)


@under_the_driver
def test_a_call_that_reads_memory_once_asks_the_driver_for_one_launch(driver, backend):
    for shape in LARGE[1:3]:
        x, y = fake.Array(shape, F32), fake.Array(shape, F32)
        args = x, channels(F32, shape[1]), channels(F32, shape[1]), 1e-5, None, None, y
        with fused(driver):
            backend.forward(*args)
            for stream in (7, 12):
                cupy.use(stream=stream)
                before = driver.calls()
                (launch,) = driver.during(backend.forward, *args)
                assert (launch.stream, driver.calls()) == (stream, before + 1)
            cupy.use()


@under_the_driver
def test_parameters_and_x_of_float64_are_read_as_such(driver, backend):
    x, y = tensor(F64, rows=True), tensor(F64, rows=True)
    gamma, beta, mean, rstd = (channels(F64, 5) for _ in range(4))
    cut, numbers = geometry(True, x)
    (apply,) = driver.during(backend.apply, x, gamma, beta, mean, rstd, None, "relu", y)
    check(
        apply, "rows.apply", cut.blocks, **view(True, "x", "x", x),
        **view(True, "residual", "r", x, absent=True), **view(True, "y", "y", y), **numbers,
        mean=mean, rstd=rstd, gamma=gamma, beta=beta, floor=0.0, added=0,
    )  # fmt: skip
    gamma, beta = channels(F32, 5), channels(F32, 5)
    (narrow,) = driver.during(backend.apply, x, gamma, beta, mean, rstd, None, "relu", y)
    assert (types_of(apply)["x"], types_of(apply)["gamma"]) == ("float64*", "float64*")
    assert (types_of(narrow)["x"], types_of(narrow)["gamma"]) == ("float64*", "float32*")


@under_the_driver
def test_one_tensor_that_begins_between_vectors_has_all_read_value_by_value(driver, backend):
    gamma, beta, mean, rstd = channels(F32), channels(F32), channels(), channels()
    shape = 3, 5, 512

    def vectors(call, *args):
        return [arguments_of(launch)["vectors"] for launch in driver.during(call, *args)]

    for odd in (None, 0, 1, 2, 3, 4):
        x, residual, y, dy, dx = (fake.Array(shape, F32, offset=i == odd) for i in range(5))
        args = x, gamma, beta, mean, rstd, residual, None, y
        assert vectors(backend.apply, *args) == [512 if odd in (0, 1, 2) else 128], odd
        for outs in ((dx, None), (None, dx)):
            args = dy, x, gamma, mean, rstd, None, 1, None, y, *outs
            assert vectors(backend.backward_apply, *args) == [128 if odd in (None, 1) else 512], odd


@under_the_driver
def test_statistics_are_moved_and_inverted(driver, backend):
    C = 300
    mean, m2, var = channels(F64, C), channels(F64, C), channels(F64, C)
    for dtype in (F32, F64):
        running_mean, running_var = channels(dtype, C), channels(dtype, C)
        (move,) = driver.during(backend.move, running_mean, running_var, mean, m2, 0.1, 31.0)
        check(
            move, "channel.move", 2, running_mean=running_mean, running_var=running_var,
            mean=mean, m2=m2, momentum=0.1, divisor=31.0, C=C,
        )  # fmt: skip
        assert types_of(move)["running_mean"] == types_of(move)["running_var"] == f"{dtype}*"
    running_mean, running_var = channels(F64, C), channels(F64, C)
    population = running_mean, running_var, 3.0, 5.0
    (renorm_factors,) = driver.during(backend.renorm_factors, mean, m2, 8, 1e-3, *population)
    r, d = driver.returned
    check(
        renorm_factors, "channel.renorm_factors", 2, mean=mean, m2=m2, count=8.0, eps=1e-3,
        running_mean=running_mean, running_var=running_var, r_max=3.0, d_max=5.0, C=C, r=r, d=d,
    )  # fmt: skip
    assert types_of(renorm_factors)["running_mean"] == "float64*"
    (rstd,) = driver.during(backend.rstd, var, 1e-3)
    check(rstd, "channel.rstd_all", 2, var=var, eps=1e-3, rstd=driver.returned, C=C)


# -- access to numba-cuda's internals --------------------------------------------------------------


@under_the_driver
def test_internals_of_numba_cuda_are_read_in_any_form_they_have_had(driver, backend):
    from cuda.bindings import driver as bindings

    from nbnorm.cuda.loading import load

    for handle in (77, bindings.CUkernel(77), bindings.CUfunction(77)):
        of = loadable(kernel=SimpleNamespace(handle=handle), attrs=SimpleNamespace(shared=512))
        assert load(of, ())[1:] == (77, 512)


@under_the_driver
def test_versions_that_do_not_go_together_are_named(driver, backend):
    from nbnorm.cuda.loading import load

    for of in (loadable(), loadable(kernel=SimpleNamespace(handle=None)), SimpleNamespace()):
        of.py_func = tensor
        with pytest.raises(RuntimeError, match=r"kernel tensor.*numba-cuda \d+\.\d+.*cuda-core \d"):
            load(of, ())


@under_the_driver
def test_a_compiler_that_is_not_there_is_named_with_the_remedy(driver, backend):
    from cuda.pathfinder import DynamicLibNotFoundError
    from numba.cuda.cudadrv.error import NvvmSupportError

    from nbnorm.cuda.loading import load

    for error in (NvvmSupportError("no libnvvm"), DynamicLibNotFoundError("no libnvvm\nlong")):
        of = SimpleNamespace(compile=Mock(side_effect=error))
        with pytest.raises(RuntimeError, match=r"set CUDA_HOME.*numba-cuda \d.*\(no libnvvm\)$"):
            load(of, ())


def loadable(**inside):
    """Return a kernel that compiles to an object with these attributes."""
    library = SimpleNamespace(get_cufunc=lambda: SimpleNamespace(**inside))
    return SimpleNamespace(compile=lambda _: SimpleNamespace(_codelibrary=library))


# -- how often the driver is called --------------------------------------------------------------


def calls_of(backend, dtype=F32, *, rows=True, samples=3):
    """Return {name: (number of launches, call)} for every function of the backend."""
    shape = (samples, 5, 512) if rows else (2 * samples, 16, 8)
    x, y, dy, dx = (fake.Array(shape, dtype) for _ in range(4))
    C = x.shape[1]
    gamma, beta = channels(F32, C), channels(F32, C)
    mean, rstd, m2 = channels(F64, C), channels(F64, C), channels(F64, C)
    sums = fake.Array((2, C))
    running = channels(F32, C), channels(F32, C)
    mask = fake.Array((shape[0], 1, shape[2]), np.dtype("uint8"))
    counts = {"weights": SimpleNamespace(values=mask, count=channels(F64, C), fill=0.0)}
    wide = channels(F64, C), channels(F64, C)
    return {
        "forward": (3, lambda: backend.forward(x, gamma, beta, 1e-5, None, "relu", y)),
        "forward with weights": (
            3, lambda: backend.forward(x, gamma, beta, 1e-5, None, "relu", y, **counts),
        ),
        "backward with weights": (
            3, lambda: backend.backward(dy, x, gamma, mean, rstd, beta, None, dx, None, **counts),
        ),
        "backward": (
            3, lambda: backend.backward(dy, x, gamma, mean, rstd, beta, None, dx, None),
        ),
        "apply": (1, lambda: backend.apply(x, gamma, beta, mean, rstd, None, "relu", y)),
        "stats": (2, lambda: backend.stats(x)),
        "move": (1, lambda: backend.move(*running, mean, m2, 0.1, 2.0)),
        "rstd": (1, lambda: backend.rstd(m2, 1e-5)),
        "renorm_factors": (1, lambda: backend.renorm_factors(mean, m2, 9, 1e-5, *wide, 3.0, 5.0)),
        "double_backward": (
            4,
            lambda: backend.double_backward(dy, dy, x, mean, mean, rstd, *wide, True, y, dx),
        ),
        "jvp": (4, lambda: backend.jvp(dy, x, mean, mean, rstd, *wide, True, y)),
        "backward_reduce": (
            2, lambda: backend.backward_reduce(dy, x, gamma, mean, rstd, beta, None),
        ),
        "backward_apply": (
            1,
            lambda: backend.backward_apply(
                dy, x, gamma, mean, rstd, sums, 9, beta, None, dx, None
            ),
        ),
    }  # fmt: skip


@under_the_driver
def test_each_function_takes_as_many_launches_as_it_has_kernels(driver, backend):
    for rows in (True, False):
        for name, (launches, call) in calls_of(backend, rows=rows).items():
            assert len(driver.during(call)) == launches, (name, rows)


@under_the_driver
def test_after_the_first_call_the_driver_is_asked_for_launches_and_nothing_else(driver, backend):
    """It does not wait, copy, allocate, create contexts or load modules."""
    for rows in (True, False):
        for name, (launches, call) in calls_of(backend, F16, rows=rows).items():
            call()
            before, before_launches = driver.calls(), driver.calls("cuLaunch")
            for _ in range(3):
                call()
            assert driver.calls("cuLaunch") - before_launches == 3 * launches, name
            assert driver.calls() - before == 3 * launches, name


@under_the_driver
def test_kernels_are_loaded_without_waiting(driver, backend):
    waits = ("cuStreamSync", "cuCtxSync", "cuEventSync", "cuMemcpy", "cuMemAlloc")
    before = [driver.calls(name) for name in waits]
    loads = driver.calls("cuLibraryLoad")
    for _, call in calls_of(backend, F64).values():
        call()
    assert driver.calls("cuLibraryLoad") > loads
    assert [driver.calls(name) for name in waits] == before


# -- streams, devices, threads -------------------------------------------------------------------


@under_the_driver
def test_launches_go_to_the_stream_that_is_current_in_cupy(driver, backend):
    _, call = calls_of(backend)["forward"]
    for stream in (7, fake.DEFAULT, fake.PER_THREAD, 12, 7):
        cupy.use(stream=stream)
        assert [launch.stream for launch in driver.during(call)] == [stream] * 3


@under_the_driver
def test_a_kernel_is_loaded_once_for_each_kind_of_device(driver, backend):
    _, call = calls_of(backend, F16)["forward"]
    cupy.use(device=0)
    call()
    loads = driver.calls("cuLibraryLoad")
    for device, loaded_on, more in ((1, 1, 3), (0, 0, 3), (2, 0, 3), (1, 1, 3)):
        for stream in (fake.DEFAULT, fake.stream_of(device)):
            cupy.use(device, stream)
            launches = driver.during(call)
            assert [launch.device for launch in launches] == [device] * 3
            assert [launch.loaded_on for launch in launches] == [loaded_on] * 3
            assert driver.calls("cuLibraryLoad") == loads + more


@under_the_driver
def test_loading_leaves_the_devices_of_the_thread_as_they_were(driver, backend):
    x, y = (fake.Array((3, 3, 3), F32) for _ in range(2))  # kernels that no other test here loads
    gamma, beta = channels(F64, 3), channels(F64, 3)
    loads = driver.calls("cuLibraryLoad")
    cupy.use(device=2)
    backend.apply(x, gamma, beta, channels(), channels(), None, "relu", y)
    assert driver.calls("cuLibraryLoad") == loads + 1
    assert (driver.device(), driver.depth()) == (2, 1)


@under_the_driver
def test_a_thread_whose_device_nothing_has_set_yet_can_launch(driver, backend):
    seen = []
    _, call = calls_of(backend)["forward"]
    call()

    def work():
        assert driver.depth() == 0
        seen.extend(driver.during(call))

    in_thread(work)
    assert [launch.device for launch in seen] == [0] * 3


@under_the_driver
def test_threads_that_launch_at_the_same_time_do_not_share_arguments(driver, backend):
    threads, each = 8, 20
    gamma, beta, mean, rstd = channels(F32), channels(F32), channels(), channels()
    pairs = [(tensor(F32, rows=True), tensor(F32, rows=True)) for _ in range(threads)]
    start = threading.Barrier(threads)

    def work(x, y):
        driver.set_device(0)
        start.wait()
        for _ in range(each):
            backend.apply(x, gamma, beta, mean, rstd, None, "relu", y)

    def all_of_them():
        running = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    driver.delay(200)
    try:
        launches = driver.during(all_of_them)
    finally:
        driver.delay(0)
    seen = [arguments_of(launch) for launch in launches]
    assert sorted((a["x"], a["y"]) for a in seen) == sorted(
        (x.data.ptr, y.data.ptr) for x, y in pairs for _ in range(each)
    )


def in_thread(work):
    """Run in a new thread; raise its exceptions here."""
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


# -- errors --------------------------------------------------------------------------------------


@under_the_driver
def test_a_launch_that_fails_raises_and_names_cuda_and_the_kernel(driver, backend):
    _, call = calls_of(backend)["apply"]
    driver.fail(fake.LAUNCH_FAILED)
    with pytest.raises(RuntimeError, match=r"CUDA.* apply: CUDA_ERROR_LAUNCH_FAILED"):
        call()
    assert len(driver.during(call)) == 1  # the next call is not affected


@under_the_driver
def test_arguments_that_a_kernel_does_not_take_are_refused(driver, backend):
    from struct import error

    from nbnorm.cuda import kernels, launch

    x = channels()
    good = x, 1e-5, x, 16
    for wrong in (good[:3], (*good, 1), (x, 1e-5, x, 16.0)):
        with pytest.raises(error):
            launch.run(kernels.rstd_all, "float64", "float64", 1, 256, *wrong)
    launch.run(kernels.rstd_all, "float64", "float64", 1, 256, *good)


@pytest.mark.parametrize("library", ["cupy", "numba_cuda"])
def test_without_a_library_a_gpu_array_is_refused_with_what_to_install(environment, library):
    from children import run_child

    said = run_child("-W", "error", __file__, "without", library, **environment)
    assert library in said
    assert "nbnorm-kernels[cuda]" in said


def without(library):
    """Print the message of the ImportError raised for an array on a GPU."""
    import nbnorm

    class Tensor:
        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **options):
            raise AssertionError("the backend comes first")

    if library != "cupy":
        fake.install_cupy(fake.Driver())
    sys.modules[library] = None
    with pytest.raises(ImportError) as caught:
        nbnorm.batch_norm_stats(Tensor())
    print(caught.value)


# -- time ----------------------------------------------------------------------------------------


def host_times(driver, backend):
    """Return {name: microseconds} of each function, with preallocated results."""
    times = {}
    for samples, shared in ((3, 0), (3, SHARED), (100, SHARED)):
        for rows in (True, False):
            for name, (_, call) in calls_of(backend, rows=rows, samples=samples).items():
                if shared and name not in ("forward", "backward"):
                    continue
                with fused(driver, shared):
                    cupy.allocated.clear()
                    (*_, launch) = driver.during(call)
                    for array in cupy.allocated:
                        cupy.ready[array.shape] = array
                        if len(array.shape) == 1:
                            cupy.ready[array.size] = array
                    # Processor time: nothing waits, except for other processes.
                    rounds = timeit.repeat(call, timer=time.thread_time, number=200, repeat=30)
                    cupy.ready.clear()
                how = f", once, clusters of {launch.cluster}" if shared else ""
                times[f"{name}, {'rows' if rows else 'columns'}{how}"] = min(rounds) / 200 * 1e6
    return times


@under_the_driver
def test_a_call_takes_the_host_some_microseconds(driver, backend):
    """On an idle machine the aim for forward and backward is 10 us."""
    times = host_times(driver, backend)
    print(*(f"{name}: {spent:.1f} us" for name, spent in times.items()), sep="\n")
    assert max(times.values()) < 50, times


# -- the child -----------------------------------------------------------------------------------


def run_all():
    """Run all marked tests; print their outcomes."""
    outcomes = {}
    for name, body in _bodies.items():
        error = None
        with redirect_stdout(StringIO()) as said:
            try:
                cupy.use()
                body(driver, backend)
            except BaseException:  # pytest.fail raises a BaseException that is not an Exception
                error = traceback.format_exc()
        outcomes[name] = said.getvalue(), error
    print(json.dumps(outcomes))


def table():
    """Start this file with the fake driver, which must be loaded when Python starts."""
    if reason := fake.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **fake.environment(folder)}
        subprocess.run([sys.executable, __file__, "times"], env=environment, check=True)


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if not command:
        table()
    elif command == "without":
        without(sys.argv[2])
    else:
        driver = fake.Driver()
        cupy = fake.install_cupy(driver)
        from nbnorm import cuda as backend

        if command == "all":
            run_all()
        else:
            for key, value in host_times(driver, backend).items():
                print(f"{key:42}{value:6.1f} us")
