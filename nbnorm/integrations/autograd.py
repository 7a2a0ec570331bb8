"""HIPS autograd: `batch_norm`, differentiable with respect to x, gamma, beta and residual.

The forward pass runs outside of the trace, once: what autograd records is a primitive that takes
its result as it is, so that statistics are neither computed nor moved a second time however many
traces there are. That primitive's gradient is one backward pass for all arguments asked for, and a
primitive itself, so that a derivative of it is refused rather than wrong.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from autograd.extend import defvjp_argnums, primitive
from autograd.tracer import getval, isbox

from nbnorm._typing import Activation, Array, Axis, Mask, NDArray
from nbnorm.functional import batch_norm_backward, batch_norm_forward

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
    """`nbnorm.batch_norm_forward` for functions that autograd differentiates.

    y = act(gamma (x - mean) rstd + beta [+ residual]), rstd = 1 / sqrt(var + eps), with the
    statistics of the batch in training, the running ones otherwise.

    Parameters
    ----------
    x : ndarray, at least 2-d, or a box of one
        float32, float64, float16 or bfloat16 (of ml_dtypes). A box is what autograd passes to a
        function that it differentiates.
    gamma, beta : ndarray of the shape of the channel axes, or a box of one, optional
        Scale and shift, of any floating dtype. None: 1 and 0.
    running_mean, running_var : ndarray of the shape of the channel axes, optional
        Population statistics, both or neither. In training they are updated **in place**, whenever
        the function is evaluated; otherwise they normalise, as constants.
    training : bool, default True
        Whether the statistics of this batch normalise it.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        1: running_var takes the unbiased variance; 0: the biased one.
    axis : int or tuple of int, default 1
        Channel axes: those that **keep** their statistics, not those that are reduced.
    residual : ndarray of x's shape and dtype, or a box of one, optional
        Added before the activation.
    activation : {None, "relu"}
        Applied last.

    Returns
    -------
    ndarray or box of one
        y: shape, dtype and order in memory of x; a box where an argument is one.

    Raises
    ------
    TypeError
        As `nbnorm.batch_norm_forward`; running statistics that are boxes, such as come of keeping
        them among the parameters that are differentiated.
    ValueError
        As `nbnorm.batch_norm_forward`.
    RuntimeError
        In a second derivative, of which there is none.
    NotImplementedError
        In forward mode (`autograd.make_jvp`), of which there is none either.

    Notes
    -----
    Ioffe & Szegedy (2015), Algorithm 1 and the gradients of section 3. One backward pass gives all
    the gradients that are asked for and computes no others. It takes mean and rstd from the forward
    pass and keeps x, and y where ReLU follows a residual. Each gradient has its argument's dtype.

    What evaluates a function twice also moves its running statistics twice: `autograd.checkpoint`,
    `autograd.test_util.check_grads`.

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
                f"{name} is a box of autograd's, and running statistics have no gradient; "
                "expected an ndarray that is not among the arguments of what is differentiated"
            )
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
    """Return y, which has been computed: the place in the trace that a gradient belongs to."""
    return y


def _differentiate(
    argnums: tuple[int, ...], y: Array, arguments: tuple[Any, ...], _: dict[str, Any]
) -> Callable[[Array], tuple[Array, ...]]:
    """Return the function from dy to the gradients of `argnums`, of x, gamma, beta, residual."""
    x, gamma, beta, residual, _, mean, rstd, training, axis, activation = arguments
    of_x, of_gamma, of_beta, of_residual = (i in argnums for i in range(4))
    added = residual is not None and activation is None  # its gradient is dy
    mask = of_x, of_gamma, of_beta, of_residual and not added
    y = None if residual is None or added else y
    dtype = x.dtype

    def gradients(dy: Array) -> tuple[Array, ...]:
        dy = dy.astype(dtype, copy=False)  # a loss may be computed in another
        grads: tuple[Array, ...] = ()
        if any(mask):
            grads = _gradients(dy, x, gamma, beta, mean, rstd, y, training, axis, activation, mask)
        return (*grads, dy) if of_residual and added else grads

    return gradients


@primitive
def _gradients(
    dy: NDArray,
    x: NDArray,
    gamma: NDArray | None,
    beta: NDArray | None,
    mean: NDArray,
    rstd: NDArray,
    y: NDArray | None,
    training: bool,
    axis: Axis,
    activation: Activation,
    mask: Mask,
) -> tuple[NDArray, ...]:
    """Return those of dx, dgamma, dbeta and dresidual that mask asks for."""
    dx, dgamma, dbeta, dresidual = batch_norm_backward(
        dy,
        x,
        gamma,
        mean,
        rstd,
        beta=beta,
        y=y,
        training=training,
        axis=axis,
        activation=activation,
        output_mask=mask,
    )
    if beta is not None and dbeta is not None:
        dbeta = dbeta.astype(beta.dtype, copy=False)  # from gamma's
    return tuple(grad for grad in (dx, dgamma, dbeta, dresidual) if grad is not None)


def _no_second_derivative(*_: object) -> Callable[[Array], NoReturn]:
    def refuse(_: Array) -> NoReturn:
        raise RuntimeError(
            "nbnorm's batch_norm has no second derivative; for one (Hessians, gradient penalties) "
            "compose batch normalization of autograd.numpy's functions"
        )

    return refuse


defvjp_argnums(_batch_norm, _differentiate)
defvjp_argnums(_gradients, _no_second_derivative)
