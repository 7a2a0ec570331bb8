"""The function `batch_norm` and its gradient, computed through operators or directly."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from nbnorm import _checks
from nbnorm._arrays import stand_in_of
from nbnorm._pairwise import Pairwise
from nbnorm._typing import Activation
from nbnorm.activations import Activation as Fused
from nbnorm.integrations.torch import _operators, _tensors


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
    activation: Activation = None,
) -> Tensor:
    """Compute `torch.nn.functional.batch_norm`, with residual and activation in the same pass.

    y = act(weight (input - mean) / sqrt(var + eps) + bias + residual), with the statistics of the
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
        Added before the activation. May be float32 if input is float16 or bfloat16, as under
        autocast; y has input's dtype.
    relu : bool, default False
        Whether to apply ReLU last.
    activation : None, str or Activation, default None
        Another activation to apply last, by name ("silu", "leaky_relu", ...) or a result of
        `nbnorm.activation`; "relu" is the same as ``relu=True``.

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
        (``is_neg()``), or `torch.func.vmap` does not map over them. The activation is unknown, or
        given beside ``relu=True``.
    RuntimeError
        A third derivative is requested.
    NotImplementedError
        Forward mode of forward mode is requested (``jacfwd`` of ``jacfwd``), or
        `torch.func.linearize`; or an activation of your own in a graph, a transform, forward mode
        or a second derivative.

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015), see `nbnorm.batch_norm_forward`. Statistics
    are computed in float64 for all dtypes. Autocast does not apply: nothing
    is cast, and y has input's dtype even if residual is float32.

    Second derivatives and forward mode are computed by `nbnorm.batch_norm_double_backward` and
    `nbnorm.batch_norm_jvp`. `torch.func`'s ``grad``, ``vjp``, ``jvp``, ``jacrev``, ``jacfwd``,
    ``hessian`` and ``vmap`` work; ``vmap`` makes one call per sample. ``grad`` and ``vmap`` also
    work inside `torch.compile`.

    The backward pass keeps input, weight, and the float64 mean and rstd. ReLU also keeps bias, or
    the result if it follows a residual; other activations keep bias and the residual.

    Activations other than ReLU are fused where a call is computed directly. In graphs, `torch.func`
    and forward mode, and for second derivatives, PyTorch's own function follows the batch norm.

    First calls compile kernels, which takes some seconds, once per machine.

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
    last = relu if activation is None else chosen(relu, activation)
    return normalise(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, last
    )


def chosen(relu: bool, activation: Activation) -> bool | Fused:
    """Return True for ReLU, the Activation for others, or False."""
    found = _checks.activation(activation)
    if relu and isinstance(found, Fused):
        raise ValueError(f"relu=True and activation={activation!r} are both given; pass one")
    return found if isinstance(found, Fused) else relu or found == "relu"


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
    relu: bool | Fused,
    seen: Sequence[Pairwise] = (),
) -> Tensor:
    """Compute `batch_norm`, and add the moments of the batch to each item of `seen`.

    `seen` requires training mode without running statistics. `relu` is what `chosen` returns.
    """
    if not isinstance(input, Tensor):
        if what := stand_in_of(type(input)):  # type: ignore[arg-type]
            raise TypeError(f"input is {what}")
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__qualname__}")
    for name, running in ("running_mean", running_mean), ("running_var", running_var):
        if running is not None and running.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad, but running statistics have no gradient; "
                f"pass {name}.detach()"
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
    eager = _tensors.eager(*arguments[:6])
    if isinstance(relu, Fused) and not (eager and not _operators.in_forward_mode()):
        plain = running_mean, running_var, weight, bias, training, momentum, eps, residual, False
        return _composed(relu)(normalise(input, *plain, seen))
    if eager:
        y = _Eager.apply(*arguments, seen)  # type: ignore[no-untyped-call]
        return y
    if _tensors.transformed():
        if torch.compiler.is_dynamo_compiling():
            # torch.compile would trace the Function, whose forward mode and vmap it does not know.
            from torch._dynamo.comptime import comptime

            comptime(_keep_in_graph)
        y = _transformed(*arguments)
    else:
        y, *_ = _operators.record(*arguments)
    if seen:  # the operators do not return M2
        _operators.see(input, seen)
    return y


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "leaky_relu": torch.nn.functional.leaky_relu,
    "relu6": torch.nn.functional.relu6,
    "hardswish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _composed(activation: Fused) -> Callable[[Tensor], Tensor]:
    """Return PyTorch's function for an activation: it has all derivatives, and graphs know it."""
    if activation.functions is not None:
        raise NotImplementedError(
            f"{activation!r} has functions of your own, which work only in direct calls, with "
            "first derivatives: not in graphs, torch.func or forward mode; apply a PyTorch "
            "function to the result instead"
        )
    function = _FUNCTIONS[activation.name]
    return lambda v: function(v, *activation.parameters)


