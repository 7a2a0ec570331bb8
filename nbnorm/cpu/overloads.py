"""Overloads: what Numba compiles where a user's compiled function calls one of nbnorm's.

A call is checked as in Python, by types at compile time and by values at run time. The units of
kernels.py then compute it, in their usual order, in the calling thread: the bits are those of a
call from Python. x is C-contiguous, so (N, C, S) follows from its shape.

`forward`, `inference` and so on receive the types of a call's arguments (None, or the default, for
those left out) and return the function to compile. Messages name the argument, as in Python, but
contain no values: compiled functions can only raise constants.
"""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from numba import types
from numba.core.errors import TypingError

from nbnorm import functional, moments
from nbnorm._layout import PLANE
from nbnorm.cpu import _CACHES, kernels
from nbnorm.cpu.channel import finish_moments, finish_sums
from nbnorm.cpu.intrinsics import address_of, row_of
from nbnorm.cpu.jit import by_types, named, ordered, overloaded
from nbnorm.cpu.plan import past_cache, serial

BatchNormForward, BatchNormBackward = functional.BatchNormForward, functional.BatchNormBackward
Moments = moments.Moments
_OWN, _LAST = _CACHES

# Checks of types, at compile time.


def _array(kind, name, dims, dims_in_words, written=False):
    """Refuse anything but a C-contiguous array of floats, which kernels can read in place."""
    if isinstance(kind, types.Optional):
        raise TypingError(
            f"{name} has an optional type, expected an array or None known at compile time"
        )
    if not isinstance(kind, types.Array) or kind.dtype not in (types.float32, types.float64):
        raise TypingError(
            f"{name} must be an array of float32 or float64 in compiled code, got {kind}"
        )
    if kind.ndim not in dims:
        raise TypingError(f"{name} must have {dims_in_words} in compiled code, got {kind.ndim}")
    if kind.layout != "C" or not kind.aligned:
        raise TypingError(
            f"{name} must be C-contiguous in compiled code; pass np.ascontiguousarray({name})"
        )
    if written and not kind.mutable:
        raise TypingError(f"{name} is read-only; it is updated in place")


def _tensor(x):
    _array(x, "x", range(2, 6), "2 to 5 axes")


def _like_x(kind, name, x):
    _array(kind, name, (x.ndim,), f"{x.ndim} axes, as x has,")
    if kind.dtype != x.dtype:
        raise TypingError(f"{name} has dtype {kind.dtype}, expected {x.dtype}, the dtype of x")


def _per_channel(written=False, **kinds):
    for name, kind in kinds.items():
        _array(kind, name, (1,), "one axis", written)


def _given(kind):
    return not (kind is None or isinstance(kind, types.NoneType))


def _where_given(written=False, **kinds):
    _per_channel(written, **{name: kind for name, kind in kinds.items() if _given(kind)})


def _numbers(**kinds):
    for name, kind in kinds.items():
        known = (bool, int, float, types.Boolean, types.Integer, types.Float)
        if not isinstance(kind, known):
            raise TypingError(f"{name} must be a real number, got {kind}")


def _whole(**kinds):
    for name, kind in kinds.items():
        if not isinstance(kind, types.Integer):
            raise TypingError(f"{name} must be an int, got {kind}")


def _literal(kind):
    return kind.literal_value if isinstance(kind, types.Literal) else kind


def _channels_last(axis, x):
    """Whether the channels are x's last axis."""
    axis = _literal(axis)
    if type(axis) is not int or axis not in (1, -1):
        raise TypingError(
            f"axis must be 1 or -1, written out where the function is called, in compiled code, "
            f"got {axis}"
        )
    return axis == -1 or x.ndim == 2


def _floor(activation):
    """Lower bound of y."""
    return 0.0 if _relu(activation) else -np.inf


def _relu(activation):
    activation = _literal(activation)
    if activation != "relu" and _given(activation):
        raise TypingError(
            f"activation must be None or 'relu', written out where the function is called, in "
            f"compiled code, got {activation}"
        )
    return activation == "relu"


def _known(kind):
    """The value of `training`; None if it is known only at run time."""
    training = _literal(kind)
    if type(training) is bool:
        return training
    if not isinstance(training, types.Boolean):
        raise TypingError(f"training must be a bool, got {training}")
    return None


