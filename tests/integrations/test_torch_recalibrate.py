"""nbnorm.integrations.torch.recalibrate: running statistics of all data that a model has seen."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402
from torch_cases import Others, _seed, close, drawn  # noqa: E402, F401

from nbnorm import batch_norm_stats  # noqa: E402
from nbnorm._pairwise import Pairwise  # noqa: E402
from nbnorm.integrations.torch import (  # noqa: E402
    BatchNorm1d,
    _operators,
    _recalibrate,
    _tensors,
    convert,
    recalibrate,
)

BATCHES = (7, 2, 20, 5)


def uneven(dtype=torch.float64):
    """Return batches of several sizes, each with a different mean."""
    return [drawn((n, 3, 6, 5), dtype) + i for i, n in enumerate(BATCHES)]


def two_layers(norm=nn.BatchNorm2d, dtype=torch.float64, **options):
    """Return a network with dropout whose second normalization depends on the first."""
    return nn.Sequential(
        *(norm(3, **options), nn.Conv2d(3, 4, 3), nn.Tanh(), norm(4, **options), nn.Dropout()),
    ).to(dtype)


def kept(model):
    """Return everything that recalibration must not change."""
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return modes, hooks, {name: t.clone() for name, t in model.state_dict().items()}


def assert_kept(model, before, changed=()):
    modes, hooks, state = kept(model)
    assert modes == before[0]
    assert hooks == before[1]
    for name, tensor in state.items():
        if not name.endswith(changed):
            assert torch.equal(tensor, before[2][name]), name


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recalibrated_by_all_that_was_seen(dtype, momentum, converted):
    model = two_layers(momentum=momentum, dtype=dtype).eval()
    if converted:
        convert(model)
    model[3].train()
    by_batch = copy.deepcopy(model)
    for norm in (by_batch[0], by_batch[3]):
        norm.track_running_stats, norm.training = False, True
    seen = {0: [], 3: []}
    for i in seen:
        by_batch[i].register_forward_pre_hook(lambda _, inputs, i=i: seen[i].append(inputs[0]))
    before, batches = kept(model), uneven(dtype)
    expected = [by_batch(x) for x in batches]
    with recalibrate(model):
        for x, y in zip(batches, expected, strict=True):
            result = model(x)
            assert torch.equal(result, y)
            assert not result.requires_grad
    # A plain average continues from the batches seen here, as after PyTorch's update_bn.
    tracked = ("num_batches_tracked",) if momentum is None else ()
    assert_kept(model, before, ("running_mean", "running_var", *tracked))
    for i, inputs in seen.items():
        assert model[i].num_batches_tracked == (len(batches) if momentum is None else 0)
        values = torch.cat([x.detach().double().transpose(0, 1).flatten(1) for x in inputs], 1)
        close(model[i].running_mean.double(), values.mean(1), dtype)
        close(model[i].running_var.double(), values.var(1), dtype)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize(("momentum", "trained"), [(None, 0), (None, 3), (0.1, 0)])
def test_a_cumulative_average_does_not_forget_the_statistics(converted, momentum, trained):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum)).double()
    *batches, last = torch.arange(36.0).double().reshape(3, 4, 3)
    if converted:
        convert(model)
    for _ in range(trained):
        model(last)
    with recalibrate(model):
        for x in batches:
            model(x)
    seen = trained or (len(batches) if momentum is None else 0)
    assert model[0].num_batches_tracked == seen
    model(last)
    weight = momentum or 1 / (seen + 1)
    expected = (1 - weight) * torch.cat(batches).mean(0) + weight * last.mean(0)
    torch.testing.assert_close(model[0].running_mean, expected)


def test_modes_may_change_within_the_block():
    """Functions that evaluate a model often call `eval` first."""
    model, (x, *_) = two_layers()[:4].train(), uneven()
    with recalibrate(model):
        in_training = model(x)
        assert torch.equal(model.eval()(x), in_training)
        model[3].train()
        assert torch.equal(model(x), in_training)
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            model(x[:1, :, :1, :1])
        assert [model[i].training for i in (0, 3)] == [False, True]
        assert all(model[i].track_running_stats for i in (0, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_converted_modules_go_through_each_batch_once(monkeypatch, dtype):
    """The moments have the bits of a separate pass."""
    model = convert(two_layers(dtype=torch.float64)[:1])
    batches, alone = uneven(dtype), Pairwise()
    for x in batches:
        alone.add(batch_norm_stats(x.numpy()))
    monkeypatch.delattr(_operators, "batch_norm_stats")
    with recalibrate(model):
        for x in batches:
            model(x)
    moments = alone.total()
    assert torch.equal(model[0].running_mean, torch.from_numpy(moments.mean))
    assert torch.equal(model[0].running_var, torch.from_numpy(moments.var(correction=1)))


def test_recalibration_by_the_operators(monkeypatch):
    """The operators, which subclasses of tensors use, give the bits of direct calls."""
    results = []
    for direct in (True, False):
        torch.manual_seed(0)
        if not direct:
            monkeypatch.setattr(_tensors, "eager", lambda *_: False)
        model = convert(two_layers().eval())
        with recalibrate(model):
            outputs = [model(x) for x in uneven()]
        results.append([*outputs, *model.state_dict().values()])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("converted", [False, True])
def test_a_block_within_a_block(converted):
    model, (first, second, *_) = two_layers()[:1].eval(), uneven()
    if converted:
        convert(model)
    with recalibrate(model):
        model(first)
        with recalibrate(model):
            model(second)
        close(model[0].running_mean, second.mean((0, 2, 3)))
        model(first)
    close(model[0].running_mean, torch.cat([first, second, first]).mean((0, 2, 3)))


@pytest.mark.parametrize("converted", [False, True])
def test_a_copy_made_within_the_block_is_what_the_model_was(converted):
    model, (x, *_) = two_layers()[:1].eval(), uneven()
    if converted:
        convert(model)
    expected = model(x)
    with recalibrate(model):
        model(x)
        copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    assert vars(model[0]).keys() == vars(copied[0]).keys()


def test_recalibration_weighs_values_and_update_bn_batches():
    model, batches = two_layers().train(), uneven()
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    with recalibrate(model):
        for x in batches:
            model(x)
    close(model[0].running_var, values.var(1))
    torch.optim.swa_utils.update_bn(batches, model)
    average = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    close(model[0].running_var, average)
    assert (model[0].running_var < 0.7 * values.var(1)).all()  # ignores the spread of batch means


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recalibration_in_half_precision(dtype):
    model = convert(nn.Sequential(nn.BatchNorm2d(3)))  # parameters in float32
    batches = uneven(dtype)
    with recalibrate(model):
        for x in batches:
            model(x)
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in batches], 1)
    close(model[0].running_mean.double(), values.mean(1), torch.float32)
    close(model[0].running_var.double(), values.var(1), torch.float32)


def test_a_shared_module_and_a_named_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = self.again = BatchNorm1d(3).double()

        def forward(self, x, y):
            return self.norm(input=x), self.again(y)

    model, x, y = Twice(), drawn((7, 3)), drawn((4, 3)) + 5
    with recalibrate(model):
        model(x, y)
    close(model.norm.running_mean, torch.cat([x, y]).mean(0))
    close(model.norm.running_var, torch.cat([x, y]).var(0))


def test_what_is_not_recalibrated():
    model, x = Others(), drawn(dtype=torch.float32)
    model.untracked = nn.BatchNorm2d(3, track_running_stats=False)
    parts = model.sync, model.volume, model.untracked
    before = [kept(part) for part in parts]
    with recalibrate(model):
        model.own(x)
        model.lazy(x)
        model.untracked(x)
    for part, was in zip(parts, before, strict=True):
        assert_kept(part, was)
    close(model.own.running_mean, x.mean((0, 2, 3)), torch.float32)
    close(model.lazy.running_mean, 0.1 * x.mean((0, 2, 3)), torch.float32)  # trained as usual


def test_recalibration_that_fails_changes_nothing():
    model = two_layers().eval()
    before = kept(model)

    def interrupted():
        with recalibrate(model):
            model(drawn((7, 3, 6, 5)))
            raise KeyboardInterrupt

    def misfit():
        with recalibrate(model):
            model(drawn((7, 3, 6, 5)))
            model(drawn((7, 2, 6, 5)))

    def nothing_seen():
        with recalibrate(model):
            model[0](drawn((0, 3, 6, 5)))

    for call, error, match in (
        (interrupted, KeyboardInterrupt, None),
        (misfit, RuntimeError, "should contain 2 elements"),
        (nothing_seen, ValueError, "^model received no values within the block"),
    ):
        with pytest.raises(error, match=match):
            call()
        assert_kept(model, before)
        assert torch.is_grad_enabled()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got"), recalibrate([model]):
        pass
    with pytest.raises(ValueError, match="has no batch normalization"), recalibrate(nn.ReLU()):
        pass


@pytest.mark.parametrize("converted", [False, True])
def test_recalibration_interrupted_at_any_call_leaves_no_module_in_training(converted):
    """Like Ctrl-C: a signal's handler runs when a call has returned."""
    collector = BatchNorm1d._collecting if converted else _recalibrate._collecting
    code, step, left = collector.__wrapped__.__code__, 0, 0

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_back is None or frame.f_back.f_code is not code:
            return trace
        left -= event == "return"
        if left == 0:
            left = -1
            raise KeyboardInterrupt
        return trace

    while left <= 0:
        step += 1
        left = step
        model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        if converted:
            convert(model)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with recalibrate(model):
                pass
        except (KeyboardInterrupt, ValueError):
            pass
        finally:
            sys.settrace(before)
        x = torch.tensor([[1.0], [3.0]])
        torch.testing.assert_close(model(x), x, atol=1e-4, rtol=1e-4)
        assert not model[0].training
        assert model[0].track_running_stats
    assert step > (1 if converted else 6)


def test_recalibrating_with_a_single_sample():
    model = nn.Sequential(BatchNorm1d(3))
    with pytest.raises(ValueError, match="more than 1 value"), recalibrate(model):
        model(torch.randn(1, 3))
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_a_compiled_model_is_recalibrated():
    torch._dynamo.reset()
    batches, models = uneven(torch.float32), []
    for way in ("eager", "compiled before", "compiled and called before"):
        torch.manual_seed(0)
        model = convert(two_layers(dtype=torch.float32)).eval()
        run = model if way == "eager" else torch.compile(model, backend="eager", fullgraph=True)
        if way == "compiled and called before":
            run(batches[0])
        with recalibrate(run):
            for x in batches:
                run(x)
        models.append((model, run))
    (ref, _), *others = models
    for model, run in others:
        for i in (0, 3):
            assert torch.equal(model[i].running_mean, ref[i].running_mean)
            assert torch.equal(model[i].running_var, ref[i].running_var)
        close(run(batches[0]), ref(batches[0]), torch.float32)
