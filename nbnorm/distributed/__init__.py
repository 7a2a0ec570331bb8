"""Batch normalization synchronised over the ranks of a communicator, each with part of the batch.

Each pass is `batch_norm_forward` or `batch_norm_backward` split in two, with a reduction and two
messages in between. First every rank sends a header of fixed size, even if its arguments are
invalid. It says whether the rank's checks passed and what all ranks must have in common, so either
all ranks go on or all raise. Then the ranks exchange statistics, and each merges them in the order
of the ranks: the same operations on the same numbers give the same bits.

A communicator is mpi4py's, a `TorchProcessGroup`, a `ThreadComm` for ranks that are threads, or any
object with their ``Allgather``. mpi4py and torch are imported only when they are used.
"""

from nbnorm.distributed._functional import (
    SyncBatchNormBackward,
    SyncBatchNormForward,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from nbnorm.distributed._layer import SyncBatchNorm
from nbnorm.distributed._ranks import Communicator, SelfComm, TorchProcessGroup
from nbnorm.distributed._threads import ThreadComm

__all__ = [
    "Communicator",
    "SelfComm",
    "SyncBatchNorm",
    "SyncBatchNormBackward",
    "SyncBatchNormForward",
    "ThreadComm",
    "TorchProcessGroup",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
]

# Printing and pickling use this module's name, not those of the private modules.
for _name in __all__:
    globals()[_name].__module__ = __name__
