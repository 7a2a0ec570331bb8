"""The custom operators that appear in PyTorch's graphs, and the functions that they call."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nbnorm import _checks
from nbnorm._arrays import take
from nbnorm._pairwise import Pairwise
from nbnorm.activations import Activation
from nbnorm.functional import (
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_stats,
)
from nbnorm.integrations.torch._tensors import array_of, direct, laid_out, tensor_of
from nbnorm.moments import Moments
from nbnorm.second_order import batch_norm_double_backward, batch_norm_jvp


def fused(relu: bool | Activation) -> Activation | Literal["relu"] | None:
    """Return `relu` as nbnorm's `activation` argument."""
    if isinstance(relu, Activation):
        return relu
    return "relu" if relu else None


def compute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool | Activation,
    seen: Sequence[Pairwise] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd); in training, update the running statistics in place.

    `relu` may be an Activation in direct calls; operators take a bool. If `seen` is not
    empty, add the moments of the batch to each item and update no statistics.
    """
    correction = 1
    if seen:
        count = x.shape[0] * x.shape[2:].numel()
        # With momentum 1 and count - correction = 1, the updated statistics are mean and M2.
        running_mean, running_var = (x.new_zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
        momentum, correction = 1.0, count - 1
    y, mean, rstd = batch_norm_forward(
        array_of(x),
        array_of(weight),
        array_of(bias),
        array_of(running_mean, resolve=not training),  # a copy would be updated instead
        array_of(running_var, resolve=not training),
        training=training,
        momentum=momentum,
        eps=eps,
        correction=correction,
        residual=array_of(residual),
        activation=fused(relu),
    )
    if seen:
        collect(Moments(count, mean, array_of(running_var)), seen)
    return laid_out(y, x), tensor_of(mean), tensor_of(rstd)


def compute_and_count(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `compute`, and tell autograd that the running statistics have been written to."""
    found = compute(*inputs)
    running, training = inputs[3:5], inputs[6]
    if training and running[0] is not None and not running[0].is_inference():
        torch.autograd.graph.increment_version(running)
    return found


def see(x: Tensor, seen: Sequence[Pairwise]) -> None:
    """Compute the moments of a batch in an extra pass and add them to each item of `seen`."""
    collect(batch_norm_stats(array_of(x)), seen)


def collect(moments: Moments, seen: Sequence[Pairwise]) -> None:
    """Add the moments of a batch to each item of `seen`, unless the batch is empty."""
    if moments.count > 0:
        for each in seen:
            each.add(moments)


def no_forward_mode(*_: Any) -> NoReturn:
    """Raise: forward mode is not implemented."""
    raise NotImplementedError(
        "nbnorm's operators have no forward mode, and would lose the tangents; call "
        "nbnorm.integrations.torch.batch_norm with jvp or jacfwd, not linearize"
    )


def in_forward_mode() -> bool:
    """Return True if tensors may have tangents."""
    return forward_ad._current_level >= 0


_tangents_are_seen: ContextVar[bool] = ContextVar("_tangents_are_seen", default=False)


def _refuse_forward_mode() -> None:
    """Raise in forward mode: a custom operator does not see tangents and would drop them."""
    if in_forward_mode() and not _tangents_are_seen.get():
        no_forward_mode()


def computed(function: Any, operator: Any, *inputs: Any) -> Any:
    """Return what an operator returns; without the dispatcher if all inputs hold values.

    For the forward pass of a Function that has a forward mode of its own.
    """
    if direct(*(t for t in inputs if isinstance(t, Tensor))):
        return function(*inputs)
    before = _tangents_are_seen.set(True)
    try:
        return operator(*inputs)
    finally:
        _tangents_are_seen.reset(before)


def refuse_shared(**tensors: Tensor | None) -> None:
    """Raise if running statistics, which are updated, share memory with another tensor.

    `batch_norm_forward` checks this itself, but here it gets copies.
    """
    if tensors["running_mean"] is None or tensors["running_var"] is None:
        return
    arrays = {
        name: take(array_of(tensor, resolve=False), name)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    _checks.running_to_update(arrays, "it is updated in place")


@torch.library.custom_op("nbnorm::batch_norm", mutates_args=())
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, new running_mean, new running_var); empty tensors if not updated."""
    _refuse_forward_mode()
    if training:
        refuse_shared(
            x=x, gamma=weight, beta=bias, running_mean=running_mean, running_var=running_var,
            residual=residual,
        )  # fmt: skip
    moved_mean, moved_var = (
        running.detach().clone() if training and running is not None else x.new_empty(0)
        for running in (running_mean, running_var)
    )
    if training:
        running_mean = None if running_mean is None else moved_mean
        running_var = None if running_var is None else moved_var
    y, mean, rstd = compute(
        x, weight, bias, running_mean, running_var, residual, training, momentum, eps, relu
    )
    return y, mean, rstd, moved_mean, moved_var


@forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, ...]:
    _refuse_forward_mode()
    moved = (running_mean, running_var) if training else (None, None)
    return (
        torch.empty_like(x),
        *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2)),
        *(x.new_empty(0) if running is None else torch.empty_like(running) for running in moved),
    )


@torch.library.custom_op("nbnorm::statistics_apart", mutates_args=())
def statistics_apart(
    running_mean: Tensor,
    running_var: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return float64 copies of running statistics; raise if they share memory with a tensor."""
    refuse_shared(
        x=x, gamma=weight, beta=bias, running_mean=running_mean, running_var=running_var,
        residual=residual,
    )  # fmt: skip
    mean, var = (r.to(torch.float64, copy=True) for r in (running_mean, running_var))
    return mean, var


