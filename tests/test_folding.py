"""Batch normalization at inference as a linear map, and folded into the layer before it."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

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
    """Replace the named ones of (gamma, beta) by None."""
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
