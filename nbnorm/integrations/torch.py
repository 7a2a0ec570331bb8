"""PyTorch: `batch_norm` with autograd, modules, `convert` and `recalibrate` for models that exist.

Where a program is recorded (torch.compile, torch.export, fake tensors), `batch_norm` is the
operator ``nbnorm::batch_norm`` and its gradient ``nbnorm::batch_norm_backward``, which stay as they
are in the graph. They write to none of their arguments, as PyTorch gives a gradient only to such
operators: new running statistics are a result, which `batch_norm` copies into the old. Where a
program just runs, the same functions are called without the dispatcher.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from nbnorm import _checks, _shortcut
from nbnorm._arrays import _bfloat16, stand_in_of, take
from nbnorm._typing import Array
from nbnorm.functional import batch_norm_backward, batch_norm_forward, batch_norm_stats
from nbnorm.population import Pairwise

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert", "recalibrate"]

_Model = TypeVar("_Model", bound=nn.Module)

for _library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
    _shortcut.adopt(str(_library), torch.get_num_threads)


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
    """`torch.nn.functional.batch_norm`, with a residual and ReLU at no further pass over memory.

    y = relu(weight (input - mean) / sqrt(var + eps) + bias + residual), with the statistics of the
    batch in training, the running ones otherwise.

    Parameters
    ----------
    input : Tensor of shape (N, C) or (N, C, ...)
        float32, float64, float16 or bfloat16 (the last needs ml_dtypes), in CPU memory or, with
        the extra ``cuda``, on a CUDA device. Channels-last memory stays so.
    running_mean, running_var : Tensor of shape (C,), or None
        Population statistics, both or neither. In training they are updated in place, otherwise
        they normalise. Any floating dtype, as for weight and bias: float32 beside a bfloat16 input.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift. None: 1 and 0.
    training : bool, default False
        Whether the statistics of this batch normalise it. Without, the gradient takes the
        statistics for constants.
    momentum : float, default 0.1
        Weight of the new statistic.
    eps : float, default 1e-5
        Added to the variance.
    residual : Tensor of input's shape and dtype, optional
        Added before ReLU.
    relu : bool, default False
        Whether ReLU comes last.

    Returns
    -------
    Tensor
        Of input's shape, dtype and memory format.

    Raises
    ------
    TypeError
        A dtype that is not computed in, or a residual of another than input's; an input that is no
        Tensor; running statistics that require grad; a ZeroTensor.
    ValueError
        Shapes that do not fit, one running statistic without the other, none where they
        normalise, a single value per channel in training; in training running statistics with the
        negative bit (``is_neg()``), and under `torch.func.vmap` ones that are not mapped over.
    RuntimeError
        In a second derivative, of which there is none.
    NotImplementedError
        In forward mode (`torch.func.jvp`, ``jacfwd``, ``hessian``), of which there is none either.

    Notes
    -----
    Ioffe & Szegedy (2015), Algorithm 1; see `nbnorm.batch_norm_forward`. Statistics are float64
    inside, whatever the dtypes. Autocast changes no dtype here: where it has made input bfloat16,
    residual must be made so, too.

    `torch.func`'s ``grad``, ``vjp``, ``jacrev`` and ``vmap`` work, the last by one call for each
    sample; not inside of `torch.compile`, which takes gradients by `torch.autograd` alone.

    For the backward pass input and weight are kept, mean and rstd in float64, with ReLU also bias,
    and the result where ReLU follows a residual.

    The first call of a kind compiles kernels for some seconds, once on a machine.

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
    if _eager(*arguments[:6]):
        y = _Eager.apply(*arguments)  # type: ignore[no-untyped-call]
        return y
    if _transformed():
        y, *_ = _Transformed.apply(*arguments)  # type: ignore[no-untyped-call]
        return y
    y, *_ = _record(*arguments)
    return y


