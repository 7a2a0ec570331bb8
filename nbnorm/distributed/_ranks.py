"""Communicators, and the agreement of their ranks on the arguments before any computation."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from nbnorm._arrays import DTYPES
from nbnorm._frame import Frame
from nbnorm._typing import NDArray
from nbnorm.activations import NAMES, Activation, Fused

_T = TypeVar("_T")


# Communicators


class Communicator(Protocol):
    """Interface of a communicator: mpi4py's upper-case ``Allgather``, and a size.

    The size is ``Get_size()`` or ``size``. No other method is called. In particular, ``Allreduce``
    is not: its order of summation depends on the implementation and may differ between ranks.
    """

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> Any:  # noqa: N802
        """Write every rank's `sendbuf` into the rows of every rank's `recvbuf`, in rank order."""


class SelfComm:
    """Communicator of a single process, for programs that also run without MPI.

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
    """A ``torch.distributed`` process group as a communicator; its constructor imports torch.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        A group whose backend gathers tensors in CPU memory (gloo). None means the default group,
        which must be initialised.

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


class Header(NamedTuple):
    """What each rank sends before any computation; all fields but the last must agree."""

    version: float = 3.0
    failed: float = 0.0
    step: float = 0.0
    channels: float = 0.0
    channel_axes: float = 0.0
    dtype: float = 0.0
    activation: float = 0.0
    parameters: float = 0.0  # of the activation
    eps: float = 0.0
    momentum: float = 0.0
    correction: float = 0.0
    total: float = 0.0
    dx: float = 0.0
    r_max: float = 0.0  # of batch renormalization
    d_max: float = 0.0
    values: float = 0.0  # values per channel of this rank's x


# The same in all versions: ranks of different versions must be able to compare the first field.
_HEADER_LENGTH = 16
_REASON_BYTES = 512
FORWARD, BACKWARD = 1.0, 2.0
_AGREED = len(Header._fields) - 1
_ACTIVATIONS = ("None", *map(repr, NAMES), "a user's function")
_DTYPE_CODES = {np.dtype(name): float(code) for code, name in enumerate(DTYPES[:3])}

# The name of each field in error messages, and a function that formats its value.
_WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "version": ("the version of the protocol", "{:g}".format),
    "step": ("the pass", {FORWARD: "forward", BACKWARD: "backward"}.__getitem__),
    "channels": ("the number of channels", "{:.0f}".format),
    "channel_axes": ("the shape of the channel axes", "checksum {:.0f}".format),
    "dtype": ("the dtype of x", lambda code: DTYPES[int(code)]),
    "activation": ("activation", lambda code: _ACTIVATIONS[int(code)]),
    "parameters": ("the parameters of activation", "checksum {:.0f}".format),
    "eps": ("eps", repr),
    "momentum": ("momentum", repr),
    "correction": ("correction", "{:g}".format),
    "total": ("count", "{:.0f}".format),
    "dx": ("whether output_mask wants dx", lambda wanted: str(bool(wanted))),
    "r_max": ("r_max of renorm", lambda bound: repr(bound) if bound else "none"),
    "d_max": ("d_max of renorm", repr),
}


def common_fields(frame: Frame, activation: Fused) -> dict[str, float]:
    """Return the header fields common to both passes."""
    if not isinstance(frame.x, np.ndarray):
        raise TypeError("x is in GPU memory, expected CPU memory, where ranks synchronise arrays")
    return {
        "channels": float(frame.channels),
        "channel_axes": _checksum(frame.channel_shape),
        "dtype": _DTYPE_CODES.get(frame.x.dtype, float(DTYPES.index("bfloat16"))),
        "activation": float(_code_of(activation)),
        "parameters": _checksum(getattr(activation, "parameters", ())),
        "values": float(frame.m),
    }


def _code_of(activation: Fused) -> int:
    """Return the place of an activation in `_ACTIVATIONS`."""
    if activation is None:
        return 0
    if isinstance(activation, Activation) and activation.functions is not None:
        return len(_ACTIVATIONS) - 1
    return 1 + NAMES.index(activation if isinstance(activation, str) else activation.name)


@lru_cache(maxsize=1024)
def _checksum(numbers: tuple[float, ...]) -> float:
    """Return a 32-bit checksum of a shape or of parameters of any number, as a float."""
    return float(zlib.crc32(repr(numbers).encode()))


class Ranks:
    """The ranks of a communicator, which exchange arrays and agree on arguments."""

    def __init__(self, comm: Communicator) -> None:
        size = getattr(comm, "Get_size", None)
        if not hasattr(comm, "Allgather") or not (callable(size) or hasattr(comm, "size")):
            raise TypeError(
                "comm must be a communicator with Allgather and Get_size (mpi4py's, "
                "TorchProcessGroup, ThreadComm), got "
                f"{type(comm).__module__}.{type(comm).__qualname__}"
            )
        self._gather = comm.Allgather
        self.size = int(size() if callable(size) else comm.size)  # type: ignore[attr-defined]

    def gather(self, *parts: NDArray) -> NDArray:
        """Return a row per rank, in rank order: the rank's parts, flattened and concatenated."""
        length = sum(part.size for part in parts)
        buffer = np.empty((self.size + 1, length), parts[0].dtype)
        own, table = buffer[-1], buffer[:-1]
        np.concatenate([part.reshape(-1) for part in parts], out=own)
        self._gather(own, table)
        return table

    def checked(self, check: Callable[[], tuple[_T, Header]]) -> tuple[_T, list[int]]:
        """Run this rank's checks and exchange results; return the result of `check` and counts.

        The counts are the numbers of values per channel, by rank. Invalid arguments on one rank
        raise on every rank.
        """
        call: _T | None = None
        error: Exception | None = None
        try:
            call, header = check()
        except Exception as own:  # tell the other ranks before raising
            error, header = own, Header(failed=1.0)
        row = np.zeros(_HEADER_LENGTH)
        row[: len(header)] = list(header)
        table = self.gather(row)
        agreed = table.view(np.int64)[:, :_AGREED]
        if error is not None or call is None or (agreed != agreed[0]).any():
            self._refuse(table, error)
        return call, [int(values) for values in table[:, _AGREED].tolist()]

    def refuse(self, error: Exception) -> NoReturn:
        """Raise `error`, after telling the other ranks, which wait in `checked`."""

        def check() -> NoReturn:
            raise error

        self.checked(check)
        raise error

    def _refuse(self, table: NDArray, error: Exception | None) -> NoReturn:
        """Raise this rank's error, or else report another rank's error or a disagreement."""
        headers = [Header(*row[: _AGREED + 1].tolist()) for row in table]
        failed = [rank for rank, header in enumerate(headers) if header.failed]
        same_version = all(header.version == Header().version for header in headers)
        if not failed or not same_version:
            if error is not None:
                raise error
            raise ValueError(_disagreement(headers))
        # Every rank knows that one has failed, so all take part in gathering the reason.
        text = "" if error is None else f"{type(error).__name__}: {error}"
        reason = text.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        reasons = self.gather(np.frombuffer(reason, np.uint8))
        if error is not None:
            raise error
        first = reasons[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RuntimeError(f"rank {failed[0]}{others} has invalid arguments: {first}")


def _disagreement(headers: list[Header]) -> str:
    """Return a message that names the field and the first rank that differs from rank 0."""
    for field, (words, written) in _WORDS.items():
        values = [getattr(header, field) for header in headers]
        for rank, value in enumerate(values):
            if value != values[0]:
                return (
                    f"ranks disagree on {words}: {written(values[0])} on rank 0, "
                    f"{written(value)} on rank {rank}"
                )
    return "ranks disagree on their headers"  # equal numbers with different bits: 0.0 and -0.0
