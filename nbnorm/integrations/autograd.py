"""HIPS autograd: `batch_norm`, differentiable with respect to x, gamma, beta and residual.

The forward pass runs once, outside the trace. autograd records a primitive that only returns the
result, so statistics are computed and updated once however many traces there are. The gradient of
that primitive is one backward pass for all requested arguments. It is itself a primitive, and so is
its own gradient, the second derivative. A third raises an error.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from autograd.extend import defvjp_argnums, primitive
from autograd.tracer import getval, isbox

from nbnorm import _checks
from nbnorm._arrays import ones_like
from nbnorm._typing import Activation, Array, Axis, Mask, NDArray
from nbnorm.activations import Activation as Fused
from nbnorm.functional import batch_norm_apply, batch_norm_backward, batch_norm_forward
from nbnorm.integrations._curvature import curvature, has_curvature
from nbnorm.second_order import batch_norm_double_backward

__all__ = ["batch_norm"]


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: NDArray | None = None,
    running_var: NDArray | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
) -> Array:
    """Compute `nbnorm.batch_norm_forward` in functions that autograd differentiates.

    y = act(gamma (x - mean) rstd + beta [+ residual]), rstd = 1 / sqrt(var + eps), with the
    statistics of the batch in training, the running ones otherwise.

    Parameters
    ----------
    x : ndarray, at least 2-d, or a box of one
        float32, float64, float16 or bfloat16 (ml_dtypes). autograd passes boxes to the functions
        that it differentiates.
    gamma, beta : ndarray of the shape of the channel axes, or a box of one, optional
        Scale and shift, any floating dtype. None means 1 and 0.
    running_mean, running_var : ndarray of the shape of the channel axes, optional
        Population statistics; pass both or neither. In training, each evaluation of the function
        updates them **in place**; otherwise they normalise, as constants.
    training : bool, default True
        Normalise with the batch's statistics (True) or the running ones.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        1 updates running_var with the unbiased variance, 0 with the biased one.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    residual : ndarray of x's shape and dtype, or a box of one, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last, as in `nbnorm.batch_norm_forward`.

    Returns
    -------
    ndarray or box of one
        y, with the shape, dtype and memory order of x; a box if an argument is a box.

    Raises
    ------
    TypeError
        As in `nbnorm.batch_norm_forward`; also if running statistics are boxes, which happens if
        they are among the parameters that are differentiated.
    ValueError
        As in `nbnorm.batch_norm_forward`.
    RuntimeError
        A third derivative is requested.
    NotImplementedError
        Forward mode is requested (`autograd.make_jvp`), or a second derivative with a
        user-defined activation.

    Notes
    -----
    Implements Algorithm 1 and the gradients in section 3 of Ioffe & Szegedy (2015). One backward
    pass computes the requested gradients and no others. It keeps x, mean, rstd and the residual,
    and y if ReLU follows a residual. Each gradient has its argument's dtype. Second derivatives are
    those of `nbnorm.batch_norm_double_backward`, and of the activation.

    Tools that evaluate a function twice update its running statistics twice:
    `autograd.checkpoint`, `autograd.test_util.check_grads`.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from nbnorm.integrations.autograd import batch_norm
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.5]])
    >>> def loss(gamma):
    ...     return np.sum(dy * batch_norm(x, gamma, eps=0.0))
    >>> loss(np.array([2.0])), grad(loss)(np.array([2.0]))
    (np.float64(-1.0), array([-0.5]))
    """
    for name, running in ("running_mean", running_mean), ("running_var", running_var):
        if isbox(running):
            raise TypeError(
                f"{name} is an autograd box, and running statistics have no gradient; "
                "expected an ndarray that is not an argument of the differentiated function"
            )
    activation = _checks.activation(activation)
    y, mean, rstd = batch_norm_forward(
        getval(x),
        getval(gamma),
        getval(beta),
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        correction=correction,
        axis=axis,
        residual=getval(residual),
        activation=activation,
    )
    return _batch_norm(x, gamma, beta, residual, y, mean, rstd, training, axis, activation)


@primitive
def _batch_norm(
    x: Array, gamma: Array, beta: Array, residual: Array, y: NDArray, *call: object
) -> NDArray:
    """Return y, already computed; autograd attaches the gradient to this primitive."""
    return y


def _differentiate(
    argnums: tuple[int, ...], _: Array, arguments: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[Array], tuple[Array, ...]]:
    """Return a function that maps dy to the gradients of the arguments in `argnums`."""
    x, gamma, beta, residual, y, mean, rstd, training, axis, activation = arguments
    of_x, of_gamma, of_beta, of_residual = (i in argnums for i in range(4))
    added = residual is not None and activation is None  # the residual's gradient is dy
    mask = of_x, of_gamma, of_beta, of_residual and not added
    y = None if residual is None or activation != "relu" else y
    taken = residual if isinstance(activation, Fused) else None  # act'(v) needs it, not y
    dtype = x.dtype

    def gradients(dy: Array) -> tuple[Array, ...]:
        dy = dy.astype(dtype, copy=False)  # the loss may be computed in another dtype
        grads: tuple[Array, ...] = ()
        if any(mask):
            statistics = mean, rstd, y, training, axis, activation
            grads = _gradients(dy, x, gamma, beta, taken, *statistics, mask)
        if of_residual and added:
            grads = *grads, dy
        if of_residual and residual.dtype != dtype:
            grads = *grads[:-1], grads[-1].astype(residual.dtype)
        return grads

    return gradients


@primitive
def _gradients(
    dy: NDArray,
    x: NDArray,
    gamma: NDArray | None,
    beta: NDArray | None,
    residual: NDArray | None,
    mean: NDArray,
    rstd: NDArray,
    y: NDArray | None,
    training: bool,
    axis: Axis,
    activation: Activation,
    mask: Mask,
) -> tuple[NDArray, ...]:
    """Return those of dx, dgamma, dbeta and dresidual that are in `mask`."""
    dx, dgamma, dbeta, dresidual = batch_norm_backward(
        dy,
        x,
        _scale(gamma, beta),
        mean,
        rstd,
        beta=beta,
        y=y,
        residual=residual,
        training=training,
        axis=axis,
        activation=activation,
        output_mask=mask,
    )
    if beta is not None and dbeta is not None:
        dbeta = dbeta.astype(beta.dtype, copy=False)  # it has gamma's dtype
    return tuple(grad for grad in (dx, dgamma, dbeta, dresidual) if grad is not None)


def _scale(gamma: NDArray | None, beta: NDArray | None) -> NDArray | None:
    """Return gamma, or ones of beta's dtype, so that a lone beta's gradient has it."""
    return ones_like(beta) if gamma is None and beta is not None else gamma


def _differentiate_gradients(
    argnums: tuple[int, ...], _: Any, arguments: tuple[Any, ...], __: dict[str, Any]
) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
    """Return a function that maps gradients of `_gradients` to those of its arguments."""
    *given, activation, mask = arguments
    if isinstance(activation, Fused) and not has_curvature(activation):
        raise NotImplementedError(
            f"nbnorm's batch_norm has no second derivative with {activation!r}; apply a function "
            "of autograd.numpy's to its result instead"
        )

    def gradients(grads: tuple[Array, ...]) -> tuple[Array, ...]:
        of_results = iter(grads)
        directions = [next(of_results) if wanted else None for wanted in mask]
        found = _second(*directions, *given, activation)
        return tuple(found[i] for i in argnums)

    return gradients


@primitive
def _second(
    ddx: NDArray | None,
    ddgamma: NDArray | None,
    ddbeta: NDArray | None,
    ddresidual: NDArray | None,
    dy: NDArray,
    x: NDArray,
    gamma: NDArray | None,
    beta: NDArray | None,
    residual: NDArray | None,
    mean: NDArray,
    rstd: NDArray,
    y: NDArray | None,
    training: bool,
    axis: Axis,
    activation: Activation,
) -> tuple[Any, ...]:
    """Return the gradients of `_gradients`: of dy, x, gamma, beta and residual.

    `_gradients` is the backward pass without activation, of g = dy act'(v) with
    v = gamma (x - mean) rstd + beta [+ residual]. The gradient of dy is that of g times act'(v).
    The gradient of v is that of g times dy act''(v), and passes on to x, gamma, beta and residual;
    it is 0 for ReLU.
    """

    def through(g: NDArray) -> Any:
        """g act'(v)."""
        if activation is None:
            return g
        if activation == "relu":
            return np.where(passed, g, np.zeros_like(g))
        return batch_norm_backward(
            g,
            x,
            gamma,
            mean,
            rstd,
            beta=beta,
            residual=np.zeros_like(x) if residual is None else residual,  # dresidual is wanted
            training=training,
            axis=axis,
            activation=activation,
            output_mask=(False, False, False, True),
        ).dresidual

    if activation == "relu":
        if y is None:
            y = batch_norm_apply(x, gamma, beta, mean, rstd, axis=axis, activation=activation)
        passed = y > 0
    ddy, dx, dgamma = batch_norm_double_backward(
        None if ddx is None else ddx.astype(x.dtype, copy=False),
        ddgamma,
        ddbeta,
        through(dy),
        x,
        gamma,
        mean,
        rstd,
        training=training,
        axis=axis,
    )
    if ddresidual is not None:
        ddy = ddy + ddresidual
    if not isinstance(activation, Fused):
        dbeta = dgamma if beta is None else np.zeros_like(beta)
        return through(ddy), dx, dgamma, dbeta
    v = batch_norm_apply(x, gamma, beta, mean, rstd, axis=axis, residual=residual)
    dv = curvature(activation, v) * dy * ddy  # in float64: products of halves leave their range
    of_v = batch_norm_backward(
        dv.astype(x.dtype), x, _scale(gamma, beta), mean, rstd, training=training, axis=axis
    )
    if gamma is not None:
        dgamma = dgamma + of_v.dgamma
    dbeta = None if beta is None else of_v.dbeta.astype(beta.dtype, copy=False)
    dresidual = None if residual is None else dv.astype(residual.dtype)
    return through(ddy), dx + of_v.dx, dgamma, dbeta, dresidual


def _no_third_derivative(*_: object) -> Callable[[Array], NoReturn]:
    def refuse(_: Array) -> NoReturn:
        raise RuntimeError(
            "nbnorm's batch_norm has derivatives up to the second; for a third, write batch "
            "normalization with autograd.numpy"
        )

    return refuse


defvjp_argnums(_batch_norm, _differentiate)
defvjp_argnums(_gradients, _differentiate_gradients)
defvjp_argnums(_second, _no_third_derivative)
