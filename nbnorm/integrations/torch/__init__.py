"""PyTorch: `batch_norm` with autograd, modules; `convert`, `fold`, `recalibrate` for models.

When PyTorch records a program (torch.compile, torch.export, fake tensors), `batch_norm` becomes the
operator ``nbnorm::batch_norm`` in the graph, and its gradient ``nbnorm::batch_norm_backward``.
PyTorch supports gradients only of operators that do not write to their arguments, so the operator
returns new running statistics, and `batch_norm` copies them to the old ones. In eager mode the
same functions are called without the dispatcher.
"""

from pathlib import Path

import torch

from nbnorm import _shortcut
from nbnorm.integrations.torch._convert import _remade, convert
from nbnorm.integrations.torch._fold import fold
from nbnorm.integrations.torch._functional import batch_norm
from nbnorm.integrations.torch._modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from nbnorm.integrations.torch._recalibrate import recalibrate

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert", "fold", "recalibrate",
]  # fmt: skip

for _library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
    _shortcut.adopt(str(_library), torch.get_num_threads)

# Printing and pickling use this module's name, not those of the private modules.
_PUBLIC = (BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm, convert, fold, recalibrate, _remade)
for _public in _PUBLIC:
    _public.__module__ = __name__
