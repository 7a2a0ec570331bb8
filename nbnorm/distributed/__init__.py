"""Batch normalization over the ranks of a communicator: one batch, each rank with its part of it.

Both passes are `batch_norm_forward` and `batch_norm_backward` cut in two, with a reduction in
between. Two messages a pass. First a header of fixed size, which every rank sends whatever its own
arguments are like: it says whether this rank's checks passed and what all ranks must have in
common, so that all go on or all raise. Then the statistics, which every rank merges for itself in
the order of the ranks: the same numbers by the same operations, and so the same bits.

A communicator is mpi4py's, `TorchProcessGroup`, or anything else with their ``Allgather``. Neither
mpi4py nor torch is imported here before it is asked for.
"""

from nbnorm.distributed._functional import (
    SyncBatchNormBackward,
    SyncBatchNormForward,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from nbnorm.distributed._layer import SyncBatchNorm
from nbnorm.distributed._ranks import Communicator, SelfComm, TorchProcessGroup

__all__ = [
    "Communicator",
    "SelfComm",
    "SyncBatchNorm",
    "SyncBatchNormBackward",
    "SyncBatchNormForward",
    "TorchProcessGroup",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
]
