"""Models folded by nbnorm.integrations.torch.fold against the originals."""

import copy
import io
import itertools
import operator
import random

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_cases import _seed  # noqa: E402, F401

from nbnorm.integrations import torch as integration  # noqa: E402
from nbnorm.integrations.torch import convert, fold  # noqa: E402

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def randomised(model, dtype=torch.float64):
    """Put a model in eval mode, with random parameters and statistics that all differ."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.2)
    return model


def check(model, *inputs, folded, left=None, modules=nn.Identity):
    """Fold a model and compare results; `folded` and `left` are the expected names."""
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(*inputs)
        result = fold(model)
        torch.testing.assert_close(result.model(*inputs), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
    assert set(result.folded) == set(folded)
    assert set(result.left) == set(left or ())
    for name in folded:
        assert isinstance(result.model.get_submodule(name), modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(result.model) is type(model)
    return result


@st.composite
def pairs(draw):
    """Return a layer and a batch normalization, in either order, and an input."""
    rank, transposed, first = draw(st.integers(0, 3)), draw(st.booleans()), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    ins, outs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    if rank == 0:
        layer, norm, space = nn.Linear(ins, outs, bias=bias), nn.BatchNorm1d, ()
    else:
        kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
        options = {"groups": groups, "bias": bias, "stride": draw(st.integers(1, 2))}
        if transposed:
            options["output_padding"] = options["stride"] - 1
        else:
            options["dilation"] = draw(st.integers(1, 2))
            options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
        if not first or options.get("padding_mode") != "zeros":
            options["padding"] = draw(st.integers(0, 1))
        layer = (TRANSPOSED if transposed else CONVS)[rank](ins, outs, kernel, **options)
        norm, space = NORMS[rank], [6] * rank
    bn = norm(ins if first else outs, eps=draw(st.sampled_from([1e-5, 0.1])))
    bn.affine = draw(st.booleans())
    if not bn.affine:
        bn.weight = bn.bias = None
    pair = randomised(nn.Sequential(*((bn, layer) if first else (layer, bn))))
    if first and transposed and rank:  # only a norm without a shift can be folded
        bn.running_mean.zero_()
        if bn.affine:
            nn.init.zeros_(bn.bias)
    if draw(st.booleans()):
        convert(pair)
    return pair, torch.randn(2, ins, *space, dtype=torch.float64)


@given(pairs())
@settings(max_examples=100)
def test_pairs_are_folded_both_ways(drawn):
    pair, u = drawn
    norm = next(
        i for i, module in enumerate(pair) if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    check(pair, u, folded=[str(norm)])


class Wires(nn.Module):
    """Calls modules from a pool, each on a value computed before; returns some values."""

    def __init__(self, program, outputs):
        super().__init__()
        self.pool = nn.ModuleList([
            nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1),
            nn.Conv1d(3, 3, 1, bias=False), nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 1),
            nn.ConvTranspose1d(3, 3, 1), nn.ReLU(), nn.Identity(), nn.Dropout(),
        ])  # fmt: skip
        self.program, self.outputs = program, outputs

    def forward(self, x):
        values = [x]
        for module, operand in self.program:
            values.append(self.pool[module](values[operand]))
        return [values[i] for i in self.outputs]


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=100)
def test_wires_at_random(seed, size):
    rng = random.Random(seed)
    program = [
        (rng.randrange(11), i if rng.random() < 0.8 else rng.randrange(i + 1)) for i in range(size)
    ]
    model = randomised(Wires(program, [size, *rng.sample(range(size), rng.randrange(2))]))
    with torch.no_grad():
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        result = fold(model)
        # Values grow by a factor of at most 30 at each call.
        close = {"rtol": 1e-10, "atol": 1e-13 * 10.0**size}
        torch.testing.assert_close(result.model(x), model(x), **close)
    assert {*result.folded, *result.left} == {f"pool.{i}" for i in range(3)}


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + x)


class Network(nn.Module):
    """A small residual network with a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.head(x.mean((2, 3))))


BLOCKS = [f"blocks.{i}.bn{j}" for i, j in itertools.product(range(2), (1, 2))]


def test_a_network_keeps_its_class_and_code():
    model = randomised(Network())
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    folded = ["stem.0", "stem.2", *BLOCKS, "last"]
    result = check(model, x, folded=folded, left=["head.0"])
    assert "no linear layer" in result.left["head.0"]
    again = fold(result.model)
    assert again.folded == ()
    assert list(again.left) == ["head.0"]
    check(convert(copy.deepcopy(model), fuse_relu=True), x, folded=folded, left=["head.0"])


