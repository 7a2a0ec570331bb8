"""thinc: `BatchNorm`, a layer for NumPy and CuPy arrays."""

from collections.abc import Callable
from typing import Any, Literal

from thinc.api import Model, registry
from thinc.types import FloatsXd
from thinc.util import is_xp_array

from nbnorm import _checks
from nbnorm._arrays import ones_like
from nbnorm._typing import Activation
from nbnorm.functional import batch_norm_backward, batch_norm_forward
from nbnorm.layer import names_of

__all__ = ["BatchNorm"]


@registry.layers("nbnorm.BatchNorm.v1")
def BatchNorm(  # noqa: N802  # thinc capitalises layers
    nO: int | None = None,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    axis: int = -1,
    activation: Activation = None,
    affine: bool | Literal["gamma", "beta"] = True,
) -> Model[FloatsXd, FloatsXd]:
    """Create a batch normalization layer for thinc (Ioffe & Szegedy 2015).

    y = act(G (x - mean) / sqrt(var + eps) + b), with the statistics of the batch if
    ``is_train=True`` (`Model.begin_update`), the running ones otherwise (`Model.predict`).

    Parameters
    ----------
    nO : int, optional
        Number of channels. None infers it in `Model.initialize`, from X or else from Y.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float, default 0.1
        Weight of the new batch in the running statistics.
    axis : int, default -1
        Channel axis, which **keeps** its statistics; all other axes are reduced. The default, the
        last axis, is the width of thinc's arrays.
    activation : None, str or Activation, default None
        Applied last, in the same pass over memory, as in `nbnorm.batch_norm_forward`. thinc stores
        names, not objects: make the model that loads with the same `nbnorm.activation`.
    affine : bool, "gamma" or "beta", default True
        Whether the layer has the parameters "G" and "b", or which of them.

    Returns
    -------
    Model
        Maps a Floats2d, Floats3d or Floats4d to one of the same shape and dtype, on the same
        device. For lists, Ragged and Padded, use ``with_array(BatchNorm())``.

    Raises
    ------
    TypeError
        axis is not an int. In `Model.initialize`: X or Y is not an array. In calls: an array is
        not floating, or a gradient does not have X's dtype.
    ValueError
        activation or affine is invalid. In `Model.initialize`: the width of X or Y is not nO, X or
        Y has a single axis, or none of nO, X and Y is given. In calls: an array does not fit the
        parameters, or a channel has a single value in training.

    Notes
    -----
    The parameters are "G" (gamma, initially 1) and "b" (beta, initially 0), as in thinc's
    LayerNorm, and the running statistics "running_mean" and "running_var" (unbiased). The running
    statistics never have a gradient, so optimizers do not update them. As parameters they are
    included in `Model.to_bytes`, `Model.to_disk`, `Model.copy` and moves to a GPU. The options are
    in `Model.attrs` under their names and may be changed there: ``momentum`` 0 stops their updates.

    The gradient of a call with ``is_train=False`` treats the running statistics as constants.

    An optimizer's averages (``model.use_params(optimizer.averages)``) cover only the parameters
    that it updates. The running statistics remain those of the latest parameters. To update them
    for the averages, pass data through `Model.begin_update` inside ``use_params``.

    In a config, use ``@layers = "nbnorm.BatchNorm.v1"``. First calls compile kernels,
    which takes some seconds, once per machine.

    Examples
    --------
    >>> import numpy as np
    >>> from thinc.api import chain, Linear
    >>> from nbnorm.integrations.thinc import BatchNorm
    >>> X = np.array([[1, 10], [3, 30]], dtype="f")
    >>> model = BatchNorm(eps=0.0).initialize(X)
    >>> Y, backprop = model.begin_update(X)
    >>> Y
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> backprop(np.ones_like(Y))
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> model.get_grad("b")
    array([2., 2.], dtype=float32)
    >>> network = chain(Linear(8), BatchNorm(activation="relu"), Linear(2)).initialize(X, X)
    >>> network.predict(X).shape
    (2, 2)
    """
    axis = _checks.integer(axis, "axis")
    _checks.activation(activation)
    names = [_PARAMETERS[name] for name in names_of(affine)]
    return Model(
        "batchnorm",
        _forward,
        init=_init,
        dims={"nO": nO, "nI": nO},
        params=dict.fromkeys([*names, "running_mean", "running_var"]),
        attrs={"eps": eps, "momentum": momentum, "axis": axis, "activation": activation},
    )


_PARAMETERS = {"weight": "G", "bias": "b"}


def _forward(
    model: Model[FloatsXd, FloatsXd], X: FloatsXd, is_train: bool
) -> tuple[FloatsXd, Callable[[FloatsXd], FloatsXd]]:
    """Return Y and the callback that maps dY to dX."""
    gamma, beta = (model.get_param(name) if _has(model, name) else None for name in ("G", "b"))
    activation = _checks.activation(model.attrs["activation"])
    options: dict[str, Any] = {"axis": model.attrs["axis"], "activation": activation}
    Y, mean, rstd = batch_norm_forward(
        X,
        gamma,
        beta,
        model.get_param("running_mean"),
        model.get_param("running_var"),
        training=is_train,
        momentum=model.attrs["momentum"],
        eps=model.attrs["eps"],
        **options,
    )

    def backprop(dY: FloatsXd) -> FloatsXd:
        dX, dgamma, dbeta, _ = batch_norm_backward(
            dY,
            X,
            ones_like(beta) if gamma is None and beta is not None else gamma,
            mean,
            rstd,
            beta=beta,
            training=is_train,
            output_mask=(True, gamma is not None, beta is not None, False),
            **options,
        )
        if gamma is not None:
            model.inc_grad("G", dgamma)
        if beta is not None:
            model.inc_grad("b", dbeta)
        return dX

    return Y, backprop


def _init(
    model: Model[FloatsXd, FloatsXd], X: FloatsXd | None = None, Y: FloatsXd | None = None
) -> None:
    """Infer the width and set the initial parameters and statistics."""
    # Prefer X to Y, as thinc's layers do: a chain passes its own Y to layers without nO.
    sample = Y if X is None else X
    if sample is not None:
        width = _width(sample, model.attrs["axis"])
        model.set_dim("nO", width)
        model.set_dim("nI", width)
    nO = model.get_dim("nO")
    if _has(model, "G"):
        model.set_param("G", model.ops.alloc1f(nO) + 1)
    if _has(model, "b"):
        model.set_param("b", model.ops.alloc1f(nO))
    model.set_param("running_mean", model.ops.alloc1f(nO))
    model.set_param("running_var", model.ops.alloc1f(nO) + 1)


def _has(model: Model[Any, Any], name: str) -> bool:
    """Return True if a model has a parameter, set or not."""
    return name in model.param_names


def _width(sample: FloatsXd, axis: int) -> int:
    """Return the number of channels of X or Y."""
    if not is_xp_array(sample):
        raise TypeError(
            f"BatchNorm must be initialized with arrays, got {type(sample).__qualname__}; "
            "with_array(BatchNorm()) accepts lists, Ragged and Padded"
        )
    _, (width,), _ = _checks.channel_axes(sample.shape, (axis,))
    return width
