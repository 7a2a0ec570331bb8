"""Batches read several times, one part at a time, with results computed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import place_of
from nbnorm._frame import Frame
from nbnorm._typing import X

R = TypeVar("R")
Parts = Iterable[X] | Callable[[], Iterable[X]]


class Recomputed(Generic[X]):
    """Parts of a result, which are computed anew whenever they are iterated over.

    Each iteration reads the parts of the inputs once more and holds one of them at a time. It can
    be the input of another layer, which reads it twice. ``len`` is the number of parts.
    """

    def __init__(self, parts: Callable[[], Iterator[X]], number: int) -> None:
        self._parts, self._number = parts, number

    def __iter__(self) -> Iterator[X]:
        return self._parts()

    def __len__(self) -> int:
        return self._number


class Kind(NamedTuple):
    """What all parts of x must have in common."""

    dtype: np.dtype[Any]
    channels: tuple[int, ...]  # the shape of the channel axes
    place: str


def kind_of(frame: Frame) -> Kind:
    return Kind(frame.x.dtype, frame.channel_shape, place_of(frame.x))


class Sweeps:
    """Repeated readings of the parts of one or more sources together; the last source is x's.

    The first reading notes shapes and dtypes, and later ones must find the same. No part is kept
    while the next is read.
    """

    def __init__(self, **sources: Parts[Any]) -> None:
        for name, source in sources.items():
            _readable_twice(source, name)
        self._sources = sources
        self._forms: list[str] = []

    def first(self, function: Callable[..., tuple[R, Kind]]) -> Iterator[R]:
        """Yield ``function(*parts)`` of every part; raise if the parts do not go together."""
        opened, expected = self._opened(), None
        while parts := self._next(opened):
            try:
                result, kind = function(*parts)
                expected = expected or kind
                _same_kind(kind, expected)
            except (TypeError, ValueError) as error:
                error.add_note(f"(part {len(self._forms)})")
                raise
            self._forms.append(_form(parts[-1]))
            del parts
            yield result
        if not self._forms:
            raise ValueError(f"{next(reversed(self._sources))} has no parts, expected at least one")

    def again(self, function: Callable[..., X]) -> Recomputed[X]:
        """Return ``function(*parts)`` of every part, which must not have changed."""

        def results() -> Iterator[X]:
            opened = self._opened()
            for i, form in enumerate(self._forms):
                yield function(*self._same(self._next(opened), i, form))
            self._same(self._next(opened), len(self._forms), _NONE)

        return Recomputed(results, len(self._forms))

    def _opened(self) -> dict[str, Iterator[Any]]:
        opened = {}
        for name, source in self._sources.items():
            parts = source() if callable(source) else source
            if hasattr(parts, "shape") or not isinstance(parts, Iterable):
                raise TypeError(
                    f"{name} is a function that returned {type(parts).__qualname__}, expected an "
                    "iterable of arrays"
                )
            opened[name] = iter(parts)
        return opened

    def _next(self, opened: dict[str, Iterator[Any]]) -> list[Any]:
        """Return the next part of each source, or nothing at the end."""
        parts = {name: next(iterator, _END) for name, iterator in opened.items()}
        ended = [name for name, part in parts.items() if part is _END]
        if ended and len(ended) < len(parts):
            others = parts.keys() - ended
            raise ValueError(f"{ended[0]} has fewer parts than {others.pop()}")
        return [] if ended else list(parts.values())

    def _same(self, parts: list[Any], i: int, form: str) -> list[Any]:
        """Return the parts; raise if x's form is not `form` (`_NONE` at the end)."""
        found = _form(parts[-1]) if parts else _NONE
        if found != form:
            raise ValueError(
                f"part {i} of {next(reversed(self._sources))} had {form} at the first reading, "
                f"and now {found}; every reading must yield the same parts"
            )
        return parts


_NONE = "no data"


def _form(part: Any) -> str:
    """Return shape and dtype of a part, in words."""
    return f"shape {tuple(part.shape)} and dtype {part.dtype}"


_END = object()


def _readable_twice(source: Any, name: str) -> None:
    """Raise unless a source is a function or an iterable that can be read more than once."""
    ways = "pass a sequence of arrays, or a function that returns a new iterator"
    if hasattr(source, "shape"):
        raise TypeError(f"{name} is an array, expected its parts; {ways}")
    if callable(source):
        return
    if not isinstance(source, Iterable):
        raise TypeError(f"{name} must be an iterable of arrays, got {type(source).__qualname__}")
    if isinstance(source, Iterator):
        raise TypeError(
            f"{name} can be read only once (it is a {type(source).__qualname__}), and is read "
            f"twice; {ways}"
        )


def _same_kind(kind: Kind, expected: Kind) -> None:
    """Raise if a part differs in kind from part 0."""
    if kind.dtype != expected.dtype:
        raise TypeError(f"x has dtype {kind.dtype}, expected {expected.dtype}, that of part 0")
    if kind.channels != expected.channels:
        raise ValueError(
            f"x has channel axes of shape {kind.channels}, expected {expected.channels}, "
            "those of part 0"
        )
    _checks.same_place(kind.place, "x", expected.place)
