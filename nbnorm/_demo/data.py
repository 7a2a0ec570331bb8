"""What a user names on the command line, as arrays: .npy and .npz files, images, folders."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nbnorm import _checks, _sources
from nbnorm._typing import NDArray

# Looked for in folders. A file that is named itself may have any suffix.
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

KEPT = ("L", "LA", "RGB", "RGBA", "CMYK", "I", "F")  # Pillow's modes to use unchanged
BYTES = frozenset(("L", "LA", "RGB", "RGBA", "CMYK"))  # those that Pillow converts to RGB
TAKEN = frozenset(map(np.dtype, ("f2", "f4", "f8", "u1", "i1", "u2", "i2")))  # nbnorm's own
EXPECTED = "expected a .npy or .npz file, an image, or a folder of images"


class DemoError(Exception):
    """An error whose message is shown to the user."""


@dataclass(frozen=True)
class Data:
    """Arrays that share their channels, read one at a time.

    Calling an item returns an array, or an object that reads one when sliced.
    """

    path: Path
    about: str
    axes: tuple[int, ...]
    channels: tuple[int, ...]
    items: Sequence[Callable[[], Any]] = field(repr=False)
    labels: Sequence[str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the file without its ending, or of the folder."""
        path = self.path.resolve()
        return path.name if path.is_dir() else path.stem

    def label(self, index: int) -> str:
        """Return the name of the channel of this number: R, 5, or (0, 1) of two axes."""
        if self.labels is not None:
            return self.labels[index]
        if len(self.channels) == 1:
            return str(index)
        return str(tuple(map(int, np.unravel_index(index, self.channels))))


def open_data(file: str, array: str | None = None, axis: str | None = None) -> Data:
    """Return the arrays of a file or folder; raise DemoError, with a remedy, for any other."""
    path = Path(file)
    if not path.exists():
        raise DemoError(f"FILE {file} does not exist; {EXPECTED}")
    suffix = path.suffix.lower()
    if array is not None and suffix != ".npz":
        raise DemoError(f"--array {array} names an array of a .npz file, but FILE is {file}")
    if suffix in (".npy", ".npz"):
        return _of_array(path, _load(path, array), array, axis)
    if axis is not None:
        raise DemoError(f"--axis {axis} is for arrays; the channels of images are their colours")
    return _of_images(path)


class _As:
    """An array that is converted when sliced, piece by piece."""

    def __init__(self, array: NDArray, dtype: np.dtype[Any]) -> None:
        self.shape, self.strides = array.shape, array.strides
        self._array, self._dtype = array, dtype

    def __getitem__(self, index: Any) -> NDArray:
        piece: NDArray = self._array[index].astype(self._dtype)
        return piece


def pieces(array: Any, axes: tuple[int, ...], most: int) -> Iterator[NDArray]:
    """Yield pieces of an item, of at most `most` values, with all channels."""
    whole = _sources.Source(array, axes)
    for cut in whole.cuts(most):
        yield from map(whole.read, cut)


def _load(path: Path, name: str | None) -> NDArray:
    """Return the array of a file, a memory map where the file allows it."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return np.asarray(loaded)  # still read from the file as it is needed
        with loaded:
            return np.asarray(loaded[_name_in(list(loaded.files), path, name)])
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        objects = "Object arrays" in str(error)
        if objects or "Array can't be memory-mapped" in str(error):
            raise DemoError(
                f"FILE {path} has an array of Python objects, expected numbers: "
                "np.save(..., x.astype(float)) saves them"
            ) from None
        raise DemoError(f"FILE {path} cannot be read as NumPy's format: {error}") from error


def _name_in(names: list[str], path: Path, name: str | None) -> str:
    """Return the name of the array to read from a .npz file."""
    there = f"FILE {path} has {', '.join(names) or 'no arrays'}"
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise DemoError(f"{there}: choose one with --array NAME")
    if name not in names:
        raise DemoError(f"--array {name} is not in the file; {there}")
    return name


def _of_array(path: Path, array: NDArray, name: str | None, axis: str | None) -> Data:
    """Return the Data of an array, converted if nbnorm does not take its dtype."""
    dtype = _dtype_for(array.dtype)
    if array.ndim < 2:
        raise DemoError(
            f"FILE {path} has an array of shape {array.shape}, expected at least 2 axes: "
            "save x.reshape(-1, 1) to have one channel"
        )
    axes, channels = _axes_of(array.shape, axis)
    if not array.size:
        raise DemoError(f"FILE {path} has an array of shape {array.shape}, which holds no values")
    notes = []
    if dtype != array.dtype:
        notes.append(f"Values are converted from {array.dtype} to {dtype}, part by part.")
    colours = (1, 3, 4)
    last = array.ndim > 2 and array.shape[-1] in colours and array.shape[1] not in colours
    if axis is None and last:
        notes.append("If the last axis has the channels, as in images, pass --axis -1.")
    of = f"{name} of " if name is not None else ""
    about = f"{of}{path.name}: array of shape {array.shape}, {array.dtype}, channel axis "
    about += str(axes[0] if len(axes) == 1 else axes)
    item = array if dtype == array.dtype else _As(array, dtype)
    return Data(path, about, axes, channels, [lambda: item], notes=tuple(notes))


def _dtype_for(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype to compute in."""
    native = dtype.newbyteorder("=")
    if native in TAKEN:
        return native
    if native.kind in "biuf":
        return np.dtype(np.float64)
    more = ": save x.real and x.imag as two arrays" if native.kind == "c" else ""
    raise DemoError(f"FILE has an array of dtype {dtype}, expected real numbers{more}")


