"""Batch normalization over the ranks of a communicator: one batch, each rank with its part of it.

Both passes are `batch_norm_forward` and `batch_norm_backward` cut in two, with a reduction in
between. Two messages a pass. First a header of fixed size, which every rank sends whatever its own
arguments are like: it says whether this rank's checks passed and what all ranks must have in
common, so that all go on or all raise. Then the statistics, which every rank merges for itself in
the order of the ranks: the same numbers by the same operations, and so the same bits.

A communicator is mpi4py's, `TorchProcessGroup`, or anything else with their ``Allgather``. Neither
mpi4py nor torch is imported here before it is asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import DTYPES, Array, NDArray
from nbnorm._checks import NOT_GIVEN
from nbnorm._frame import Frame
from nbnorm.functional import (
    Activation,
    Axis,
    BackwardCall,
    ForwardCall,
    Mask,
    OrNone,
    X,
    apply_to,
    batch_norm_backward,
    batch_norm_forward,
    check_backward,
    check_forward,
    flat_stats,
)
from nbnorm.layer import BatchNorm, Saved
from nbnorm.moments import Moments

__all__ = [
    "Communicator",
    "SelfComm",
    "SyncBatchNorm",
    "SyncBatchNormBackward",
    "SyncBatchNormForward",
    "TorchProcessGroup",
    "sync_batch_norm_backward",
    "sync_batch_norm_forward",
]

_T = TypeVar("_T")


# Communicators


class Communicator(Protocol):
    """What is needed of a communicator: mpi4py's upper-case ``Allgather``, and its size.

    The size is ``Get_size()`` or ``size``. Nothing else is called, ``Allreduce`` neither: the order
    in which that adds up is the implementation's, and may differ from rank to rank.
    """

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> Any:  # noqa: N802
        """Write every rank's `sendbuf` into the rows of every rank's `recvbuf`, in rank order."""


class SelfComm:
    """Communicator of one process, for a program that also runs without MPI.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.distributed import SelfComm
    >>> table = np.empty((1, 2))
    >>> SelfComm().Allgather(np.array([1.0, 2.0]), table)
    >>> table
    array([[1., 2.]])
    """

    def Get_size(self) -> int:  # noqa: N802
        """Return 1."""
        return 1

    def Get_rank(self) -> int:  # noqa: N802
        """Return 0."""
        return 0

    def Allgather(self, sendbuf: NDArray, recvbuf: NDArray) -> None:  # noqa: N802
        """Copy `sendbuf` to `recvbuf`."""
        recvbuf[...] = sendbuf


class TorchProcessGroup:
    """A process group of ``torch.distributed`` as a communicator; torch is imported here only.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        One whose backend gathers tensors in CPU memory (gloo). None: the default group, which has
        to be initialised.

    Raises
    ------
    ImportError
        torch is not installed.
    RuntimeError
        torch was built without ``torch.distributed``.

    Examples
    --------
    After ``torch.distributed.init_process_group("gloo")``:

    >>> comm = TorchProcessGroup()  # doctest: +SKIP
    >>> y, mean, rstd, count = sync_batch_norm_forward(x, comm=comm)  # doctest: +SKIP
    """

    def __init__(self, group: Any = None) -> None:
        self._torch = import_module("torch")
        self._distributed = import_module("torch.distributed")
        if not self._distributed.is_available():
            raise RuntimeError("torch was built without torch.distributed")
        self._group = group

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of processes in the group."""
        return int(self._distributed.get_world_size(self._group))

    def Get_rank(self) -> int:  # noqa: N802
        """Return this process's rank in the group."""
        return int(self._distributed.get_rank(self._group))

    def Allgather(self, sendbuf: NDArray, recvbuf: NDArray) -> None:  # noqa: N802
        """Write every rank's `sendbuf` into the rows of every rank's `recvbuf`, in rank order."""
        rows = self._torch.from_numpy(recvbuf.reshape(self.Get_size(), -1))
        row = self._torch.from_numpy(sendbuf.reshape(-1))
        self._distributed.all_gather(list(rows.unbind(0)), row, group=self._group)


# The header


