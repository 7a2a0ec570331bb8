"""mygrad: `batch_norm` of tensors, with one backward pass for all gradients."""

from typing import Any

import numpy as np
from mygrad import Tensor, execute_op
from mygrad.operation_base import Operation

from nbnorm import _checks
from nbnorm._arrays import ones_like
from nbnorm._typing import Activation, Axis, NDArray
from nbnorm.activations import Activation as Fused
from nbnorm.functional import batch_norm_backward, batch_norm_forward

__all__ = ["batch_norm"]

ArrayLike = Any  # tensors, arrays, and sequences of numbers, which mygrad converts to tensors


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    running_mean: NDArray | None = None,
    running_var: NDArray | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    constant: bool | None = None,
) -> Tensor:
    """Compute `nbnorm.batch_norm_forward` for mygrad tensors, with back-propagation.

    y = act(gamma (x - mean) rstd + beta [+ residual]), rstd = 1 / sqrt(var + eps), with the
    statistics of the batch in training, the running ones otherwise. `mygrad.nnet.batchnorm`
    computes the same without running statistics, residual and activation.

    Parameters
    ----------
    x : array_like, at least 2-d
        float32, float64 or float16.
    gamma, beta : array_like of the shape of the channel axes, optional
        Scale and shift, any floating dtype. None means 1 and 0.
    running_mean, running_var : ndarray of the shape of the channel axes, optional
        Population statistics; pass both or neither. They have no gradient, so they must be arrays,
        not tensors. In training they are updated **in place**; otherwise they normalise, as
        constants.
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
    residual : array_like of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16.
    activation : None, str or Activation, default None
        Applied last, as in `nbnorm.batch_norm_forward`.
    constant : bool, optional
        Whether the result is a constant, which stops back-propagation. None makes it a constant if
        all of x, gamma, beta and residual are constants.

    Returns
    -------
    mygrad.Tensor
        y, with the shape, dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        As in `nbnorm.batch_norm_forward`; also if running statistics are tensors, or constant is
        not a bool or None.

    Notes
    -----
    Implements Algorithm 1 and the gradients in section 3 of Ioffe & Szegedy (2015). One backward
    pass computes the gradients of all tensors that are not constant, and no others. It reuses mean
    and rstd from the forward pass and keeps y if ReLU follows a residual.

    Gradients cannot be differentiated: mygrad's are NumPy arrays, which have no graph. For second
    derivatives pass arrays to `nbnorm.batch_norm_double_backward`.

    Examples
    --------
    >>> import mygrad as mg
    >>> from nbnorm.integrations.mygrad import batch_norm
    >>> x = mg.tensor([[1.0], [3.0]])
    >>> gamma = mg.tensor([2.0])
    >>> y = batch_norm(x, gamma, eps=0.0)
    >>> y
    Tensor([[-2.],
            [ 2.]])
    >>> y.backward([[1.0], [0.5]])
    >>> gamma.grad
    array([-0.5])
    """
    if not isinstance(constant, bool | None):
        raise TypeError(f"constant must be a bool or None, got {constant!r}")
    activation = _checks.activation(activation)
    optional = {"gamma": gamma, "beta": beta, "residual": residual}
    given = {"x": x} | {name: array for name, array in optional.items() if array is not None}
    return execute_op(
        _BatchNorm,
        *given.values(),
        op_kwargs={
            "names": tuple(given),
            "running_mean": running_mean,
            "running_var": running_var,
            "training": training,
            "momentum": momentum,
            "eps": eps,
            "correction": correction,
            "axis": axis,
            "activation": activation,
        },
        constant=constant,
    )


class _BatchNorm(Operation):
    """One call of `batch_norm`: the forward pass, and the state for its gradient."""

    def __call__(
        self,
        *tensors: Tensor,
        names: tuple[str, ...],
        training: bool,
        axis: Axis,
        activation: Activation,
        **others: Any,
    ) -> NDArray:
        """Return y."""
        self.variables, self._names = tensors, names
        self._options: dict[str, Any] = {
            "training": training,
            "axis": axis,
            "activation": activation,
        }
        arrays = self._by_name("data")
        # y and dx need memory outside nbnorm's pool: mygrad locks an array's base, which fails for
        # the pool's blocks, and copies a gradient that has a base.
        y, self._mean, self._rstd = batch_norm_forward(
            **arrays, **self._options, **others, out=np.empty_like(arrays["x"])
        )
        self._y = y if "residual" in names and activation == "relu" else None
        return y

    def backward(self, grad: NDArray, **kwargs: Any) -> None:
        """Back-propagate to all variables in one backward pass."""
        arrays, constant = self._by_name("data"), self._by_name("constant")
        x = arrays["x"]
        of_x, of_gamma, of_beta, of_residual = (
            not constant.get(name, True) for name in ("x", "gamma", "beta", "residual")
        )
        gamma, beta = arrays.get("gamma"), arrays.get("beta")
        activation = self._options["activation"]
        dx, dgamma, dbeta, dresidual = batch_norm_backward(
            grad,
            x,
            ones_like(beta) if gamma is None and beta is not None else gamma,
            self._mean,
            self._rstd,
            beta=beta,
            y=self._y,
            residual=arrays.get("residual") if isinstance(activation, Fused) else None,
            **self._options,
            output_mask=(of_x, of_gamma, of_beta, of_residual),
            out=np.empty_like(x) if of_x else None,
        )
        if activation is None:
            dresidual = grad  # there is no activation after the sum
        if not constant.get("residual", True):
            dresidual = dresidual.astype(arrays["residual"].dtype, copy=False)
        self._grads: dict[str, Any] = {
            "x": dx,
            "gamma": dgamma,
            "beta": dbeta,
            "residual": dresidual,
        }
        super().backward(grad, **kwargs)

    def backward_var(self, grad: NDArray, index: int, **kwargs: Any) -> NDArray:
        """Return the gradient of one variable, computed by `backward`."""
        return self._grads[self._names[index]]

    def _by_name(self, attribute: str) -> dict[str, Any]:
        """Return an attribute of every given tensor, by the tensor's name.

        Looks it up at each call: mygrad replaces variables whose tensors are written to.
        """
        values = (getattr(tensor, attribute) for tensor in self.variables)
        return dict(zip(self._names, values, strict=True))
