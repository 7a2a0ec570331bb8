"""PyTorch's batch normalization modules, computed by nbnorm."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nbnorm._pairwise import Pairwise
from nbnorm._typing import Activation
from nbnorm.integrations.torch._functional import batch_norm, chosen, normalise
from nbnorm.integrations.torch._operators import statistics_apart


class BatchNormModule(_BatchNorm):
    """Base of the three modules, with what they add to PyTorch's."""

    # Class attributes, as `convert` does not call __init__.
    relu: bool = False
    activation: Activation = None
    _seen: tuple[Pairwise, ...] = ()  # collect the moments of batches, inside `_collecting`

    def __init__(
        self, *args: Any, relu: bool = False, activation: Activation = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        chosen(relu, activation)  # raises what forward would
        self.relu = relu
        self.activation = activation

    def forward(
        self,
        input: Tensor,  # noqa: A002
        residual: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> Tensor:
        """Normalise input, add residual, and apply ReLU or the module's activation.

        ReLU applies if the module or the call has relu=True.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = 0.0 if self.momentum is None else self.momentum
        if self._seen:
            return normalise(
                *(input, None, None, self.weight, self.bias, True, momentum, self.eps),
                *(residual, chosen(self.relu or relu, self.activation), self._seen),
            )
        tracked = self.track_running_stats or not self.training
        mean, var = running = (self.running_mean, self.running_var) if tracked else (None, None)
        counted = (
            self.training and self.track_running_stats and self.num_batches_tracked is not None
        )
        # A cumulative average omits empty batches; otherwise count them as PyTorch does.
        if counted and (self.momentum is not None or input.numel() > 0):
            self.num_batches_tracked.add_(1)
            if self.momentum is None and torch.compiler.is_compiling():
                # A float cannot depend on a tensor in a graph: get the batch's statistics with
                # momentum 1, and average below.
                momentum = 1.0
                mean, var = (torch.zeros_like(r, dtype=torch.float64) for r in running)
                others = (
                    None if t is None else t.detach()
                    for t in (input, self.weight, self.bias, residual)
                )
                before = statistics_apart(*running, *others)
            elif self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        y = batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            residual=residual,
            relu=self.relu or relu,
            activation=self.activation,
        )
        if mean is not running[0]:
            weight = 1.0 / self.num_batches_tracked.double()
            for average, old, batch in zip(running, before, (mean, var), strict=True):
                average.copy_((1.0 - weight) * old + weight * batch)
        return y

    @contextmanager
    def _collecting(self) -> Iterator[Pairwise]:
        """Collect the moments of batches inside the block; do not update running statistics.

        Batches are normalised as in training, whatever the module's mode.
        """
        before, seen = self._seen, Pairwise()
        try:  # starts before the assignment, as an interrupt may come at any line
            self._seen = (*before, seen)
            yield seen
        finally:  # calls no Python function, as an interrupt may come inside it
            if before:
                self.__dict__["_seen"] = before
            else:
                self.__dict__.pop("_seen", None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy; a copy does not collect moments."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_seen", None)
        return state

    def extra_repr(self) -> str:
        """Describe the module as PyTorch does, followed by relu=True or an activation if set."""
        described = str(super().extra_repr())  # type: ignore[no-untyped-call]
        described += ", relu=True" * self.relu
        return (
            described if self.activation is None else f"{described}, activation={self.activation!r}"
        )


class BatchNorm1d(BatchNormModule, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` computed by nbnorm, with optional activation and residual.

    A subclass of PyTorch's class, with the same arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As in `torch.nn.BatchNorm1d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether to apply ReLU last.
    activation : None, str or Activation, default None
        Another activation to apply last, as in `batch_norm`.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as in `batch_norm`; also if the input is not 2-d or 3-d.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import BatchNorm1d
    >>> layer = BatchNorm1d(2, relu=True)
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round(decimals=3)
    tensor([[0., 0.],
            [1., 1.]])
    >>> layer.running_mean
    tensor([0.2000, 2.0000])
    """


class BatchNorm2d(BatchNormModule, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` computed by nbnorm, with optional activation and residual.

    A subclass of PyTorch's class, with the same arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As in `torch.nn.BatchNorm2d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether to apply ReLU last.
    activation : None, str or Activation, default None
        Another activation to apply last, as in `batch_norm`.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as in `batch_norm`; also if the input is not 4-d.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import BatchNorm2d
    >>> layer, x = BatchNorm2d(3, relu=True), torch.randn(2, 3, 4, 4)
    >>> y = layer(x, residual=x)  # the end of a residual block, in one operator
    >>> isinstance(layer, torch.nn.BatchNorm2d), y.min() >= 0
    (True, tensor(True))
    """


class BatchNorm3d(BatchNormModule, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` computed by nbnorm, with optional activation and residual.

    A subclass of PyTorch's class, with the same arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As in `torch.nn.BatchNorm3d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether to apply ReLU last.
    activation : None, str or Activation, default None
        Another activation to apply last, as in `batch_norm`.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as in `batch_norm`; also if the input is not 5-d.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import BatchNorm3d
    >>> BatchNorm3d(3)(torch.ones(2, 3, 4, 4, 4)).abs().max().item()
    0.0
    """