def _compute(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); in training the running statistics are moved in place."""
    y, mean, rstd = batch_norm_forward(
        _array(x),
        _array(weight),
        _array(bias),
        _array(running_mean, resolve=not training),  # a copy would be moved in their place
        _array(running_var, resolve=not training),
        training=training,
        momentum=momentum,
        eps=eps,
        residual=_array(residual),
        activation="relu" if relu else None,
    )
    return _laid_out(y, x), _tensor(mean), _tensor(rstd)


def _no_forward_mode(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "nbnorm's batch_norm has no forward mode; for one (jvp, jacfwd) use "
        "torch.nn.functional.batch_norm"
    )


def _refuse_forward_mode() -> None:
    """Raise where tangents are about, which a custom operator cannot see and would drop."""
    if forward_ad._current_level >= 0:
        _no_forward_mode()


def _refuse_shared(**tensors: Tensor | None) -> None:
    """Refuse running statistics that share memory with another tensor: they are going to change.

    nbnorm does where it moves them itself. Here it is given copies.
    """
    if tensors["running_mean"] is None or tensors["running_var"] is None:
        return
    arrays = {
        name: take(_array(tensor, resolve=False), name)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    _checks.running_to_update(arrays, "it is updated in place")


@torch.library.custom_op("nbnorm::batch_norm", mutates_args=())
def _forward(
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
    """(y, mean, rstd, moved running_mean, moved running_var), the last two empty if not moved."""
    _refuse_forward_mode()
    if training:
        _refuse_shared(
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
    y, mean, rstd = _compute(
        x, weight, bias, running_mean, running_var, residual, training, momentum, eps, relu
    )
    return y, mean, rstd, moved_mean, moved_var


@_forward.register_fake
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
def _statistics_apart(
    running_mean: Tensor,
    running_var: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Copies in float64 of running statistics that share memory with no other tensor of a call."""
    _refuse_shared(
        x=x, gamma=weight, beta=bias, running_mean=running_mean, running_var=running_var,
        residual=residual,
    )  # fmt: skip
    mean, var = (r.to(torch.float64, copy=True) for r in (running_mean, running_var))
    return mean, var


@_statistics_apart.register_fake
def _(running_mean: Tensor, running_var: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, var = (torch.empty_like(r, dtype=torch.float64) for r in (running_mean, running_var))
    return mean, var


def _record(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) by the operator; in training the running statistics are moved in place."""
    running_mean, running_var, training = *arguments[3:5], arguments[6]
    y, mean, rstd, moved_mean, moved_var = _forward(*arguments)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(moved_mean)
        running_var.copy_(moved_var)
    return y, mean, rstd


def _gradients(
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
) -> list[Tensor | None]:
    """[dx, dweight, dbias, dresidual], None where output_mask does not ask for one."""
    dx, dweight, dbias, dresidual = batch_norm_backward(
        _array(dy),
        _array(x),
        _array(weight),
        _array(mean),
        _array(rstd),
        beta=_array(bias),
        y=_array(y),
        training=training,
        activation="relu" if relu else None,
        output_mask=tuple(output_mask),  # type: ignore[arg-type]  # four of them
    )
    return [
        None if dx is None else _laid_out(dx, x),
        None if dweight is None else _tensor(dweight),
        None if dbias is None else _tensor(dbias),
        None if dresidual is None else _laid_out(dresidual, x),
    ]


@torch.library.custom_op("nbnorm::batch_norm_backward", mutates_args=())
def _backward(
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
    """`_gradients`, empty rather than None."""
    _refuse_forward_mode()
    grads = _gradients(dy, x, weight, bias, mean, rstd, y, training, relu, output_mask)
    dx, dweight, dbias, dresidual = (x.new_empty(0) if g is None else g for g in grads)
    return dx, dweight, dbias, dresidual


@_backward.register_fake
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, *output[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Keep what the gradient needs."""
    x, weight, bias, _, _, residual, training, _, _, relu = inputs
    by_y = relu and residual is not None  # the mask cannot be told from x then
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
            if _eager(*arguments[:7]) and not torch.is_grad_enabled() and not batched:
                grads = _gradients(*arguments)
            else:
                if _transformed():
                    found = _TransformedBackward.apply(*arguments[:-1], *mask)  # type: ignore[no-untyped-call]
                else:
                    found = _backward(*arguments)
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


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_second_derivative)


class _Eager(torch.autograd.Function):
    """What the operators do, without the dispatcher, which takes 60 us a layer and step.

    Of the old style: one with `setup_context` has its arguments bound by signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = _compute(*inputs)
        running, training = inputs[3:5], inputs[6]
        if training and running[0] is not None and not running[0].is_inference():
            torch.autograd.graph.increment_version(running)
        _keep(ctx, inputs, y, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *grads)

    jvp = staticmethod(_no_forward_mode)


class _Transform(torch.autograd.Function):
    """An operator as `torch.func` takes it, which passes a custom operator's derivative by."""

    jvp = staticmethod(_no_forward_mode)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """One call after the other."""
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
        return _record(*inputs)

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
        return _backward(*inputs[:9], inputs[9:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing: there is no further derivative."""

    backward = staticmethod(_no_second_derivative)


_PLAIN = (Tensor, nn.Parameter, type(None))


def _eager(*tensors: Tensor | None) -> bool:
    """Whether tensors hold values and nobody records what is done with them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(
            type(tensor) not in _PLAIN or (tensor is not None and tensor.is_meta)
            for tensor in tensors
        )
    )


def _transformed() -> bool:
    """Whether a program runs under `torch.func`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_NUMPYS = (torch.float32, torch.float64)


def _array(tensor: Tensor | None, *, resolve: bool = True) -> Array:
    """View a tensor as nbnorm takes it: as NumPy's where that can be, 1 us rather than DLPack's 5.

    bfloat16 goes by its bits, as neither library can tell the other of it.
    """
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype in _NUMPYS:
        try:
            return tensor.numpy()
        except (RuntimeError, TypeError):  # the negative bit, another device
            pass
    if resolve and tensor.is_neg():  # as of conj().imag: neither NumPy nor DLPack knows the bit
        tensor = tensor.resolve_neg()
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return tensor
    try:
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(_bfloat16("input"))
        return tensor.numpy()
    except RuntimeError:  # nbnorm says of which argument, and the way out
        return tensor


def _tensor(array: Array) -> Tensor:
    """The way back."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.itemsize == 2 and array.dtype.name == "bfloat16":  # a name takes 3 us
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def _laid_out(array: Array, x: Tensor) -> Tensor:
    """Return a result with the strides of `torch.empty_like(x)`, as the fakes promise."""
    result = _tensor(array)
    if result.stride() == x.stride():
        return result
    if x.numel() and any(x.is_contiguous(memory_format=known) for known in _FORMATS):
        # Equal but for axes of length 1, whose strides tell memory formats apart, too.
        return result.as_strided(x.shape, x.stride())
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)