@statistics_apart.register_fake
def _(running_mean: Tensor, running_var: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, var = (torch.empty_like(r, dtype=torch.float64) for r in (running_mean, running_var))
    return mean, var


def record(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd) from the operator; in training, update the running statistics."""
    running_mean, running_var, training = *arguments[3:5], arguments[6]
    y, mean, rstd, moved_mean, moved_var = forward(*arguments)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(moved_mean)
        running_var.copy_(moved_var)
    return y, mean, rstd


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool | Activation,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Return [dx, dweight, dbias, dresidual]; gradients not in `output_mask` are None.

    With an activation other than ReLU, `y` is the residual, or None.
    """
    own = isinstance(relu, Activation)
    dx, dweight, dbias, dresidual = batch_norm_backward(
        array_of(dy),
        array_of(x),
        array_of(weight),
        array_of(mean),
        array_of(rstd),
        beta=array_of(bias),
        y=None if own else array_of(y),
        residual=array_of(y) if own else None,
        training=training,
        activation=fused(relu),
        output_mask=tuple(output_mask),  # type: ignore[arg-type]  # four of them
    )
    return [
        None if dx is None else laid_out(dx, x),
        None if dweight is None else tensor_of(dweight),
        None if dbias is None else tensor_of(dbias),
        None if dresidual is None else laid_out(dresidual, x),
    ]


def filled_gradients(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call `gradients`; return empty tensors in place of None."""
    grads = gradients(dy, x, *others)
    dx, dweight, dbias, dresidual = (x.new_empty(0) if g is None else g for g in grads)
    return dx, dweight, dbias, dresidual


@torch.library.custom_op("nbnorm::batch_norm_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call `gradients`; return empty tensors in place of None."""
    _refuse_forward_mode()
    return filled_gradients(dy, x, weight, bias, mean, rstd, y, training, relu, output_mask)


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    _refuse_forward_mode()
    parameter = x.new_empty(x.shape[1], dtype=(x if weight is None else weight).dtype)
    return tuple(
        torch.empty_like(like) if wanted else x.new_empty(0)
        for like, wanted in zip((x, parameter, parameter, x), output_mask, strict=True)
    )


def passed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    relu: bool,
) -> Callable[[Tensor | None], Tensor | None]:
    """Return a function that sets a gradient to 0 wherever ReLU did; the identity without ReLU."""
    if not relu:
        return lambda gradient: gradient
    if y is None:
        arrays = map(array_of, (x, weight, bias, mean, rstd))
        y = tensor_of(batch_norm_apply(*arrays, activation="relu"))
    stopped = ~(y > 0)
    return lambda gradient: None if gradient is None else gradient.masked_fill(stopped, 0)


def second(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    ddresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `gradients` with respect to dy, x and weight (empty for None)."""
    masked = passed(x, weight, bias, mean, rstd, y, relu)
    ddy, dx, dweight = batch_norm_double_backward(
        array_of(ddx),
        array_of(ddweight),
        array_of(ddbias),
        array_of(masked(dy)),
        array_of(x),
        array_of(weight),
        array_of(mean),
        array_of(rstd),
        training=training,
    )
    of_dy = laid_out(ddy, x)
    if ddresidual is not None:
        of_dy = of_dy + ddresidual
    of_dy = masked(of_dy)
    return of_dy, laid_out(dx, x), x.new_empty(0) if weight is None else tensor_of(dweight)


@torch.library.custom_op("nbnorm::batch_norm_double_backward", mutates_args=())
def double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    ddresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `second`."""
    _refuse_forward_mode()
    return second(
        ddx, ddweight, ddbias, ddresidual, dy, x, weight, bias, mean, rstd, y, training, relu
    )


@double_backward.register_fake
def _(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    ddresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    _refuse_forward_mode()
    of_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x), torch.empty_like(x), of_weight


def tangent(
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    tresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
) -> tuple[Tensor]:
    """Return the derivative of y along tangents of x, weight, bias and residual."""
    arrays = map(array_of, (tx, tweight, tbias, x, weight, mean, rstd))
    ty = laid_out(batch_norm_jvp(*arrays, training=training), x)
    if tresidual is not None:
        ty = ty + tresidual
    found = passed(x, weight, bias, mean, rstd, y, relu)(ty)
    assert found is not None
    return (found,)


@torch.library.custom_op("nbnorm::batch_norm_jvp", mutates_args=())
def jvp(
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    tresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    relu: bool,
) -> tuple[Tensor]:
    """Call `tangent`."""
    _refuse_forward_mode()
    return tangent(tx, tweight, tbias, tresidual, x, weight, bias, mean, rstd, y, training, relu)


@jvp.register_fake
def _(
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    tresidual: Tensor | None,
    x: Tensor,
    *_: Any,
) -> tuple[Tensor]:
    _refuse_forward_mode()
    return (torch.empty_like(x),)
