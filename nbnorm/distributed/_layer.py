"""The layer over the functions."""

from __future__ import annotations

import math
from typing import Any

from nbnorm._typing import Array
from nbnorm.distributed._functional import sync_batch_norm_backward, sync_batch_norm_forward
from nbnorm.distributed._ranks import Communicator, Ranks
from nbnorm.layer import BatchNorm, Saved


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose batches are those of all ranks of a communicator together.

    In training every rank has to call `forward` and `backward`, in the same order; its batch may be
    of any size, or empty. Evaluation communicates nothing, and without running statistics uses
    those of the rank's own batch, as PyTorch's SyncBatchNorm does.

    Parameters
    ----------
    num_features : int or tuple of int
        Number of channels; see `BatchNorm`.
    comm : Communicator
        An mpi4py communicator, `TorchProcessGroup`, or anything else with ``Allgather``.
    **options
        All others of `BatchNorm`: eps, momentum, affine, track_running_stats, correction, axis,
        activation, dtype.

    Attributes
    ----------
    comm : Communicator
        As given.
    grads : dict of str to array
        This rank's own sums. Add them up over the ranks, or average, as all gradients.

    Raises
    ------
    TypeError, ValueError
        As `BatchNorm`; a comm that is no communicator.

    Notes
    -----
    The other attributes are `BatchNorm`'s. Running statistics, ``num_batches_tracked`` included,
    stay the same on every rank; parameters do as long as each rank updates them alike.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.distributed import SelfComm, SyncBatchNorm
    >>> layer = SyncBatchNorm(2, comm=SelfComm())
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> np.round(layer.forward(x), 3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.backward(np.ones_like(x))
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> layer.running_mean
    array([0.2, 2. ], dtype=float32)
    """

    def __init__(
        self, num_features: int | tuple[int, ...], *, comm: Communicator, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        Ranks(comm)
        self.comm = comm
        self._count: int | None = None  # of the last forward, where that was synchronised

    def _normalise(
        self, x: Array, training: bool, **options: Any
    ) -> tuple[Array, Array, Array, int]:
        if not self.training and self._seen is None:
            alone = super()._normalise(x, training, **options)
            self._count = None
            return alone
        y, mean, rstd, self._count = sync_batch_norm_forward(x, comm=self.comm, **options)
        # A batch that is empty on this rank alone is one nevertheless.
        return y, mean, rstd, self._count * math.prod(mean.shape)

    def _differentiate(self, dy: Array, saved: Saved, **options: Any) -> tuple[Array | None, ...]:
        if self._count is None:
            return super()._differentiate(dy, saved, **options)
        return sync_batch_norm_backward(
            dy, saved.x, mean=saved.mean, rstd=saved.rstd, count=self._count, comm=self.comm,
            **options,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"
