"""The synchronised forward and backward passes: two halves each, with a reduction in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np

from nbnorm import _checks
from nbnorm._checks import NOT_GIVEN
from nbnorm._frame import Out
from nbnorm._typing import Activation, Array, Axis, Mask, NDArray, OrNone, X
from nbnorm.distributed._ranks import BACKWARD, FORWARD, Communicator, Header, Ranks, common_fields
from nbnorm.functional import (
    BackwardCall,
    ForwardCall,
    Wanted,
    batch_norm_backward,
    batch_norm_forward,
    check_backward,
    check_forward,
    flat_stats,
)
from nbnorm.moments import Moments
from nbnorm.renorm import checked_bounds, corrected, gamma_sum, with_r_and_d

# Forward


class SyncBatchNormForward(NamedTuple, Generic[X]):
    """Result of `sync_batch_norm_forward`.

    Attributes
    ----------
    y : array
        Normalised x, with the shape, dtype and memory order of this rank's x.
    mean, rstd : array of float64
        Statistics of the values of all ranks, with the shape of the channel axes; bitwise
        identical on every rank.
    count : int
        Number of values per channel on all ranks together, needed by the backward pass. With
        ``training=False``, that of this rank's x.
    """

    y: X
    mean: Array
    rstd: Array
    count: int  # type: ignore[assignment]  # shadows tuple.count, on purpose


def sync_batch_norm_forward(
    x: X,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    comm: Communicator,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 1,
    axis: Axis = 1,
    residual: Array | None = None,
    activation: Activation = None,
    out: Array | None = None,
) -> SyncBatchNormForward[X]:
    """Compute `batch_norm_forward` for a batch spread over the ranks of a communicator.

    In training every rank must call this function. The ranks' batches may differ in size and may
    be empty. With ``training=False`` the ranks do not communicate: one may evaluate by itself.

    Parameters
    ----------
    x : array, at least 2-d
        This rank's part of the batch, in CPU memory. Any dtype that `batch_norm_forward` accepts,
        the same on every rank.
    gamma, beta : array of the shape of the channel axes, optional
        Scale and shift. None means 1 and 0. They must be equal on all ranks; this is not checked.
    running_mean, running_var : array of the shape of the channel axes, optional
        Population statistics; pass both or neither. In training they are updated **in place** with
        the statistics of all ranks: if equal on every rank before, they stay bitwise equal.
    comm : Communicator
        mpi4py's, a `TorchProcessGroup`, a `ThreadComm` or another `Communicator`.
    training : bool, default True
        Normalise with the batch's statistics (True) or the running ones.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        The running variance averages M2 / (m - correction), with m the count of all ranks.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    residual : array of x's shape and dtype, optional
        Added before the activation. May be float32 if x is float16 or bfloat16.
    activation : None, str or Activation, default None
        Applied last.
    out : array of x's shape and dtype, optional
        Array to write y to. It may be x itself, which is then **overwritten**: pass
        ``None, ..., y=y`` to the backward function instead of x. It must not overlap an input in
        any other way.

    Returns
    -------
    SyncBatchNormForward
        (y, mean, rstd, count), arrays of x's library. y is `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        On the rank whose arguments are invalid, as in `batch_norm_forward`; also if an array is on
        a GPU, or comm is not a communicator. The other ranks do not learn of an invalid comm.
    RuntimeError
        On every other rank if one rank's arguments are invalid. The message gives the rank and its
        error.
    ValueError
        On every rank: the ranks disagree on the pass, the shape of the channel axes, the dtype of
        x, activation, eps, momentum or correction; or all ranks together have a single value per
        channel and ``correction=1``. No rank has written anything then.

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015) over the union of the ranks' batches. Count,
    mean and M2 of every rank are gathered in float64 and merged in rank order with the formula of
    Chan, Golub & LeVeque (1983), see `Moments.merge`. Errors after the checks (out of memory, an
    interrupt) are not communicated and leave the other ranks waiting. Start programs with
    ``mpiexec python -m mpi4py program.py``, which then ends all ranks.

    Examples
    --------
    With MPI, use ``from mpi4py import MPI`` and ``comm=MPI.COMM_WORLD``. With one process:

    >>> import numpy as np
    >>> from nbnorm.distributed import SelfComm, sync_batch_norm_forward
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> y, mean, rstd, count = sync_batch_norm_forward(x, eps=0.0, comm=SelfComm())
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean, count
    (array([ 2., 20.]), 2)
    """
    if not training:
        alone = batch_norm_forward(
            x, gamma, beta, running_mean, running_var, training=False, momentum=momentum, eps=eps,
            correction=correction, axis=axis, residual=residual, activation=activation, out=out,
        )  # fmt: skip
        return SyncBatchNormForward(*alone, _values_per_channel(x, axis))
    forward: SyncBatchNormForward[X]
    forward, *_ = forward_of_all(
        comm, x, gamma, beta, running_mean, running_var, momentum, eps, correction, axis, residual,
        activation, out,
    )  # fmt: skip
    return forward


def forward_of_all(
    comm: Communicator,
    x: X,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    correction: int,
    axis: Axis,
    residual: Array | None,
    activation: Activation,
    out: Array | None,
    *,
    bounds: Callable[[], dict[str, float]] | None = None,
) -> tuple[Any, ...]:
    """Return the result of `sync_batch_norm_forward` in training, then r and d with `bounds`.

    `bounds` returns r_max and d_max of batch renormalization, as keywords.
    """
    ranks = Ranks(comm)

    def check() -> tuple[tuple[ForwardCall, tuple[float, float] | None], Header]:
        """Check the arguments as `batch_norm_forward` does; add what the ranks must agree on."""
        call = check_forward(
            x, gamma, beta, running_mean, running_var, True, momentum, eps, correction, axis,
            residual, activation, out, alone=False,
        )  # fmt: skip
        limits = None if bounds is None else checked_bounds(**bounds())
        header = Header(
            step=FORWARD, eps=call.eps, momentum=call.momentum, correction=call.correction,
            **dict(zip(("r_max", "d_max"), limits or (), strict=False)),
            **common_fields(call.frame, call.activation),
        )  # fmt: skip
        return (call, limits), header

    (call, limits), counts = ranks.checked(check)
    total = sum(counts)
    _checks.enough_values(total, call.correction, "{} on all ranks together", total)
    frame = call.frame
    moments = _merged(ranks, counts, Moments(frame.m, *flat_stats(frame)))
    rstd = moments.rstd(call.eps)
    renorm: list[NDArray] = []
    if limits is not None:
        call, *renorm = corrected(call, moments.mean, moments.m2, total, limits)
    target = call.apply(moments.mean, rstd)
    if call.running is not None and total > 0:
        divisor = total - call.correction
        frame.backend.move(*call.running, moments.mean, moments.m2, call.momentum, divisor)
    y, statistics = frame.settle(target), (moments.mean, rstd, *renorm)
    mean, rstd, *r_and_d = (frame.home(frame.unflat(array)) for array in statistics)
    return SyncBatchNormForward(y, mean, rstd, total), *r_and_d


def _values_per_channel(x: Array, axis: Axis) -> int:
    """Return the number of values per channel of an x that has been checked."""
    _, _, m = _checks.channel_axes(tuple(x.shape), _checks.axes(axis))
    return m


def _merged(ranks: Ranks, counts: list[int], own: Moments) -> Moments:
    """Gather the moments of all ranks and merge them in rank order."""
    rows = ranks.gather(own.mean, own.m2).reshape(ranks.size, 2, -1)
    first, *others = (
        Moments(count, mean, m2) for count, (mean, m2) in zip(counts, rows, strict=True)
    )
    return first.merge(*others)


# Backward


class SyncBatchNormBackward(NamedTuple, Generic[X]):
    """Result of `sync_batch_norm_backward`; gradients that were not requested are None.

    Attributes
    ----------
    dx : array or None
        Gradient of this rank's x, with its shape, dtype and memory order.
    dgamma, dbeta : array or None
        This rank's sums, with the shape of the channel axes and the dtype of gamma. The gradients
        of gamma and beta are the totals over all ranks, which the caller must compute.
    dresidual : array or None
        Gradient of the residual, with the shape and dtype of x. None if neither `y`
        nor `residual` was given.
    """

    dx: X | OrNone
    dgamma: Array | OrNone
    dbeta: Array | OrNone
    dresidual: X | OrNone


def sync_batch_norm_backward(
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    count: int,
    *,
    comm: Communicator,
    beta: Array | None = NOT_GIVEN,
    y: Array | None = None,
    residual: Array | None = None,
    training: bool = True,
    axis: Axis = 1,
    activation: Activation = None,
    output_mask: Mask = (True, True, True, True),
    out: Array | None = None,
) -> SyncBatchNormBackward[X]:
    """Compute the gradients of `sync_batch_norm_forward`.

    In training every rank must call this function. dx is the gradient of the sum of all ranks'
    losses, since every value affects the statistics that normalise all others. With
    ``training=False`` the ranks do not communicate.

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of this rank's y. Any strides, including broadcast ones.
    x : array, at least 2-d, or None
        This rank's input of the forward call. If that wrote y over it (``out=x``), pass None and
        `y`, as in `batch_norm_backward`.
    gamma : array of the shape of the channel axes, or None
        As in the forward call.
    mean, rstd : array of the shape of the channel axes
        As returned by the forward call.
    count : int
        As returned by the forward call: number of values per channel on all ranks together.
        Ignored with ``training=False``.
    comm : Communicator
        As in the forward call.
    beta : array of the shape of the channel axes, or None
        As in the forward call. The derivative of an activation depends on it, so pass it (None if
        the forward call had none); with ReLU `y` will do. Without activation it may be omitted,
        unless x is None.
    y : array of x's shape and dtype, optional
        Result of the forward call, required with ReLU if that added a residual: the mask is then
        y > 0, and dresidual is returned. If x is None, x_hat is computed from `y`.
    residual : array of x's shape and dtype, optional
        Residual of the forward call, required with another activation; dresidual is then returned.
    training : bool, default True
        If False, mean and rstd are constants (frozen statistics) and dx = gamma rstd dy.
    axis : int or tuple of int, default 1
        Channel axes: the axes that **keep** their statistics, not the axes to reduce.
    activation : None, str or Activation, default None
        As in the forward call.
    output_mask : 4 bools, default all True
        Which of dx, dgamma, dbeta, dresidual to compute; the others are None. The ranks must agree
        on dx.
    out : array of x's shape and dtype, optional
        Array to write dx to, if dx is requested. It may be dy itself; it must not overlap an input
        in any other way.

    Returns
    -------
    SyncBatchNormBackward
        (dx, dgamma, dbeta, dresidual), arrays of x's library. dgamma and dbeta are this rank's
        sums; reduce them over the ranks as the gradients of all other parameters.

    Raises
    ------
    TypeError, ValueError
        On the rank whose arguments are invalid, as in `batch_norm_backward`; also if count is not
        an integer, or not positive although x is not empty.
    RuntimeError
        On every other rank if one rank's arguments are invalid. The message gives the rank and its
        error.
    ValueError
        On every rank: the ranks disagree on the pass, the shape of the channel axes, the dtype of
        x, activation, count or whether to compute dx; or count is not the number of values per
        channel on all ranks together. No rank has written anything then.

    Notes
    -----
    Implements section 3 of Ioffe & Szegedy (2015), with both sums over the union of the ranks'
    batches. The sums are gathered in float64 and added in rank order, so they are bitwise identical
    on every rank. PyTorch's SyncBatchNorm also leaves the reduction of dgamma and dbeta to the
    caller.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.distributed import SelfComm, sync_batch_norm_backward, sync_batch_norm_forward
    >>> x, dy, comm = np.array([[1.0], [3.0], [5.0]]), np.array([[1.0], [0.0], [0.0]]), SelfComm()
    >>> y, mean, rstd, count = sync_batch_norm_forward(x, comm=comm)
    >>> grads = sync_batch_norm_backward(dy, x, None, mean, rstd, count, comm=comm)
    >>> grads.dgamma.round(3), grads.dbeta
    (array([-1.225]), array([1.]))
    >>> abs(grads.dx.sum()) < 1e-12  # a shift of the whole batch changes nothing
    np.True_
    """
    if not training:
        alone = batch_norm_backward(
            dy, x, gamma, mean, rstd, beta=beta, y=y, residual=residual, training=False,
            axis=axis, activation=activation, output_mask=output_mask, out=out,
        )  # fmt: skip
        return SyncBatchNormBackward(*alone)
    return backward_of_all(
        comm, dy, x, gamma, mean, rstd, count, beta, y, residual, axis, activation, output_mask, out
    )


def backward_of_all(
    comm: Communicator,
    dy: Array,
    x: X,
    gamma: Array | None,
    mean: Array,
    rstd: Array,
    count: int,
    beta: Array | None,
    y: Array | None,
    residual: Array | None,
    axis: Axis,
    activation: Activation,
    output_mask: Mask,
    out: Array | None,
    *,
    r_and_d: Sequence[Array] = (),
) -> SyncBatchNormBackward[X]:
    """Return the result of `sync_batch_norm_backward` in training.

    `r_and_d` are r and d of batch renormalization.
    """
    ranks = Ranks(comm)

    def check() -> tuple[tuple[BackwardCall, list[NDArray], Wanted, Out | None, int], Header]:
        """Check the arguments, including count; add what the ranks must agree on."""
        call = check_backward(
            dy, x, gamma, mean, rstd, beta, axis, activation, y=y, residual=residual
        )
        frame = call.frame
        renorm = [
            frame.statistic(frame.required_per_channel(array, name))
            for name, array in zip("rd", r_and_d, strict=False)
        ]
        wanted, out_ = call.wanted(output_mask), frame.out(out, inplace="dy")
        m = _checks.whole_count(count, call.frame.x)
        common = common_fields(call.frame, call.activation)
        header = Header(step=BACKWARD, total=float(m), dx=float(wanted.dx), **common)
        return (call, renorm, wanted, out_, m), header

    (call, renorm, wanted, out_, m), counts = ranks.checked(check)
    if sum(counts) != m:
        raise ValueError(f"count is {m}, but the ranks' x have {sum(counts)} values per channel")
    # The ranks agree on whether to compute dx; each decides on the other gradients by itself.
    frame = call.frame
    dx = frame.target(out_) if wanted.dx else None
    dresidual = frame.target() if wanted.dresidual else None
    operands, mask = (with_r_and_d(call, *renorm) if renorm else call).operands()
    own: NDArray = frame.memory.zeros((2, frame.channels))
    if (wanted.dx or wanted.dgamma or wanted.dbeta) and not frame.empty:
        own = frame.backend.backward_reduce(*operands, *mask, call.recomputed)
    sums = _added(ranks, own) if wanted.dx else None
    if (wanted.dx or wanted.dresidual) and not frame.empty:
        written = dx and dx.written, dresidual and dresidual.written
        frame.backend.backward_apply(*operands, sums, m, *mask, *written, call.recomputed)
    of_gamma = gamma_sum(own, *renorm) if renorm else own[1]
    return SyncBatchNormBackward(
        dx and frame.settle(dx),
        frame.parameter_gradient(of_gamma, call.gamma) if wanted.dgamma else None,
        frame.parameter_gradient(own[0], call.gamma) if wanted.dbeta else None,
        dresidual and frame.settle(dresidual),
    )


def _added(ranks: Ranks, own: NDArray) -> NDArray:
    """Return the two sums of the backward pass over all ranks, added in rank order."""
    total, *others = ranks.gather(own).reshape(ranks.size, *own.shape)
    with np.errstate(all="ignore"):  # a NaN or Inf in one channel is not worth a warning
        for sums in others:
            total += sums
    return np.asarray(total)