class Branches(Network):
    """The network, with a forward that cannot be traced."""

    def forward(self, x):
        if x.sum() > 0:  # depends on values
            x = -x
        return super().forward(x)


class BranchingBlock(Block):
    """The block, with a forward that cannot be traced."""

    def forward(self, x):
        return super().forward(-x if x.sum() > 0 else x)


UNTRACED = "{} cannot be traced: its code may use the layers by themselves"


def test_what_is_inside_a_module_that_cannot_be_traced_stays():
    model = randomised(Branches())
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    norms = ["stem.0", "stem.2", *BLOCKS, "head.0", "last"]
    result = check(model, x, folded=[], left=norms)
    assert {*result.left.values()} == {UNTRACED.format("the model")}
    # Fold the parts separately: this forward calls each of them as a whole.
    expected = model(x)
    model.stem, model.blocks = fold(model.stem).model, fold(model.blocks).model
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert [*fold(model).left] == ["head.0", "last"]


def test_what_is_outside_a_module_that_cannot_be_traced_is_folded():
    model = Network()
    model.blocks[1] = BranchingBlock(8)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    inside = ["blocks.1.bn1", "blocks.1.bn2"]
    folded, left = ["stem.0", "stem.2", "blocks.0.bn1", "blocks.0.bn2"], ["head.0", "last"]
    result = check(randomised(model), x, folded=folded, left=left + inside)
    assert {result.left[name] for name in inside} == {UNTRACED.format("blocks.1")}
    # The untraced module may use a layer of another module by itself.
    model.blocks[1].other = model.blocks[0].conv1
    inside.append(folded.pop(2))
    result = check(randomised(model), x, folded=folded, left=left + inside)
    assert result.left["blocks.0.bn1"].startswith(UNTRACED.format("blocks.1"))


def each(layers, x):
    """Apply the layers one after the other; return the sum of all their results."""
    total = 0
    for layer in layers:
        x = layer(x)
        total = total + x.sum()
    return total


class Reaching(nn.Module):
    """Uses the layers of a Sequential as the test says."""

    def __init__(self, reach, branches):
        super().__init__()
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(4))
        self.reach, self.branches = reach, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        return self.reach(self.features, x)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(
    "reach",
    [
        each,
        lambda features, x: features[3](features[0](x)) + features(x).sum(),
        lambda features, x: features(x) + features[0].weight.sum() + features[3].bias.sum(),
    ],
)
def test_a_parent_that_reaches_into_a_sequential(reach, branches):
    model = randomised(Reaching(reach, branches))
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    check(model, x, folded=[], left=["features.1", "features.4"])


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x: x.add_(1),
        lambda m, x: operator.iadd(x, 1),
        lambda m, x: x.__iadd__(1),
        lambda m, x: x[:, :1].mul_(2),
        lambda m, x: torch.add(x, 1, out=x),
        lambda m, x: functional.relu(x, inplace=True),
        lambda m, x: functional.relu(x, True),
        lambda m, x: torch.relu_(x),
        lambda m, x: m.inplace(x),
    ],
)
def test_an_input_that_changes_in_place_between_the_two(change):
    def wire(m, x):
        x = x * 2
        z = m.bn(x)
        change(m, x)
        return m.conv(z)

    model = Wired(wire)
    model.inplace = nn.Sequential(nn.ReLU(inplace=True))
    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = check(randomised(model), u, folded=[], left=["bn"])
    assert "its input may change in place before conv runs" in result.left["bn"]


def test_an_input_that_plus_equals_changes():
    def wire(m, x):
        x = x * 2
        z = m.bn(x)
        x += 1  # a trace shows x + 1
        return m.conv(z)

    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = check(randomised(Wired(wire)), u, folded=[], left=["bn"])
    assert "its input may change in place before conv runs" in result.left["bn"]


def test_modules_between_the_two_that_only_read_are_no_obstacle():
    def wire(m, x):
        x = x * 2
        z = m.bn(x)
        return m.pool(x) + m.conv(z)

    model = Wired(wire)
    model.pool = nn.AdaptiveAvgPool2d(1)
    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    check(randomised(model), u, folded=["bn"])
    model.pool.register_forward_hook(lambda module, args, y: args[0].add_(1) * 0)
    check(model, u, folded=[], left=["bn"])
    model.pool = type("Own", (nn.AdaptiveAvgPool2d,), {"__module__": "torch.nn_own"})(1)
    check(model, u, folded=[], left=["bn"])


