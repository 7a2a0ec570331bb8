"""Every row of the contract's error table, for every function it applies to; nothing is written.

Each test takes valid arguments, spoils some of them, and compares every array bit by bit after the
exception: out and the running statistics hold values that no kernel would write. Errors of `out`
are in test_results.py.
"""

import inspect
import re
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from refusals import (
    LARGE,
    OVER_X,
    SENTINEL,
    SHAPE,
    SMALL,
    VALID,
    bits,
    data,
    moments,
    per_channel,
    refuses,
    takers,
    taking,
    target,
)
from strategies import lay_out
from tolerances import assert_same_bits

import nbnorm
from nbnorm import Moments

RUNNING = {"running_mean", "running_var"}


def shared_memory():
    """Yield pairs of arrays of shape (8,) that share memory."""
    whole = per_channel()
    yield whole, whole
    yield whole, whole[:]
    yield whole[::-1], whole
    longer = per_channel(length=9)
    yield longer[:8], longer[1:]
    yield longer.view()[1:], longer[:8]


@pytest.mark.slow  # compiles the kernels of every function
def test_valid_arguments_are_valid():
    """Otherwise tests of errors could pass for another reason than the one in their name."""
    for function, arguments in VALID.items():
        getattr(nbnorm, function)(**arguments())


def test_every_public_function_is_covered():
    functions = {name for name in nbnorm.__all__ if inspect.isfunction(getattr(nbnorm, name))}
    others = {"show_config", "set_pool_limit", "warmup"}
    # Their errors are tested by test_population.py, test_activations.py and test_microbatch.py.
    others |= {"population_stats", "recalibrate", "activation"}
    others |= {"micro_batch_norm_forward", "micro_batch_norm_backward"}
    assert functions - others == set(VALID)


# Types of arrays


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "object", "longdouble"])
@pytest.mark.parametrize("function", OVER_X)
def test_x_that_is_not_floating(function, dtype):
    arguments = VALID[function]()
    spoiled = {name: arguments[name].astype(dtype) for name in LARGE if name in arguments}
    refuses(function, TypeError, rf"^x has dtype {np.dtype(dtype).name}", **spoiled)


@pytest.mark.parametrize(
    ("function", "argument"), takers("dy", "residual", "y", "out", "ddx", "tx")
)
@pytest.mark.parametrize("dtype", ["float64", "int32", "float16"])
def test_arrays_of_another_dtype_than_x(function, argument, dtype):
    refuses(
        function,
        TypeError if argument != "out" else ValueError,
        rf"^{argument} has dtype {dtype}.*float32",
        **{argument: data().astype(dtype)},
    )


@pytest.mark.parametrize(("function", "argument"), takers(*SMALL))
@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "object"])
def test_parameters_and_statistics_that_are_not_floating(function, argument, dtype):
    spoiled = {argument: VALID[function]()[argument].astype(dtype)}
    refuses(function, TypeError, rf"^{argument} has dtype {np.dtype(dtype)}", **spoiled)


@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL, "weight"))
def test_byte_order_that_is_not_native(function, argument):
    array = VALID[function]()[argument]
    swapped = array.astype(array.dtype.newbyteorder())
    refuses(function, TypeError, rf"^{argument} .*byte order", **{argument: swapped})


@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL, "weight"))
def test_masked_arrays(function, argument):
    array = VALID[function]()[argument]
    masked = np.ma.masked_array(array, array > 0)
    refuses(function, TypeError, rf"^{argument} is a masked array", **{argument: masked})


@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL, "weight"))
@pytest.mark.parametrize(
    "thing", [[[1.0, 2.0]], "x", 3.0, object()], ids=["list", "str", "float", "object"]
)
def test_objects_that_are_no_arrays(function, argument, thing):
    refuses(function, TypeError, rf"^{argument} .*{type(thing).__name__}", **{argument: thing})


@pytest.mark.parametrize(
    ("function", "argument"), takers("x", "dy", "mean", "var", "rstd", "sum_dy", "weight")
)
def test_required_arrays_that_are_none(function, argument):
    spoiled = {argument: None}
    if argument == "x" and "y" in VALID[function]():
        spoiled["y"] = None  # y can replace x: see test_from_y.py
    refuses(function, TypeError, rf"^{argument} .*NoneType", **spoiled)


