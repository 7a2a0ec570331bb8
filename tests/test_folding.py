"""Batch normalization at inference as a linear map, and folding it into an adjacent layer."""

import itertools
import math
import os
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from strategies import DTYPES, dtype_of
from tolerances import one_unit

import nbnorm
from nbnorm import reference
from nbnorm.folding import fold_batch_norm, fold_into_conv, fold_into_linear

EPS = 1e-3
TOLERANCE = {"rtol": 0, "atol": 1e-13}  # float64 sums of about ten terms near 1


def statistics(channels, dtype=np.float64, seed=0):
    """Return gamma, beta, mean and var of awkward sizes and signs."""
    rng = np.random.default_rng(seed)
    gamma, beta, mean = rng.standard_normal((3, channels))
    return [array.astype(dtype) for array in (gamma, beta, mean, rng.uniform(0.1, 2, channels))]


def batch_norm(z, gamma, beta, mean, var, axis):
    """Compute the last line of the paper's Algorithm 2."""
    shape = [1] * z.ndim
    shape[axis] = -1
    gamma, beta, mean, var = (
        np.float64(default) if array is None else array.astype(np.float64).reshape(shape)
        for array, default in ((gamma, 1), (beta, 0), (mean, 0), (var, 1))
    )
    return gamma * (z - mean) / np.sqrt(var + EPS) + beta


def conv(u, weight, bias, groups):
    """Cross-correlate over all kernel axes, stride 1, no padding: (N, C, *space)."""
    kernel = weight.shape[2:]
    space = [n - k + 1 for n, k in zip(u.shape[2:], kernel, strict=True)]
    out_of, in_of = weight.shape[0] // groups, weight.shape[1]
    z = np.zeros((u.shape[0], weight.shape[0], *space))
    for g, offset in itertools.product(range(groups), np.ndindex(*kernel)):
        window = tuple(slice(o, o + n) for o, n in zip(offset, space, strict=True))
        outs, ins = slice(g * out_of, (g + 1) * out_of), slice(g * in_of, (g + 1) * in_of)
        tap = weight[(outs, slice(None), *offset)]
        z[:, outs] += np.einsum("oi,ni...->no...", tap, u[(slice(None), ins, *window)])
    return z + bias.reshape(-1, *[1] * len(kernel))


def conv_transposed(u, weight, bias, groups):
    """Add every input value times its kernel to the output: weight (in, out/g, *k)."""
    kernel = weight.shape[2:]
    space = [n + k - 1 for n, k in zip(u.shape[2:], kernel, strict=True)]
    in_of, out_of = weight.shape[0] // groups, weight.shape[1]
    z = np.zeros((u.shape[0], out_of * groups, *space))
    for g, offset in itertools.product(range(groups), np.ndindex(*kernel)):
        window = tuple(slice(o, o + n) for o, n in zip(offset, u.shape[2:], strict=True))
        outs, ins = slice(g * out_of, (g + 1) * out_of), slice(g * in_of, (g + 1) * in_of)
        tap = weight[(ins, slice(None), *offset)]
        z[(slice(None), outs, *window)] += np.einsum("io,ni...->no...", tap, u[:, ins])
    return z + bias.reshape(-1, *[1] * len(kernel))


def with_none(arrays, absent):
    """Replace gamma and beta by None if they are in `absent`."""
    gamma, beta, mean, var = arrays
    return None if "gamma" in absent else gamma, None if "beta" in absent else beta, mean, var


ABSENT = [(), ("gamma",), ("beta",), ("gamma", "beta", "bias")]


@pytest.mark.parametrize("absent", ABSENT, ids=" ".join)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_scale_and_shift_are_inference(absent, shape):
    x = np.random.default_rng(1).standard_normal((4, *shape))
    bn = with_none([array.reshape(shape) for array in statistics(np.prod(shape))], absent)
    scale, shift = fold_batch_norm(*bn, eps=EPS)
    assert scale.shape == shift.shape == shape
    flat = [None if array is None else array.reshape(-1) for array in bn]
    ref = batch_norm(x.reshape(4, -1), *flat, axis=1)
    np.testing.assert_allclose(scale * x + shift, ref.reshape(x.shape), **TOLERANCE)


@pytest.mark.parametrize("absent", ABSENT, ids=" ".join)
def test_linear_layer_absorbs_batch_norm(absent):
    rng = np.random.default_rng(2)
    weight, bias, u = rng.standard_normal((5, 7)), rng.standard_normal(5), rng.random((6, 7))
    bn = with_none(statistics(5), absent)
    folded, shift = fold_into_linear(weight, None if "bias" in absent else bias, *bn, eps=EPS)
    z = u @ weight.T + (0 if "bias" in absent else bias)
    np.testing.assert_allclose(u @ folded.T + shift, batch_norm(z, *bn, axis=1), **TOLERANCE)


