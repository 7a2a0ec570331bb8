"""Running statistics updated by NumPy or CuPy where there is no kernel for them."""

from collections.abc import Sequence

import numpy as np

from nbnorm._typing import NDArray


def move(
    running: Sequence[NDArray],
    batch: Sequence[NDArray],
    momentum: float,
    where: NDArray | None = None,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, rounded once to running's dtype.

    The batch's statistics may be of shape (C,). Channels that are False in `where` do not change.
    """
    with np.errstate(all="ignore"):
        for old, new in zip(running, batch, strict=True):
            moved = momentum * new.reshape(old.shape)
            moved = (1.0 - momentum) * old.astype(np.float64) + moved
            old[...] = moved if where is None else np.where(where.reshape(old.shape), moved, old)
