"""`SyncBatchNorm`: a layer whose batches are spread over ranks."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from typing import Any, Self

from nbnorm._typing import Array
from nbnorm.distributed._functional import (
    backward_of_all,
    forward_of_all,
    sync_batch_norm_forward,
)
from nbnorm.distributed._ranks import Communicator, Ranks
from nbnorm.layer import BatchNorm, Saved


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` over batches spread over the ranks of a communicator.

    In training every rank must call `forward` and `backward`, in the same order; its batch may
    have any size, or be empty. In evaluation the ranks do not communicate. Without running
    statistics, evaluation uses those of the rank's own batch, as does PyTorch's SyncBatchNorm.

    Parameters
    ----------
    num_features : int or tuple of int
        Number of channels; see `BatchNorm`.
    comm : Communicator
        mpi4py's, a `TorchProcessGroup`, a `ThreadComm` or another `Communicator`.
    **options
        The other arguments of `BatchNorm`. They must be the same on all ranks. With `renorm`, r and
        d correct the statistics of all ranks' values. In training, `forward` refuses segments and
        masks, lengths or weights.

    Attributes
    ----------
    comm : Communicator
        The communicator passed in.
    grads : dict of str to array
        This rank's sums. Add or average them over the ranks, as you do all other gradients.

    Raises
    ------
    TypeError, ValueError
        As in `BatchNorm`; comm is not a communicator. What `forward` refuses on one rank raises on
        every rank.

    Notes
    -----
    The other attributes are those of `BatchNorm`. Running statistics and ``num_batches_tracked``
    stay equal on all ranks. Parameters stay equal if every rank makes the same updates. A deep copy
    shares the communicator, so all ranks must call it together, too.

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
        self._count: int | None = None  # count of the last forward; None if not synchronised

    def _synchronised(self) -> bool:
        """Return whether `forward` communicates."""
        return self.training or self._seen is not None

    def _prepared(self, x: Array, residual: Array | None, **given: Any) -> tuple[Any, ...]:
        try:
            prepared = super()._prepared(x, residual, **given)
            if (parts := prepared[-1]) and self._synchronised():
                names = " and ".join(parts)
                raise ValueError(f"{names} cannot be combined with a synchronised batch")
        except Exception as error:
            if self._synchronised():
                Ranks(self.comm).refuse(error)  # the others wait for this rank
            raise
        return prepared

    def _normalise(self, x: Array, training: bool, **options: Any) -> tuple[Any, ...]:
        if not self._synchronised():
            alone = super()._normalise(x, training, **options)
            self._count = None
            return alone
        y, mean, rstd, self._count = sync_batch_norm_forward(x, comm=self.comm, **options)
        # Count the values of all ranks: a batch that is empty on this rank still counts as one.
        return y, mean, rstd, self._count * math.prod(mean.shape)

    def _renormalise(self, x: Array, training: bool, **options: Any) -> tuple[Any, ...]:
        assert self.renorm is not None
        bounds = partial(self.renorm.bounds, self.num_batches_tracked)
        forward, *r_and_d = forward_of_all(self.comm, x, **options, bounds=bounds)
        y, mean, rstd, self._count = forward
        return y, mean, rstd, *r_and_d, self._count * math.prod(mean.shape)

    def _differentiate(self, dy: Array, saved: Saved, **options: Any) -> tuple[Array | None, ...]:
        if self._count is None:
            return super()._differentiate(dy, saved, **options)
        return backward_of_all(
            self.comm, dy, saved.x, mean=saved.mean, rstd=saved.rstd, count=self._count,
            r_and_d=saved.renorm, out=None, **options,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy of everything but the communicator, which is a handle: both share it."""
        memo.setdefault(id(self.comm), self.comm)
        copied = type(self).__new__(type(self))
        vars(copied).update(deepcopy(self.__getstate__(), memo))
        return copied

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"
