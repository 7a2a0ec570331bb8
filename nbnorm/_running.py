"""Running statistics moved by NumPy or CuPy, where no kernel is compiled for them."""

from collections.abc import Sequence

import numpy as np

from nbnorm._typing import NDArray


def move(running: Sequence[NDArray], batch: Sequence[NDArray], momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * batch, rounded once to running's dtype.

    The batch's statistics may be of shape (C,).
    """
    with np.errstate(all="ignore"):
        for old, new in zip(running, batch, strict=True):
            moved = momentum * new.reshape(old.shape)
            old[...] = (1.0 - momentum) * old.astype(np.float64) + moved
