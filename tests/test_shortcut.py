"""The fast path of common calls: the same bits and errors as the general path.

Arguments, valid and invalid, are drawn as a recipe that is made into arrays twice: the call's
result or error, and every array's memory afterwards, must agree.
"""

import pickle
from itertools import count, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from of_users import doubled, squared

import nbnorm
from nbnorm import _shortcut
from nbnorm.activations import NAMES

SHAPES = [(2, 3), (5, 4), (1, 3), (2, 3, 4), (3, 2, 4, 4), (2, 5, 3, 2, 2), (9, 3, 20, 20)]
# Memory layouts of an array.
LAYOUTS = ["F", "stepped", "reversed", "offset", "read-only", "subclass", "list", "unpickled"]
NUMBERS = [1e-5, 0.0, 0.1, 1.0, 1, 0, -0.5, np.nan, np.inf, np.float64(0.25), "1", None, True]


class Subclass(np.ndarray):
    """A subclass of ndarray: calls with it do not take the shortcut."""


def made(rng, shape, dtype, layout, positive=False):
    """Return an array, and the memory of its values."""
    numbers = rng.standard_normal((*shape[:-1], 2 * shape[-1] + 1) if shape else 1)
    numbers = np.abs(numbers) + 0.1 if positive else numbers
    memory = (numbers * (10 if dtype == "i4" else 1)).astype(dtype)
    if not shape:
        return memory[0:1].reshape(()), memory
    whole = memory[..., : shape[-1]]
    if layout == "stepped":
        return memory[..., : 2 * shape[-1] : 2], memory
    array = np.array(whole, order="F" if layout == "F" else "C")
    if layout == "channels-last":
        return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1), array
    if layout == "reversed":
        return array[::-1], array
    if layout == "offset":  # unaligned
        raw = np.zeros(array.nbytes + 1, np.uint8)
        moved = raw[1:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved, raw
    if layout == "unpickled":  # its dtype is a different object
        array = pickle.loads(pickle.dumps(array))
    if layout == "read-only":
        array.flags.writeable = False
    if layout == "subclass":
        return array.view(Subclass), array
    if layout == "list":
        return array.tolist(), array
    return array, array


@st.composite
def recipes(draw, names_like_x, names_per_channel, others):
    """Draw how to make the arguments of a call."""
    # At most two of thirty choices are unusual: with more, few calls would be ordinary.
    odd, number = draw(st.sets(st.integers(0, 30), max_size=2)), count()

    def rarely(usual, unusual):
        return draw(st.sampled_from(unusual)) if next(number) in odd else usual

    shape = rarely(draw(st.sampled_from(SHAPES)), [(7,), (0, 3), (3, 0)])
    axis = rarely(draw(st.sampled_from([1, -1])), [0, 2, -2, 9, (1,), (0, 1), True, 1.0, None])
    dtype = rarely(draw(st.sampled_from(["f4", "f8"])), ["f2", ">f4", "i4"])
    try:
        channels = (shape[axis],)
    except (IndexError, TypeError):
        channels = (shape[1],) if len(shape) > 1 else (3,)
    recipe = {"seed": draw(st.integers(0, 99)), "axis": axis, "arrays": {}, "same": {}}
    for name in ("x", *names_like_x):
        if name in REQUIRED or draw(st.integers(0, 3)) == 0:
            recipe["arrays"][name] = (
                rarely(shape, [shape[::-1], (*shape, 1)]) if name != "x" else shape,
                rarely(dtype, ["f4", "f8"]) if name != "x" else dtype,
                rarely("C", LAYOUTS),
            )
    for name in names_per_channel:
        if rarely(name in REQUIRED or draw(st.booleans()), [False, True]):
            recipe["arrays"][name] = (
                rarely(channels, [(), (9,), (*channels, 1)]),
                rarely("f8" if name in ("mean", "rstd") else dtype, ["f4", "f8", "f2"]),
                rarely("C", LAYOUTS),
            )
    arrays = list(recipe["arrays"])
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        one, other = draw(st.sampled_from(arrays)), draw(st.sampled_from(arrays))
        recipe["same"][one] = (other, draw(st.sampled_from(["it", "view", "shifted"])))
    recipe["others"] = {
        name: rarely(draw(st.sampled_from(usual)), unusual)
        for name, (usual, unusual) in others.items()
    }
    return recipe


def arguments(recipe):
    """Return the arguments, and the memory of all arrays."""
    rng = np.random.default_rng(recipe["seed"])
    arrays, memories = {}, []
    for name, (shape, dtype, layout) in recipe["arrays"].items():
        arrays[name], memory = made(
            rng, shape, dtype, layout, name in ("running_var", "var", "rstd")
        )
        memories.append(memory)
    for name, (other, how) in recipe["same"].items():
        array, wanted = arrays[other], arrays[name]
        if how == "overlapping":
            if name != other and all(type(a) is np.ndarray for a in (array, wanted)):
                arrays[other], arrays[name], memory = overlapping(array, wanted)
                memories.append(memory)
            continue
        if how != "it" and isinstance(array, np.ndarray) and array.ndim:
            array = array[:] if how == "view" else array[: max(len(array) - 1, 0)]
        arrays[name] = array
    return {**arrays, "axis": recipe["axis"], **recipe["others"]}, memories


def overlapping(first, second):
    """Return copies of two arrays: the last bytes of one are the first of the other."""
    shared = min(first.itemsize, second.itemsize)
    memory = np.zeros(first.nbytes + second.nbytes - shared, np.uint8)
    # Both arrays are aligned, whatever their sizes.
    one = memory[second.nbytes - shared :].view(first.dtype).reshape(first.shape)
    other = memory[: second.nbytes].view(second.dtype).reshape(second.shape)
    other[...] = second
    one[...] = first
    return one, other, memory


def outcome(call, recipe):
    """Return a call's result or error and its effects, in comparable form."""
    arrays, memories = arguments(recipe)
    try:
        result = call(arrays)
    except Exception as error:
        found = type(error), str(error)
    else:
        results = result if isinstance(result, tuple) else (result,)
        found = type(result), [described(r, arrays) for r in results]
    return found, [np.asarray(memory).tobytes() for memory in memories]


def described(result, arrays):
    if result is None:
        return None
    return (
        type(result),
        result.dtype,
        result.shape,
        result.strides,
        result.tobytes(),
        result is arrays.get("out"),
        result.flags.writeable,
    )


MINE = nbnorm.activation(squared, doubled)
LEAKY = nbnorm.activation("leaky_relu", slope=0.25)
REQUIRED = {"x", "dy", "mean", "var", "rstd", "running_mean", "running_var"}
NEVER = {name: lambda *_: None for name in ("forward", "inference", "backward")}
EVERY = [(True, True, True, True), (True, False, True, False), (False, True, True, True)]
EVERY += [(True, True, False, True), [True] * 4, (1, 1, 1, 1), (True, True), None]
FORWARD = {
    "training": ([True, False], [0, 2, None, np.True_, np.array([1, 0])]),
    "momentum": ([0.1], NUMBERS),
    "eps": ([1e-5], NUMBERS),
    "correction": ([0, 1], [2, 3, 36, 100, -1, 10**400, *NUMBERS]),
    "activation": (
        [None, "relu", LEAKY],
        ["leaky_relu", nbnorm.activation("relu"), "mish", np.str_("relu"), np.str_("gelu"), 0],
    ),
}
INFERENCE = {name: FORWARD[name] for name in ("eps", "activation")}
BACKWARD = {
    "training": FORWARD["training"],
    "activation": FORWARD["activation"],
    "output_mask": (EVERY[:1], EVERY),
}


def forward(arrays):
    x = arrays.pop("x")
    return nbnorm.batch_norm_forward(x, **arrays)


def inference(arrays):
    names = ("x", "gamma", "beta", "mean", "var")
    first = [arrays.pop(name, None) for name in names]
    return nbnorm.batch_norm_inference(*first, **arrays)


def backward(arrays):
    names = ("dy", "x", "gamma", "mean", "rstd")
    first = [arrays.pop(name, None) for name in names]
    return nbnorm.batch_norm_backward(*first, **arrays)


OTHER_SHAPES = [(), (9,), (3, 1), (9, 3), (9, 3, 4), (9, 3, 4, 1), (1, 9, 3, 2, 2), (9, 2, 3, 2)]

# By function: the call, arrays like x, parameters and statistics, other arguments.
CALLS = {
    "forward": (
        forward,
        ("residual", "out"),
        ("gamma", "beta", "running_mean", "running_var"),
        FORWARD,
    ),
    "inference": (inference, ("residual", "out"), ("gamma", "beta", "mean", "var"), INFERENCE),
    "backward": (
        backward,
        ("dy", "y", "residual", "out"),
        ("gamma", "mean", "rstd", "beta"),
        BACKWARD,
    ),
}


@pytest.fixture(params=[1 << 15, 1], ids=["small", "large"])
def compare(request, monkeypatch):
    """Return a function that compares a call by both paths and tells whether it was ordinary."""
    monkeypatch.setattr(_shortcut, "SERIAL_BELOW", request.param)
    _shortcut._site.cache_clear()

    def compared(name, recipe):
        call, shortcut, taken = CALLS[name][0], getattr(_shortcut, name), []

        def watched(*args):
            taken.append(shortcut(*args))
            return taken[-1]

        found = []
        for way in watched, lambda *_: None:
            with monkeypatch.context() as patch, np.errstate(all="raise"):
                patch.setattr(_shortcut, name, way)
                found.append(outcome(call, recipe))
        assert found[0] == found[1], recipe
        return bool(taken) and taken[0] is not None

    yield compared
    _shortcut._site.cache_clear()


@pytest.mark.slow  # two hundred draws compile a hundred kinds of kernels
@pytest.mark.parametrize("name", CALLS)
def test_the_same_with_and_without(name, compare):
    ordinary = []

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recipe=recipes(*CALLS[name][1:]))
    def draw(recipe):
        ordinary.append(compare(name, recipe))

    draw()
    assert 20 < sum(ordinary) < len(ordinary) - 20  # loose: draws depend on Hypothesis's version


