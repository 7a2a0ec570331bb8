"""`activation`: what batch normalization applies last, by name or as a user's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbnorm.cpu.activations import NAMES, TABLE, Activation, Pair


def activation(
    value: str | Callable[[Any], Any],
    derivative: Callable[[Any], Any] | None = None,
    **parameters: float,
) -> Activation:
    """Return an activation to pass as ``activation=``: one by name, or of your own functions.

    Parameters
    ----------
    value : str or function
        "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu" (exact), "gelu_tanh", "sigmoid"
        or "tanh"; or a function of one number v, the value before the activation, compiled by
        `numba.njit`.
    derivative : function, optional
        The derivative of your function, compiled too. Kernels call both with v in the dtype that
        they compute in, float32 or float64.
    **parameters : float
        Of an activation by name: `slope` of "leaky_relu", default 0.01.

    Returns
    -------
    Activation
        Two of the same name and parameters are equal, and so are two of the same functions.

    Raises
    ------
    TypeError
        A function is not compiled by `numba.njit`; a parameter is unknown or no number.
    ValueError
        The name is unknown; a parameter is not finite.

    Notes
    -----
    v is gamma (x - mean) rstd + beta [+ residual]. The backward pass computes it again from x, so
    nothing but x is stored. With functions of your own, kernels are compiled in each process: only
    those of the table are kept on disk. They run fastest if they consist of arithmetic and
    ``a if c else b`` on `numpy.float32` constants, which LLVM vectorises.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.activation("leaky_relu", slope=0.2)
    activation('leaky_relu', slope=0.2)
    """
    if isinstance(value, str):
        if derivative is not None:
            raise TypeError(f"derivative is only for functions of your own, got value={value!r}")
        if value not in NAMES:
            raise ValueError(f"activation must be one of {', '.join(NAMES)}, got {value!r}")
        known = {} if value == "relu" else TABLE[value].parameters
        for name, number in parameters.items():
            if name not in known:
                raise TypeError(f"activation {value!r} has no parameter {name!r}")
            if isinstance(number, bool) or not isinstance(number, (int, float, np.number)):
                raise TypeError(f"{name} must be a real number, got {number!r}")
            if not np.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number}")
        return Activation(value, tuple(float(parameters.get(n, known[n])) for n in known))
    for name, function in (("value", value), ("derivative", derivative)):
        if not hasattr(function, "py_func"):
            raise TypeError(f"{name} must be a function compiled by numba.njit, got {function!r}")
    if parameters:
        raise TypeError(f"functions of your own have no parameters, got {', '.join(parameters)}")
    return Activation(value.py_func.__name__, (), Pair(value, derivative))  # type: ignore[attr-defined, arg-type]
