"""Both passes over the ranks: the halves of a pass, with a reduction in between."""

from __future__ import annotations

from typing import Generic, NamedTuple

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

# Forward


class SyncBatchNormForward(NamedTuple, Generic[X]):
    """Result of `sync_batch_norm_forward`.

    Attributes
    ----------
    y : array
        Normalised x: shape, dtype and order in memory of this rank's x.
    mean, rstd : array of float64
        Statistics of all ranks' values, of the shape of the channel axes; the same bits on every
        rank.
    count : int
        Values per channel on all ranks together, for the backward pass. With ``training=False`` of
        this rank's x.
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
    """`batch_norm_forward` of the batch that the ranks of a communicator have together.

    In training every rank has to call it. The ranks may have batches of different sizes, and empty
    ones. With ``training=False`` nothing is communicated: a rank may evaluate by itself.

    Parameters
    ----------
    x : array, at least 2-d
        This rank's part of the batch, in CPU memory: any floating dtype of `batch_norm_forward`,
        the same on every rank.
    gamma, beta : array of the shape of the channel axes, optional
        Scale and shift; None: 1 and 0. That they are the same on every rank is not checked.
    running_mean, running_var : array of the shape of the channel axes, optional
        Population statistics, both or neither. In training they are updated **in place** with the
        statistics of all ranks: what was the same on every rank stays so, bit for bit.
    comm : Communicator
        An mpi4py communicator, `TorchProcessGroup`, or anything else with ``Allgather``.
    training : bool, default True
        Whether the statistics of this batch normalise it.
    momentum : float, default 0.1
        Weight of the new statistic; any finite number.
    eps : float, default 1e-5
        Added to the variance.
    correction : int, default 1
        The running variance takes M2 / (m - correction), m being the count of all ranks.
    axis : int or tuple of int, default 1
        Channel axes: those that **keep** their statistics, not those that are reduced.
    residual : array of x's shape and dtype, optional
        Added before the activation.
    activation : {None, "relu"}
        Applied last.
    out : array of x's shape and dtype, optional
        Where to write y. It may be x itself, which is **gone** then, and the backward pass needs
        it: in training keep a copy, or another `out`. It may not otherwise overlap an input.

    Returns
    -------
    SyncBatchNormForward
        (y, mean, rstd, count), arrays of x's library. y is `out` itself where given.

    Raises
    ------
    TypeError, ValueError
        On the rank whose arguments are wrong, as `batch_norm_forward`; arrays on a GPU; a comm that
        is no communicator (which nobody else can be told of).
    RuntimeError
        On every other rank, naming the one whose arguments are wrong, and why they are.
    ValueError
        On every rank: where they disagree on the pass, the shape of the channel axes, the dtype of
        x, activation, eps, momentum or correction; where all ranks together have a single value
        per channel with ``correction=1``. Nothing has been written then, on any rank.

    Notes
    -----
    Ioffe & Szegedy (2015), Algorithm 1, over the union of the ranks' batches. Count, mean and M2 of
    every rank are gathered in float64 and merged by the formula of Chan, Golub & LeVeque (1983) in
    rank order (`Moments.merge`). What goes wrong after the checks (memory, an interrupt) is not
    announced, and the other ranks wait: ``mpiexec python -m mpi4py program.py`` ends them all.

    Examples
    --------
    As with ``from mpi4py import MPI`` and ``comm=MPI.COMM_WORLD``, here with one process:

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
    ranks = Ranks(comm)

    def check() -> tuple[ForwardCall, Header]:
        """Check what `batch_norm_forward` checks, and say what the ranks must agree on."""
        call = check_forward(
            x, gamma, beta, running_mean, running_var, True, momentum, eps, correction, axis,
            residual, activation, out, alone=False,
        )  # fmt: skip
        header = Header(
            step=FORWARD, eps=call.eps, momentum=call.momentum, correction=call.correction,
            **common_fields(call.frame, call.relu),
        )  # fmt: skip
        return call, header

    call, counts = ranks.checked(check)
    total = sum(counts)
    _checks.enough_values(total, call.correction, "{} on all ranks together", total)
    frame = call.frame
    moments = _merged(ranks, counts, Moments(frame.m, *flat_stats(frame)))
    rstd = moments.rstd(call.eps)
    target = call.apply(moments.mean, rstd)
    if call.running is not None and total > 0:
        divisor = total - call.correction
        frame.backend.move(*call.running, moments.mean, moments.m2, call.momentum, divisor)
    return SyncBatchNormForward(
        frame.settle(target),
        frame.home(frame.unflat(moments.mean)),
        frame.home(frame.unflat(rstd)),
        total,
    )


def _values_per_channel(x: Array, axis: Axis) -> int:
    """Return their number, by the shape of an x that has been checked."""
    _, _, m = _checks.channel_axes(tuple(x.shape), _checks.axes(axis))
    return m


def _merged(ranks: Ranks, counts: list[int], own: Moments) -> Moments:
    """Moments of all ranks' values: gathered, and merged in rank order."""
    rows = ranks.gather(own.mean, own.m2).reshape(ranks.size, 2, -1)
    first, *others = (
        Moments(count, mean, m2) for count, (mean, m2) in zip(counts, rows, strict=True)
    )
    return first.merge(*others)


# Backward