def test_two_results_of_one_layer_do_not_become_one_tensor():
    def wire(m, x):
        z = m.conv(x)
        first, second = m.bn(z), m.bn(z)
        first.add_(1)
        return first * second

    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    check(randomised(Wired(wire)), u, folded=[], left=["bn"])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
)
def test_a_batch_norm_whose_tensors_are_read_stays(name, norm_first):
    model = Wired(lambda m, x: PAIR[norm_first](m, x) * getattr(m.bn, name).sum())
    u = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = check(randomised(model), u, folded=[], left=["bn"])
    assert result.left["bn"] == "the model's code reads its parameters or statistics"


def test_folded_models_can_be_traced_saved_and_compiled_from():
    model = fold(randomised(Network())).model
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x))
    assert not any(module.training for module in model.modules())


def test_relu_that_is_part_of_the_batch_norm_stays():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        integration.BatchNorm2d(8, relu=True),
        nn.Conv2d(8, 4, 3),
        integration.BatchNorm2d(4, activation="relu"),
        nn.Conv2d(4, 4, 1),
        integration.BatchNorm2d(4, activation="silu"),
        nn.Flatten(),
        nn.Linear(16, 6),
        integration.BatchNorm1d(6, relu=True),
    )
    u = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = randomised(model)
    for i in (1, 3, 8):
        nn.init.normal_(model[i].bias)
    result = check(model, u, folded=["1", "3", "8"], left=["5"], modules=(nn.ReLU, nn.Sequential))
    assert result.left["5"] == "it applies an activation"


@pytest.mark.parametrize(
    "wire",
    [
        lambda m, x: m.bn(m.conv(x), x),
        lambda m, x: m.bn(m.conv(x), residual=x),
        lambda m, x: m.bn(m.conv(x), relu=True),
        lambda m, x: m.conv(m.bn(x, x)),
    ],
)
def test_residuals_and_relu_of_a_call_stay(wire):
    model = convert(randomised(Wired(wire)))
    nn.init.constant_(model.bn.bias, -0.5)
    result = check(model, torch.randn(2, 3, 4, 5, dtype=torch.float64), folded=[], left=["bn"])
    assert "called with a keyword or with more than its input" in result.left["bn"]


@pytest.mark.parametrize("options", [{"relu": True}, {"activation": "silu"}], ids=str)
def test_an_activation_between_the_two_stays(options):
    model = nn.Sequential(integration.BatchNorm2d(3, **options), nn.Conv2d(3, 4, 1))
    model = randomised(model)
    nn.init.normal_(model[0].bias)
    u = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    result = check(model, u, folded=[], left=["0"])
    assert "it applies an activation" in result.left["0"]


def test_a_fused_sequential_goes_on_fusing_what_stays():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )
    model = convert(randomised(model), fuse_relu=True)
    u = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = check(model, u, folded=["1"], left=["4"])
    assert "fuse_relu=True" in repr(result.model)


def test_chains_of_batch_norms_and_identities():
    layers = nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    model = randomised(nn.Sequential(nn.BatchNorm1d(3), *layers))
    check(model, torch.randn(5, 3, dtype=torch.float64), folded=["0", "3", "4"])


def test_dropout_does_nothing_in_eval_mode():
    model = randomised(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 4)))
    u = torch.randn(5, 3, dtype=torch.float64)
    check(model, u, folded=["0"])
    model[1].train()
    assert fold(model).folded == ()
    model[1].eval().register_forward_hook(lambda module, args, y: -y)
    check(model, u, folded=[], left=["0"])


