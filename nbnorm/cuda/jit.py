"""How device code is compiled: the only file that sets forceinline, launch bounds or fastmath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda

from nbnorm.cuda.plan import THREADS


def device(function: Callable[..., Any]) -> Any:
    """Compile a device function, inlined by its callers so that its arrays stay in registers."""
    return cuda.jit(device=True, forceinline=True)(function)


def kernel(resident: int = 4) -> Any:
    """Compile a kernel of which `resident` blocks of `THREADS` threads fit into a multiprocessor.

    Of its 65,536 registers a thread gets 64 with four blocks, 80 with three, 128 with two.
    """
    return cuda.jit(launch_bounds=(THREADS, resident))