def useless(name, activation):
    """Return the arguments from which backward cannot compute an activation's derivative."""
    if name != "backward":
        return ()
    return {None: ("y", "residual"), "relu": ("residual",)}.get(activation, ("y",))


@pytest.mark.parametrize("layout", ["C", "F", "channels-last", "offset", "stepped"])
@pytest.mark.parametrize("name", CALLS)
def test_all_arrays_in_one_order(name, layout, compare):
    """Any order in which kernels can walk memory without gaps is ordinary."""
    _, like_x, per_channel, others = CALLS[name]
    for shape in ((9, 3, 2, 2), (5, 4), (2, 3, 20, 20), (1, 3, 4), (4, 1, 1, 2)):
        channels = shape[1:2]
        recipe = {
            "seed": 0,
            "axis": 1,
            "arrays": dict.fromkeys(
                ("x", *(n for n in like_x if n not in useless(name, "relu"))), (shape, "f4", layout)
            )
            | {n: (channels, "f8" if n in ("mean", "rstd") else "f4", "C") for n in per_channel},
            "same": {},
            "others": {n: wanted[0][0] for n, wanted in others.items()} | {"activation": "relu"},
        }
        if name == "inference":
            recipe["arrays"]["mean"] = (channels, "f4", "C")
        ordinary = compare(name, recipe)
        if max(shape) < 20 or layout != "F":  # planes of 400 values are walked one by one
            assert ordinary is (layout in ("C", "F", "channels-last")), shape


