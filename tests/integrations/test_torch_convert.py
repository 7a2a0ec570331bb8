"""Models converted by nbnorm.integrations.torch.convert against the originals."""

import copy
import io
import operator
import pickle
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_cases import (  # noqa: E402
    FORWARD,
    SHAPE,
    Others,
    _seed,  # noqa: F401
    close,
    drawn,
    graphs,
)

from nbnorm.integrations.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    _modules,
    convert,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.integrations_torch import resnet50  # noqa: E402


def test_what_is_converted():
    model = Others()
    shared, parameters = model.shared, dict(model.named_parameters())
    assert convert(model) is model
    assert model.shared is model.again is shared
    assert type(shared) is BatchNorm2d
    assert type(model.nested["deep"][0][0]) is BatchNorm1d
    assert type(model.volume) is BatchNorm3d
    assert type(model.sync) is nn.SyncBatchNorm
    assert type(model.lazy) is nn.LazyBatchNorm2d
    assert type(model.own).__name__ == "Own"
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert type(convert(nn.BatchNorm1d(3))) is BatchNorm1d
    assert type(convert(convert(nn.BatchNorm1d(3)))) is BatchNorm1d
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor"):
        convert(torch.ones(3))


def test_mode_options_and_hooks_stay():
    layer = nn.BatchNorm2d(3, eps=0.1, momentum=None).eval()
    layer.weight.requires_grad_(False)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    expected = repr(layer)
    convert(layer)
    assert repr(layer) == expected
    assert not layer.training
    assert not layer.weight.requires_grad
    layer(torch.randn(SHAPE, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]


class Subclass(nn.Sequential):
    """A block like torchvision's of convolution, normalization and activation."""


@pytest.fixture
def fused(monkeypatch):
    """Return a function that tells which normalizations fused ReLU since its last call."""
    seen = []
    forward = _modules.batch_norm

    def look(*args, relu, **kwargs):
        seen.append(relu)
        return forward(*args, relu=relu, **kwargs)

    monkeypatch.setattr(_modules, "batch_norm", look)

    def looked():
        result = tuple(seen)
        seen.clear()
        return result

    return looked


@pytest.mark.parametrize("kind", ["Sequential", "Subclass"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(fused, way, kind):
    kind = nn.Sequential if kind == "Sequential" else Subclass
    layer = convert(kind(nn.BatchNorm2d(3), nn.ReLU(), BatchNorm2d(3, relu=True)), fuse_relu=True)
    layer(torch.randn(SHAPE))
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer)
    assert type(other[0]) is BatchNorm2d
    assert [m.relu for m in other[::2]] == [False, True]
    assert other[0].running_mean is not layer[0].running_mean
    x = torch.randn(SHAPE)
    fused()
    assert torch.equal(layer(x), other(x))
    assert fused() == (True,) * 4
    assert torch.equal(layer[0].running_var, other[0].running_var)


def norm_and_relu(kind=nn.Sequential):
    return kind(nn.BatchNorm2d(3), nn.ReLU())


def test_relu_is_fused_where_the_order_is_known(fused):
    class Reversed(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    relu, shared = nn.ReLU(), nn.BatchNorm2d(3)
    hooked, hooked_relu = norm_and_relu(), norm_and_relu()
    hooked[0].register_forward_hook(lambda *_: None)
    hooked_relu[1].register_forward_pre_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "plain": norm_and_relu().eval(),
            "subclass": norm_and_relu(Subclass),
            "one relu": nn.Sequential(nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3), relu),
            "shared": nn.Sequential(shared, nn.ReLU(), shared),
            "hooked": hooked,
            "hooked relu": hooked_relu,
            "own order": norm_and_relu(Reversed),
            "kind": nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6()),
            "apart": nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()),
        }
    )
    keys, x = list(model.state_dict()), torch.randn(SHAPE)
    expected = {name: part(x) for name, part in copy.deepcopy(model).items()}
    kinds = {name: type(part) for name, part in model.items()}
    convert(convert(model, fuse_relu=True), fuse_relu=True)
    wanted = {
        "plain": (True,),
        "subclass": (True,),
        "one relu": (True, True),
        "shared": (True, False),
        **dict.fromkeys(["hooked", "hooked relu", "own order", "kind", "apart"], (False,)),
    }
    assert list(model.state_dict()) == keys
    for name, part in model.items():
        close(part(x), expected[name], torch.float32)
        assert fused() == wanted[name], name
        assert isinstance(part, kinds[name])
    close(model["plain"][0](x), BatchNorm2d(3).eval()(x), torch.float32)  # a part outside the model
    assert not model["plain"][1].training


