"""The operators of nbnorm.integrations.torch: PyTorch's own checks, and graphs that keep them."""

import copy
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch_cases import (  # noqa: E402
    BACKWARD,
    FORWARD,
    SHAPE,
    _seed,  # noqa: F401
    close,
    drawn,
    graphs,
    last,
    parameters,
    statistics,
)

from nbnorm.integrations.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    _tensors,
    batch_norm,
    convert,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.integrations_torch import Bottleneck  # noqa: E402


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", ["plain", "relu", "both"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, affine, options, training):
    if dtype is torch.bfloat16:
        pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy needs ml_dtypes")
    x = drawn(dtype=dtype, last=True, grad=True)
    weight, bias = parameters(dtype=torch.float32, grad=True) if affine else (None, None)
    residual = drawn(dtype=dtype, last=True, grad=True) if options == "both" else None
    running = statistics(dtype=torch.float32)
    if training and not affine:
        running = None, None
    relu = options != "plain"
    arguments = (x, weight, bias, *running, residual, training, 0.1, 1e-5, relu)
    torch.library.opcheck(FORWARD, arguments, **TOLERANCE)
    y, mean, rstd, *_ = (t.detach() for t in FORWARD(*arguments))
    beta, y = bias if relu and residual is None else None, y if options == "both" else None
    for mask in ([True] * 3 + [y is not None], [False, True, False, False], [True] + [False] * 3):
        torch.library.opcheck(
            BACKWARD,
            (x.detach(), x, weight, beta, mean, rstd, y, training, relu, mask),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_operators_give_the_bits_of_what_is_called_directly(monkeypatch, with_residual, training):
    x, dy = drawn(dtype=torch.float32, grad=True), drawn(dtype=torch.float32)
    weight, bias = parameters(dtype=torch.float32, grad=True)
    residual = drawn(dtype=torch.float32, grad=True) if with_residual else None
    inputs = [x, weight, bias, *([residual] if with_residual else [])]
    start, results = statistics(dtype=torch.float32), []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(_tensors, "eager", lambda *_: False)
        running = [t.clone() for t in start]
        y = batch_norm(x, *running, weight, bias, training, residual=residual, relu=True)
        assert ("_Eager" in type(y.grad_fn).__name__) == direct
        results.append((y, *running, *torch.autograd.grad(y, inputs, dy)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_tracing_records_the_operator(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x, weight):
        y = batch_norm(x, None, None, weight, training=True)
        return torch.autograd.grad(y.sum(), weight)

    x, weight = drawn(), parameters(grad=True)[0]
    graph = make_fx(function, tracing_mode=tracing_mode)(x, weight).graph
    targets = [node.target for node in graph.nodes]
    assert FORWARD in targets
    assert BACKWARD in targets


def test_meta_tensors():
    x = torch.empty(2, 3, 4, 5, device="meta")
    layer = BatchNorm2d(3, device="meta")
    assert layer(x).shape == x.shape
    assert layer(x).device.type == "meta"


class Small(nn.Module):
    def __init__(self, norm=BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.first = norm(8)
        self.second = norm(8, affine=False, track_running_stats=False)
        self.block = Bottleneck(8, 4, 2)
        if norm is BatchNorm2d:
            convert(self.block, fuse_relu=True)

    def forward(self, x):
        y = torch.relu(self.first(self.conv(x)))
        return self.block(self.second(y))


def step(model, call, x):
    y = call(x)
    y.square().mean().backward()
    return [
        y.detach(),
        *(parameter.grad for parameter in model.parameters()),
        *(buffer.clone() for buffer in model.buffers()),
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
@last
def test_compiled_model_keeps_the_operators(mode, last):
    torch._dynamo.reset()
    model = Small()
    getattr(model, mode)()
    other = copy.deepcopy(model)
    x = drawn((2, 3, 8, 8), torch.float32, last=last, grad=True)
    backend, seen = graphs()
    expected = step(model, model, x)
    got = step(other, torch.compile(other, backend=backend, fullgraph=True), x)
    assert len(seen) == 2  # one forward and one backward graph, without a break
    assert seen[0].count(FORWARD) == 6
    assert seen[1].count(BACKWARD) == 6
    for ours, reference in zip(got, expected, strict=True):
        close(ours, reference, torch.float32)


def test_compiled_for_any_size():
    torch._dynamo.reset()
    layer = BatchNorm1d(3, relu=True)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 9, 6):
        x = torch.randn(n, 3)
        close(compiled(x), layer(x), torch.float32)
    close(other.running_mean, layer.running_mean, torch.float32)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile's own backend needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore")  # warnings of inductor's imports
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, relu=True), nn.Conv2d(4, 2, 1))
    other = copy.deepcopy(model)
    x = drawn((2, 3, 8, 8), torch.float32, last=True, grad=True)
    expected = step(model, model, x)
    got = step(other, torch.compile(other, fullgraph=True), x)
    for ours, reference in zip(got, expected, strict=True):
        close(ours, reference, torch.float32)


def test_export_keeps_the_operator():
    layer = BatchNorm2d(3).eval()
    program = torch.export.export(layer, (torch.randn(SHAPE),))
    assert FORWARD in [node.target for node in program.graph.nodes]
    x = torch.randn(SHAPE)
    close(program.module()(x), layer(x), torch.float32)
