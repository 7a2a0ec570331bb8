"""Tests for any communicator: each case runs on every rank and checks the results there.

`distributed_ranks.py` runs all cases over MPI and over torch.distributed, `test_distributed.py`
over threads (`ThreadComm`). Every rank draws the whole batch of a case from one seed and takes its
part.
"""

# ruff: noqa: N802  # names of MPI

import re
import zlib

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tolerances import (
    assert_same_bits,
    assert_within,
    channels_of,
    dx_tolerance,
    mean_tolerance,
    rstd_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import reference
from nbnorm.distributed import SyncBatchNorm, sync_batch_norm_backward, sync_batch_norm_forward
from nbnorm.population import recalibrate

# Samples per rank, by number of ranks: uneven; of three or four ranks, one has none.
BATCHES = {1: (7,), 2: (7, 25), 3: (0, 7, 20), 4: (7, 0, 20, 5)}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Batch:
    """A whole batch, the same on every rank, and the rank's part of it."""

    def __init__(self, comm, dtype="float64", plane=(3, 2), axis=1, offset=0.0, sizes=None):
        sizes = BATCHES[comm.Get_size()] if sizes is None else sizes
        end = np.cumsum(sizes)[comm.Get_rank()]
        self.part = slice(end - sizes[comm.Get_rank()], end)
        self.axis = axis
        rng = np.random.default_rng(7)
        shape = (sum(sizes), 4, *plane)
        self.x = np.asarray(rng.normal(size=shape) + offset, dtype)
        self.dy, self.residual = (np.asarray(rng.normal(size=shape), dtype) for _ in range(2))
        wide = "float64" if dtype == "float64" else "float32"
        channels = channels_of(shape, axis)
        self.gamma, self.beta = (rng.normal(size=channels).astype(wide) for _ in range(2))
        self.start = rng.normal(size=channels).astype(wide), np.ones(channels, wide)

    def running(self):
        return tuple(array.copy() for array in self.start)

    def own(self, array):
        return array[self.part]


def step(comm, batch, activation=None, with_residual=False, **options):
    """Return forward, backward and running statistics for the rank's part."""
    options = {"axis": batch.axis, "activation": activation, **options}
    running = batch.running()
    residual = batch.own(batch.residual) if with_residual else None
    x, dy = batch.own(batch.x), batch.own(batch.dy)
    forward = sync_batch_norm_forward(
        x, batch.gamma, batch.beta, *running, comm=comm, residual=residual, **options
    )
    backward = sync_batch_norm_backward(
        dy,
        x,
        batch.gamma,
        *forward[1:],
        comm=comm,
        beta=batch.beta,
        y=forward.y if with_residual else None,
        **options,
    )
    return forward, backward, running


def whole_step(batch, activation=None, with_residual=False):
    """Return the same for the whole batch, computed in this process alone."""
    options = {"axis": batch.axis, "activation": activation}
    running = batch.running()
    residual = batch.residual if with_residual else None
    forward = nbnorm.batch_norm_forward(
        batch.x, batch.gamma, batch.beta, *running, residual=residual, **options
    )
    y = forward.y if with_residual else None
    backward = nbnorm.batch_norm_backward(
        batch.dy, batch.x, batch.gamma, *forward[1:], beta=batch.beta, y=y, **options
    )
    return forward, backward, running


def gathered(comm, array):
    """Return every rank's array, in rank order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    table = np.empty((comm.Get_size(), flat.size), flat.dtype)
    comm.Allgather(flat.copy(), table)
    return table.reshape(comm.Get_size(), *np.shape(array))


def assert_same_on_all_ranks(comm, array, name):
    for rank, other in enumerate(gathered(comm, array)):
        assert_same_bits(other, np.asarray(array), f"{name} of rank {rank}")


def assert_is_the_whole(comm, batch, ours, whole):
    """Compare with one process, to 1e-12; statistics must have the same bits on all ranks."""
    (forward, backward, running), (ref, ref_back, ref_running) = ours, whole
    assert_allclose(forward.y, batch.own(ref.y), **CLOSE)
    assert_allclose(backward.dx, batch.own(ref_back.dx), **CLOSE)
    assert forward.count == batch.x.size // batch.gamma.size
    statistics = {"mean": forward.mean, "rstd": forward.rstd}
    statistics |= dict(zip(("running_mean", "running_var"), running, strict=True))
    expected = ref.mean, ref.rstd, *ref_running
    for (name, array), theirs in zip(statistics.items(), expected, strict=True):
        assert array.dtype == theirs.dtype
        assert_allclose(array, theirs, err_msg=name, **CLOSE)
        assert_same_on_all_ranks(comm, array, name)
    for name in ("dgamma", "dbeta"):
        total = gathered(comm, getattr(backward, name)).sum(axis=0)
        assert_allclose(total, getattr(ref_back, name), err_msg=name, **CLOSE)
    if ref_back.dresidual is None:
        assert backward.dresidual is None
    else:
        assert_allclose(backward.dresidual, batch.own(ref_back.dresidual), **CLOSE)


def compare(comm, *, activation=None, with_residual=False, **layout):
    batch = Batch(comm, **layout)
    ours = step(comm, batch, activation, with_residual)
    assert_is_the_whole(comm, batch, ours, whole_step(batch, activation, with_residual))


def bits_of_a_step(comm):
    """Return a checksum of the bits of all that this rank computes in a step."""
    forward, backward, running = step(comm, Batch(comm, "float32", plane=(20, 20)), "relu")
    arrays = *forward[:3], *backward[:3], *running
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


@case
def equals_one_process(comm):
    compare(comm)


@case
def equals_one_process_where_planes_are_large(comm):
    compare(comm, plane=(20, 20))


@case
def equals_one_process_with_relu(comm):
    compare(comm, activation="relu")


@case
def equals_one_process_with_residual(comm):
    compare(comm, with_residual=True)


@case
def equals_one_process_with_residual_and_relu(comm):
    compare(comm, with_residual=True, activation="relu")


@case
def equals_one_process_channels_last(comm):
    compare(comm, axis=-1, activation="relu")


@case
def equals_one_process_with_several_channel_axes(comm):
    compare(comm, axis=(1, 2, 3))


def against_oracle(comm, dtype, offset=0.0, **layout):
    """Compare with the oracle of the whole batch, within the tolerances of one process."""
    batch = Batch(comm, dtype, offset=offset, **layout)
    forward, backward, running = step(comm, batch)
    x, dy, axis = batch.x, batch.dy, batch.axis
    ref = reference.batch_norm_forward(x, batch.gamma, batch.beta, axis=axis)
    moments = reference.batch_norm_stats(x, axis=axis)
    # Use the returned float64 statistics: where the mean is large, its rounding is the main error.
    statistics = forward.mean, forward.rstd
    ref_back = reference.batch_norm_backward(dy, x, batch.gamma, *statistics, axis=axis)
    tolerance = y_tolerance(x, batch.gamma, batch.beta, ref.mean, ref.rstd, axis=axis)
    rows = np.broadcast_to(tolerance, x.shape)
    assert_within(forward.y, batch.own(ref.y), batch.own(rows), "y")
    assert_within(forward.mean, ref.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(forward.rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, x.dtype), "rstd")
    assert forward.y.dtype == backward.dx.dtype == x.dtype
    rows = dx_tolerance(dy, x, batch.gamma, *statistics, axis=axis)
    rows = stored(np.broadcast_to(rows, x.shape), ref_back.dx, x.dtype)
    assert_within(backward.dx, batch.own(ref_back.dx), batch.own(rows), "dx")
    tolerances = sums_tolerance(dy, x, *statistics, axis=axis)
    for name, tolerance in zip(("dbeta", "dgamma"), tolerances, strict=True):
        parts = gathered(comm, getattr(backward, name))
        assert parts.dtype == batch.gamma.dtype
        # Each rank's sum is rounded once to gamma's dtype.
        allowed = tolerance + sum(stored(0, part, part.dtype) for part in parts)
        assert_within(parts.sum(axis=0), getattr(ref_back, name), allowed, name)
    expected = batch.running()
    allowed = running_tolerance(moments, *expected, momentum=0.1, correction=1, dtype=x.dtype)
    nbnorm.update_running_stats(*expected, moments_of(moments))
    for array, theirs, error in zip(running, expected, allowed, strict=True):
        assert_within(array, theirs, stored(error, theirs, theirs.dtype), "running")
        assert_same_on_all_ranks(comm, array, "running")


def moments_of(moments):
    return nbnorm.Moments(
        moments.count, np.asarray(moments.mean, np.float64), np.asarray(moments.m2, np.float64)
    )


@case
def float32_is_as_accurate_as_in_one_process(comm):
    against_oracle(comm, "float32")


@case
def float16_is_as_accurate_as_in_one_process(comm):
    against_oracle(comm, "float16")


@case
def a_mean_of_a_million_deviations_costs_no_digits(comm):
    against_oracle(comm, "float32", offset=1e6)
    against_oracle(comm, "float64", offset=1e6)


@case
def results_go_where_they_are_wanted(comm):
    """Compute in place: y over x and dx over dy."""
    batch = Batch(comm)
    expected, expected_back, _ = step(comm, batch, "relu", with_residual=True)
    x, dy = (batch.own(array).copy() for array in (batch.x, batch.dy))
    kept = x.copy()
    options = {"activation": "relu", "comm": comm}
    forward = sync_batch_norm_forward(
        x, batch.gamma, batch.beta, residual=batch.own(batch.residual), out=x, **options
    )
    assert forward.y is x
    assert_same_bits(x, expected.y, "y")
    backward = sync_batch_norm_backward(
        dy, kept, batch.gamma, *forward[1:], y=x, beta=batch.beta, out=dy, **options
    )
    assert backward.dx is dy
    assert_same_bits(dy, expected_back.dx, "dx")
    assert_same_bits(backward.dresidual, expected_back.dresidual, "dresidual")


@case
def only_what_is_wanted_is_computed(comm):
    batch = Batch(comm)
    forward, full, _ = step(comm, batch, "relu", with_residual=True)
    for wants_dx in (True, False):
        # All ranks must agree on dx; each chooses its other gradients.
        odd = comm.Get_rank() % 2 == 1
        mask = (wants_dx, odd, not odd, odd)
        grads = sync_batch_norm_backward(
            batch.own(batch.dy), batch.own(batch.x), batch.gamma, *forward[1:], comm=comm,
            beta=batch.beta, y=forward.y, activation="relu", output_mask=mask,
        )  # fmt: skip
        for name, wanted, array in zip(grads._fields, mask, grads, strict=True):
            assert (array is not None) == wanted, name
            if wanted:
                assert_same_bits(array, getattr(full, name), name)


@case
def all_ranks_empty(comm):
    batch = Batch(comm, sizes=[0] * comm.Get_size())
    forward, backward, running = step(comm, batch, "relu", with_residual=True)
    assert forward.count == 0
    assert forward.y.shape == backward.dx.shape == backward.dresidual.shape == (0, 4, 3, 2)
    for array in (forward.mean, forward.rstd, backward.dgamma, backward.dbeta):
        assert_same_bits(array, np.zeros_like(array))
    for array, start in zip(running, batch.start, strict=True):
        assert_same_bits(array, start)


@case
def no_channels(comm):
    x = np.empty((3, 0, 2))
    y, mean, rstd, count = sync_batch_norm_forward(x, comm=comm)
    assert (y.shape, mean.shape, count) == ((3, 0, 2), (0,), 6 * comm.Get_size())
    assert sync_batch_norm_backward(y, x, None, mean, rstd, count, comm=comm).dx.shape == x.shape


@case
def one_value_a_rank_is_enough_if_there_are_two_ranks(comm):
    running = np.zeros(3), np.ones(3)
    x = np.full((1, 3), float(comm.Get_rank()))
    if comm.Get_size() > 1:
        _, mean, *_ = sync_batch_norm_forward(x, None, None, *running, comm=comm)
        assert_allclose(mean, (comm.Get_size() - 1) / 2)
        assert_same_bits(running[0], 0.1 * mean)
    running = np.zeros(3), np.ones(3)
    message = f"more than {comm.Get_size()} values? per channel.* got {comm.Get_size()} on all"
    with pytest.raises(ValueError, match=message):
        sync_batch_norm_forward(
            x, None, None, *running, correction=comm.Get_size(), comm=comm, out=x
        )
    assert_same_bits(running[0], np.zeros(3))
    assert_same_bits(x, np.full((1, 3), float(comm.Get_rank())))


@case
def not_a_number_stays_in_its_channel(comm):
    batch = Batch(comm)
    clean, clean_back, _ = step(comm, batch)
    batch.x[-1, 2, 0, 0] = np.nan  # of the last rank
    batch.dy[-1, 3, 0, 0] = np.inf
    forward, backward, running = step(comm, batch)
    assert np.isnan(forward.mean[2])
    assert np.isnan(running[0][2])
    assert np.isnan(forward.y[:, 2]).all()
    assert_same_bits(np.delete(forward.y, 2, axis=1), np.delete(clean.y, 2, axis=1))
    assert_same_bits(backward.dx[:, :2], clean_back.dx[:, :2])


class Silent:
    """A communicator whose use is an error."""

    def Get_size(self):
        raise AssertionError("asked for the size")

    def Allgather(self, sendbuf, recvbuf):
        raise AssertionError("communicated")


@case
def evaluation_is_each_rank_on_its_own(comm):
    batch = Batch(comm)
    x, dy = batch.own(batch.x), batch.own(batch.dy)
    running = batch.running()
    options = {"training": False, "activation": "relu"}
    ours = sync_batch_norm_forward(x, batch.gamma, batch.beta, *running, comm=Silent(), **options)
    ref = nbnorm.batch_norm_forward(x, batch.gamma, batch.beta, *batch.start, **options)
    back = sync_batch_norm_backward(
        dy, x, batch.gamma, *ours[1:], comm=Silent(), beta=batch.beta, **options
    )
    ref_back = nbnorm.batch_norm_backward(dy, x, batch.gamma, *ref[1:], beta=batch.beta, **options)
    for array, theirs in zip(
        (*ours[:3], *back[:3], *running), (*ref, *ref_back[:3], *batch.start), strict=True
    ):
        assert_same_bits(array, theirs)
    assert ours.count == x.size // 4


def assert_steps_agree(comm, batch, layer, single, whole, residual):
    """Take a step of a layer on this rank's part and of one on the whole batch; compare them."""
    added = () if residual is None else (residual,)
    y = layer.forward(batch.own(whole), *map(batch.own, added))
    assert_allclose(y, batch.own(single.forward(whole, *added)), **CLOSE)
    ours, theirs = layer.backward(batch.own(batch.dy)), single.backward(batch.dy)
    for array, expected in zip(ours, theirs, strict=True) if added else [(ours, theirs)]:
        assert_allclose(array, batch.own(expected), **CLOSE)
    for name, grad in layer.grads.items():
        assert_allclose(gathered(comm, grad).sum(axis=0), single.grads[name], **CLOSE)


def assert_states_agree(comm, layer, single):
    for name, array in layer.state_dict().items():
        assert_allclose(array, single.state_dict()[name], err_msg=name, **CLOSE)
        assert_same_on_all_ranks(comm, array, name)


@case
def statistics_add_up_over_steps(comm):
    """On batches that are empty on some rank, the layer equals one process's layer."""
    for options in ({}, {"momentum": None}, {"activation": "relu", "correction": 0}):
        batch = Batch(comm)
        layer = SyncBatchNorm(4, comm=comm, dtype=np.float64, **options)
        single = nbnorm.BatchNorm(4, dtype=np.float64, **options)
        with_residual = "activation" in options
        for seed in range(3):
            whole = np.random.default_rng(seed).normal(size=batch.x.shape)
            residual = batch.residual if with_residual else None
            assert_steps_agree(comm, batch, layer, single, whole, residual)
        assert_states_agree(comm, layer, single)


@case
def renormalises_with_the_statistics_of_all_ranks(comm):
    """Empty batches on some rank, bounds that clip and bounds that follow a schedule."""
    renorms = nbnorm.Renorm(1.05, 0.1), nbnorm.Renorm(nbnorm.Ramp(0, 2, 1, 3), np.inf)
    for renorm in renorms:
        for with_residual in (False, True):
            options = {"renorm": renorm, "dtype": np.float64, "momentum": 0.3}
            options |= {"activation": "relu" if with_residual else None}
            batch = Batch(comm)
            layer = SyncBatchNorm(4, comm=comm, **options)
            single = nbnorm.BatchNorm(4, **options)
            for one in (layer, single):
                one.parameters["weight"][...], one.parameters["bias"][...] = batch.gamma, batch.beta
            for seed in range(3):
                whole = np.random.default_rng(seed).normal(2 * seed, 1 + seed, batch.x.shape)
                residual = batch.residual if with_residual else None
                assert_steps_agree(comm, batch, layer, single, whole, residual)
            assert_states_agree(comm, layer, single)


@case
def renormalises_no_values(comm):
    layer = SyncBatchNorm(4, comm=comm, renorm=nbnorm.Renorm(3, 5))
    x = np.ones((0, 4, 2), np.float32)
    assert layer.forward(x).shape == layer.backward(x).shape == x.shape
    for array in (layer.running_mean, *layer.grads.values()):
        assert_same_bits(array, np.zeros(4, np.float32))
    assert layer.num_batches_tracked == 0


@case
def recalibration_takes_what_all_ranks_have_seen(comm):
    steps = [Batch(comm, offset=offset) for offset in (0.0, 3.0)]
    layer = SyncBatchNorm(4, comm=comm, dtype=np.float64).eval()
    with recalibrate(layer):
        for batch in steps:
            layer.forward(batch.own(batch.x))
    ref = reference.batch_norm_stats(np.concatenate([batch.x for batch in steps]))
    var = ref.m2 / (ref.count - 1)
    assert_allclose(layer.running_mean, ref.mean.astype(float), **CLOSE)
    assert_allclose(layer.running_var, var.astype(float), **CLOSE)
    assert not layer.training
    assert layer.num_batches_tracked == 0
    everywhere = np.empty((comm.Get_size(), 8))
    comm.Allgather(np.concatenate([layer.running_mean, layer.running_var]), everywhere)
    for rank in everywhere:
        assert_same_bits(rank, everywhere[0], "running statistics")


# Errors: all ranks raise, none waits, and the next call succeeds.


def refused_on_the_last_rank(comm, call, error, match):
    """Pass wrong arguments on the last rank; check all errors, and that the next call works."""
    last = comm.Get_size() - 1
    if comm.Get_rank() == last:
        with pytest.raises(error, match=f"^{match}"):
            call(True)
    else:
        whose = rf"^rank {last} has invalid arguments: {error.__name__}: {match}"
        with pytest.raises(RuntimeError, match=whose):
            call(False)
    call(False)


def forward_with(comm, **spoiled):
    """Return a call with valid or spoilt arguments; an error must leave the arrays unchanged."""
    batch = Batch(comm)

    def call(wrong):
        mean, var = batch.running()
        x = batch.own(batch.x).copy()
        arguments = {"x": x, "gamma": batch.gamma, "beta": batch.beta, "running_mean": mean}
        arguments |= {"running_var": var, "out": x, **(spoiled if wrong else {})}
        try:
            sync_batch_norm_forward(**arguments, comm=comm)
        except Exception:
            assert_same_bits(mean, batch.start[0])
            assert_same_bits(var, batch.start[1])
            assert_same_bits(x, batch.own(batch.x))
            raise

    return call


def backward_with(comm, **spoiled):
    batch = Batch(comm)
    forward, *_ = step(comm, batch)

    def call(wrong):
        dy = batch.own(batch.dy).copy()
        arguments = {"dy": dy, "x": batch.own(batch.x), "gamma": batch.gamma}
        arguments |= {**forward._asdict(), "out": dy, **(spoiled if wrong else {})}
        del arguments["y"]
        try:
            sync_batch_norm_backward(**arguments, comm=comm)
        except Exception:
            assert_same_bits(dy, batch.own(batch.dy))
            raise

    return call


@case
def refuses_x_that_is_not_floating(comm):
    call = forward_with(comm, x=np.zeros((3, 4, 3, 2), int))
    refused_on_the_last_rank(comm, call, TypeError, "x has dtype int64")


@case
def refuses_what_is_no_array(comm):
    refused_on_the_last_rank(comm, forward_with(comm, x=None), TypeError, "x must be a NumPy array")


@case
def refuses_gamma_of_another_shape(comm):
    call = forward_with(comm, gamma=np.ones(3))
    refused_on_the_last_rank(comm, call, ValueError, re.escape("gamma has shape (3,), expected"))


@case
def refuses_a_missing_running_var(comm):
    call = forward_with(comm, running_var=None)
    refused_on_the_last_rank(comm, call, ValueError, "running_var is None; pass both")


@case
def refuses_an_out_of_another_shape(comm):
    call = forward_with(comm, out=np.ones((1, 4)))
    refused_on_the_last_rank(comm, call, ValueError, "out has shape")


@case
def refuses_a_reason_longer_than_its_message(comm):
    call = forward_with(comm, activation="é" * 1000)
    refused_on_the_last_rank(comm, call, ValueError, "activation must be None, an")


@case
def refuses_statistics_of_another_shape(comm):
    call = backward_with(comm, rstd=np.ones((4, 1)))
    refused_on_the_last_rank(comm, call, ValueError, "rstd has shape")


@case
def refuses_a_count_that_is_no_count(comm):
    call = backward_with(comm, count="many")
    refused_on_the_last_rank(comm, call, TypeError, "count must be an int, got 'many'")


def layer_with(comm, spoil, **options):
    """Return a call of a layer's forward, given whether `spoil` makes its arguments invalid."""
    batch = Batch(comm)

    def call(wrong):
        layer = SyncBatchNorm(4, comm=comm, dtype=np.float64, **options)
        given = (spoil(layer) if wrong else None) or {}
        before = layer.state_dict()
        try:
            layer.forward(batch.own(batch.x).copy(), **given)
        except Exception:
            for name, array in layer.state_dict().items():
                assert_same_bits(array, before[name], name)
            raise

    return call


@case
def refuses_on_all_ranks_what_a_layer_refuses(comm):
    """A layer checks before any communication; the other ranks must still learn of the error."""

    def momentum(layer):
        layer.momentum = 1.5

    def gamma(layer):
        layer.parameters["weight"][1] = 0

    def bounds(layer):
        layer.renorm = nbnorm.Renorm(0.5, 1)

    def schedule(layer):
        layer.renorm = nbnorm.Renorm(lambda batch: 1 / batch, 1)

    renorm = {"renorm": nbnorm.Renorm(3, 5)}
    for spoil, options, error, match in (
        (momentum, {"debias": True}, ValueError, re.escape("momentum must be in (0, 1]")),
        (gamma, {"inplace": True}, ValueError, "gamma is 0"),
        (lambda _: {"groups": 2}, {}, ValueError, "groups cannot be combined"),
        (lambda _: {"groups": 2}, renorm, ValueError, "groups cannot be combined with renorm"),
        (bounds, renorm, ValueError, "r_max must be at least 1, got 0.5"),
        (schedule, renorm, ZeroDivisionError, "division by zero"),
    ):
        refused_on_the_last_rank(comm, layer_with(comm, spoil, **options), error, match)


@case
def a_layer_alone_refuses_alone(comm):
    layer = SyncBatchNorm(4, comm=comm, inplace=True).eval()
    layer.comm = Silent()
    with pytest.raises(ValueError, match="residual is given"):
        layer.forward(np.ones((3, 4)), np.ones((3, 4)))


@case
def ranks_of_different_bounds(comm):
    def wider(layer):
        layer.renorm = nbnorm.Renorm(4, 5)

    def without(layer):
        layer.renorm = None

    options = {"renorm": nbnorm.Renorm(3, 5)}
    call = layer_with(comm, wider, **options)
    disagree(comm, call, "on r_max of renorm: 3.0 on rank 0, 4.0 on rank {last}$")
    call = layer_with(comm, without, **options)
    disagree(comm, call, "on r_max of renorm: 3.0 on rank 0, none on rank {last}$")


@case
def several_wrong_ranks_each_raise_their_own_error(comm):
    batch = Batch(comm)
    rank, size = comm.Get_rank(), comm.Get_size()
    wrong = {"eps": -1.0} if rank == 0 else {"momentum": "x"} if rank == size - 1 else {}
    error, match = {0: (ValueError, "^eps"), size - 1: (TypeError, "^momentum")}.get(
        rank, (RuntimeError, r"^rank 0 \(and 1 more\) has invalid arguments: ValueError: eps")
    )
    if size == 1:
        error, match = ValueError, "^eps"
    with pytest.raises(error, match=match):
        sync_batch_norm_forward(batch.own(batch.x), comm=comm, **wrong)
    step(comm, batch)


def disagree(comm, call, match):
    """Call differently on the last rank; every rank must raise the same error."""
    last = comm.Get_size() - 1
    if last == 0:
        return
    with pytest.raises(ValueError, match=match.format(last=last)):
        call(comm.Get_rank() == last)
    call(False)


@case
def ranks_of_different_dtypes(comm):
    call = forward_with(comm, x=np.zeros((3, 4, 3, 2), "float32"), out=None)
    match = r"^ranks disagree on the dtype of x: float64 on rank 0, float32 on rank {last}$"
    disagree(comm, call, match)


@case
def ranks_of_different_channels(comm):
    fields = dict.fromkeys(("gamma", "beta", "running_mean", "running_var", "out"))
    call = forward_with(comm, x=np.zeros((2, 5, 3, 2)), **fields)
    disagree(comm, call, "the number of channels: 4 on rank 0, 5 on rank {last}$")


@case
def ranks_of_as_many_channels_in_another_shape(comm):
    def call(other):
        shape = (2, 3, 5) if other else (3, 2, 5)
        sync_batch_norm_forward(np.zeros((4, *shape)), axis=(1, 2), comm=comm)

    disagree(comm, call, "the shape of the channel axes")


@case
def ranks_of_different_options(comm):
    disagree(comm, forward_with(comm, eps=1e-3), "on eps: 1e-05 on rank 0, 0.001 on rank {last}$")
    disagree(comm, forward_with(comm, momentum=0.2), "on momentum: 0.1 on rank 0, 0.2 on")
    disagree(comm, forward_with(comm, correction=0), "on correction: 1 on rank 0, 0 on rank {last}")
    disagree(comm, forward_with(comm, activation="relu"), "on activation: None on rank 0, 'relu'")


@case
def ranks_in_different_passes(comm):
    batch = Batch(comm)
    ways = forward_with(comm), backward_with(comm)
    x = batch.own(batch.x)
    forward = sync_batch_norm_forward(x, comm=comm)

    def call(other):
        if other:
            sync_batch_norm_backward(x, x, None, *forward[1:], comm=comm)
        else:
            sync_batch_norm_forward(x, comm=comm)

    disagree(comm, call, "the pass: forward on rank 0, backward on rank {last}")
    for way in ways:
        way(False)


@case
def ranks_of_different_counts_and_wishes(comm):
    disagree(comm, backward_with(comm, count=5), r"on count: \d+ on rank 0, 5 on rank {last}$")
    call = backward_with(comm, output_mask=(False, True, True, True))
    disagree(comm, call, "whether output_mask wants dx: True on rank 0, False on rank {last}$")


@case
def a_count_that_all_ranks_have_wrong(comm):
    batch = Batch(comm)
    call = backward_with(comm, count=10_000)
    with pytest.raises(ValueError, match=f"count is 10000, .* {batch.x.size // 4} values per"):
        call(True)
    call(False)


@case
def the_layer_is_as_it_was_after_an_error(comm):
    batch = Batch(comm)
    layer = SyncBatchNorm(4, comm=comm, dtype=np.float64)
    before = layer.state_dict()
    own = batch.own(batch.x)
    last = comm.Get_rank() == comm.Get_size() - 1
    with pytest.raises((TypeError, RuntimeError), match="x has dtype int64"):
        layer.forward(own.astype(int) if last else own)
    for name, array in layer.state_dict().items():
        assert_same_bits(array, before[name], name)
    layer.forward(own)
    grads = dict(layer.grads)
    with pytest.raises((ValueError, RuntimeError), match="dy has shape"):
        layer.backward(np.ones((1, 4)) if last else own)
    assert all(layer.grads[name] is grad for name, grad in grads.items())
    assert layer.backward(own).shape == own.shape