def _refused(**kinds):
    for name, kind in kinds.items():
        if _given(kind):
            raise TypingError(f"{name} is not supported in compiled code; call nbnorm from Python")


def _for_mask(relu, **kinds):
    """Refuse ReLU if an argument that its mask depends on is left out.

    None has to be passed explicitly: it is not the same as having forgotten the argument.
    """
    for name, kind in kinds.items():
        if relu and kind is None:
            raise TypingError(
                f"{name} is not given, and the mask of activation='relu' depends on it; pass the "
                f"forward's {name}= ({name}=None if it had none)"
            )


def _dtype(x, *parameters):
    """np.float64 if any of these types is a float64 array, else np.float32; None is skipped.

    For x, gamma and beta this is the dtype in which `Frame.scale_and_shift` passes parameters.
    """
    wide = any(_given(kind) and kind.dtype == types.float64 for kind in (x, *parameters))
    return np.float64 if wide else np.float32


# Checks of values, at run time. gamma and the like are rows (see `row_of`) or None.


@by_types
def wrong_size(values, C):
    """Whether `values` does not have one value for every channel."""
    if isinstance(values, types.NoneType):
        return lambda values, C: False
    return lambda values, C: values.size != C


@by_types
def overlap(a, b):
    """Whether two rows share a byte."""
    if isinstance(a, types.NoneType) or isinstance(b, types.NoneType):
        return lambda a, b: False

    def overlap(a, b):
        begin, other = address_of(a), address_of(b)
        return begin < other + b.nbytes and other < begin + a.nbytes and a.size * b.size > 0

    return overlap


@ordered
def check_parameters(C, gamma, beta):
    """Refuse gamma or beta of the wrong size."""
    if wrong_size(gamma, C):
        raise ValueError("gamma must have one value for every channel of x")
    if wrong_size(beta, C):
        raise ValueError("beta must have one value for every channel of x")


@ordered
def check_mean(C, mean):
    """Refuse a mean of the wrong size."""
    if wrong_size(mean, C):
        raise ValueError("mean must have one value for every channel of x")


@ordered
def check_rstd(C, rstd):
    """Refuse an rstd of the wrong size."""
    if wrong_size(rstd, C):
        raise ValueError("rstd must have one value for every channel of x")


@ordered
def check_eps(eps):
    """Refuse an eps that is negative or not finite."""
    if not 0 <= eps < np.inf:
        raise ValueError("eps must be finite and not negative")


@ordered
def check_moves(m, momentum, correction, training):
    """Refuse numbers with which running statistics cannot be updated."""
    if not np.abs(momentum) < np.inf:
        raise ValueError("momentum must be finite")
    if not np.abs(correction) < np.inf:
        raise ValueError("correction must be finite")
    if training and 0 < m <= correction:
        raise ValueError("expected more values per channel than `correction` when training")


@ordered
def check_running(C, running_mean, running_var, x, gamma, beta, written):
    """Refuse running statistics of the wrong size or, if `written`, in shared memory."""
    if wrong_size(running_mean, C):
        raise ValueError("running_mean must have one value for every channel of x")
    if wrong_size(running_var, C):
        raise ValueError("running_var must have one value for every channel of x")
    if written:
        check_apart(running_mean, running_var, x)
        check_apart(running_mean, running_var, gamma)
        check_apart(running_mean, running_var, beta)


@ordered
def check_apart(running_mean, running_var, other):
    """Refuse running statistics that share memory with each other or with another array."""
    if overlap(running_mean, running_var):
        raise ValueError("running_mean and running_var share memory, and both are written")
    if overlap(running_mean, other) or overlap(running_var, other):
        raise ValueError("running statistics share memory with another array, and are written")


@by_types
def check_same(array, x):
    """Refuse a dy whose shape is not x's."""

    def check_same(array, x):
        if array.shape != x.shape:
            raise ValueError("dy must have the shape of x")

    return check_same


# Shapes (N, C, S), and parameters in one dtype.


@ordered
def channels_first(x):
    """N, C and S of x, whose channels are axis 1."""
    S = 1
    for n in x.shape[2:]:
        S *= n
    return x.shape[0], x.shape[1], S


@ordered
def channels_last(x):
    """N, C and S = 1 of x, whose channels are the last axis."""
    N = 1
    for n in x.shape[:-1]:
        N *= n
    return N, x.shape[-1], np.intp(1)  # for a literal, units would be compiled again


