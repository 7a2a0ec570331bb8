"""The page: one HTML file that loads nothing."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template

from nbnorm._demo import charts
from nbnorm._demo.charts import number
from nbnorm._demo.report import Channel, Report
from nbnorm._demo.times import Timing
from nbnorm._version import __version__


def page_of(report: Report) -> str:
    """Return the page as text. Whatever comes from the user's files is escaped."""
    folder = files(__package__)
    data = report.data
    notes = [*data.notes]
    if report.number > len(report.channels):
        notes.append(
            f"The table and the charts have the {len(report.channels):,} most notable channels of "
            f"{report.number:,}; the summary covers all."
        )
    seen = "all" if report.sampled == report.count else "evenly spaced"
    return Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        name=escape(data.path.resolve().name),
        about=escape(data.about),
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        summary=_items(report.summary),
        notes=_items(notes),
        size=f"{report.number:,} channel{'s' * (report.number > 1)} of {report.count:,} values",
        sampled=f"{report.sampled:,} values per channel ({seen})",
        overview="".join(charts.overview(report.channels, kind) for kind in ("before", "after")),
        channels="\n".join(map(_row, report.channels)),
        timed=escape(report.timed),
        timings="\n".join(_timing(timing, report.timings[0]) for timing in report.timings),
        version=__version__,
    )


def _items(sentences: list[str] | tuple[str, ...]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _row(channel: Channel) -> str:
    """Return a channel's row; data-value has every digit, for sorting and for programs."""
    label = escape(channel.label)
    values = "".join(
        f'<td data-value="{value!r}">{number(value)}</td>'
        for value in (channel.mean, channel.std, channel.std_after)
    )
    flags = "".join(f'<span class="flag">{escape(flag)}</span> ' for flag in channel.flags)
    pictures = "".join(
        f"<td>{charts.histogram(getattr(channel, kind), kind, f'channel {channel.label}')}</td>"
        for kind in ("before", "after")
    )
    return (
        f'<tr><th scope="row" data-value="{channel.index}">{label}</th>{values}{pictures}'
        f"<td>{flags}</td></tr>"
    )


def _timing(timing: Timing, copy: Timing) -> str:
    milliseconds = number(timing.seconds * 1e3, 3)
    return (
        f'<tr><th scope="row">{escape(timing.name)}</th>'
        f'<td data-value="{timing.seconds!r}">{milliseconds} ms</td>'
        f'<td data-value="{timing.bytes}">{timing.bytes / 1e6:,.3f} MB</td>'
        f"<td>{timing.bytes / timing.seconds / 1e9:.3g} GB/s</td>"
        f"<td>{timing.seconds / copy.seconds:.2f}</td></tr>"
    )
