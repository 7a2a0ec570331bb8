"""Running statistics of all that a model's normalizations see: `recalibrate`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbnorm.integrations.torch._modules import BatchNormModule
from nbnorm.integrations.torch._operators import refuse_shared, see
from nbnorm.integrations.torch._tensors import tensor_of
from nbnorm.moments import Pairwise


@contextmanager
def recalibrate(model: nn.Module) -> Iterator[None]:
    """Within a ``with``, collect what batch norms see; at its end make that their statistics.

    Run the model over batches in the block, in whatever way it is run. Each of its batch
    normalizations then takes the statistics of its batch, as in training; no gradient is recorded,
    and what has been compiled runs as if it had not. When the block has ended without an exception,
    the running statistics become those of all the values that a normalization has seen together,
    batches weighted by their sizes. One that has seen no values keeps its own.

    Parameters
    ----------
    model : torch.nn.Module
        Modules in it that are of `torch.nn.BatchNorm1d`, ``2d`` or ``3d`` and keep running
        statistics are recalibrated, converted or not. Others are left alone, such as SyncBatchNorm
        and lazy modules that have seen no input yet. All other modules stay in their mode: have
        dropout off by ``model.eval()``.

    Raises
    ------
    TypeError
        model is no module; within the block, where an input is of a dtype that is not computed in.
    ValueError
        model has no batch normalization with running statistics, or one whose statistics share
        memory with its weight, its bias or each other; within the block, where a batch
        has a single value per channel, as a last batch of one sample (``drop_last=True`` of a
        DataLoader leaves it out); at the end of the block, when none has seen a value.

    Notes
    -----
    As `nbnorm.population.recalibrate`. The variance is the unbiased one, of M2 / (count - 1), where
    count is that of all batches. `torch.optim.swa_utils.update_bn` averages over batches instead,
    all with the same weight, and leaves out the variance between their means. Parameters, modes and
    ``num_batches_tracked`` stay what they were.

    Converted modules take the moments of a batch from the pass that normalises it. PyTorch's own
    go through each batch once more.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nbnorm.integrations.torch import recalibrate
    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(), nn.Linear(1, 1)).eval()
    >>> with recalibrate(model):
    ...     for batch in (torch.zeros(2, 1), torch.tensor([[1.0], [2.0], [3.0], [6.0]])):
    ...         y = model(batch)
    >>> model[0].running_mean, model[0].running_var
    (tensor([2.]), tensor([5.2000]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        and module.running_mean is not None
    ]
    if not norms:
        raise ValueError("model has no batch normalization with running statistics")
    for norm in norms:
        refuse_shared(
            weight=norm.weight, bias=norm.bias,
            running_mean=norm.running_mean, running_var=norm.running_var,
        )  # fmt: skip
    with ExitStack() as block:
        seen = [block.enter_context(_collector_of(norm)) for norm in norms]
        block.enter_context(torch.no_grad())
        # A compiled model would trace what collects, or not know of it.
        block.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    if not any(seen):
        raise ValueError("none of the model's batch normalizations has seen a value")
    for norm, merged in zip(norms, seen, strict=True):
        if merged:
            moments = merged.total()
            norm.running_mean.copy_(tensor_of(moments.mean))
            norm.running_var.copy_(tensor_of(moments.var(correction=1)))


def _collector_of(norm: nn.Module) -> AbstractContextManager[Pairwise]:
    """What collects the moments of a module's batches: the module itself, where it is nbnorm's."""
    ours = type(norm).forward is BatchNormModule.forward
    collector: AbstractContextManager[Pairwise] = norm._collecting() if ours else _collecting(norm)
    return collector


@contextmanager
def _collecting(norm: nn.Module) -> Iterator[Pairwise]:
    """`BatchNormModule._collecting` of a module that is not nbnorm's, by hooks.

    A module of PyTorch's keeps no M2, so that each batch is gone through once more.
    """
    seen, collecting = Pairwise(), True

    def look(
        _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], __: Tensor
    ) -> None:
        if collecting:
            see(inputs[0] if inputs else named["input"], (seen,))

    # For the length of each forward, as `eval` and `train` may be called within the block.
    modes: list[tuple[bool, bool]] = []

    def train(*_: object) -> None:
        if collecting:
            modes.append((norm.training, norm.track_running_stats))
            norm.training, norm.track_running_stats = True, False

    def restore(*_: object) -> None:
        if modes:
            norm.training, norm.track_running_stats = modes.pop()

    hooks: list[Any] = []
    try:  # an interrupt at any line may leave a hook behind, which then does nothing
        hooks.append(norm.register_forward_pre_hook(train))
        hooks.append(norm.register_forward_hook(restore, always_call=True))
        hooks.append(norm.register_forward_hook(look, with_kwargs=True))
        yield seen
    finally:
        collecting = False
        for hook in hooks:
            hook.remove()
