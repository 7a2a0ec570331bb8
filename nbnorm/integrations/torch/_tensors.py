"""Conversion between tensors and arrays, and tests for tensors without values."""

import torch
from torch import Tensor, nn

from nbnorm._arrays import _bfloat16
from nbnorm._typing import Array

_PLAIN = (Tensor, nn.Parameter, type(None))


def eager(*tensors: Tensor | None) -> bool:
    """Return True if all tensors hold values and no tracer or transform records the call."""
    return direct(*tensors) and not torch._C._are_functorch_transforms_active()


def direct(*tensors: Tensor | None) -> bool:
    """Return True if all tensors hold values and no tracer records the call."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or any(
            type(tensor) not in _PLAIN or (tensor is not None and tensor.is_meta)
            for tensor in tensors
        )
    )


def transformed() -> bool:
    """Return True inside a `torch.func` transform."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[no-any-return]


_NUMPYS = (torch.float32, torch.float64)


def array_of(tensor: Tensor | None, *, resolve: bool = True) -> Array:
    """View a tensor as an array that nbnorm accepts.

    Uses `Tensor.numpy` where possible, which takes 1 us; DLPack takes 5. bfloat16 is viewed as
    int16 in between, as PyTorch cannot export it to NumPy.
    """
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype in _NUMPYS:
        try:
            return tensor.numpy()
        except (RuntimeError, TypeError):  # has the negative bit, or is on another device
            pass
    if resolve and tensor.is_neg():  # conj().imag, for one: NumPy and DLPack lack this bit
        tensor = tensor.resolve_neg()
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return tensor
    try:
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(_bfloat16("input"))
        return tensor.numpy()
    except RuntimeError:  # nbnorm raises a better error, with the argument's name and a remedy
        return tensor


def tensor_of(array: Array) -> Tensor:
    """View an array as a tensor, the inverse of `array_of`."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.itemsize == 2 and array.dtype.name == "bfloat16":  # dtype.name takes 3 us
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def laid_out(array: Array, x: Tensor) -> Tensor:
    """Return a result with the strides of `torch.empty_like(x)`, as the fake kernels do."""
    result = tensor_of(array)
    if result.stride() == x.stride():
        return result
    if x.numel() and any(x.is_contiguous(memory_format=known) for known in _FORMATS):
        # Only axes of length 1 differ, but their strides distinguish memory formats, too.
        return result.as_strided(x.shape, x.stride())
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)