# Axes


@pytest.mark.parametrize("function", OVER_X)
@pytest.mark.parametrize("shape", [(), (8,)])
def test_x_of_fewer_than_two_axes(function, shape):
    spoiled = {name: data(shape=shape) for name in LARGE if name in VALID[function]()}
    refuses(function, ValueError, re.escape(f"{shape}"), **spoiled)


@pytest.mark.parametrize("function", OVER_X)
@pytest.mark.parametrize("axis", [4, -5, (1, 9), (0, -5)])
def test_axis_out_of_range(function, axis):
    refuses(function, ValueError, r"^axis .*out of range", axis=axis)


@pytest.mark.parametrize("function", OVER_X)
@pytest.mark.parametrize("axis", [(1, 1), (1, -3), (0, 2, -4)])
def test_axis_repeated(function, axis):
    refuses(function, ValueError, r"^axis .*twice", axis=axis)


@pytest.mark.parametrize("function", OVER_X)
@pytest.mark.parametrize("axis", [(0, 1, 2, 3), (-1, -2, -3, -4)])
def test_no_axis_left_to_reduce(function, axis):
    refuses(function, ValueError, r"^axis .*leaves no axis", axis=axis)


@pytest.mark.parametrize("function", OVER_X)
@pytest.mark.parametrize("axis", [1.0, "1", None, (1.5,)])
def test_axis_that_is_no_axis(function, axis):
    with pytest.raises((TypeError, ValueError), match=r"^axis must be an int or a tuple of ints"):
        getattr(nbnorm, function)(**{**VALID[function](), "axis": axis})


# Shapes


@pytest.mark.parametrize(
    ("function", "argument"), takers(*[s for s in SMALL if s != "bias"], functions=OVER_X)
)
@pytest.mark.parametrize("shape", [(7,), (9,), (1,), (0,), (), (8, 1), (1, 8, 1, 1), (2, 8, 4, 4)])
def test_parameters_and_statistics_of_another_shape(function, argument, shape):
    expected = f"{argument} has shape {shape}, expected (8,) for x of shape (2, 8, 4, 4) and axis 1"
    array = np.full(shape, SENTINEL, VALID[function]()[argument].dtype)
    refuses(function, ValueError, f"^{re.escape(expected)}$", **{argument: array})


AXIS_NAMES_WHAT_IS_KEPT = "; axis names the channel axes, which are kept: "


@pytest.mark.parametrize(
    ("function", "argument"), takers(*[s for s in SMALL if s != "bias"], functions=OVER_X)
)
@pytest.mark.parametrize(
    ("axis", "over", "instead", "shape"),
    [
        ((0, 2, 3), "(0, 2, 3)", "1", (8,)),
        ((0, -2, -1), "(0, -2, -1)", "1", (8,)),
        ((0, 1, 2), "(0, 1, 2)", "3", (4,)),
        (0, "0", "(1, 2, 3)", (8, 4, 4)),
    ],
)
def test_axes_that_were_meant_to_be_reduced(function, argument, axis, over, instead, shape):
    arguments = VALID[function]()
    kept = tuple(SHAPE[a] for a in range(4) if a in np.atleast_1d(axis) % 4)
    right = {s: np.ones(kept, arguments[s].dtype) for s in SMALL if s in arguments}
    end = f"{AXIS_NAMES_WHAT_IS_KEPT}to reduce over {over}, pass axis={instead}"
    match = rf"^{argument} has shape {re.escape(str(shape))}, .*{re.escape(end)}$"
    spoiled = right | {argument: np.ones(shape, right[argument].dtype)}
    refuses(function, ValueError, match, axis=axis, **spoiled)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (32,)])
def test_parameters_of_another_shape_than_several_channel_axes(shape):
    x = data()
    with pytest.raises(
        ValueError, match=rf"^gamma has shape {re.escape(str(shape))}, expected \(8, 4\) for x of"
    ):
        nbnorm.batch_norm_forward(x, np.ones(shape), axis=(3, 1))


@pytest.mark.parametrize(
    ("function", "argument"), takers("dy", "residual", "y", "out", "ddx", "tx")
)
@pytest.mark.parametrize(
    "shape", [(2, 8, 4, 5), (2, 8, 16), (1, 8, 4, 4), (2, 8, 4, 4, 1), (8,), ()]
)
def test_arrays_of_another_shape_than_x(function, argument, shape):
    match = rf"^{argument} has shape {re.escape(str(shape))}, expected {re.escape(str(SHAPE))}"
    refuses(function, ValueError, match, **{argument: data(shape=shape)})