@by_types
def as_row(values, C, default, dtype):
    """A parameter in `dtype`: itself if it has that dtype, filled with `default` if it is None."""
    if isinstance(values, types.NoneType):
        return lambda values, C, default, dtype: np.full(C, default, dtype)
    if values.dtype == dtype.instance_type:
        return lambda values, C, default, dtype: values

    def convert(values, C, default, dtype):
        out = np.empty(C, dtype)
        for c in range(C):
            out[c] = values[c]
        return out

    return convert


@ordered
def no_row(values, C, default, dtype):
    """None, in place of a beta that no mask needs."""


@ordered
def rounded(values, dtype):
    """Copy of `values` in a dtype."""
    out = np.empty(values.size, dtype)
    for c in range(values.size):
        out[c] = values[c]
    return out


# Passes: what `nbnorm.cpu` does with kernels, in one thread.


@ordered
def cut(shape, x, tensors):
    """Grid, chunks, block, span and whether results are streamed; see `plan.Plan`."""
    N, C, S = shape
    streamed = past_cache(N, C, S, x.itemsize, tensors, _LAST)
    tile, fold, per, chunks, block, span = serial(N, C, S, x.itemsize, tensors, _OWN, streamed)
    return (N, C, S, tile, fold, per), chunks, block, span, streamed


@ordered
def view(row, shape):
    """A row as the view that units take."""
    return row, shape[1] * shape[2], shape[2]


@ordered
def units_of(channels, size):
    """Number of units of `size` channels."""
    return (channels + size - 1) // size


def _passes(traversal, units):
    """Make the passes of a traversal; x, dy, y and dx are rows, `shape` is (N, C, S)."""
    stats_unit, apply_unit, forward_block = units.stats, units.apply, units.forward
    backward_reduce_unit, backward_apply_unit = units.backward_reduce, units.backward_apply
    backward_block = units.backward

    @ordered
    @named(f"{traversal}_calling_stats")
    def stats(shape, x, mean, m2):
        grid, chunks, _, span, _ = cut(shape, x, 1)
        C = shape[1]
        partial, rstd, x_ = np.empty((4, chunks, C)), np.empty(C), view(x, shape)
        for u in range(units_of(C, span) * chunks):
            stats_unit(x_, grid, span, chunks, partial, u)
        finish_moments(partial, 0, C, 0.0, mean, m2, rstd)

    @ordered
    @named(f"{traversal}_calling_apply")
    def apply(shape, x, norm, floor, y):
        grid, chunks, _, span, streamed = cut(shape, x, 2)
        x_, y_ = view(x, shape), view(y, shape)
        for u in range(units_of(shape[1], span) * chunks):
            apply_unit(x_, None, grid, span, chunks, norm, floor, streamed, y_, u)

    @ordered
    @named(f"{traversal}_calling_forward")
    def forward(shape, x, norm, eps, floor, m2, y):
        grid, chunks, block, _, streamed = cut(shape, x, 2)
        partial, x_, y_ = np.empty((4, chunks, shape[1])), view(x, shape), view(y, shape)
        for u in range(units_of(shape[1], block)):
            forward_block(x_, None, grid, block, norm, eps, floor, streamed, partial, m2, y_, u)

    @ordered
    @named(f"{traversal}_calling_backward_reduce")
    def backward_reduce(shape, dy, x, norm, sums):
        grid, chunks, _, span, _ = cut(shape, x, 2)
        C = shape[1]
        partial, dy_, x_ = np.empty((2, chunks, C)), view(dy, shape), view(x, shape)
        for u in range(units_of(C, span) * chunks):
            backward_reduce_unit(dy_, x_, None, grid, span, chunks, norm, partial, None, u)
        finish_sums(partial, norm, 0, C, x_, sums)

    @ordered
    @named(f"{traversal}_calling_backward_apply")
    def backward_apply(shape, dy, x, norm, sums, count, dx):
        grid, chunks, _, span, streamed = cut(shape, x, 3)
        dy_, x_, dx_ = view(dy, shape), view(x, shape), view(dx, shape)
        for u in range(units_of(shape[1], span) * chunks):
            backward_apply_unit(
                dy_, x_, None, grid, span, chunks, norm, sums, count, streamed, dx_, None, u
            )

    @ordered
    @named(f"{traversal}_calling_backward")
    def backward(shape, dy, x, norm, sums, dx):
        grid, chunks, block, _, streamed = cut(shape, x, 3)
        partial, count = np.empty((2, chunks, shape[1])), float(shape[0] * shape[2])
        dy_, x_, dx_ = view(dy, shape), view(x, shape), view(dx, shape)
        for u in range(units_of(shape[1], block)):
            backward_block(
                dy_, x_, None, grid, block, norm, count, streamed, partial, sums, dx_, None, u
            )

    return {
        "stats": stats,
        "apply": apply,
        "forward": forward,
        "backward_reduce": backward_reduce,
        "backward_apply": backward_apply,
        "backward": backward,
    }


