"""Ordinary calls by one compiled function: the same as by the general way, to the bit and the word.

Arguments are drawn, good and bad, as a recipe that is made into arrays twice: what a call returns
or raises, and what it has left in every array's memory, must agree.
"""

from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbnorm
from nbnorm import _shortcut

SHAPES = [(2, 3), (5, 4), (1, 3), (2, 3, 4), (3, 2, 4, 4), (2, 5, 3, 2, 2), (9, 3, 20, 20)]
# How an array lies in its memory.
LAYOUTS = ["F", "stepped", "reversed", "offset", "read-only", "subclass", "list"]
NUMBERS = [1e-5, 0.0, 0.1, 1.0, 1, 0, -0.5, np.nan, np.inf, np.float64(0.25), "1", None, True]


class Subclass(np.ndarray):
    """An ndarray that is not one exactly."""


def made(rng, shape, dtype, layout, positive=False):
    """An array, and what its values lie in."""
    numbers = rng.standard_normal((*shape[:-1], 2 * shape[-1] + 1) if shape else 1)
    numbers = np.abs(numbers) + 0.1 if positive else numbers
    memory = (numbers * (10 if dtype == "i4" else 1)).astype(dtype)
    if not shape:
        return memory[0:1].reshape(()), memory
    whole = memory[..., : shape[-1]]
    if layout == "stepped":
        return memory[..., : 2 * shape[-1] : 2], memory
    array = np.array(whole, order="F" if layout == "F" else "C")
    if layout == "reversed":
        return array[::-1], array
    if layout == "offset":  # not aligned
        raw = np.zeros(array.nbytes + 1, np.uint8)
        moved = raw[1:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved, raw
    if layout == "read-only":
        array.flags.writeable = False
    if layout == "subclass":
        return array.view(Subclass), array
    if layout == "list":
        return array.tolist(), array
    return array, array


@st.composite
def recipes(draw, names_like_x, names_per_channel, others):
    """How to make the arguments of a call."""
    # Two things of thirty are unusual at most: with more, hardly a call would be ordinary.
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
    """Make the arguments; return them and the memory of all arrays."""
    rng = np.random.default_rng(recipe["seed"])
    arrays, memories = {}, []
    for name, (shape, dtype, layout) in recipe["arrays"].items():
        arrays[name], memory = made(
            rng, shape, dtype, layout, name in ("running_var", "var", "rstd")
        )
        memories.append(memory)
    for name, (other, how) in recipe["same"].items():
        array = arrays[other]
        if how != "it" and isinstance(array, np.ndarray) and array.ndim:
            array = array[:] if how == "view" else array[: max(len(array) - 1, 0)]
        arrays[name] = array
    return {**arrays, "axis": recipe["axis"], **recipe["others"]}, memories


def outcome(call, recipe):
    """What a call gives and leaves behind, as something that can be compared."""
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


REQUIRED = {"x", "dy", "mean", "var", "rstd", "running_mean", "running_var"}
NEVER = {name: lambda *_: None for name in ("forward", "inference", "backward")}
EVERY = [(True, True, True, True), (True, False, True, False), (False, True, True, True)]
EVERY += [(True, True, False, True), [True] * 4, (1, 1, 1, 1), (True, True), None]
FORWARD = {
    "training": ([True, False], [0, 2, None]),
    "momentum": ([0.1], NUMBERS),
    "eps": ([1e-5], NUMBERS),
    "correction": ([0, 1], [2, 3, 100, -1, *NUMBERS]),
    "activation": ([None, "relu"], ["gelu", np.str_("relu"), 0]),
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


CALLS = {
    "forward": (
        forward,
        recipes(["residual", "out"], ["gamma", "beta", "running_mean", "running_var"], FORWARD),
    ),
    "inference": (
        inference,
        recipes(["residual", "out"], ["gamma", "beta", "mean", "var"], INFERENCE),
    ),
    "backward": (
        backward,
        recipes(["dy", "y", "out"], ["gamma", "mean", "rstd", "beta"], BACKWARD),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("limit", [1 << 15, 1], ids=["small", "large"])
def test_the_same_with_and_without(name, limit, monkeypatch):
    call, made_by = CALLS[name]
    monkeypatch.setattr(_shortcut, "SERIAL_BELOW", limit)
    _shortcut._site.cache_clear()
    taken = []
    shortcut = getattr(_shortcut, name)

    def watched(*args):
        result = shortcut(*args)
        taken.append(result is not None)
        return result

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recipe=made_by)
    def compare(recipe):
        with monkeypatch.context() as patch:
            patch.setattr(_shortcut, name, watched)
            short = outcome(call, recipe)
        with monkeypatch.context() as patch:
            patch.setattr(_shortcut, name, NEVER[name])
            general = outcome(call, recipe)
        assert short == general

    with np.errstate(all="ignore"):
        compare()
    _shortcut._site.cache_clear()
    assert sum(taken) > 30, "hardly a call was ordinary"
    assert taken.count(False) > 30
