"""``python -m nbnorm`` prints the configuration; ``python -m nbnorm demo FILE`` makes a page."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence

from nbnorm import _demo
from nbnorm.config import show_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; without one, print the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m nbnorm",
        description="Without a command: print versions, hardware and settings, for bug reports.",
    )
    commands = parser.add_subparsers(title="commands", dest="command")
    demo = commands.add_parser(
        "demo",
        help="write a page that shows an array before and after batch normalization",
        description="Write an HTML page that shows an array, or images, before and after batch "
        "normalization: statistics, histograms, channels that stand out, and times.",
    )
    demo.add_argument("file", metavar="FILE", help=".npy or .npz file, image, or folder of images")
    demo.add_argument("--array", metavar="NAME", help="which array of a .npz file")
    demo.add_argument(
        "--axis",
        help="channel axes, which keep their statistics: 1 (default), -1 (channels last) or 1,2,3; "
        "if the first of several is negative: --axis=-2,-1",
    )
    demo.add_argument("--output", metavar="PAGE", help="page to write (default: FILE's name.html)")
    demo.add_argument("--no-open", action="store_true", help="do not open the page in a browser")
    given = parser.parse_args(arguments)
    if given.command is None:
        show_config()
        return
    try:
        page = _demo.write_page(given.file, array=given.array, axis=given.axis, output=given.output)
    except _demo.DemoError as error:
        demo.error(str(error))
    encoding = sys.stdout.encoding or "utf-8"
    print(str(page).encode(encoding, errors="replace").decode(encoding))
    if not given.no_open:
        webbrowser.open(page.resolve().as_uri())


if __name__ == "__main__":
    main()