class _Header(NamedTuple):
    """What a rank says before anything is computed; all but the last must agree."""

    version: float = 1.0
    failed: float = 0.0
    step: float = 0.0
    channels: float = 0.0
    channel_axes: float = 0.0
    dtype: float = 0.0
    relu: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    correction: float = 0.0
    total: float = 0.0
    dx: float = 0.0
    values: float = 0.0  # per channel, of this rank's x


# Of all versions: ranks of two versions have to understand each other as far as the first field.
_HEADER_LENGTH = 16
_REASON_BYTES = 512
_FORWARD, _BACKWARD = 1.0, 2.0
_AGREED = len(_Header._fields) - 1
_DTYPE_CODES = {np.dtype(name): float(code) for code, name in enumerate(DTYPES[:3])}

# What a field is called in a message, and how its value is written there.
_WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "version": ("the version of the protocol", "{:g}".format),
    "step": ("the pass", {_FORWARD: "forward", _BACKWARD: "backward"}.__getitem__),
    "channels": ("the number of channels", "{:.0f}".format),
    "channel_axes": ("the shape of the channel axes", "checksum {:.0f}".format),
    "dtype": ("the dtype of x", lambda code: DTYPES[int(code)]),
    "relu": ("activation", lambda relu: "'relu'" if relu else "None"),
    "eps": ("eps", repr),
    "momentum": ("momentum", repr),
    "correction": ("correction", "{:g}".format),
    "total": ("count", "{:.0f}".format),
    "dx": ("whether output_mask wants dx", lambda wanted: str(bool(wanted))),
}


def _common(frame: Frame, relu: bool) -> dict[str, float]:
    """Fields of both passes."""
    if not isinstance(frame.x, np.ndarray):
        raise TypeError("x is in the memory of a GPU; ranks synchronise arrays in CPU memory")
    return {
        "channels": float(frame.channels),
        "channel_axes": _checksum(frame._channels),
        "dtype": _DTYPE_CODES.get(frame.x.dtype, float(DTYPES.index("bfloat16"))),
        "relu": float(relu),
        "values": float(frame.m),
    }


@lru_cache(maxsize=1024)
def _checksum(shape: tuple[int, ...]) -> float:
    """A number of few bits for a shape of any length."""
    return float(zlib.crc32(repr(shape).encode()))


