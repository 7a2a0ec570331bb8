"""``python -m nbnorm demo FILE``: a page of what batch normalization does to an array."""

from __future__ import annotations

import os
from pathlib import Path

from nbnorm._demo.data import DemoError, open_data
from nbnorm._demo.page import page_of
from nbnorm._demo.report import report_of

__all__ = ["DemoError", "write_page"]


def write_page(
    file: str, *, array: str | None = None, axis: str | None = None, output: str | None = None
) -> Path:
    """Measure the array in a file, write the page, and return its path.

    Parameters
    ----------
    file : str
        A .npy or .npz file, an image, or a folder of images.
    array : str, optional
        Name of the array in a .npz file of several.
    axis : str, optional
        Channel axes of an array, such as "1" (the default) or "1,2,3".
    output : str, optional
        Where to write the page; by default the name of the file with .html, in the current folder.

    Raises
    ------
    DemoError
        An argument is wrong, or a file cannot be read or written. The page is not written then.
    """
    data = open_data(file, array, axis)
    target = Path(output) if output is not None else Path(f"{data.name}.html")
    _check_target(target, data.path)
    # File names need not be UTF-8; other bytes become "?".
    page = page_of(report_of(data)).encode("utf-8", errors="replace")
    try:
        target.write_bytes(page)
    except OSError as error:
        raise DemoError(f"--output {target} cannot be written: {error.strerror}") from error
    return target


def _check_target(target: Path, file: Path) -> None:
    """Raise before anything is measured if the page cannot be written there."""
    if target.is_dir():
        raise DemoError(f"--output {target} is a folder, expected a file such as page.html")
    if not target.parent.is_dir():
        raise DemoError(f"--output {target}: there is no folder {target.parent}; make it first")
    if target.exists() and target.samefile(file):
        raise DemoError(f"--output {target} is FILE itself, which the page would replace")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise DemoError(f"--output {target} cannot be written; name a file in another folder")
