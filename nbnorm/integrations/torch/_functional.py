"""The function `batch_norm` and its gradient, computed through operators or directly."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from nbnorm._arrays import stand_in_of
from nbnorm.integrations.torch import _operators, _tensors
from nbnorm.moments import Pairwise


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute `torch.nn.functional.batch_norm`, with a residual and ReLU in the same pass.

    y = relu(weight (input - mean) / sqrt(var + eps) + bias + residual), with the statistics of the
    batch in training, the running ones otherwise.

    Parameters
    ----------
    input : Tensor of shape (N, C) or (N, C, ...)
        float32, float64, float16 or bfloat16 (requires ml_dtypes), in CPU memory or, with the
        ``cuda`` extra, on a CUDA device. The result keeps a channels-last memory format.
    running_mean, running_var : Tensor of shape (C,), or None
        Population statistics; pass both or neither. In training they are updated in place,
        otherwise they normalise. Any floating dtype: they may be float32 with a bfloat16 input, as
        may weight and bias.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift. None means 1 and 0.
    training : bool, default False
        Normalise with the batch's statistics (True) or the running ones. If False, the gradient
        treats the statistics as constants.
    momentum : float, default 0.1
        Weight of the new statistic.
    eps : float, default 1e-5
        Added to the variance.
    residual : Tensor of input's shape and dtype, optional
        Added before ReLU. May be float32 if input is float16 or bfloat16 in CPU memory, as under
        autocast; y has input's dtype.
    relu : bool, default False
        Whether to apply ReLU last.

    Returns
    -------
    Tensor
        y, with the shape, dtype and memory format of input.

    Raises
    ------
    TypeError
        input is not a Tensor; a dtype is not supported; residual has another dtype;
        running statistics require grad; an argument is a ZeroTensor.
    ValueError
        A shape is invalid; only one running statistic is given, or none with ``training=False``; in
        training, a channel has a single value, running statistics have the negative bit
        (``is_neg()``), or `torch.func.vmap` does not map over them.
    RuntimeError
        A second derivative is requested; it is not implemented.
    NotImplementedError
        Forward mode is requested (`torch.func.jvp`, ``jacfwd``, ``hessian``).

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015), see `nbnorm.batch_norm_forward`. Statistics
    are computed in float64 for all dtypes. Autocast does not apply: nothing
    is cast, and y has input's dtype also if residual is float32.

    `torch.func`'s ``grad``, ``vjp``, ``jacrev`` and ``vmap`` work; ``vmap`` makes one call per
    sample. They do not work inside `torch.compile`, which supports gradients only through
    `torch.autograd`.

    The backward pass keeps input, weight, and the float64 mean and rstd; with ReLU also bias, or
    the result if ReLU follows a residual.

    The first call of a kind compiles kernels, which takes some seconds, once per machine.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import batch_norm
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]], requires_grad=True)
    >>> y = batch_norm(x, None, None, training=True, eps=0.0, relu=True)
    >>> y.detach()
    tensor([[0., 0.],
            [1., 1.]])
    >>> weight = torch.ones(2, requires_grad=True)
    >>> batch_norm(x, torch.zeros(2), torch.ones(2), weight, eps=0.0).sum().backward()
    >>> weight.grad
    tensor([ 4., 40.])
    """
    return normalise(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu
    )


def normalise(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    seen: Sequence[Pairwise] = (),
) -> Tensor:
    """Compute `batch_norm`, and add the moments of the batch to each item of `seen`.

    `seen` requires training mode without running statistics.
    """
    if not isinstance(input, Tensor):
        if what := stand_in_of(type(input)):  # type: ignore[arg-type]
            raise TypeError(f"input is {what}")
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__qualname__}")
    for name, running in ("running_mean", running_mean), ("running_var", running_var):
        if running is not None and running.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad, and running statistics have no gradient; expected a "
                "tensor that does not, as of detach()"
            )
    if training and input.dim() > 1 and input.shape[0] * input.shape[2:].numel() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    arguments = (
        *(input, weight, bias, running_mean, running_var, residual),
        *(training, momentum, eps, relu),
    )
    y: Tensor
    if _tensors.eager(*arguments[:6]):
        y = _Eager.apply(*arguments, seen)  # type: ignore[no-untyped-call]
        return y
    if _tensors.transformed():
        y, *_ = _Transformed.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, *_ = _operators.record(*arguments)
    if seen:  # the operators do not return M2
        _operators.see(input, seen)
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, *output[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Save what the gradient needs."""
    x, weight, bias, _, _, residual, training, _, _, relu = inputs
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # the gradients have its dtype
    by_y = relu and residual is not None  # x alone does not determine the ReLU mask then
    ctx.save_for_backward(
        x, weight, bias if relu and not by_y else None, mean, rstd, y if by_y else None
    )
    ctx.training, ctx.relu = training, relu


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias, of_residual = (ctx.needs_input_grad[i] for i in (0, 1, 2, 5))
    grads: list[Tensor | None] = [None] * 4
    if dy is not None:
        mask = [of_x, of_weight, of_bias, of_residual and ctx.relu]
        if any(mask):
            arguments = (dy, *ctx.saved_tensors, ctx.training, ctx.relu, mask)
            batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched=True
            if _tensors.eager(*arguments[:7]) and not torch.is_grad_enabled() and not batched:
                grads = _operators.gradients(*arguments)
            else:
                if _tensors.transformed():
                    found = _TransformedBackward.apply(*arguments[:-1], *mask)  # type: ignore[no-untyped-call]
                else:
                    found = _operators.backward(*arguments)
                grads = [g if wanted else None for g, wanted in zip(found, mask, strict=True)]
        if of_residual and not ctx.relu:
            grads[3] = dy
    dx, dweight, dbias, dresidual = grads
    return dx, dweight, dbias, None, None, dresidual, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(
        "nbnorm's batch_norm has no second derivative; for one (gradient penalties, Hessians) use "
        "torch.nn.functional.batch_norm"
    )


_operators.forward.register_autograd(_differentiate, setup_context=_save)
_operators.backward.register_autograd(_no_second_derivative)


class _Eager(torch.autograd.Function):
    """The operators' computation without the dispatcher, which costs 60 us per layer and step.

    Does not define `setup_context`, with which PyTorch would bind the signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = _operators.compute(*inputs)
        running, training = inputs[3:5], inputs[6]
        if training and running[0] is not None and not running[0].is_inference():
            torch.autograd.graph.increment_version(running)
        _keep(ctx, inputs[:10], y, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, *grads), None

    jvp = staticmethod(_operators.no_forward_mode)


class _Transform(torch.autograd.Function):
    """Base of the operators under `torch.func`, which ignores a custom operator's derivative."""

    jvp = staticmethod(_operators.no_forward_mode)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """Call the function once for each sample."""
        calls = [
            cls.apply(  # type: ignore[no-untyped-call]
                *(
                    given if dim is None else given.select(dim, i)
                    for given, dim in zip(inputs, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(each) for each in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)


class _Transformed(_Transform):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operators.record(*inputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        if inputs[6] and inputs[3] is not None and None in in_dims[3:5]:
            raise ValueError(
                "running_mean and running_var are not mapped over, but what moves them in training "
                "is; expected in_dims for both, none of them, or training=False"
            )
        return super().vmap(info, in_dims, *inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)


class _TransformedBackward(_Transform):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operators.backward(*inputs[:9], inputs[9:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    backward = staticmethod(_no_second_derivative)