class _Ranks:
    """The ranks of a communicator, and how they agree."""

    def __init__(self, comm: Communicator) -> None:
        size = getattr(comm, "Get_size", None)
        if not hasattr(comm, "Allgather") or not (callable(size) or hasattr(comm, "size")):
            raise TypeError(
                "comm must be a communicator with Allgather and Get_size (mpi4py's, "
                f"TorchProcessGroup), got {type(comm).__module__}.{type(comm).__qualname__}"
            )
        self._gather = comm.Allgather
        self.size = int(size() if callable(size) else comm.size)  # type: ignore[attr-defined]

    def gather(self, *parts: NDArray) -> NDArray:
        """Return a row for every rank, in rank order: its parts, flat and one after the other."""
        length = sum(part.size for part in parts)
        buffer = np.empty((self.size + 1, length), parts[0].dtype)
        own, table = buffer[-1], buffer[:-1]
        np.concatenate([part.reshape(-1) for part in parts], out=own)
        self._gather(own, table)
        return table

    def checked(self, check: Callable[[], tuple[_T, _Header]]) -> tuple[_T, list[int]]:
        """Run this rank's checks and hear of the others'; return what `check` did, and counts.

        The counts are the numbers of values per channel, by rank. What is wrong on one rank
        raises on all of them.
        """
        call: _T | None = None
        error: Exception | None = None
        try:
            call, header = check()
        except Exception as own:  # sent to the others before it is raised
            error, header = own, _Header(failed=1.0)
        row = np.zeros(_HEADER_LENGTH)
        row[: len(header)] = list(header)
        table = self.gather(row)
        agreed = table.view(np.int64)[:, :_AGREED]
        if error is not None or call is None or (agreed != agreed[0]).any():
            self._refuse(table, error)
        return call, [int(values) for values in table[:, _AGREED].tolist()]

    def _refuse(self, table: NDArray, error: Exception | None) -> NoReturn:
        """Raise this rank's own error, or what another's was, or what they disagree on."""
        headers = [_Header(*row[: _AGREED + 1].tolist()) for row in table]
        failed = [rank for rank, header in enumerate(headers) if header.failed]
        same_version = all(header.version == _Header().version for header in headers)
        if not failed or not same_version:
            if error is not None:
                raise error
            raise ValueError(_disagreement(headers))
        # Every rank knows that one has failed, and takes part in hearing why.
        text = "" if error is None else f"{type(error).__name__}: {error}"
        reason = text.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        reasons = self.gather(np.frombuffer(reason, np.uint8))
        if error is not None:
            raise error
        first = reasons[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RuntimeError(f"rank {failed[0]}{others} refused its arguments: {first}")


def _disagreement(headers: list[_Header]) -> str:
    """Say on what the ranks disagree, and name the first that has it otherwise than rank 0."""
    for field, (words, written) in _WORDS.items():
        values = [getattr(header, field) for header in headers]
        for rank, value in enumerate(values):
            if value != values[0]:
                return (
                    f"ranks disagree on {words}: {written(values[0])} on rank 0, "
                    f"{written(value)} on rank {rank}"
                )
    return "ranks disagree on their headers"  # bits of equal numbers: 0.0 and -0.0


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
        return SyncBatchNormForward(*alone, Frame(x, axis).m)
    ranks = _Ranks(comm)
    arguments = (
        x, gamma, beta, running_mean, running_var, True,
        momentum, eps, correction, axis, residual, activation, out,
    )  # fmt: skip
    call, counts = ranks.checked(lambda: _forward_call(*arguments))
    frame, gamma_, beta_, mean_, var_, residual_, eps, momentum, taken, relu, out_ = call
    _checks.enough_values(sum(counts), taken, "{} on all ranks together", sum(counts))
    moments = _merged(ranks, counts, Moments(frame.m, *flat_stats(frame)))
    rstd = moments.rstd(eps)
    target = apply_to(frame, gamma_, beta_, moments.mean, rstd, residual_, relu, out_)
    if mean_ is not None and var_ is not None and moments.count > 0:
        divisor = moments.count - taken
        frame.backend.move(mean_, var_, moments.mean, moments.m2, momentum, divisor)
    return SyncBatchNormForward(
        frame.settle(target, out),
        frame.home(frame.unflat(moments.mean)),
        frame.home(frame.unflat(rstd)),
        moments.count,
    )


def _forward_call(*arguments: Any) -> tuple[ForwardCall, _Header]:
    """Check what `batch_norm_forward` checks, and say what the ranks must agree on."""
    call = check_forward(*arguments, alone=False)
    frame, *_, eps, momentum, taken, relu, _ = call
    header = _Header(
        step=_FORWARD, eps=eps, momentum=momentum, correction=taken, **_common(frame, relu)
    )
    return call, header


def _merged(ranks: _Ranks, counts: list[int], own: Moments) -> Moments:
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
    ranks = _Ranks(comm)
    (call, m), counts = ranks.checked(
        lambda: _backward_call(
            count, dy, x, gamma, mean, rstd, beta, y, axis, activation, output_mask, out
        )
    )
    if sum(counts) != m:
        raise ValueError(f"count is {m}, but the ranks' x have {sum(counts)} values per channel")
    return _backward(ranks, call, m, out)


def _backward_call(count: int, *arguments: Any) -> tuple[tuple[BackwardCall, int], _Header]:
    """Check what `batch_norm_backward` checks, and count; say what the ranks must agree on."""
    call = check_backward(*arguments)
    frame, *_, relu, wanted, _ = call
    m = _checks.count(count, frame.x)
    header = _Header(step=_BACKWARD, total=float(m), dx=float(wanted[0]), **_common(frame, relu))
    return (call, m), header


def _backward(
    ranks: _Ranks, call: BackwardCall, m: int, out: Array | None
) -> SyncBatchNormBackward[Any]:
    """Compute what is wanted; the ranks agree on dx, the rest is each rank's own affair."""
    frame, dy, gamma, mean, rstd, beta, y, relu, wanted, out_ = call
    want_dx, want_dgamma, want_dbeta, want_dresidual = wanted
    dx = frame.target(out_) if want_dx else None
    dresidual = frame.target(None) if want_dresidual else None
    arrays = frame.view(dy), frame.view(frame.x)
    scale, *mask = frame.scale_and_mask(relu, gamma, beta, y)
    norm = scale, frame.statistic(mean), frame.statistic(rstd)
    own: NDArray = frame.memory.zeros((2, frame.channels))
    if (want_dx or want_dgamma or want_dbeta) and not frame.empty:
        own = frame.backend.backward_reduce(*arrays, *norm, *mask)
    sums = _added(ranks, own) if want_dx else None
    if (want_dx or want_dresidual) and not frame.empty:
        written = dx and dx.written, dresidual and dresidual.written
        frame.backend.backward_apply(*arrays, *norm, sums, m, *mask, *written)
    return SyncBatchNormBackward(
        dx and frame.settle(dx, out),
        frame.parameter_gradient(own[1], gamma) if want_dgamma else None,
        frame.parameter_gradient(own[0], gamma) if want_dbeta else None,
        dresidual and frame.settle(dresidual),
    )


def _added(ranks: _Ranks, own: NDArray) -> NDArray:
    """Both sums of backward over all ranks, added up in rank order."""
    total, *others = ranks.gather(own).reshape(ranks.size, *own.shape)
    with np.errstate(all="ignore"):  # a NaN or Inf in one channel is not worth a warning
        for sums in others:
            total += sums
    return np.asarray(total)


# The layer


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose batches are those of all ranks of a communicator together.

    In training every rank has to call `forward` and `backward`, in the same order; its batch may be
    of any size, or empty. Evaluation communicates nothing, and without running statistics uses
    those of the rank's own batch, as PyTorch's SyncBatchNorm does.

    Parameters
    ----------
    num_features : int or tuple of int
        Number of channels; see `BatchNorm`.
    comm : Communicator
        An mpi4py communicator, `TorchProcessGroup`, or anything else with ``Allgather``.
    **options
        All others of `BatchNorm`: eps, momentum, affine, track_running_stats, correction, axis,
        activation, dtype.

    Attributes
    ----------
    comm : Communicator
        As given.
    grads : dict of str to array
        This rank's own sums. Add them up over the ranks, or average, as all gradients.

    Raises
    ------
    TypeError, ValueError
        As `BatchNorm`; a comm that is no communicator.

    Notes
    -----
    The other attributes are `BatchNorm`'s. Running statistics, ``num_batches_tracked`` included,
    stay the same on every rank; parameters do as long as each rank updates them alike.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.distributed import SelfComm, SyncBatchNorm
    >>> layer = SyncBatchNorm(2, comm=SelfComm())
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> np.round(layer.forward(x), 3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.backward(np.ones_like(x))
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> layer.running_mean
    array([0.2, 2. ], dtype=float32)
    """

    def __init__(
        self, num_features: int | tuple[int, ...], *, comm: Communicator, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        _Ranks(comm)
        self.comm = comm
        self._count: int | None = None  # of the last forward, where that was synchronised

    def _normalise(
        self, x: Array, training: bool, **options: Any
    ) -> tuple[Array, Array, Array, int]:
        if not self.training and self._seen is None:
            alone = super()._normalise(x, training, **options)
            self._count = None
            return alone
        y, mean, rstd, self._count = sync_batch_norm_forward(x, comm=self.comm, **options)
        # A batch that is empty on this rank alone is one nevertheless.
        return y, mean, rstd, self._count * math.prod(mean.shape)

    def _differentiate(self, dy: Array, saved: Saved, **options: Any) -> tuple[Array | None, ...]:
        if self._count is None:
            return super()._differentiate(dy, saved, **options)
        return sync_batch_norm_backward(
            dy, saved.x, mean=saved.mean, rstd=saved.rstd, count=self._count, comm=self.comm,
            **options,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"