def _by_size(name, by_rows, by_columns):
    """Make a pass that goes by rows or by columns, depending on the size of a plane."""

    @ordered
    @named(f"calling_{name}")
    def either(shape, *args):
        if shape[2] >= PLANE:
            by_rows(shape, *args)
        else:
            by_columns(shape, *args)

    return either


@by_types
def move(running_mean, running_var, mean, m2, momentum, divisor):
    """`kernels.move_pass`; does nothing without running statistics."""
    if isinstance(running_mean, types.NoneType):
        return lambda running_mean, running_var, mean, m2, momentum, divisor: None
    return kernels.move_pass.py_func


@lru_cache(maxsize=2)
def _steps(last):
    """Make the steps of all functions, for channels on the `last` axis (S = 1) or on axis 1."""
    passes = _passes("columns", kernels.columns_units)
    if not last:
        by_rows = _passes("rows", kernels.rows_units)
        passes = {name: _by_size(name, by_rows[name], passes[name]) for name in passes}
    apply_pass, forward_pass = passes["apply"], passes["forward"]
    backward_reduce_pass, backward_apply_pass = passes["backward_reduce"], passes["backward_apply"]
    backward_pass, inference_statistics = passes["backward"], kernels.inference_statistics
    where = "last" if last else "first"

    @ordered
    @named(f"calling_train_{where}")
    def train(shape, _, x, norm, running_mean, running_var, momentum, eps, correction, floor, y):
        if x.size > 0:
            m2 = np.empty(shape[1])
            forward_pass(shape, x, norm, eps, floor, m2, y)
            m = shape[0] * shape[2]
            move(running_mean, running_var, norm[0], m2, momentum, m - correction)

    @ordered
    @named(f"calling_infer_{where}")
    def infer(shape, _, x, norm, running_mean, running_var, momentum, eps, correction, floor, y):
        inference_statistics(running_mean, running_var, eps, norm[0], norm[1])
        if x.size > 0:
            apply_pass(shape, x, norm, floor, y)

    @ordered
    @named(f"calling_train_or_infer_{where}")
    def train_or_infer(shape, training, *args):
        if training:
            train(shape, training, *args)
        else:
            infer(shape, training, *args)

    @ordered
    @named(f"calling_back_{where}")
    def back(shape, _, dy, x, norm, sums, dx):
        if x.size > 0:
            backward_pass(shape, dy, x, norm, sums, dx)

    @ordered
    @named(f"calling_back_frozen_{where}")
    def back_frozen(shape, _, dy, x, norm, sums, dx):
        if x.size > 0:
            backward_reduce_pass(shape, dy, x, norm, sums)
            backward_apply_pass(shape, dy, x, norm, None, float(shape[0] * shape[2]), dx)

    @ordered
    @named(f"calling_back_either_{where}")
    def back_either(shape, training, *args):
        if training:
            back(shape, training, *args)
        else:
            back_frozen(shape, training, *args)

    return SimpleNamespace(
        shape_of=channels_last if last else channels_first,
        forwards={True: train, False: infer, None: train_or_infer},
        backwards={True: back, False: back_frozen, None: back_either},
        **passes,
    )


# Public functions.


