"""Shared by the tests of nbnorm.integrations.torch: data, PyTorch's functions, and models."""

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import nbnorm.integrations.torch  # noqa: E402, F401  # registers the operators

FORWARD = torch.ops.nbnorm.batch_norm.default
BACKWARD = torch.ops.nbnorm.batch_norm_backward.default
SHAPE = (4, 3, 5, 6)
# Two summation orders of a few hundred values near 1: units in the last place of the dtype.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
last = pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(shape=SHAPE, dtype=torch.float64, *, last=False, grad=False):
    x = torch.randn(shape, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def parameters(channels=3, dtype=torch.float64, *, grad=False):
    return (
        torch.rand(channels, dtype=dtype).add_(0.5).requires_grad_(grad),
        torch.randn(channels, dtype=dtype).requires_grad_(grad),
    )


def statistics(channels=3, dtype=torch.float64):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype).add_(0.5)


def theirs(x, mean, var, weight=None, bias=None, *args, residual=None, relu=False, **kwargs):
    """Compute the same with PyTorch's functions."""
    y = functional.batch_norm(x, mean, var, weight, bias, *args, **kwargs)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


def close(ours, expected, dtype=torch.float64):
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])


def graphs():
    """Return a backend that records the graphs passed to it, and the list of them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep), seen


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm2d(3)
        self.again = self.shared
        self.nested = nn.ModuleDict({"deep": nn.ModuleList([nn.Sequential(nn.BatchNorm1d(4))])})
        self.volume = nn.BatchNorm3d(2)
        self.sync = nn.SyncBatchNorm(3)
        self.lazy = nn.LazyBatchNorm2d()
        self.own = type("Own", (nn.BatchNorm2d,), {})(3)