@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(7,), (1,), (), (8, 1)])
@pytest.mark.parametrize("inplace", [True, False])
def test_running_statistics_of_another_shape_than_the_moments(argument, shape, inplace):
    match = rf"^{argument} has shape {re.escape(str(shape))}, expected \(8,\)"
    spoiled = {argument: np.full(shape, SENTINEL, "float32"), "inplace": inplace}
    refuses("update_running_stats", ValueError, match, **spoiled)


@pytest.mark.parametrize("length", [1, 7])
def test_moments_of_different_shapes_do_not_merge(length):
    for first, second in ((moments(), moments(length)), (moments(length), moments())):
        with pytest.raises(ValueError, match=r"shape"):
            first.merge(second)
    with pytest.raises(ValueError, match=r"shape"):
        Moments(2, np.zeros(8), np.zeros(length)).merge(moments())


@pytest.mark.parametrize(
    ("function", "argument"),
    [("fold_batch_norm", name) for name in ("gamma", "beta", "mean")]
    + takers("gamma", "beta", "mean", "var", functions=["fold_into_linear", "fold_into_conv"]),
)
@pytest.mark.parametrize("shape", [(7,), (1,), (), (8, 1)])
def test_folded_parameters_of_another_shape(function, argument, shape):
    match = rf"^{argument} has shape {re.escape(str(shape))}, expected \(8,\)"
    refuses(function, ValueError, match, **{argument: np.full(shape, SENTINEL, "float32")})


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        ("fold_into_linear", (7, 5)),
        ("fold_into_linear", (5, 8)),
        ("fold_into_linear", (8,)),
        ("fold_into_linear", (8, 5, 3)),
        ("fold_into_conv", (7, 5, 3, 3)),
        ("fold_into_conv", (8,)),
    ],
)
def test_folded_weights_of_another_shape(function, shape):
    refuses(function, ValueError, re.escape(str(shape)), weight=data(shape=shape))


@pytest.mark.parametrize("function", ["fold_into_linear", "fold_into_conv"])
def test_folded_bias_of_another_shape(function):
    match = r"^bias has shape \(7,\), expected \(8,\)"
    refuses(function, ValueError, match, bias=per_channel(length=7))


@pytest.mark.parametrize("groups", [0, -1, 3, 5])
def test_folded_groups_that_do_not_divide_the_channels(groups):
    spoiled = {"weight": data(shape=(8, 1, 3, 3)), "transposed": True, "groups": groups}
    refuses("fold_into_conv", ValueError, r"groups", **spoiled)


# Running statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_only_one_running_statistic(training, missing):
    spoiled = {missing: None, "training": training}
    refuses("batch_norm_forward", ValueError, r"running_mean.*running_var", **spoiled)


def test_no_running_statistics_when_not_training():
    spoiled = {"running_mean": None, "running_var": None, "training": False}
    refuses("batch_norm_forward", ValueError, r"running_mean.*running_var", **spoiled)


@pytest.mark.cpu_only  # CuPy arrays are never read-only
@pytest.mark.parametrize("function", ["batch_norm_forward", "update_running_stats"])
@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
def test_read_only_running_statistics(function, argument):
    frozen = lay_out(per_channel(), "read-only")
    match = rf"^{argument}\b.*read-only.*update_running_stats.*inplace=False"
    refuses(function, ValueError, match, **{argument: frozen})


def test_read_only_running_statistics_are_fine_where_nothing_is_written():
    frozen = lay_out(per_channel(), "read-only")
    x = data()
    nbnorm.batch_norm_forward(x, None, None, frozen, frozen, training=False)
    nbnorm.update_running_stats(frozen, frozen, moments(), inplace=False)
    assert_same_bits(frozen, per_channel())