def forward(
    x,
    gamma=None,
    beta=None,
    running_mean=None,
    running_var=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    correction=1,
    axis=1,
    residual=None,
    activation=None,
    out=None,
):
    """Check the types of a call of `batch_norm_forward`; return the function to compile."""
    _tensor(x)
    _where_given(gamma=gamma, beta=beta)
    known = _known(training)
    running = {"running_mean": running_mean, "running_var": running_var}
    _where_given(known is not False, **running)
    missing = [name for name, kind in running.items() if not _given(kind)]
    if len(missing) == 1:
        raise TypingError(
            f"{missing[0]} is None; pass both running_mean and running_var, or neither"
        )
    if missing and known is not True:
        raise TypingError("running_mean and running_var must not be None unless training is True")
    _numbers(momentum=momentum, eps=eps, correction=correction)
    _refused(residual=residual, out=out)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.forwards[known]
    dtype, wide, floor = _dtype(x), _dtype(x, gamma, beta), _floor(activation)

    def forward(
        x, gamma=None, beta=None, running_mean=None, running_var=None, training=True,
        momentum=0.1, eps=1e-5, correction=1, axis=1, residual=None, activation=None, out=None,
    ):  # fmt: skip
        shape, x_ = shape_of(x), row_of(x)
        C, gamma_, beta_ = shape[1], row_of(gamma), row_of(beta)
        mean_, var_ = row_of(running_mean), row_of(running_var)
        check_parameters(C, gamma_, beta_)
        check_running(C, mean_, var_, x_, gamma_, beta_, training)
        check_eps(float(eps))
        check_moves(shape[0] * shape[2], float(momentum), float(correction), training)
        y, mean, rstd = np.empty(x.shape, dtype), np.zeros(C), np.zeros(C)
        norm = mean, rstd, as_row(gamma_, C, 1, wide), as_row(beta_, C, 0, wide)
        run(
            shape, training, x_, norm, mean_, var_,
            float(momentum), float(eps), float(correction), floor, row_of(y),
        )  # fmt: skip
        return BatchNormForward(y, mean, rstd)

    return forward


def inference(
    x, gamma, beta, mean, var, eps=1e-5, axis=1, residual=None, activation=None, out=None
):
    """Check the types of a call of `batch_norm_inference`; return the function to compile."""
    _tensor(x)
    _where_given(gamma=gamma, beta=beta)
    _per_channel(mean=mean, var=var)
    _numbers(eps=eps)
    _refused(residual=residual, out=out)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.forwards[False]
    dtype, wide, floor = _dtype(x), _dtype(x, gamma, beta), _floor(activation)

    def inference(
        x, gamma, beta, mean, var, eps=1e-5, axis=1, residual=None, activation=None, out=None
    ):
        shape, x_ = shape_of(x), row_of(x)
        C, gamma_, beta_ = shape[1], row_of(gamma), row_of(beta)
        mean_, var_ = row_of(mean), row_of(var)
        check_parameters(C, gamma_, beta_)
        check_mean(C, mean_)
        if wrong_size(var_, C):
            raise ValueError("var must have one value for every channel of x")
        check_eps(float(eps))
        y = np.empty(x.shape, dtype)
        norm = np.empty(C), np.empty(C), as_row(gamma_, C, 1, wide), as_row(beta_, C, 0, wide)
        run(shape, False, x_, norm, mean_, var_, 0.0, float(eps), 0.0, floor, row_of(y))
        return y

    return inference


def apply(x, gamma, beta, mean, rstd, axis=1, residual=None, activation=None, out=None):
    """Check the types of a call of `batch_norm_apply`; return the function to compile."""
    _tensor(x)
    _where_given(gamma=gamma, beta=beta)
    _per_channel(mean=mean, rstd=rstd)
    _refused(residual=residual, out=out)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.apply
    dtype, wide, floor = _dtype(x), _dtype(x, gamma, beta), _floor(activation)

    def apply(x, gamma, beta, mean, rstd, axis=1, residual=None, activation=None, out=None):
        shape, x_ = shape_of(x), row_of(x)
        C, gamma_, beta_ = shape[1], row_of(gamma), row_of(beta)
        mean_, rstd_ = row_of(mean), row_of(rstd)
        check_parameters(C, gamma_, beta_)
        check_mean(C, mean_)
        check_rstd(C, rstd_)
        y = np.empty(x.shape, dtype)
        norm = (
            as_row(mean_, C, 0, np.float64), as_row(rstd_, C, 0, np.float64),
            as_row(gamma_, C, 1, wide), as_row(beta_, C, 0, wide),
        )  # fmt: skip
        if x.size > 0:
            run(shape, x_, norm, floor, row_of(y))
        return y

    return apply


