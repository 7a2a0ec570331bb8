"""PyTorch: `batch_norm` with autograd, modules, `convert` and `recalibrate` for models that exist.

Where a program is recorded (torch.compile, torch.export, fake tensors), `batch_norm` is the
operator ``nbnorm::batch_norm`` and its gradient ``nbnorm::batch_norm_backward``, which stay as they
are in the graph. They write to none of their arguments, as PyTorch gives a gradient only to such
operators: new running statistics are a result, which `batch_norm` copies into the old. Where a
program just runs, the same functions are called without the dispatcher.
"""

from pathlib import Path

import torch

from nbnorm import _shortcut
from nbnorm.integrations.torch._convert import _remade, convert
from nbnorm.integrations.torch._functional import batch_norm
from nbnorm.integrations.torch._modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from nbnorm.integrations.torch._recalibrate import recalibrate

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert", "recalibrate"]

for _library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
    _shortcut.adopt(str(_library), torch.get_num_threads)

# What prints or pickles these names knows them by this module.
for _public in (BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm, convert, recalibrate, _remade):
    _public.__module__ = __name__