def test_running_statistics_that_share_memory_with_anything_else_of_the_call():
    """An update would change the gamma, beta or residual that backward receives."""
    for statistic in ("running_mean", "running_var"):
        for other in ("gamma", "beta", "running_mean", "running_var"):
            if statistic == other:
                continue
            names = " and ".join(sorted((statistic, other), key=lambda n: n not in RUNNING))
            names = "running_mean and running_var" if {statistic, other} == RUNNING else names
            for shared in shared_memory():
                spoiled = {statistic: shared[0], other: shared[1]}
                match = f"^{names} share memory, and {names.split()[0]} is written"
                refuses("batch_norm_forward", ValueError, match, **spoiled)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("argument", ["x", "residual", "out"])
def test_running_statistics_inside_of_large_arrays(statistic, argument):
    large = target()
    match = rf"{statistic}.* share memory|out overlaps {statistic}"
    spoiled = {argument: large, statistic: large[0, :, 1, 1]}
    refuses("batch_norm_forward", ValueError, match, **spoiled)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("of_batch", ["mean", "m2"])
def test_running_statistics_that_share_memory_with_the_moments(statistic, of_batch):
    batch = Moments(32, per_channel("float64"), per_channel("float64"))
    match = f"^{statistic} and moments.{of_batch} share memory"
    spoiled = {"moments": batch, statistic: getattr(batch, of_batch)}
    refuses("update_running_stats", ValueError, match, **spoiled)
    nbnorm.update_running_stats(**VALID["update_running_stats"]() | spoiled, inplace=False)


def test_running_statistics_may_share_memory_where_nothing_is_written():
    shared = per_channel()
    nbnorm.batch_norm_forward(data(), shared, shared, shared, shared, training=False)
    nbnorm.batch_norm_forward(data(), shared, shared)


def test_neighbours_in_one_memory_share_none():
    gamma, beta, mean, var = per_channel(length=32).reshape(4, 8)
    nbnorm.batch_norm_forward(data(), gamma, beta, mean, var)


@pytest.mark.parametrize(
    ("shape", "axis", "correction", "values"),
    [
        ((1, 8), 1, 1, "1 value"),
        ((1, 8, 1, 1), 1, 1, "1 value"),
        ((2, 8), 1, 2, "2 values"),
        ((8, 1), 0, 1, "1 value"),
    ],
)
@pytest.mark.parametrize("with_running", [True, False])
def test_too_few_values_per_channel(shape, axis, correction, values, with_running):
    spoiled = {name: data(shape=shape) for name in ("x", "residual", "out")}
    if not with_running:
        spoiled |= {"running_mean": None, "running_var": None}
    message = f"expected more than {values} per channel when training, got x of shape {shape}"
    refuses(
        "batch_norm_forward",
        ValueError,
        f"^{re.escape(message)}$",
        axis=axis,
        correction=correction,
        **spoiled,
    )


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(("count", "correction"), [(1, 1), (2, 2), (1, 5)])
def test_too_few_values_to_update_running_statistics(count, correction, inplace):
    refuses(
        "update_running_stats",
        ValueError,
        rf"expected more than {correction} value.* per channel when training",
        moments=moments(count=count),
        correction=correction,
        inplace=inplace,
    )


# Numbers and names


@pytest.mark.parametrize("function", taking("eps"))
@pytest.mark.parametrize("eps", [-1e-5, np.nan, np.inf, -np.inf])
def test_eps_that_is_negative_or_not_finite(function, eps):
    refuses(function, ValueError, r"^eps", eps=eps)


@pytest.mark.parametrize("function", taking("momentum"))
@pytest.mark.parametrize("momentum", [np.nan, np.inf, -np.inf, np.float32("nan")])
def test_momentum_that_is_not_finite(function, momentum):
    refuses(function, ValueError, r"^momentum must be finite", momentum=momentum)


@pytest.mark.parametrize(("momentum", "mean", "var"), [(2.0, 6.0, 11.0), (-1.0, -3.0, -4.0)])
def test_momentum_outside_of_0_and_1_extrapolates(momentum, mean, var):
    x = np.array([[3.0 - np.sqrt(3)], [3.0], [3 + np.sqrt(3)]]).repeat(2, 0)  # mean 3
    batch = Moments(6, np.array([3.0]), np.array([30.0]))  # unbiased variance 6
    running = np.zeros(1), np.ones(1)
    nbnorm.update_running_stats(*running, batch, momentum=momentum)
    assert_array_equal(running, [[mean], [var]])
    frozen = nbnorm.batch_norm_inference(x, None, None, *running)
    assert np.isnan(frozen).all() == (var < 0)  # a variance cannot be negative: the result is NaN