def stats(x, axis=1):
    """Check the types of a call of `batch_norm_stats`; return the function to compile."""
    _tensor(x)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.stats

    def stats(x, axis=1):
        shape = shape_of(x)
        mean, m2 = np.zeros(shape[1]), np.zeros(shape[1])
        if x.size > 0:
            run(shape, row_of(x), mean, m2)
        return Moments(shape[0] * shape[2], mean, m2)

    return stats


def backward(
    dy,
    x,
    gamma,
    mean,
    rstd,
    beta=None,
    y=None,
    training=True,
    axis=1,
    activation=None,
    output_mask=None,
    out=None,
):
    """Check the types of a call of `batch_norm_backward`; return the function to compile."""
    relu = _backward_types(dy, x, gamma, mean, rstd, beta, activation, out=out, y=y)
    if output_mask is not None:
        raise TypingError("output_mask is not supported in compiled code; call nbnorm from Python")
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.backwards[_known(training)]
    wide, mask_row = (_dtype(x, gamma, beta), as_row) if relu else (_dtype(x, gamma), no_row)
    dtype, of_gamma = _dtype(x), _dtype(gamma if _given(gamma) else x)

    def backward(
        dy, x, gamma, mean, rstd, beta=None, y=None, training=True, axis=1, activation=None,
        output_mask=None, out=None,
    ):  # fmt: skip
        shape, C, gamma_, beta_ = shape_of(x), x.shape[axis], row_of(gamma), row_of(beta)
        mean_, rstd_ = row_of(mean), row_of(rstd)
        check_same(dy, x)
        check_parameters(C, gamma_, beta_)
        check_mean(C, mean_)
        check_rstd(C, rstd_)
        dx, sums = np.empty(x.shape, dtype), np.zeros((2, C))
        norm = (
            as_row(mean_, C, 0, np.float64), as_row(rstd_, C, 0, np.float64),
            as_row(gamma_, C, 1, wide), mask_row(beta_, C, 0, wide),
        )  # fmt: skip
        run(shape, training, row_of(dy), row_of(x), norm, sums, row_of(dx))
        return BatchNormBackward(dx, rounded(sums[1], of_gamma), rounded(sums[0], of_gamma), None)

    return backward


def backward_reduce(dy, x, mean, rstd, gamma=None, beta=None, y=None, activation=None, axis=1):
    """Check the types of a call of `batch_norm_backward_reduce`; return the function to compile."""
    relu = _backward_types(dy, x, gamma, mean, rstd, beta, activation, y=y)
    _for_mask(relu, gamma=gamma)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.backward_reduce
    wide, mask_row = (_dtype(x, gamma, beta), as_row) if relu else (_dtype(x, gamma), no_row)

    def backward_reduce(dy, x, mean, rstd, gamma=None, beta=None, y=None, activation=None, axis=1):
        shape, C, gamma_, beta_ = shape_of(x), x.shape[axis], row_of(gamma), row_of(beta)
        mean_, rstd_ = row_of(mean), row_of(rstd)
        check_same(dy, x)
        check_parameters(C, gamma_, beta_)
        check_mean(C, mean_)
        check_rstd(C, rstd_)
        sums = np.zeros((2, C))
        norm = (
            as_row(mean_, C, 0, np.float64), as_row(rstd_, C, 0, np.float64),
            as_row(gamma_, C, 1, wide), mask_row(beta_, C, 0, wide),
        )  # fmt: skip
        if x.size > 0:
            run(shape, row_of(dy), row_of(x), norm, sums)
        return sums[0], sums[1]

    return backward_reduce