class Shared(nn.Module):
    """A pair that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.again = self.bn

    def forward(self, x):
        return self.again(self.conv(self.bn(self.conv(x))))


def test_pairs_that_are_called_twice_or_have_two_names():
    model, u = randomised(Shared()), torch.randn(2, 4, 5, dtype=torch.float64)
    result = check(model, u, folded=["bn"], modules=nn.Module)
    assert result.model.again is result.model.bn


def test_a_layer_that_takes_one_result_twice():
    model = randomised(Wired(lambda m, x: m.conv(z := m.bn(x)) * m.conv(z)))
    check(model, torch.randn(2, 3, 4, 5, dtype=torch.float64), folded=["bn"])


def test_inputs_of_another_rank_are_refused_where_the_channels_would_differ():
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    folded = fold(model).model
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    assert model(u).shape == (2, 4, 4)  # of axis 1, not of the last
    for called in (folded, torch.fx.symbolic_trace(folded)):
        with pytest.raises(AssertionError, match="folded for inputs of 2 axes only"):
            called(u)
    other = fold(randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm2d(4))))
    assert "normalises another axis" in other.left["1"]


class Wired(nn.Module):
    """A convolution and a batch normalization, wired as the test says."""

    def __init__(self, wire, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


def tied(model):
    model.other = nn.Conv2d(3, 3, 1)
    model.other.weight = model.conv.weight


def hooked(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *_: None)


def keep_statistics_of_batches(model):
    model.bn.running_mean = model.bn.running_var = None


WIRES = [
    (lambda m, x: (z := m.conv(x)) + m.bn(z), "conv, before it, is also used without it"),
    (lambda m, x: m.bn(functional.relu(m.conv(x))), "no linear layer or convolution is directly"),
    (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "conv, before it, is also used without it"),
    (lambda m, x: m.bn(m.conv(x)) + m.bn(x), "no linear layer or convolution is directly before"),
    (lambda m, x: m.conv(z := m.bn(x)) + z, "no linear layer or convolution is directly after"),
    (lambda m, x: m.conv(m.bn(x)) + m.conv(x), "conv, after it, is also used without it"),
    (
        lambda m, x: m.bn(m.conv(x)) + functional.conv2d(x, m.conv.weight),
        "the weight or bias of conv, before it, is used elsewhere, too",
    ),
    (
        lambda m, x: m.bn(m.conv(x)) + functional.conv2d(x, next(m.conv.parameters())),
        "the weight or bias of conv, before it, is used elsewhere, too",
    ),
    (lambda m, x: m.conv(x), "no trace of the model's code calls it"),
]


@pytest.mark.parametrize(("wire", "reason"), WIRES)
def test_what_is_used_elsewhere_stays(wire, reason):
    model, u = randomised(Wired(wire)), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = check(model, u, folded=[], left=["bn"])
    assert reason in result.left["bn"]


PAIR = (lambda m, x: m.bn(m.conv(x)), lambda m, x: m.conv(m.bn(x)))
CHANGES = [
    (tied, "the weight or bias of conv, {}, is used elsewhere, too"),
    (hooked("conv"), "conv, {}, has hooks"),
    (hooked("bn"), "it has hooks"),
    (lambda m: m.bn.train(), "it is in training mode"),
    (keep_statistics_of_batches, "it has no running statistics"),
    (lambda m: nn.utils.parametrizations.weight_norm(m.conv), "no linear layer or convolution is"),
    (
        lambda m: m.bn.register_buffer("running_mean", torch.zeros(4)),
        "mean has shape (4,), expected",
    ),
    (lambda m: m.conv.to("meta"), "meta"),
    (
        lambda m: setattr(m.bn, "__class__", type("Own", (nn.BatchNorm2d,), {})),
        "its class, Own, is not one that `fold` knows",
    ),
]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_what_cannot_be_folded_stays(change, reason, norm_first):
    model = randomised(Wired(PAIR[norm_first]))
    change(model)
    result = fold(model)
    assert result.folded == ()
    assert reason.format("after it" if norm_first else "before it") in result.left["bn"]


def test_zeros_padded_between_the_two_stay():
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    u = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert "padding is (1, 1), but zeros" in check(model, u, folded=[], left=["0"]).left["0"]
    model[1].padding, model[1].padding_mode = "same", "zeros"
    assert "padding is 'same', but" in check(model, u, folded=[], left=["0"]).left["0"]
    nn.init.zeros_(model[0].bias)
    model[0].running_mean.zero_()
    check(model, u, folded=["0"])


def test_a_hooked_container_is_not_looked_through():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    u = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    check(randomised(model), u, folded=["1"])
    model[0].register_forward_hook(lambda *_: None)
    check(model, u, folded=[], left=["1"])
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = randomised(nn.Sequential(inner, nn.ReLU()))
    inner.register_forward_hook(lambda module, args, y: -y)
    check(model, u, folded=["0.1"])


class Remembers(nn.Module):
    """A module whose forward changes it."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.seen, self.calls = None, 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        self.seen = self.pair(x)
        return self.seen * 2


def test_tracing_leaves_no_trace():
    model = Remembers().eval()
    result = fold(model)
    for module in (model, result.model):
        assert module.seen is None
        assert module.calls == 0
        assert not module.total.any()
    assert result.folded == ("pair.1",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_format_and_gradients(dtype):
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), dtype)
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    conv = fold(model).model[0]
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad


def test_models_in_training_mode_and_other_objects_are_refused():
    model = Network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model is in training mode, .*; call model.eval\(\) fir"):
        fold(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        fold(torch.ones(3))
    assert fold(nn.ReLU().eval())[1:] == ((), {})


def test_syncbatchnorm():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)))
    u = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    result = check(model, u, folded=["1"])
    with pytest.raises(AssertionError, match="4 axes"):
        result.model(u[0])