BACKWARD = [name for name in taking("activation") if "backward" in name]


@pytest.mark.slow  # compiles kernels for three calls of each function
@pytest.mark.parametrize("function", BACKWARD)
def test_the_mask_of_relu_needs_y_or_beta_even_if_it_is_none(function):
    arguments = VALID[function]()
    without = {name: array for name, array in arguments.items() if name not in ("beta", "y")}
    call = getattr(nbnorm, function)
    with pytest.raises(ValueError, match=r"^beta is not given.*\(beta=None if it had none\), or"):
        call(**without)
    call(**without, beta=None)
    call(**without, y=arguments["y"])
    call(**without | {"activation": None})
    with pytest.raises(ValueError, match=r"^beta is not given"):
        call(**without | {"gamma": None})


def test_the_mask_of_relu_in_the_sums_needs_gamma_too():
    arguments = VALID["batch_norm_backward_reduce"]() | {"y": None}
    gamma = arguments.pop("gamma")
    with pytest.raises(ValueError, match=r"^gamma is not given.*\(gamma=None if it had none\)"):
        nbnorm.batch_norm_backward_reduce(**arguments)
    for said in (gamma, None):
        nbnorm.batch_norm_backward_reduce(**arguments, gamma=said)


@pytest.mark.parametrize("function", taking("activation"))
@pytest.mark.parametrize("activation", ["Relu", "elu", "", 1, True])
def test_unknown_activation(function, activation):
    refuses(function, ValueError, r"^activation", activation=activation)


@pytest.mark.parametrize(
    "mask", [(True, True, True), (True,) * 5, (), (1, 1, 1, 2), "abcd", None, True, 4]
)
def test_output_mask_that_is_not_four_booleans(mask):
    refuses("batch_norm_backward", ValueError, r"^output_mask", output_mask=mask)


@pytest.mark.parametrize("count", [-1, 1.5, "32", None])
def test_count_that_is_no_count(count):
    arguments = {**VALID["batch_norm_backward_apply"](), "count": count}
    before = bits(arguments)
    with pytest.raises((TypeError, ValueError), match="count"):
        nbnorm.batch_norm_backward_apply(**arguments)
    for name, (array, copy) in before.items():
        assert_same_bits(array, copy, name)


# Numbers and other libraries' arrays


@pytest.mark.parametrize("argument", ["eps", "momentum", "correction"])
@pytest.mark.parametrize("value", ["1e-5", "abc", b"1"])
def test_numbers_that_are_text(argument, value):
    refuses(
        "batch_norm_forward", TypeError, rf"^{argument} must be a real number", **{argument: value}
    )


def test_a_count_that_is_no_number():
    for count in ("2", np.nan, np.inf):
        with pytest.raises(TypeError, match=r"^moments\.count must be an int or a finite float"):
            nbnorm.Moments(count, np.zeros(3), np.zeros(3)).merge()


class Elsewhere:
    """An array in the memory of an unsupported device, ROCm by default."""

    dtype = "float32"

    def __init__(self, device=10):
        self.device = device

    def __dlpack__(self, **_):
        raise AssertionError("asked for memory that cannot be read here")

    def __dlpack_device__(self):
        return self.device, 0


class Nowhere:
    """An array whose device is unknown."""

    def __dlpack__(self, **_):
        raise AssertionError


@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL))
def test_arrays_on_another_device(function, argument):
    kind = TypeError if argument == "x" else ValueError
    match = rf"^{argument} is in memory of DLPack device type"
    refuses(function, kind, match, **{argument: Elsewhere()})
    refuses(function, TypeError, rf"^{argument} has __dlpack__ but", **{argument: Nowhere()})


@pytest.mark.cpu_only
@pytest.mark.parametrize("device", [2, 13])
@pytest.mark.parametrize(("function", "argument"), takers(*LARGE, *SMALL))
def test_arrays_on_a_gpu_without_the_cuda_backend(function, argument, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    kind = ImportError if argument == "x" else ValueError
    message = rf'^{argument} is not in CPU memory, .* numba_cuda: pip install "nbnorm-kernels\[cuda'
    refuses(function, kind, message, **{argument: Elsewhere(device)})