def backward_apply(
    dy, x, gamma, mean, rstd, sum_dy, sum_dy_xhat, count, beta=None, y=None, activation=None,
    axis=1, out=None,
):  # fmt: skip
    """Check the types of a call of `batch_norm_backward_apply`; return the function to compile."""
    relu = _backward_types(dy, x, gamma, mean, rstd, beta, activation, out=out, y=y)
    _per_channel(sum_dy=sum_dy, sum_dy_xhat=sum_dy_xhat)
    _whole(count=count)
    steps = _steps(_channels_last(axis, x))
    shape_of, run = steps.shape_of, steps.backward_apply
    wide, mask_row = (_dtype(x, gamma, beta), as_row) if relu else (_dtype(x, gamma), no_row)
    dtype = _dtype(x)

    def backward_apply(
        dy, x, gamma, mean, rstd, sum_dy, sum_dy_xhat, count, beta=None, y=None,
        activation=None, axis=1, out=None,
    ):  # fmt: skip
        shape, C, gamma_, beta_ = shape_of(x), x.shape[axis], row_of(gamma), row_of(beta)
        mean_, rstd_ = row_of(mean), row_of(rstd)
        check_same(dy, x)
        check_parameters(C, gamma_, beta_)
        check_mean(C, mean_)
        check_rstd(C, rstd_)
        if wrong_size(row_of(sum_dy), C) or wrong_size(row_of(sum_dy_xhat), C):
            raise ValueError("sum_dy and sum_dy_xhat must have one value for every channel of x")
        if count < (1 if x.size > 0 else 0):
            raise ValueError("count must be positive where x has values")
        dx, sums = np.empty(x.shape, dtype), np.empty((2, C))
        for c in range(C):
            sums[0, c], sums[1, c] = sum_dy[c], sum_dy_xhat[c]
        norm = (
            as_row(mean_, C, 0, np.float64), as_row(rstd_, C, 0, np.float64),
            as_row(gamma_, C, 1, wide), mask_row(beta_, C, 0, wide),
        )  # fmt: skip
        if x.size > 0:
            run(shape, row_of(dy), row_of(x), norm, sums, float(count), row_of(dx))
        return dx

    return backward_apply


def _backward_types(dy, x, gamma, mean, rstd, beta, activation, **refused):
    """Check the types that all backward functions take; return whether there is ReLU."""
    _tensor(x)
    _like_x(dy, "dy", x)
    _where_given(gamma=gamma, beta=beta)
    _per_channel(mean=mean, rstd=rstd)
    _refused(**refused)
    relu = _relu(activation)
    _for_mask(relu, beta=beta)
    return relu


def update_running_stats(
    running_mean, running_var, moments, momentum=0.1, correction=1, inplace=True
):
    """Check the types of a call of `update_running_stats`; return the function to compile."""
    _per_channel(True, running_mean=running_mean, running_var=running_var)
    if getattr(moments, "instance_class", None) is not Moments:
        raise TypingError(f"moments must be nbnorm.Moments, got {moments}")
    count, mean, m2 = moments.types
    _whole(**{"moments.count": count})
    _per_channel(**{"moments.mean": mean, "moments.m2": m2})
    _numbers(momentum=momentum, correction=correction)
    if _literal(inplace) is not True:
        raise TypingError("inplace must be True in compiled code; copy the statistics first")

    def update_running_stats(
        running_mean, running_var, moments, momentum=0.1, correction=1, inplace=True
    ):
        C, count = moments.mean.size, moments.count
        mean_, var_ = row_of(running_mean), row_of(running_var)
        batch_mean, batch_m2 = row_of(moments.mean), row_of(moments.m2)
        if count < 0:
            raise ValueError("moments.count must not be negative")
        if wrong_size(batch_m2, C):
            raise ValueError("moments.m2 must have the shape of moments.mean")
        if wrong_size(mean_, C) or wrong_size(var_, C):
            raise ValueError("running statistics must have the shape of the moments")
        check_apart(mean_, var_, batch_mean)
        check_apart(mean_, var_, batch_m2)
        check_moves(count, float(momentum), float(correction), True)
        if count > 0:
            move(
                mean_, var_,
                as_row(batch_mean, C, 0, np.float64), as_row(batch_m2, C, 0, np.float64),
                float(momentum), float(count - correction),
            )  # fmt: skip
        return running_mean, running_var

    return update_running_stats


@lru_cache(maxsize=1)
def register():
    """Register all overloads with Numba, once, when nbnorm is imported.

    This is also nbnorm's entry point for Numba, which calls it before it compiles anything.
    """
    for function, overload in (
        (functional.batch_norm_forward, forward),
        (functional.batch_norm_inference, inference),
        (functional.batch_norm_stats, stats),
        (functional.batch_norm_apply, apply),
        (functional.batch_norm_backward, backward),
        (functional.batch_norm_backward_reduce, backward_reduce),
        (functional.batch_norm_backward_apply, backward_apply),
        (moments.update_running_stats, update_running_stats),
    ):
        overloaded(function)(overload)
