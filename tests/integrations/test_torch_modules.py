"""BatchNorm1d, 2d and 3d of nbnorm.integrations.torch against PyTorch's."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch_cases import SHAPE, _seed, close, drawn  # noqa: E402, F401

import nbnorm  # noqa: E402
from nbnorm.integrations.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    recalibrate,
)

PAIRS = {
    (6, 3): (nn.BatchNorm1d, BatchNorm1d),
    (4, 3, 7): (nn.BatchNorm1d, BatchNorm1d),
    SHAPE: (nn.BatchNorm2d, BatchNorm2d),
    (2, 3, 2, 4, 3): (nn.BatchNorm3d, BatchNorm3d),
}
pairs = pytest.mark.parametrize(("shape", "classes"), PAIRS.items(), ids=str)


@pairs
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_modules_do_what_theirs_do(momentum, track, affine, shape, classes):
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    reference, ours = (cls(3, **options, dtype=torch.float64) for cls in classes)
    assert isinstance(ours, classes[0])
    assert repr(ours) == repr(reference)
    ours.load_state_dict(reference.state_dict())
    for training in (True, True, True, False, True, False):
        x = drawn(shape)
        ours.train(training)
        reference.train(training)
        close(ours(x), reference(x))
        for name, expected in reference.state_dict().items():
            close(ours.state_dict()[name], expected)
    reference.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == reference.state_dict().keys()


@pairs
def test_dimensions_are_checked_as_theirs_are(shape, classes):
    x = torch.ones(3) if len(shape) == 2 else torch.ones(3, 3, 3, 3, 3, 3)
    messages = []
    for cls in classes:
        with pytest.raises(ValueError, match="expected") as caught:
            cls(3)(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_fused_module():
    layer, plain = BatchNorm2d(3, relu=True), nn.BatchNorm2d(3)
    assert repr(layer) == repr(plain)[:-1] + ", relu=True)"
    x, residual = torch.randn(2, *SHAPE)
    close(layer(x), torch.relu(plain(x)), torch.float32)
    close(layer(x, residual), torch.relu(plain(x) + residual), torch.float32)
    layer.relu = False
    close(layer(x, residual=residual), plain(x) + residual, torch.float32)


def test_statistics_move_in_place():
    layer = BatchNorm2d(3)
    mean, var = layer.running_mean, layer.running_var
    places, version = (mean.data_ptr(), var.data_ptr()), mean._version
    layer(torch.randn(SHAPE))
    assert layer.running_mean is mean
    assert layer.running_var is var
    assert places == (mean.data_ptr(), var.data_ptr())
    assert mean._version > version
    assert mean.any()
    assert not mean.requires_grad
    before = mean.clone()
    layer.eval()(torch.randn(SHAPE))
    assert torch.equal(mean, before)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training, without):
    layer = BatchNorm2d(3).train(training)
    reference = nn.BatchNorm2d(3).train(training)
    x = torch.randn(SHAPE)
    with without():
        y = layer(x)
        expected = reference(x)
    assert not y.requires_grad
    assert y.is_inference() == (without is torch.inference_mode)
    close(y, expected, torch.float32)
    close(layer.running_var, reference.running_var, torch.float32)


def test_an_empty_batch_moves_no_average():
    layer = BatchNorm1d(3, momentum=None)
    ours = nbnorm.BatchNorm(3, momentum=None)
    for batch in (torch.empty(0, 3), torch.full((4, 3), 9.81), torch.empty(0, 3), torch.ones(2, 3)):
        layer(batch)
        ours.forward(batch)
    assert layer.num_batches_tracked == ours.num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(layer, name).numpy(), getattr(ours, name))


def test_averages_of_a_compiled_module():
    torch.compiler.reset()
    layer = BatchNorm2d(3, momentum=None)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(SHAPE) + 3
        assert torch.equal(compiled(x), other(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("momentum", [float("nan"), float("inf")])
def test_momentum_that_is_not_finite(momentum):
    with pytest.raises(ValueError, match=r"^momentum must be finite, got (nan|inf)"):
        BatchNorm1d(3, momentum=momentum)(torch.randn(4, 3))


@pytest.mark.parametrize("shared", ["weight", "bias", "running_var"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", ["eager", "recorded", "compiled", "recalibrate"])
def test_statistics_that_share_memory_with_a_parameter(how, momentum, shared):
    """Exporters merge equal arrays: an update would change the parameter as well."""
    layer = BatchNorm1d(3, momentum=momentum)
    layer.running_mean = getattr(layer, shared).data
    before = layer.running_mean.clone()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    def run():
        if how == "recalibrate":
            with recalibrate(layer):
                layer(x)
        with torch.set_grad_enabled(how != "eager"):
            (compiled if how == "compiled" else layer)(x)

    with pytest.raises(ValueError, match="share memory"):
        run()
    torch.testing.assert_close(layer.running_mean, before, rtol=0, atol=0)