class SyncBatchNormBackward(NamedTuple, Generic[X]):
    """Result of `sync_batch_norm_backward`; what was not asked for is None.

    Attributes
    ----------
    dx : array or None
        Gradient of this rank's x: its shape, dtype and order in memory.
    dgamma, dbeta : array or None
        This rank's own sums, of the shape of the channel axes and of gamma's dtype. The gradients
        of gamma and beta are their sums over all ranks.
    dresidual : array or None
        Gradient of the residual, like x. None where the forward's y was not given.
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
    training: bool = True,
    axis: Axis = 1,
    activation: Activation = None,
    output_mask: Mask = (True, True, True, True),
    out: Array | None = None,
) -> SyncBatchNormBackward[X]:
    """Gradients of `sync_batch_norm_forward`.

    In training every rank has to call it. dx is the gradient of the sum of all ranks' losses, as
    every value has a part in the statistics that normalise all others. With ``training=False``
    nothing is communicated.

    Parameters
    ----------
    dy : array of x's shape and dtype
        Gradient of this rank's y. Any strides, broadcast ones too.
    x : array, at least 2-d
        What went into the forward on this rank: not what ``out=x`` has left there, which is y.
    gamma : array of the shape of the channel axes, or None
        As in the forward.
    mean, rstd : array of the shape of the channel axes
        As the forward returned them.
    count : int
        As the forward returned it: values per channel on all ranks together. Not looked at with
        ``training=False``.
    comm : Communicator
        As in the forward.
    beta : array of the shape of the channel axes, or None
        As in the forward. The mask of ``activation="relu"`` depends on it: there it must be given,
        None where the forward had none, unless `y` is. Elsewhere it may be left out.
    y : array of x's shape and dtype, optional
        The forward's result, needed where a residual was added: the ReLU mask is then y > 0, and
        dresidual is returned.
    training : bool, default True
        False: mean and rstd are constants (frozen statistics), dx = gamma rstd dy.
    axis : int or tuple of int, default 1
        Channel axes: those that **keep** their statistics, not those that are reduced.
    activation : {None, "relu"}
        As in the forward.
    output_mask : 4 bools, default all True
        Which of dx, dgamma, dbeta, dresidual to compute; the others are None. The ranks must agree
        on dx.
    out : array of x's shape and dtype, optional
        Where to write dx, where that is wanted. It may be dy itself; it may not otherwise overlap
        an input.

    Returns
    -------
    SyncBatchNormBackward
        (dx, dgamma, dbeta, dresidual), arrays of x's library. dgamma and dbeta are this rank's own
        sums, for the reduction that all parameters' gradients go through.

    Raises
    ------
    TypeError, ValueError
        On the rank whose arguments are wrong, as `batch_norm_backward`; a count that is no count.
    RuntimeError
        On every other rank, naming the one whose arguments are wrong, and why they are.
    ValueError
        On every rank: where they disagree on the pass, the shape of the channel axes, the dtype of
        x, activation, count or whether dx is wanted; where count is not the number of values per
        channel that they have together. Nothing has been written then, on any rank.

    Notes
    -----
    Ioffe & Szegedy (2015), section 3, with both sums over the union of the ranks' batches: gathered
    in float64 and added up in rank order, the same bits on every rank. PyTorch's SyncBatchNorm
    leaves dgamma and dbeta to the reduction of gradients too.

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
            dy, x, gamma, mean, rstd, beta=beta, y=y, training=False, axis=axis,
            activation=activation, output_mask=output_mask, out=out,
        )  # fmt: skip
        return SyncBatchNormBackward(*alone)
    ranks = Ranks(comm)

    def check() -> tuple[tuple[BackwardCall, Wanted, Out | None, int], Header]:
        """Check what `batch_norm_backward` checks, and count; say what the ranks must agree on."""
        call = check_backward(dy, x, gamma, mean, rstd, beta, y, axis, activation)
        wanted, out_ = call.wanted(output_mask), call.frame.out(out, inplace="dy")
        m = _checks.count(count, call.frame.x)
        common = common_fields(call.frame, call.relu)
        header = Header(step=BACKWARD, total=float(m), dx=float(wanted.dx), **common)
        return (call, wanted, out_, m), header

    (call, wanted, out_, m), counts = ranks.checked(check)
    if sum(counts) != m:
        raise ValueError(f"count is {m}, but the ranks' x have {sum(counts)} values per channel")
    # The ranks agree on dx; the rest is each rank's own affair.
    frame = call.frame
    dx = frame.target(out_) if wanted.dx else None
    dresidual = frame.target() if wanted.dresidual else None
    operands, mask = call.operands()
    own: NDArray = frame.memory.zeros((2, frame.channels))
    if (wanted.dx or wanted.dgamma or wanted.dbeta) and not frame.empty:
        own = frame.backend.backward_reduce(*operands, *mask)
    sums = _added(ranks, own) if wanted.dx else None
    if (wanted.dx or wanted.dresidual) and not frame.empty:
        written = dx and dx.written, dresidual and dresidual.written
        frame.backend.backward_apply(*operands, sums, m, *mask, *written)
    return SyncBatchNormBackward(
        dx and frame.settle(dx),
        frame.parameter_gradient(own[1], call.gamma) if wanted.dgamma else None,
        frame.parameter_gradient(own[0], call.gamma) if wanted.dbeta else None,
        dresidual and frame.settle(dresidual),
    )


def _added(ranks: Ranks, own: NDArray) -> NDArray:
    """Both sums of backward over all ranks, added up in rank order."""
    total, *others = ranks.gather(own).reshape(ranks.size, *own.shape)
    with np.errstate(all="ignore"):  # a NaN or Inf in one channel is not worth a warning
        for sums in others:
            total += sums
    return np.asarray(total)
