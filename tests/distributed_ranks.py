"""Run every case as one of several ranks, over a real communicator; print the cases that pass.

    mpiexec -n 4 python tests/distributed_ranks.py mpi 4
    python tests/distributed_ranks.py gloo 2 RANK FILE

The first rank prints a line for each case that all ranks have finished. If a case fails on a rank,
all ranks end, because the others would wait for it.
"""

import os
import sys
import traceback
import warnings

import numpy as np
from distributed_cases import CASES, CLOSE, Batch, bits_of_a_step, case, whole_step

from nbnorm.distributed import (
    TorchProcessGroup,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)


def mpi():
    """Return MPI's communicator and a function that ends all ranks."""
    from mpi4py import MPI

    return MPI.COMM_WORLD, lambda: MPI.COMM_WORLD.Abort(1)


def gloo(rank, size, file):
    """Return torch.distributed's communicator, and a function that ends this rank."""
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size
    )
    case(tensors_in_and_out)
    return TorchProcessGroup(), lambda: os._exit(1)


def tensors_in_and_out(comm):
    """Tensors give tensors, with the whole batch's results."""
    import torch

    batch = Batch(comm)
    ref, ref_back, ref_running = whole_step(batch, "relu")
    x, dy = (torch.tensor(batch.own(array)) for array in (batch.x, batch.dy))
    gamma, beta, *running = map(
        torch.tensor, (batch.gamma, batch.beta, *(array.copy() for array in batch.start))
    )
    forward = sync_batch_norm_forward(x, gamma, beta, *running, activation="relu", comm=comm)
    backward = sync_batch_norm_backward(
        dy, x, gamma, *forward[1:], beta=beta, activation="relu", comm=comm
    )
    results = (*forward[:3], *running, backward.dx)
    assert all(isinstance(result, torch.Tensor) for result in (*results, *backward[:3]))
    expected = batch.own(ref.y), *ref[1:], *ref_running, batch.own(ref_back.dx)
    for result, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.numpy(), theirs, **CLOSE)


def main(kind, size, *rest):
    """Run the cases in order, on all ranks together."""
    comm, end = mpi() if kind == "mpi" else gloo(int(rest[0]), int(size), rest[1])
    warnings.simplefilter("error")
    rank = comm.Get_rank()
    try:
        assert comm.Get_size() == int(size), (
            f"{comm.Get_size()} ranks, not {size}: does mpiexec belong to the MPI of mpi4py?"
        )
        for name, function in CASES.items():
            function(comm)
            comm.Allgather(np.zeros(1), np.zeros((int(size), 1)))  # wait for all ranks
            if rank == 0:
                print(f"passed {name}", flush=True)
        bits = bits_of_a_step(comm)
        if rank == 0:
            print(f"bits {bits}", flush=True)
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        end()


if __name__ == "__main__":
    main(*sys.argv[1:])
