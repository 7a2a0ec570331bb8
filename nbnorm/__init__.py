"""Batch normalization (Ioffe & Szegedy 2015) as kernels for arrays."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from nbnorm._version import __version__ as __version__
from nbnorm._warmup import warmup
from nbnorm.activations import activation
from nbnorm.config import show_config
from nbnorm.cpu.overloads import register as _register
from nbnorm.folding import fold_batch_norm, fold_into_conv, fold_into_linear
from nbnorm.functional import (
    BatchNormBackward,
    BatchNormForward,
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_stats,
)
from nbnorm.layer import BatchNorm
from nbnorm.microbatch import (
    MicroBatchNormBackward,
    MicroBatchNormForward,
    micro_batch_norm_backward,
    micro_batch_norm_forward,
)
from nbnorm.moments import Moments, update_running_stats
from nbnorm.pool import set_pool_limit
from nbnorm.population import population_stats, recalibrate
from nbnorm.renorm import (
    BatchRenormForward,
    Ramp,
    Renorm,
    batch_renorm_backward,
    batch_renorm_forward,
)
from nbnorm.second_order import (
    BatchNormDoubleBackward,
    batch_norm_backward_statistics,
    batch_norm_double_backward,
    batch_norm_jvp,
)

if _TYPE_CHECKING:
    from nbnorm import conventions as conventions
    from nbnorm import distributed as distributed
    from nbnorm import integrations as integrations
    from nbnorm import reference as reference

_register()  # compiled functions may call those above

__all__ = [
    "BatchNorm",
    "BatchNormBackward",
    "BatchNormDoubleBackward",
    "BatchNormForward",
    "BatchRenormForward",
    "MicroBatchNormBackward",
    "MicroBatchNormForward",
    "Moments",
    "Ramp",
    "Renorm",
    "activation",
    "batch_norm_apply",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_backward_statistics",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_jvp",
    "batch_norm_stats",
    "batch_renorm_backward",
    "batch_renorm_forward",
    "fold_batch_norm",
    "fold_into_conv",
    "fold_into_linear",
    "micro_batch_norm_backward",
    "micro_batch_norm_forward",
    "population_stats",
    "recalibrate",
    "set_pool_limit",
    "show_config",
    "update_running_stats",
    "warmup",
]

_SUBMODULES = ("conventions", "distributed", "integrations", "reference")  # imported on first use


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _import_module(f"nbnorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