def _axes_of(shape: tuple[int, ...], text: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the channel axes, sorted and not negative, and their shape."""
    try:
        given = tuple(int(part) for part in (text or "1").split(","))
    except ValueError:
        raise DemoError(
            f"--axis is {text}, expected integers such as 1, -1 or 1,2,3: the channel axes"
        ) from None
    try:
        axes, channels, _ = _checks.channel_axes(shape, given, "an array")
    except ValueError as error:
        raise DemoError(
            f"--axis: {error}; it names the channel axes, which keep statistics of their own, "
            "such as 1 (NCHW) or -1 (channels last)"
        ) from None
    return axes, channels


def _of_images(path: Path) -> Data:
    """Return an image, or all images in a folder and its subfolders, with channels last."""
    image_of = _pillow()
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise DemoError(
                f"FILE {path} is a folder without images ({', '.join(sorted(SUFFIXES))}); "
                f"{EXPECTED}"
            )
    modes: dict[str, Path] = {}
    sizes = set()
    for one in paths:
        try:
            with image_of(one) as image:
                kept = image.mode in KEPT or image.mode.startswith("I;16")
                modes.setdefault(image.mode if kept else "RGB", one)
                sizes.add(image.size)
        except Exception as error:  # Pillow raises errors of many kinds for a broken file
            raise DemoError(f"FILE {one} cannot be read: {error}; {EXPECTED}") from error
    if len(modes) > 1 and not modes.keys() <= BYTES:
        examples = ", ".join(f"{one.name} ({mode})" for mode, one in modes.items())
        raise DemoError(
            f"FILE {path} has images of kinds that do not mix: {examples}; separate them"
        )
    mode = next(iter(modes)) if len(modes) == 1 else "RGB"
    labels = {"L": "grey", "LA": "grey alpha", "RGB": "red green blue", "CMYK": "C M Y K"}
    labels["RGBA"] = "red green blue alpha"
    names = labels.get(mode, "value").split()
    width, height = next(iter(sizes))
    of = f"{width} x {height} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes"
    number = f"{len(paths)} images of " if path.is_dir() else "image of "
    items = [partial(_pixels, image_of, one, mode) for one in paths]
    notes = (f"Images of modes {', '.join(modes)} are converted to RGB.",) if len(modes) > 1 else ()
    about = f"{path.resolve().name}: {number}{of}, mode {mode}"
    return Data(path, about, (2,), (len(names),), items, names, notes)


def _pillow() -> Callable[[Path], Any]:
    """Return Pillow's function that opens an image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DemoError(
            'FILE: images need Pillow: pip install "nbnorm-kernels[demo]"; '
            ".npy and .npz files need nothing"
        ) from error
    opened: Callable[[Path], Any] = Image.open
    return opened


def _pixels(image_of: Callable[[Path], Any], path: Path, mode: str) -> NDArray:
    """Return an image as an array of shape (height, width, channels)."""
    try:
        with image_of(path) as image:
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise DemoError(f"FILE {path} cannot be read as an image: {error}") from error
    array = array.astype(_dtype_for(array.dtype), copy=False)
    return array if array.ndim == 3 else array[..., None]
