"""`recalibrate`: running statistics of all inputs of a model's batch normalizations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbnorm._pairwise import Pairwise
from nbnorm.integrations.torch._modules import BatchNormModule
from nbnorm.integrations.torch._operators import refuse_shared, see
from nbnorm.integrations.torch._tensors import tensor_of
from nbnorm.population import batches_of


@contextmanager
def recalibrate(model: nn.Module) -> Iterator[None]:
    """Collect the batch norms' input statistics inside the block; store them on exit.

    Run the model over batches inside the ``with`` block. There, each batch normalization normalises
    with the statistics of its batch, as in training; no gradients are recorded, and compiled models
    run eagerly. If the block ends without an exception, the running statistics of each batch
    normalization become those of all values it has seen, with batches weighted by their sizes. One
    that has seen no values keeps its running statistics.

    Parameters
    ----------
    model : torch.nn.Module
        Recalibrates its `torch.nn.BatchNorm1d`, ``2d`` and ``3d`` modules with running statistics,
        converted or not. Others, such as SyncBatchNorm and lazy modules that have not seen an
        input, do not change. All other modules keep their mode: call ``model.eval()`` first to
        turn dropout off.

    Raises
    ------
    TypeError
        model is not a module; inside the block, an input has an unsupported dtype.
    ValueError
        model has no batch normalization with running statistics, or one whose running statistics
        share memory with its weight, its bias or each other; inside the block, a batch has a single
        value per channel, such as a last batch of one sample (pass ``drop_last=True`` to the
        DataLoader); on exit, no batch normalization has seen a value.

    Notes
    -----
    See `nbnorm.population.recalibrate`. The running variance is the unbiased M2 / (count - 1), with
    the count of all batches together. `torch.optim.swa_utils.update_bn` averages over batches
    instead, which weights all batches equally and omits the variance between their means.
    Parameters and modes do not change, nor does ``num_batches_tracked``, unless ``momentum=None``
    and it is 0: it then becomes the number of batches seen, as after `update_bn`.

    Converted modules get the moments of a batch from the pass that normalises it. PyTorch's modules
    need an extra pass over each batch.

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
        # Compiled code would trace the collecting calls, or not contain them.
        block.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    if not any(seen):
        raise ValueError("model received no values within the block, expected at least one batch")
    for norm, merged in zip(norms, seen, strict=True):
        if merged:
            moments = merged.total()
            norm.running_mean.copy_(tensor_of(moments.mean))
            norm.running_var.copy_(tensor_of(moments.var(correction=1)))
            if (batches := batches_of(norm, merged)) is not None:
                norm.num_batches_tracked.fill_(batches)


def _collector_of(norm: nn.Module) -> AbstractContextManager[Pairwise]:
    """Return a context manager that collects the moments of a module's batches."""
    ours = type(norm).forward is BatchNormModule.forward
    collector: AbstractContextManager[Pairwise] = norm._collecting() if ours else _collecting(norm)
    return collector


@contextmanager
def _collecting(norm: nn.Module) -> Iterator[Pairwise]:
    """`BatchNormModule._collecting` by hooks, for PyTorch's own modules.

    PyTorch's modules do not return M2, so a hook takes another pass over each batch.
    """
    seen, collecting = Pairwise(), True

    def look(
        _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], __: Tensor
    ) -> None:
        if collecting:
            see(inputs[0] if inputs else named["input"], (seen,))

    # Set the mode only during each forward call: the block may call `eval` and `train`.
    modes: list[tuple[bool, bool]] = []

    def train(*_: object) -> None:
        if collecting:
            modes.append((norm.training, norm.track_running_stats))
            norm.training, norm.track_running_stats = True, False

    def restore(*_: object) -> None:
        if modes:
            norm.training, norm.track_running_stats = modes.pop()

    hooks: list[Any] = []
    try:  # an interrupt may leave a hook behind; with collecting=False it does nothing
        hooks.append(norm.register_forward_pre_hook(train))
        hooks.append(norm.register_forward_hook(restore, always_call=True))
        hooks.append(norm.register_forward_hook(look, with_kwargs=True))
        yield seen
    finally:
        collecting = False
        for hook in hooks:
            hook.remove()
