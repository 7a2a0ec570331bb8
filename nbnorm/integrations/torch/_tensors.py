"""Tensors as arrays and back, and whether they hold values at all."""

import torch
from torch import Tensor, nn

from nbnorm._arrays import _bfloat16
from nbnorm._typing import Array

_PLAIN = (Tensor, nn.Parameter, type(None))


def eager(*tensors: Tensor | None) -> bool:
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


def transformed() -> bool:
    """Whether a program runs under `torch.func`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_NUMPYS = (torch.float32, torch.float64)


def array_of(tensor: Tensor | None, *, resolve: bool = True) -> Array:
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


def tensor_of(array: Array) -> Tensor:
    """The way back."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.itemsize == 2 and array.dtype.name == "bfloat16":  # a name takes 3 us
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def laid_out(array: Array, x: Tensor) -> Tensor:
    """Return a result with the strides of `torch.empty_like(x)`, as the fakes promise."""
    result = tensor_of(array)
    if result.stride() == x.stride():
        return result
    if x.numel() and any(x.is_contiguous(memory_format=known) for known in _FORMATS):
        # Equal but for axes of length 1, whose strides tell memory formats apart, too.
        return result.as_strided(x.shape, x.stride())
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)