class _BatchNormModule(_BatchNorm):
    """What the three modules add to PyTorch's."""

    relu: bool = False  # of the class, too: for modules that `convert` has made

    def __init__(self, *args: Any, relu: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu

    def forward(
        self,
        input: Tensor,  # noqa: A002
        residual: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> Tensor:
        """Normalise input, add residual, apply ReLU where the module or this call has it."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = 0.0 if self.momentum is None else self.momentum
        tracked = self.track_running_stats or not self.training
        mean, var = running = (self.running_mean, self.running_var) if tracked else (None, None)
        counted = (
            self.training and self.track_running_stats and self.num_batches_tracked is not None
        )
        # An empty batch is none of those that are averaged; otherwise count it as PyTorch does.
        if counted and (self.momentum is not None or input.numel() > 0):
            self.num_batches_tracked.add_(1)
            if self.momentum is None and torch.compiler.is_compiling():
                # A number cannot depend on a tensor there: take the batch's own statistics.
                momentum = 1.0
                mean, var = (torch.zeros_like(r, dtype=torch.float64) for r in running)
                others = (
                    None if t is None else t.detach()
                    for t in (input, self.weight, self.bias, residual)
                )
                before = _statistics_apart(*running, *others)
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
        )
        if mean is not running[0]:
            weight = 1.0 / self.num_batches_tracked.double()
            for average, old, batch in zip(running, before, (mean, var), strict=True):
                average.copy_((1.0 - weight) * old + weight * batch)
        return y

    def extra_repr(self) -> str:
        """Describe the module as PyTorch does, and ReLU where there is one."""
        described = str(super().extra_repr())  # type: ignore[no-untyped-call]
        return described + ", relu=True" * self.relu


class BatchNorm1d(_BatchNormModule, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on nbnorm's kernels, with ReLU and a residual if wanted.

    An instance of PyTorch's class, with its arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As of `torch.nn.BatchNorm1d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether ReLU comes last.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as `batch_norm`; for an input that is not 2-d or 3-d.

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


class BatchNorm2d(_BatchNormModule, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on nbnorm's kernels, with ReLU and a residual if wanted.

    An instance of PyTorch's class, with its arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As of `torch.nn.BatchNorm2d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether ReLU comes last.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as `batch_norm`; for an input that is not 4-d.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import BatchNorm2d
    >>> layer, x = BatchNorm2d(3, relu=True), torch.randn(2, 3, 4, 4)
    >>> y = layer(x, residual=x)  # the end of a residual block, in one operator
    >>> isinstance(layer, torch.nn.BatchNorm2d), y.min() >= 0
    (True, tensor(True))
    """


class BatchNorm3d(_BatchNormModule, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on nbnorm's kernels, with ReLU and a residual if wanted.

    An instance of PyTorch's class, with its arguments, parameters, buffers and ``state_dict``.

    Parameters
    ----------
    *args, **kwargs
        As of `torch.nn.BatchNorm3d`: num_features, eps, momentum, affine, track_running_stats, ...
    relu : bool, default False
        Whether ReLU comes last.

    Raises
    ------
    TypeError, ValueError
        In the forward pass, as `batch_norm`; for an input that is not 5-d.

    Examples
    --------
    >>> import torch
    >>> from nbnorm.integrations.torch import BatchNorm3d
    >>> BatchNorm3d(3)(torch.ones(2, 3, 4, 4, 4)).abs().max().item()
    0.0
    """


_OURS: dict[type[nn.Module], type[_BatchNormModule]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def convert(model: _Model, *, fuse_relu: bool = False) -> _Model:
    """Have all batch normalization modules of a model computed by nbnorm, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Modules in it that are exactly `torch.nn.BatchNorm1d`, ``2d`` or ``3d`` become those of this
        file: the same objects with the same parameters, buffers, mode and hooks, so that optimizers
        and other references to them still hold. Subclasses (SyncBatchNorm, lazy, quantised, your
        own) are left alone.
    fuse_relu : bool, default False
        Whether each `torch.nn.Sequential` in the model lets a batch normalization do the work of
        a `torch.nn.ReLU` that directly follows it. Both modules stay in place and what they are by
        themselves. Each call looks again: a module that has a hook, or something else put in its
        place, such as a SyncBatchNorm, runs by itself.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        model is no module.

    Notes
    -----
    Before `torch.compile`, not after. `state_dict` stays what it was: weights saved of a
    converted model load into the original, and the other way round.

    What reads a model's code comes before `convert`, and fails after it: `torch.fx.symbolic_trace`,
    `torch.jit.script`, ONNX's exporter by TorchScript, and what begins with one of them, such as
    quantisation. `torch.compile`, `torch.export` and `torch.jit.trace` take a converted model. So
    does a `torch.fx.Tracer` whose ``is_leaf_module`` is true of this file's modules, too.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from nbnorm.integrations.torch import convert
    >>> convert(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), fuse_relu=True)
    ... # doctest: +ELLIPSIS
    Sequential(
      fuse_relu=True
      (0): Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): BatchNorm2d(8, ...)
      (2): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    for module in model.modules():
        if type(module) in _OURS:
            # A change of class: whoever holds the module, holds the converted one.
            module.__class__ = _OURS[type(module)]
    if fuse_relu:
        _fuse_relu(model)
    return model


def _fuse_relu(model: nn.Module) -> None:
    for module in model.modules():
        kind: Any = type(module)
        # A Sequential with a forward of its own has an order of its own.
        if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
            children = list(module._modules.values())
            if any(_fusible(norm, relu) for norm, relu in pairwise(children)):
                module.__class__ = _fused(kind)


class _Fused:
    """What a Sequential becomes: it asks normalizations for ReLU and leaves out the next module.

    The modules stay what and where they are, and each call looks at them anew, so that it is right
    whatever has been put in their place since: SyncBatchNorm, a folded convolution, a wrapper.
    """

    def forward(self: Any, input: Any) -> Any:  # noqa: A002
        modules = list(self._modules.values())
        skip = False
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if skip:
                skip = False
            elif _fusible(module, following):
                input = module(input, relu=True)  # noqa: A001
                skip = True
            else:
                input = module(input)  # noqa: A001
        return input

    def extra_repr(self) -> str:
        return "fuse_relu=True"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the class that there was: this one has no name to be imported by."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _remade, (type(self).__bases__[1],), *reduced[2:]


@cache
def _fused(kind: Any) -> Any:
    """The class of a Sequential that fuses."""
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__})