@pytest.mark.parametrize("activation", [None, "relu", pytest.param(LEAKY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_one_thing_that_is_not_ordinary(name, training, activation, compare):
    """Make every argument unusual in every way, and let every pair of them share memory."""
    _, like_x, per_channel, others = CALLS[name]
    shape = (9, 3, 2, 2)
    usual = {
        "seed": 0,
        "axis": 1,
        "arrays": {"x": (shape, "f4", "C")}
        | {n: (shape, "f4", "C") for n in like_x if n not in useless(name, activation)}
        | {n: ((3,), "f8" if n in ("mean", "rstd") else "f4", "C") for n in per_channel},
        "same": {},
        "others": {n: wanted[0][0] for n, wanted in others.items()},
    }
    if name == "inference":
        usual["arrays"]["mean"] = ((3,), "f4", "C")
    usual["others"]["activation"] = activation
    if name != "inference":
        usual["others"]["training"] = training
    assert compare(name, usual) is (name != "backward" or training)

    def odd(part, **changed):
        compare(name, usual | {part: usual[part] | changed})

    arrays = usual["arrays"]
    for n, (whole, dtype, _) in arrays.items():
        compare(name, usual | {"arrays": {k: v for k, v in arrays.items() if k != n or k == "x"}})
        for layout in LAYOUTS:
            odd("arrays", **{n: (whole, dtype, layout)})
        for other in ("f2", "f4", "f8", ">f4", "i4"):
            odd("arrays", **{n: (whole, other, "C")})
        for other in (
            (),
            (9,),
            (3, 1),
            (9, 3),
            (9, 3, 4),
            (9, 3, 4, 1),
            (1, 9, 3, 2, 2),
            (9, 2, 3, 2),
        ):
            odd("arrays", **{n: (other, dtype, "C")})
        for other in arrays:
            for how in ("it", "view", "shifted", "overlapping"):
                compare(name, usual | {"same": {n: (other, how)}})
    if "training" in others:  # of two errors the same one is raised
        gamma = arrays | {"gamma": ((9,), "f4", "C")}
        both = usual["others"] | {"training": np.array([1, 0])}
        compare(name, usual | {"arrays": gamma, "others": both})
    without = {n: array for n, array in arrays.items() if not n.startswith("running_")}
    compare(name, usual | {"arrays": without})
    for n, (likely, unlikely) in others.items():
        for value in (*likely, *unlikely):
            odd("others", **{n: value})
    for axis in (0, 2, -1, -3, -4, 4, (1,), (0, 1), True, 1.0, None, np.int64(1)):
        compare(name, usual | {"axis": axis})


def test_arrays_that_were_unpickled_are_ordinary(compare):
    """Like arrays from another process."""
    for name, (_, like_x, per_channel, others) in CALLS.items():
        recipe = {
            "seed": 0,
            "axis": 1,
            "arrays": dict.fromkeys(
                ("x", *(n for n in like_x if n not in useless(name, "relu"))),
                ((4, 3), "f4", "unpickled"),
            )
            | dict.fromkeys(per_channel, ((3,), "f4", "unpickled")),
            "same": {},
            "others": {n: wanted[0][0] for n, wanted in others.items()} | {"activation": "relu"},
        }
        if name == "backward":
            recipe["arrays"] |= dict.fromkeys(("mean", "rstd"), ((3,), "f8", "unpickled"))
        assert compare(name, recipe)


@pytest.mark.slow  # each activation compiles its own kernels
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("activation", [*NAMES, MINE], ids=str)
def test_every_activation(name, activation, compare):
    """By name, as an object and user-defined; with and without a residual."""
    _, like_x, per_channel, others = CALLS[name]
    arrays = {n: ((3,), "f8" if n in ("mean", "rstd") else "f4", "C") for n in per_channel}
    if name == "inference":
        arrays["mean"] = ((3,), "f4", "C")
    without = useless(name, activation)
    for added, given_ in product((False, True), (activation, as_object(activation))):
        like = [n for n in like_x if n not in without and (added or n not in ("residual", "y"))]
        usual = {n: wanted[0][0] for n, wanted in others.items()} | {"activation": given_}
        recipe = {
            "seed": 0,
            "axis": 1,
            "arrays": dict.fromkeys(("x", *like), ((9, 3, 2, 2), "f4", "C")) | arrays,
            "same": {},
            "others": usual,
        }
        assert compare(name, recipe)


def as_object(activation):
    return nbnorm.activation(activation) if isinstance(activation, str) else activation


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_numpy_is_not_asked_about_overflow_and_underflow(scale):
    """Parameter gradients that round to 0 or Inf raise on neither path."""
    x = np.random.default_rng(0).standard_normal((8, 4, 40, 40)).astype("f4")
    dy, gamma = (x * scale).astype("f4"), np.ones(4, "f4")
    _, mean, rstd = nbnorm.batch_norm_forward(x)
    for axis in (1, (1,)):
        for part in (x, dy), (x[:2, :, :5, :5].copy(), dy[:2, :, :5, :5].copy()):
            with np.errstate(all="raise"):
                nbnorm.batch_norm_backward(*part[::-1], gamma, mean, rstd, axis=axis)