def _transformed(*arguments: Any) -> Tensor:
    """Compute `batch_norm` within a `torch.func` transform."""
    y: Tensor
    y, *_ = _Transformed.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


def _keep_in_graph(_: Any) -> None:
    """Let torch.compile call `_transformed` as it is, from its graph.

    Done at the first trace, since `torch._dynamo` takes longer to import than the rest of PyTorch.
    """
    torch._dynamo.allow_in_graph(_transformed)


def _by_function(*arguments: Any) -> bool:
    """Return True if a derivative is computed by a Function, which can be transformed.

    The alternative is an operator, which PyTorch records in graphs and maps over a batch of
    gradients (``is_grads_batched=True``).
    """
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    batched = any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    return _tensors.transformed() or (_tensors.direct(*tensors) and not batched)


def _may_have_tangents() -> bool:
    """Return True if a call may be in forward mode; a `torch.func` transform does not say."""
    return _operators.in_forward_mode() or _tensors.transformed()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, *output[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Save what the gradient and the tangent need."""
    x, weight, bias, running_mean, running_var, residual, training, _, eps, relu = inputs
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # the gradients have its dtype
    own = isinstance(relu, Fused)
    # x alone does not determine the ReLU mask then
    by_y = relu and residual is not None and not own
    saved = x, weight, bias if relu and not by_y else None, mean, rstd
    ctx.save_for_backward(*saved, y if by_y else residual if own else None)
    if own:  # to recompute the batch norm if the gradient is differentiated
        frozen = None, None
        if not training:
            frozen = running_mean.clone(), running_var.clone()
        ctx.options = *frozen, eps
    if _may_have_tangents():
        # Detached, or y would keep itself alive.
        ctx.save_for_forward(*saved, y.detach() if by_y else None)
    ctx.training, ctx.relu = training, relu


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias, of_residual = (ctx.needs_input_grad[i] for i in (0, 1, 2, 5))
    grads: list[Tensor | None] = [None] * 4
    if dy is not None:
        mask = [of_x, of_weight, of_bias, of_residual and bool(ctx.relu)]
        if any(mask):
            arguments = (dy, *ctx.saved_tensors, ctx.training, ctx.relu, mask)
            recorded = torch.is_grad_enabled() or _operators.in_forward_mode()
            batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched=True
            own = isinstance(ctx.relu, Fused)
            if _tensors.eager(*arguments[:7]) and not recorded and not batched:
                grads = _operators.gradients(*arguments)
            elif own:
                grads = _gradients_of_composed(ctx, dy, mask)
            else:
                grads = _gradients_of(*arguments)
        if of_residual and not ctx.relu:
            grads[3] = dy
    dx, dweight, dbias, dresidual = grads
    return dx, dweight, dbias, None, None, dresidual, None, None, None, None


def _gradients_of_composed(ctx: Any, dy: Tensor, mask: list[bool]) -> list[Tensor | None]:
    """Recompute the batch norm, apply PyTorch's function, return the gradients.

    They can be differentiated again if grad mode is on.
    """
    x, weight, bias, _, _, residual = ctx.saved_tensors
    running_mean, running_var, eps = ctx.options
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as one tensor may be input and residual: each has a gradient of its own.
        inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias, residual)]
        v = normalise(
            *(inputs[0], running_mean, running_var, inputs[1], inputs[2]),
            *(ctx.training, 0.0, eps, inputs[3], False),
        )
        wanted = [t for t, requested in zip(inputs, mask, strict=True) if requested]
        y = _composed(ctx.relu)(v)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=recorded))
    return [next(found) if requested else None for requested in mask]


def _gradients_of(*arguments: Any) -> list[Tensor | None]:
    """Return the gradients that `mask` asks for; None for the others.

    Both ways of computing them can be differentiated again.
    """
    *given, mask = arguments
    if _by_function(*given):
        found = _Gradient.apply(*given, *mask)  # type: ignore[no-untyped-call]
    else:
        found = _operators.backward(*given, mask)
    return [g if wanted else None for g, wanted in zip(found, mask, strict=True)]


def _second_of(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `_operators.second`: the gradients of dy, x and, if there is one, weight."""
    second = _Second.apply if _by_function(*arguments) else _operators.double_backward
    ddy, dx, dweight = second(*arguments)  # type: ignore[no-untyped-call]
    return ddy, dx, None if arguments[6] is None else dweight


def _push_forward(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
    """Return the tangent of y."""
    tx, tweight, tbias, _, _, tresidual, *_ = tangents
    directions = tx, tweight, tbias, tresidual
    if all(t is None for t in directions):
        return None
    arguments = (*directions, *ctx.saved_tensors, ctx.training, ctx.relu)
    ty, *_ = _Tangent.apply(*arguments)  # type: ignore[no-untyped-call]
    return ty  # type: ignore[no-any-return]


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    if _may_have_tangents():
        ctx.save_for_forward(*inputs[:7])
    ctx.training, ctx.relu, *mask = inputs[7:]
    ctx.mask = mask[0] if len(mask) == 1 else mask  # the operator gets a list
    ctx.mark_non_differentiable(*(g for g, w in zip(output, ctx.mask, strict=True) if not w))


def _differentiate_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    ddy, dx, dweight = None, None, None
    if any(g is not None for g in gradients):
        ddy, dx, dweight = _second_of(*gradients, *ctx.saved_tensors, ctx.training, ctx.relu)
    return ddy, dx, dweight, *[None] * (len(ctx.needs_input_grad) - 3)


_BEYOND = (
    "nbnorm's batch_norm has derivatives up to the second; for a third use "
    "torch.nn.functional.batch_norm"
)


def _no_third_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(_BEYOND)


_operators.forward.register_autograd(_differentiate, setup_context=_save)
_operators.backward.register_autograd(_differentiate_gradient, setup_context=_save_gradient)
_operators.double_backward.register_autograd(_no_third_derivative)


class _Eager(torch.autograd.Function):
    """The operators' computation without the dispatcher, which costs 60 us per layer and step.

    Does not define `setup_context`, with which PyTorch would bind the signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = _operators.compute_and_count(*inputs)
        _keep(ctx, inputs[:10], y, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, *grads), None

    jvp = staticmethod(_push_forward)


class _Transform(torch.autograd.Function):
    """Base of the operators under `torch.func`, which ignores a custom operator's derivative."""

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
        return _operators.computed(_operators.compute_and_count, _operators.record, *inputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        if inputs[6] and inputs[3] is not None and None in in_dims[3:5]:
            raise ValueError(
                "running_mean and running_var are not both mapped over by vmap, but each sample "
                "updates them; pass in_dims for both, omit both, or use training=False"
            )
        return super().vmap(info, in_dims, *inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _push_forward(ctx, *tangents), None, None

    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)


class _Gradient(_Transform):
    """`_operators.backward`, differentiable once more, in reverse and in forward mode."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operators.computed(
            _operators.filled_gradients, _operators.backward, *inputs[:9], inputs[9:]
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the tangents of the gradients.

        They are linear in dy. The derivative with respect to x and weight is a Hessian, hence
        symmetric, so the second derivative serves in forward mode, too.
        """
        tdy, tx, tweight, *_ = tangents
        saved: tuple[Any, ...] = ctx.saved_tensors
        dy, rest = saved[0], (*saved[1:], ctx.training, ctx.relu)
        tdy = torch.zeros_like(dy) if tdy is None else tdy
        found = _gradients_of(tdy, *rest, ctx.mask)
        if tx is not None or tweight is not None:
            _, *more = _second_of(tx, tweight, None, None, dy, *rest)
            for i, (first, added) in enumerate(zip(found[:2], more, strict=True)):
                found[i] = None if first is None or added is None else first + added
        return tuple(found)

    setup_context = staticmethod(_save_gradient)
    backward = staticmethod(_differentiate_gradient)


class _Second(_Transform):
    """`_operators.double_backward`, the derivative of `_Gradient`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operators.computed(_operators.second, _operators.double_backward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no third derivative."""

    backward = jvp = staticmethod(_no_third_derivative)


class _Tangent(_Transform):
    """The tangent of y, differentiable in reverse mode.

    As a function of the tangents, its gradient is that of batch_norm itself, and as a function of x
    and weight it is the second derivative, with the tangents in place of ddx, ddweight and ddbias.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operators.computed(_operators.tangent, _operators.jvp, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])
        ctx.training, ctx.relu = inputs[10:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (c,) = grads
        if c is None:
            return (None,) * 12
        saved: tuple[Any, ...] = ctx.saved_tensors
        tx, tweight, tbias, tresidual = saved[:4]
        rest = (*saved[4:], ctx.training, ctx.relu)
        given = [t is not None for t in (tx, tweight, tbias, tresidual)]
        *first, of_residual = _gradients_of(c, *rest, [*given[:3], given[3] and ctx.relu])
        if given[3] and not ctx.relu:
            of_residual = c
        _, dx, dweight = _second_of(tx, tweight, tbias, None, c, *rest)
        return *first, of_residual, dx, dweight, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "nbnorm's batch_norm has no forward mode of forward mode (jacfwd of jacfwd); "
            "use reverse mode (jacrev) for one of them"
        )