def _remade(kind: Any) -> Any:
    cls: Any = _fused(kind)
    return cls.__new__(cls)


def _fusible(norm: nn.Module | None, relu: nn.Module | None) -> bool:
    """Whether the first can do the work of the second, and nobody looks at what is between."""
    return (
        type(relu) is nn.ReLU
        and type(norm) in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
        and not _hooked(norm)
        and not _hooked(relu)
    )


def _hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out."""
    return any(
        (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    )


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
        _refuse_shared(
            weight=norm.weight, bias=norm.bias,
            running_mean=norm.running_mean, running_var=norm.running_var,
        )  # fmt: skip
    with ExitStack() as block:
        seen = [block.enter_context(_collecting(norm)) for norm in norms]
        block.enter_context(torch.no_grad())
        # A compiled model would trace the hooks, or not know of them.
        block.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    if not any(seen):
        raise ValueError("none of the model's batch normalizations has seen a value")
    for norm, merged in zip(norms, seen, strict=True):
        if merged:
            moments = merged.total()
            norm.running_mean.copy_(_tensor(moments.mean))
            norm.running_var.copy_(_tensor(moments.var(correction=1)))


@contextmanager
def _collecting(norm: nn.Module) -> Iterator[Pairwise]:
    """Have a module take its batches' statistics and keep no average; collect their moments."""
    seen, collecting = Pairwise(), True

    def see(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], __: Tensor) -> None:
        if not collecting:
            return
        x = _array(inputs[0] if inputs else named["input"])
        moments = batch_norm_stats(x)
        if moments.count > 0:
            seen.add(moments)

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
        hooks.append(norm.register_forward_hook(see, with_kwargs=True))
        yield seen
    finally:
        collecting = False
        for hook in hooks:
            hook.remove()