def replace_norm(model):
    model[1][0] = nn.BatchNorm2d(3).double()


def hook_norm(model):
    model[1][0].register_forward_hook(lambda module, args, y: -y)


def insert(model):
    model[1].insert(1, nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        replace_norm,
        hook_norm,
        insert,
        lambda model: nn.Sequential(model[0], *model[1]),
        lambda model: model[1].__delitem__(1),
        lambda model: nn.Sequential(model[0], model[1][:1]),
    ],
    ids=["sync", "replaced", "hooked", "inserted", "unpacked", "deleted", "sliced"],
)
def test_a_model_that_is_changed_after_fusion(change):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm_and_relu(), nn.Conv2d(3, 2, 1)).double().eval()
    with torch.no_grad():
        model[1][0].running_mean.normal_()
    ours, x = convert(copy.deepcopy(model), fuse_relu=True), drawn()
    ours, model = (change(m) or m for m in (ours, model))
    close(ours(x), model(x))


def test_convolution_folded_after_fusion():
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 1), *norm_and_relu()).eval(), fuse_relu=True)
    x = torch.randn(SHAPE)
    expected = model(x)
    model[0] = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()
    close(model(x), expected, torch.float32)


@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated:DeprecationWarning")  # but works
@pytest.mark.parametrize("way", ["compile", "export", "trace"])
def test_fused_models_are_recorded(way):
    torch._dynamo.reset()
    model = convert(norm_and_relu(Subclass), fuse_relu=True).eval()
    x = torch.randn(SHAPE)
    if way == "compile":
        backend, seen = graphs()
        close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x), torch.float32)
        assert seen[0].count(FORWARD) == len(seen[0]) - seen[0].count(operator.getitem)
    elif way == "export":
        program = torch.export.export(model, (x,))
        assert torch.ops.aten.relu.default not in [node.target for node in program.graph.nodes]
        close(program.module()(x), model(x), torch.float32)
    else:
        close(torch.jit.trace(model, x)(x), model(x), torch.float32)


def test_symbolic_trace_with_the_modules_as_leaves():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)

    model, x = convert(norm_and_relu(), fuse_relu=True), torch.randn(SHAPE)
    graph = Tracer().trace(model)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    close(torch.fx.GraphModule(model, graph)(x), model(x), torch.float32)


def run(model, x, labels):
    """Return the output and the gradients as vectors in float64."""
    y = model(x)
    functional.cross_entropy(y, labels).backward()
    grads = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    return y.detach().double().flatten(), grads


@pytest.mark.parametrize(("last", "fuse_relu"), [(False, False), (True, True)])
def test_resnet50(last, fuse_relu):
    """Equal in float64; in float32 the error is at most twice that of PyTorch.

    53 layers amplify rounding, and ReLUs flip, so no tolerance in units of the last place holds:
    the yardstick is the error of PyTorch's own float32.
    """
    model = resnet50(10)
    if last:
        model.to(memory_format=torch.channels_last)
    x, labels = drawn((2, 3, 64, 64), torch.float32, last=last), torch.tensor([3, 7])
    wide = copy.deepcopy(model).double()
    ours, ours_wide = (convert(copy.deepcopy(m), fuse_relu=fuse_relu) for m in (model, wide))
    exact = run(wide, x.double(), labels)
    same = run(ours_wide, x.double(), labels)
    for got, expected in zip(same, exact, strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()
    results = zip(run(ours, x, labels), run(model, x, labels), exact, strict=True)
    for got, reference, expected in results:
        assert (got - expected).norm() <= 2 * (reference - expected).norm()
    for name, buffer in ours_wide.named_buffers():
        torch.testing.assert_close(buffer, wide.get_buffer(name), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            ours.get_buffer(name), buffer.to(ours.get_buffer(name).dtype), rtol=1e-3, atol=1e-4
        )
    for m in (ours_wide, wide):
        m.eval()
    with torch.inference_mode():
        got, expected = ours_wide(x.double()), wide(x.double())
    assert (got - expected).norm() <= 1e-9 * expected.norm()