@pytest.mark.parametrize("absent", ABSENT, ids=" ".join)
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_absorbs_batch_norm(transposed, groups, kernel, absent):
    rng = np.random.default_rng(3)
    ins, outs = 6, 12  # different sizes, so that a wrong layout cannot fit
    shape = (ins, outs // groups) if transposed else (outs, ins // groups)
    weight, bias = rng.standard_normal((*shape, *kernel)), rng.standard_normal(outs)
    u = rng.standard_normal((2, ins, *(k + 2 for k in kernel)))
    bn = with_none(statistics(outs), absent)
    layer = conv_transposed if transposed else conv

    folded, shift = fold_into_conv(
        weight,
        None if "bias" in absent else bias,
        *bn,
        eps=EPS,
        transposed=transposed,
        groups=groups,
    )
    assert folded.shape == weight.shape
    z = layer(u, weight, np.zeros(outs) if "bias" in absent else bias, groups)
    ref = batch_norm(z, *bn, axis=1)
    np.testing.assert_allclose(layer(u, folded, shift, groups), ref, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_convolutions_of_torch_absorb_batch_norm(transposed):
    torch = pytest.importorskip("torch")
    cls = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    torch.manual_seed(0)
    layer = cls(6, 12, (2, 3), stride=2, padding=1, groups=3, dtype=torch.float64)
    bn = torch.nn.BatchNorm2d(12, eps=EPS, dtype=torch.float64).eval()
    with torch.no_grad():
        for array, value in zip(
            (bn.weight, bn.bias, bn.running_mean, bn.running_var), statistics(12), strict=True
        ):
            array.copy_(torch.from_numpy(value))
        u = torch.randn(2, 6, 7, 8, dtype=torch.float64)
        ref = bn(layer(u))
        weight, bias = fold_into_conv(
            layer.weight.detach(),
            layer.bias.detach(),
            bn.weight.detach(),
            bn.bias.detach(),
            bn.running_mean,
            bn.running_var,
            eps=EPS,
            transposed=transposed,
            groups=3,
        )
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        np.testing.assert_allclose(layer(u).numpy(), ref.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent", ABSENT, ids=" ".join)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_folding_agrees_with_the_oracle(dtype, absent):
    rng = np.random.default_rng(9)
    bn = with_none(statistics(12, dtype), absent)
    bias = None if "bias" in absent else rng.standard_normal(12).astype(dtype)
    kernels = {
        (transposed, groups): rng.standard_normal(
            (6, 12 // groups, 2) if transposed else (12, 6 // groups, 2)
        ).astype(dtype)
        for transposed, groups in itertools.product((False, True), (1, 3))
    }
    pairs = [(fold_batch_norm(*bn, eps=EPS), reference.fold_batch_norm(*bn, eps=EPS))]
    for (transposed, groups), weight in kernels.items():
        arguments = (weight, bias, *bn)
        options = {"eps": EPS, "transposed": transposed, "groups": groups}
        ref = reference.fold_into_conv(*arguments, **options)
        pairs.append((fold_into_conv(*arguments, **options), ref))
    arguments = (kernels[False, 1][..., 0], bias, *bn)
    ref = reference.fold_into_linear(*arguments, eps=EPS)
    pairs.append((fold_into_linear(*arguments, eps=EPS), ref))
    for comp, ref in pairs:
        for array, expected in zip(comp, ref, strict=True):
            assert array.dtype == dtype
            # Half a unit of the result, plus the float64 arithmetic's error.
            atol = 4 * np.spacing(dtype(3)) if dtype is np.float64 else 0
            unit = np.spacing(np.abs(expected).astype(dtype))
            assert np.all(np.abs(array - expected) <= 0.5001 * unit + atol)


def test_results_are_rounded_once_to_the_dtype_of_their_array():
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((5, 7)), rng.standard_normal(5)
    arrays = [array.astype(np.float32) for array in statistics(5)]
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        stored = weight.astype(dtype)
        ref = fold_into_linear(stored.astype(np.float64), bias, *arrays, eps=EPS)
        comp = fold_into_linear(stored, bias, *arrays, eps=EPS)
        assert comp[0].dtype == dtype
        assert comp[1].dtype == np.float64
        assert_array_equal(comp[0], ref[0].astype(dtype))
        assert_array_equal(comp[1], ref[1])
        comp = fold_into_linear(stored, None, *arrays, eps=EPS)
        assert comp[1].dtype == dtype
        kernel = stored[:, :, None]
        assert_array_equal(
            fold_into_conv(kernel, bias, *arrays, eps=EPS)[0][..., 0], ref[0].astype(dtype)
        )


def test_scale_and_shift_have_the_dtype_of_gamma_or_else_of_var():
    gamma, beta, mean, var = statistics(5)
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        scale, shift = fold_batch_norm(gamma.astype(dtype), beta, mean, var)
        assert scale.dtype == shift.dtype == dtype
        scale, shift = fold_batch_norm(None, beta, mean, var.astype(dtype))
        assert scale.dtype == shift.dtype == dtype


def test_a_large_mean_costs_nothing_in_float64():
    # In float32 beta - mean * scale, and so the folded bias, would be off by 0.06.
    weight, bias = np.ones((1, 1), np.float32), np.array([1e6], np.float32)
    mean, var = np.array([1e6 + 1], np.float32), np.array([1.0], np.float32)
    _, shift = fold_into_linear(weight, bias, None, None, mean, var)
    assert_array_equal(shift, np.array([-1 / np.sqrt(1 + 1e-5)], np.float32))


def test_no_variance_and_eps_0_leave_beta():
    beta = np.array([3.0, 4.0])
    scale, shift = fold_batch_norm(None, beta, np.ones(2), np.array([0.0, 4.0]), eps=0.0)
    assert_array_equal(scale, [0.0, 0.5])
    assert_array_equal(shift, [3.0, 3.5])


def test_nan_and_inf_stay_in_their_channel():
    gamma, beta, mean, var = statistics(4)
    weight = np.random.default_rng(5).standard_normal((4, 3, 2)).astype(np.float16)
    ref_weight, ref_bias = fold_into_conv(weight, None, gamma, beta, mean, var)
    gamma[1], mean[2] = 1e300, np.nan
    comp_weight, comp_bias = fold_into_conv(weight, None, gamma, beta, mean, var)
    assert_array_equal(comp_weight[[0, 2, 3]], ref_weight[[0, 2, 3]])
    assert_array_equal(comp_bias[[0, 3]], ref_bias[[0, 3]])
    assert np.isinf(comp_weight[1]).all()
    assert np.isnan(comp_bias[2])


def test_arguments_stay_as_they_are_and_may_be_read_only():
    rng = np.random.default_rng(6)
    arrays = [rng.standard_normal((4, 3, 2)), rng.standard_normal(4), *statistics(4)]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    results = *fold_into_conv(*arrays), *fold_into_linear(arrays[0][..., 0], *arrays[1:])
    for array in (*results, *fold_batch_norm(*arrays[2:])):
        assert array.flags.writeable
        assert not any(np.shares_memory(array, argument) for argument in arrays)
    for array, was in zip(arrays, before, strict=True):
        assert_array_equal(array, was)


def test_weights_of_any_strides_fold_alike():
    weight = np.random.default_rng(7).standard_normal((4, 6, 3, 2))
    for transposed in (False, True):
        bn = statistics(12 if transposed else 4)
        ref, _ = fold_into_conv(weight, None, *bn, groups=2, transposed=transposed)
        strided = np.zeros((8, 2, 3, 6))[::-2].transpose(0, 3, 2, 1)
        strided[...] = weight
        comp, _ = fold_into_conv(strided, None, *bn, groups=2, transposed=transposed)
        assert_array_equal(comp, ref)


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_results_are_arrays_of_the_library_of_their_array(library):
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(8)
    arrays = [rng.standard_normal((4, 3, 2)), rng.standard_normal(4), *statistics(4)]
    arrays = [array.astype(np.float32) for array in arrays]
    theirs = [xp.asarray(array) for array in arrays]
    for function, start in ((fold_into_conv, 0), (fold_batch_norm, 2)):
        ref = function(*arrays[start:])
        for comp, expected in zip(function(*theirs[start:]), ref, strict=True):
            assert type(comp) is type(theirs[0])
            assert_array_equal(np.from_dlpack(comp), expected)
    # A NumPy weight with a bias of the library: each result is an array of its argument's library.
    weight, bias = fold_into_conv(arrays[0], theirs[1], *theirs[2:])
    assert isinstance(weight, np.ndarray)
    assert type(bias) is type(theirs[1])


NAMES = ("bias", "gamma", "beta", "mean", "var")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_and_dtypes_are_refused(name):
    weight = np.ones((4, 6, 3))
    good = dict.fromkeys(NAMES, np.ones(4))
    for shape in ((5,), (4, 1), ()):
        bad = good | {name: np.ones(shape)}
        match = rf"{name} has shape \({', '.join(map(str, shape))},?\), expected \(4,\)"
        with pytest.raises(ValueError, match=match + r" for weight of shape \(4, 6\)"):
            fold_into_linear(weight[..., 0], **bad)
        with pytest.raises(ValueError, match=match + r" for weight of shape \(4, 6, 3\)"):
            fold_into_conv(weight, **bad)
    bad = good | {name: np.ones(4, np.int64)}
    for function, layer in ((fold_into_linear, weight[..., 0]), (fold_into_conv, weight)):
        with pytest.raises(TypeError, match=f"{name} has dtype int64"):
            function(layer, **bad)
    del good["bias"]
    if name in good and name != "var":
        with pytest.raises(ValueError, match=rf"{name} has shape \(5,\), expected \(4,\) for var"):
            fold_batch_norm(**(good | {name: np.ones(5)}))


def test_output_channels_are_counted_by_layout_and_groups():
    weight, wrong = np.ones((4, 6, 3)), [None, None, None, np.ones(5), np.ones(5)]
    match = r"var has shape \(5,\), expected \(6,\) for weight"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(weight, *wrong, transposed=True)
    match = r"var has shape \(5,\), expected \(12,\) for weight of shape \(4, 6, 3\) and groups 2"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(weight, *wrong, transposed=True, groups=2)
    match = r"var has shape \(5,\), expected \(4,\) for weight of shape \(4, 6, 3\) and groups 2"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(weight, *wrong, groups=2)


def test_weights_of_another_rank_are_refused():
    rest = [None, None, None, np.ones(4), np.ones(4)]
    for shape in ((4,), (4, 3, 2)):
        with pytest.raises(ValueError, match=r"weight has shape .*, expected \(out, in\)"):
            fold_into_linear(np.ones(shape), *rest)
    with pytest.raises(ValueError, match=r"weight .*, expected \(out, in/groups, \*kernel\)"):
        fold_into_conv(np.ones((4, 3)), *rest)
    with pytest.raises(ValueError, match=r"weight .*, expected \(in, out/groups, \*kernel\)"):
        fold_into_conv(np.ones((4, 3)), *rest, transposed=True)
    for function in (fold_into_linear, fold_into_conv):
        with pytest.raises(TypeError, match="weight must be a NumPy array"):
            function([[1.0]], *rest)
        with pytest.raises(TypeError, match="weight has dtype complex128"):
            function(np.ones((4, 3, 2), complex), *rest)


@pytest.mark.parametrize("groups", [0, -1, 1.0, True, "2", None])
def test_groups_must_be_a_positive_integer(groups):
    rest = [None, None, None, np.ones(4), np.ones(4)]
    with pytest.raises(ValueError, match="groups must be a positive integer"):
        fold_into_conv(np.ones((4, 3, 2)), *rest, groups=groups)


def test_groups_must_divide_the_channels():
    rest = [None, None, None, np.ones(4), np.ones(4)]
    with pytest.raises(ValueError, match="groups is 3, which does not divide the 4 out channels"):
        fold_into_conv(np.ones((4, 3, 2)), *rest, groups=3)
    with pytest.raises(ValueError, match="groups is 3, which does not divide the 4 in channels"):
        fold_into_conv(np.ones((4, 3, 2)), *rest, groups=3, transposed=True)


@pytest.mark.parametrize("eps", [-1e-5, np.inf, np.nan])
def test_bad_eps_is_refused(eps):
    bn = statistics(4)
    for call in (
        lambda: fold_batch_norm(*bn, eps=eps),
        lambda: fold_into_linear(np.ones((4, 3)), None, *bn, eps=eps),
        lambda: fold_into_conv(np.ones((4, 3, 2)), None, *bn, eps=eps),
    ):
        with pytest.raises(ValueError, match="eps must be finite and not negative"):
            call()


# Both ways, in any layout


@dataclass
class Layer:
    """A convolution (a linear layer if `kernel` is empty) and a batch norm before or after it."""

    kernel: tuple[int, ...]
    groups: int
    inside: int  # channels of a group
    outside: int
    kind: str  # plain, transposed or depthwise
    norm_first: bool
    absent: tuple[str, ...]
    dtype: str
    seed: int
    order: tuple[int, ...] | None  # of the axes in memory; None: the default
    options: dict = field(init=False)

    def __post_init__(self):
        if self.kind == "depthwise":
            self.inside = 1
        rng = np.random.default_rng(self.seed)
        self.ins, self.outs = self.groups * self.inside, self.groups * self.outside
        dtype, channels = dtype_of(self.dtype), self.ins if self.norm_first else self.outs
        # As (out, in of a group, *kernel), or transposed as (in, out of a group, *kernel).
        shape = (self.ins, self.outside) if self.kind == "transposed" else (self.outs, self.inside)
        self.weight = rng.standard_normal((*shape, *self.kernel)).astype(dtype)
        bias, gamma, beta, mean = (
            rng.standard_normal(n).astype(dtype) for n in (self.outs, *[channels] * 3)
        )
        if self.norm_first and self.kind == "transposed":  # cannot have a shift
            beta, mean = None, 0 * mean
        self.bn = gamma, beta, mean, rng.uniform(0.1, 2, channels).astype(dtype)
        self.bn = with_none(self.bn, self.absent)
        self.bias = None if "bias" in self.absent else bias
        self.u = rng.standard_normal((2, self.ins, *(k + 1 for k in self.kernel)))

        letters = ("IO" if self.kind == "transposed" else "OI") + "DHW"[3 - len(self.kernel) :]
        stored = self.weight
        if self.kind == "depthwise":
            letters = "IM" + letters[2:]
            stored = stored.reshape(self.groups, self.outside, *self.kernel)
        self.options = {"eps": EPS, "norm_first": self.norm_first}
        if self.kernel and self.kind != "depthwise":
            self.options |= {"groups": self.groups, "transposed": self.kind == "transposed"}
        if self.kernel and self.norm_first:
            self.options["padding"] = (0, "valid", "CIRCULAR", [0, (0, 0)])[self.seed % 4]
        self.stored = stored if self.order is None else stored.transpose(self.order)
        if self.order is not None:
            self.options["layout"] = "".join(letters[axis] for axis in self.order)

    def arguments(self):
        """Return the arguments of the folding function."""
        return (self.stored, self.bias, *self.bn)

    def back(self, stored):
        """Return a weight in PyTorch's layout."""
        if self.order is not None:
            stored = stored.transpose(np.argsort(self.order))
        return stored.reshape(self.weight.shape)

    def run(self, u, weight, bias):
        """Return the layer's result in float64."""
        bias = np.zeros(self.outs) if bias is None else bias.astype(np.float64)
        layer = conv_transposed if self.kind == "transposed" else conv
        return layer(u, weight.astype(np.float64), bias, self.groups)

    def apart(self):
        """Return the result of batch normalization and layer, one after the other."""
        if self.norm_first:
            return self.run(batch_norm(self.u, *self.bn, axis=1), self.weight, self.bias)
        return batch_norm(self.run(self.u, self.weight, self.bias), *self.bn, axis=1)

    def scale(self):
        """Return an upper bound of the sum of the magnitudes of a result's terms."""
        gamma, beta, mean, var = self.bn
        factor = np.abs(1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(
            var.astype(np.float64) + EPS
        )
        shift = np.abs(mean) * factor + (0 if beta is None else np.abs(beta))
        terms = math.prod(self.weight.shape) * max(1, self.groups)
        most = np.abs(self.u).max(initial=1) * np.abs(self.weight.astype(float)).max(initial=1)
        bias = 3.0 if self.bias is None else 3 + np.abs(self.bias.astype(float)).max(initial=0)
        return (most * terms + bias) * (1 + factor.max(initial=0)) * (1 + shift.max(initial=0))


@st.composite
def layers(draw):
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    kind = draw(st.sampled_from(["plain", "transposed", "depthwise"])) if kernel else "plain"
    axes = tuple(range(2 + len(kernel)))
    orders = st.permutations(axes).map(tuple)
    # PyTorch's layout has no depthwise weights: they are weights of convolutions with groups.
    order = draw(orders if kind == "depthwise" else st.none() | orders)
    return Layer(
        kernel,
        draw(st.integers(1, 3)) if kernel else 1,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        kind,
        draw(st.booleans()),
        draw(st.sampled_from(ABSENT)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**32 - 1)),
        order,
    )


@given(layers())
@settings(max_examples=300)
def test_folded_is_as_apart_whatever_the_order_and_the_layout(layer):
    function = fold_into_conv if layer.kernel else fold_into_linear
    # In float64, where a result differs by roundings only.
    wide = [None if a is None else a.astype(np.float64) for a in layer.arguments()]
    weight, bias = function(*wide, **layer.options)
    assert weight.shape == layer.stored.shape
    assert bias.shape == (layer.outs,)
    comp = layer.run(layer.u, layer.back(weight), bias)
    ref = layer.apart()
    assert_allclose(comp, ref, rtol=0, atol=np.finfo(np.float64).eps * layer.scale())


@given(layers())
@settings(max_examples=300)
def test_both_ways_agree_with_the_oracle_to_one_rounding(layer):
    name = "fold_into_conv" if layer.kernel else "fold_into_linear"
    comp = getattr(nbnorm.folding, name)(*layer.arguments(), **layer.options)
    ref = getattr(reference, name)(*layer.arguments(), **layer.options)
    for array, expected in zip(comp, ref, strict=True):
        assert array.dtype == dtype_of(layer.dtype)
        # ml_dtypes rounds float64 to bfloat16 by way of float32.
        half = 0.5 if layer.dtype != "bfloat16" else 0.5 + 2.0**-16
        rounding = half * one_unit(expected, array.dtype)
        rounding += np.finfo(np.float64).eps * layer.scale()  # of the float64 arithmetic
        assert np.all(np.abs(array.astype(np.float64) - expected) <= rounding)


FIRST = {"norm_first": True, "eps": EPS}


def copied(torch, *modules):
    """Fill PyTorch layers with random values that all differ."""
    for i, module in enumerate(modules):
        for j, tensor in enumerate((*module.parameters(), *module.buffers())):
            if tensor.dim():
                rng = np.random.default_rng([i, j])
                tensor.copy_(torch.from_numpy(rng.uniform(0.2, 2, tensor.shape)))


def of_torch(*modules):
    """Return the modules' parameters and statistics in the order of the functions' arguments."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.dim()]
    return [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_the_convolutions_of_torch_absorb_batch_norm_before_them(groups, mode):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        bn = torch.nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64).eval()
        layer = torch.nn.Conv2d(
            *(6, 12, (2, 3)),
            stride=2,
            dilation=(1, 2),
            groups=groups,
            padding=0 if mode == "zeros" else 1,
            padding_mode=mode,
            dtype=torch.float64,
        )
        copied(torch, bn, layer)
        u = torch.randn(2, 6, 7, 9, dtype=torch.float64)
        ref = layer(bn(u))
        # Padding with values of the input itself is normalised like the rest.
        weight, bias = fold_into_conv(*of_torch(layer, bn), groups=groups, padding=0, **FIRST)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        assert_allclose(layer(u).numpy(), ref.numpy(), rtol=1e-13, atol=1e-12)


def test_zeros_are_padded_exactly_by_the_value_that_becomes_0():
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        bn = torch.nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64).eval()
        layer = torch.nn.Conv2d(6, 4, 3, padding=1, dtype=torch.float64)
        copied(torch, bn, layer)
        u = torch.randn(2, 6, 5, 7, dtype=torch.float64)
        ref = layer(bn(u))
        with pytest.raises(ValueError, match=r"padding is \(1, 1\), but .*pad the input with -shi"):
            fold_into_conv(*of_torch(layer, bn), padding=layer.padding, **FIRST)
        # Do what the error says.
        scale, shift = fold_batch_norm(*of_torch(bn), eps=EPS)
        padded = (-shift / scale)[:, None, None].repeat(2, 1, 7, 9)
        padded[:, :, 1:-1, 1:-1] = u
        folded = fold_into_conv(*of_torch(layer, bn), padding=0, **FIRST)
        comp = torch.nn.functional.conv2d(padded, *folded)
        assert_allclose(comp.numpy(), ref.numpy(), rtol=1e-13, atol=1e-12)
        # Without a shift, zeros stay zeros.
        bn.running_mean.zero_()
        bn.bias.zero_()
        ref = layer(bn(u))
        folded = fold_into_conv(*of_torch(layer, bn), padding="same", **FIRST)
        comp = torch.nn.functional.conv2d(u, *folded, padding=1)
        assert_allclose(comp.numpy(), ref.numpy(), rtol=1e-13, atol=1e-12)


def test_an_image_that_is_normalised_and_flattened():
    rng = np.random.default_rng(0)
    x, bn = rng.standard_normal((5, 3, 2, 4)), statistics(3)
    weight, bias = rng.standard_normal((6, 24)), rng.standard_normal(6)
    first, last = (batch_norm(x, *bn, axis=1).transpose(t) for t in ((0, 1, 2, 3), (0, 2, 3, 1)))
    for y, spread, u in (
        (first, np.repeat, x),
        (last, np.tile, x.transpose(0, 2, 3, 1)),
    ):
        repeated = [spread(array, 8) for array in bn]
        folded, shift = fold_into_linear(weight, bias, *repeated, **FIRST)
        comp = u.reshape(5, -1) @ folded.T + shift
        assert_allclose(comp, y.reshape(5, -1) @ weight.T + bias, rtol=1e-12, atol=1e-12)


# Keras layers with channels last, as batch normalization has them by default: the input's shape,
# the layer's arguments and the function's options.
KERAS = {
    "Dense": ((5,), {"units": 4}, {"layout": "IO"}),
    "Conv1D": ((8, 6), {"filters": 4, "kernel_size": 3}, {"layout": "WIO"}),
    "Conv2D": (
        (7, 8, 6),
        {"filters": 4, "kernel_size": (2, 3), "strides": 2},
        {"layout": "HWIO"},
    ),
    "Conv2D with groups": (
        (7, 8, 6),
        {"filters": 4, "kernel_size": (2, 3), "groups": 2},
        {"layout": "HWIO", "groups": 2},
    ),
    "Conv3D": ((4, 5, 6, 2), {"filters": 3, "kernel_size": (1, 2, 3)}, {"layout": "DHWIO"}),
    "DepthwiseConv1D": ((8, 6), {"kernel_size": 3, "depth_multiplier": 2}, {"layout": "WIM"}),
    "DepthwiseConv2D": (
        (7, 8, 6),
        {"kernel_size": (2, 3), "depth_multiplier": 2},
        {"layout": "HWIM"},
    ),
    "Conv1DTranspose": (
        (8, 6),
        {"filters": 4, "kernel_size": 3, "strides": 2},
        {"layout": "WOI", "transposed": True},
    ),
    "Conv2DTranspose": (
        (4, 5, 6),
        {"filters": 4, "kernel_size": (2, 3), "strides": 2},
        {"layout": "HWOI", "transposed": True},
    ),
}


# Keras converts its variables to NumPy arrays in a way that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", KERAS)
def test_layers_of_keras_absorb_batch_norm(name, norm_first):
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    keras = pytest.importorskip("keras")
    shape, arguments, options = KERAS[name]
    rng = np.random.default_rng(0)
    layer = getattr(keras.layers, name.partition(" ")[0])(**arguments)
    layer.build((None, *shape))
    weight, bias = layer.get_weights()
    bias = rng.standard_normal(bias.shape).astype(np.float32)
    layer.set_weights([weight, bias])
    bn = statistics(shape[-1] if norm_first else bias.size, np.float32)
    if norm_first and options.get("transposed"):
        bn[1] *= 0
        bn[2] *= 0
    norm = keras.layers.BatchNormalization(epsilon=EPS)
    norm.build((None, *shape[:-1], bn[0].size))
    norm.set_weights(bn)
    u = rng.standard_normal((2, *shape)).astype(np.float32)
    ref = layer(norm(u)) if norm_first else norm(layer(u))
    if norm_first and "Conv" in name:
        options = options | {"padding": layer.padding}
    function = fold_into_linear if name == "Dense" else fold_into_conv
    layer.set_weights(function(weight, bias, *bn, eps=EPS, norm_first=norm_first, **options))
    comp, ref = (keras.ops.convert_to_numpy(array) for array in (layer(u), ref))
    # Sums of at most 18 products near 1, in float32.
    assert_allclose(comp, ref, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_separable_convolutions_of_keras_have_the_output_in_their_second_kernel():
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    keras = pytest.importorskip("keras")
    layer = keras.layers.SeparableConv2D(4, (2, 3), depth_multiplier=2)
    layer.build((None, 7, 8, 6))
    depthwise, pointwise, bias = layer.get_weights()
    u = np.random.default_rng(0).standard_normal((2, 7, 8, 6)).astype(np.float32)
    bn = statistics(4, np.float32)
    ref = batch_norm(keras.ops.convert_to_numpy(layer(u)), *bn, axis=-1)
    folded = fold_into_conv(pointwise, bias, *bn, eps=EPS, layout="HWIO")
    layer.set_weights([depthwise, *folded])
    assert_allclose(keras.ops.convert_to_numpy(layer(u)), ref, rtol=1e-5, atol=2e-5)


FLAX = {
    "ConvTranspose": ({}, "HWIO", {"transposed": True}),
    "ConvTranspose with transpose_kernel": (
        {"transpose_kernel": True},
        "HWOI",
        {"transposed": True},
    ),
    "Conv": ({"feature_group_count": 2}, "HWIO", {"groups": 2}),
}


@pytest.mark.parametrize("name", FLAX)
def test_convolutions_of_flax_absorb_batch_norm(name):
    linen = pytest.importorskip("flax.linen")
    arguments, layout, options = FLAX[name]
    rng = np.random.default_rng(0)
    cls = getattr(linen, name.partition(" ")[0])
    layer = cls(4, (2, 3), strides=(2, 1), **arguments)
    lengths = {"H": 2, "W": 3, "I": 6 // options.get("groups", 1), "O": 4}
    kernel = rng.standard_normal([lengths[letter] for letter in layout]).astype(np.float32)
    bias, u = rng.standard_normal(4), rng.standard_normal((2, 5, 6, 6)).astype(np.float32)
    bias, bn = bias.astype(np.float32), statistics(4, np.float32)
    z = layer.apply({"params": {"kernel": kernel, "bias": bias}}, u)
    ref = batch_norm(np.asarray(z), *bn, axis=-1)
    kernel, bias = fold_into_conv(kernel, bias, *bn, eps=EPS, layout=layout, **options)
    comp = layer.apply({"params": {"kernel": kernel, "bias": bias}}, u)
    # Sums of at most 36 products near 1, in float32.
    assert_allclose(comp, ref, rtol=1e-5, atol=5e-5)


PADDED = [1, (0, 1), [[0, 0], [1, 0]], "same", "SAME", "causal", np.int64(2)]
PADDED += ["SAME_LOWER", "SAME_UPPER", np.array([0, 1]), np.array(1), (np.array([0, 1]), 0)]


@pytest.mark.parametrize("padding", PADDED, ids=str)
def test_padding_after_a_shift_is_refused(padding):
    weight, bn = np.ones((4, 3, 2, 1)), statistics(3)
    with pytest.raises(ValueError, match="zeros that are padded after batch normalization are not"):
        fold_into_conv(weight, None, *bn, padding=padding, **FIRST)
    fold_into_conv(weight, None, bn[0], None, 0 * bn[2], bn[3], padding=padding, **FIRST)
    fold_into_conv(weight, None, *statistics(4), padding=padding)  # no matter after the layer
    bn[1][:], bn[2][:] = 0, 0
    bn[1][2] = 1e-300
    with pytest.raises(ValueError, match="padding is"):
        fold_into_conv(weight, None, *bn, padding=padding, **FIRST)


def test_a_kernel_of_one_value_needs_no_padding_to_keep_the_size():
    weight, bn = np.ones((4, 3, 1, 1)), statistics(3)
    for padding in ("same", "valid", 0, (0, 0), ((0, 0), (0, 0))):
        fold_into_conv(weight, None, *bn, padding=padding, **FIRST)
    with pytest.raises(ValueError, match="padding is 1"):
        fold_into_conv(weight, None, *bn, padding=1, **FIRST)


@pytest.mark.parametrize(
    "padding", ["VALID", "CIRCULAR", "reflect", np.zeros((2, 2), int)], ids=str
)
def test_padding_without_zeros(padding):
    weight, bn = np.ones((4, 3, 3, 3)), statistics(3)
    folded = fold_into_conv(weight, None, *bn, padding=padding, **FIRST)
    for array, ref in zip(
        folded, fold_into_conv(weight, None, *bn, padding=0, **FIRST), strict=True
    ):
        assert_allclose(array, ref, rtol=0)


def test_padding_must_be_told_where_it_matters():
    weight, bn = np.ones((4, 3, 2)), statistics(3)
    with pytest.raises(ValueError, match=r"padding is None, expected the layer's padding \(0 if"):
        fold_into_conv(weight, None, *bn, **FIRST)
    match = "a transposed convolution adds the shift .* keep the batch normalization"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(weight, None, *statistics(4), transposed=True, **FIRST)


NO_PADDING = ["full", "", -1, 1.0, True, (0, -1), (0, None), {}, np.ones(2)]
NO_PADDING += [["same"], ("valid", 0), (), [[], 0], np.array([True]), np.array([0, -1])]


@pytest.mark.parametrize("padding", NO_PADDING, ids=str)
def test_padding_is_integers_or_a_word(padding):
    for norm_first in (False, True):
        bn = statistics(3 if norm_first else 4)
        with pytest.raises(ValueError, match="padding must be nonnegative integers, 'va"):
            fold_into_conv(np.ones((4, 3, 2)), None, *bn, norm_first=norm_first, padding=padding)


@pytest.mark.parametrize("layout", ["NHWC", "OIH", "OIHWD", "OOIH", "OIHH", "HWMO", "OIMH", "", 4])
def test_unknown_layouts_are_refused(layout):
    weight, rest = np.ones((4, 3, 2, 2)), [None, None, None, np.ones(4), np.ones(4)]
    with pytest.raises(
        ValueError, match=r"layout is .*, expected 4 different letters for weight of"
    ):
        fold_into_conv(weight, *rest, layout=layout)
    with pytest.raises(ValueError, match=r"layout is .*, expected 'OI' \(out, in\) or 'IO'"):
        fold_into_linear(weight[..., 0, 0], *rest, layout=layout)


def test_depthwise_layouts_have_neither_groups_nor_a_transposed_form():
    weight, rest = np.ones((2, 2, 3, 2)), [None, None, None, np.ones(6), np.ones(6)]
    fold_into_conv(weight, *rest, layout="HWIM")
    for options in ({"groups": 3}, {"transposed": True}):
        with pytest.raises(
            ValueError, match=r"layout is 'HWIM', which is depthwise and excludes groups"
        ):
            fold_into_conv(weight, *rest, layout="HWIM", **options)


def test_shapes_are_told_with_the_side_that_they_belong_to():
    wrong = [None, None, np.ones(5), np.ones(5)]
    options = {"norm_first": True, "padding": 0}
    match = r"var has shape \(5,\), expected \(6,\) for weight of shape \(2, 3, 4\) and layout "
    match += "'WIO' and groups 2 and norm_first=True"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(np.ones((2, 3, 4)), None, *wrong, layout="WIO", groups=2, **options)
    match = r"bias has shape \(3,\), expected \(4,\) for weight of shape \(3, 4\) and layout 'IO'$"
    with pytest.raises(ValueError, match=match):
        fold_into_linear(np.ones((3, 4)), np.ones(3), *statistics(3), layout="IO", norm_first=True)
    match = r"groups is 3, which does not divide the 4 out channels of weight of shape \(2, 3, 4\)"
    with pytest.raises(ValueError, match=match):
        fold_into_conv(np.ones((2, 3, 4)), None, *wrong, layout="WIO", groups=3)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), expected axes 'WIO'"):
        fold_into_conv(np.ones((3, 4)), None, *wrong, layout="WIO")
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(in, out\)"):
        fold_into_linear(np.ones(3), None, *wrong, layout="IO")


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)])
def test_empty_weights_fold_to_the_bias(shape):
    for norm_first, transposed in itertools.product([False, True], repeat=2):
        channels = shape[0 if transposed == norm_first else 1]
        bn = statistics(channels)
        if transposed:
            bn[1], bn[2] = 0 * bn[1], 0 * bn[2]
        outs = shape[1 if transposed else 0]
        options = {"norm_first": norm_first, "transposed": transposed, "padding": 0}
        weight, bias = fold_into_conv(np.ones(shape), np.ones(outs), *bn, **options)
        assert weight.shape == shape
        assert bias.shape == (outs,)
        if norm_first:
            assert_array_equal(bias, 1)
    weight, bias = fold_into_conv(
        np.ones(shape), None, *statistics(np.prod(shape[:2])), layout="IMW"
    )
    assert bias.shape == (np.prod(shape[:2]),)


def test_results_are_contiguous_in_any_layout():
    weight = np.ones((3, 3, 6, 4)).transpose(1, 0, 2, 3)
    folded, _ = fold_into_conv(weight, None, *statistics(4), layout="HWIO")
    assert folded.flags.c_contiguous


def test_a_channel_of_nan_reaches_what_the_layer_makes_of_it():
    weight = np.ones((2, 4, 1))
    weight[1, 2] = 0
    gamma, beta, mean, var = statistics(4)
    mean[2] = np.nan
    folded, bias = fold_into_conv(weight, None, gamma, beta, mean, var, padding=0, **FIRST)
    assert np.isfinite(folded).all()
    assert np.isnan(bias).all()  # 0 times NaN is NaN in the layer, too
