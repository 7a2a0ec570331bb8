"""Inline SVG. Hundreds of small charts are lighter as one path each than as a library's figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nbnorm._demo.report import REACH, Channel, Histogram, ends_of

WIDTH, HEIGHT = 128, 36  # of a histogram
WIDE, HIGH = 960, 180  # of a chart of all channels


def number(value: float, digits: int = 6) -> str:
    """Format a number: rounded, with a typographic minus sign."""
    text = f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")
    return text.replace("nan", "NaN").replace("inf", "Inf")


def histogram(found: Histogram | None, kind: str, label: str) -> str:
    """Return the histogram of a channel before or after, with its ends below."""
    if found is None:
        return f'<span class="none">{"no finite values" if kind == "before" else "NaN"}</span>'
    left, right = (found.low, found.high) if kind == "before" else (-REACH, REACH)
    step = (found.high - found.low) / len(found.counts)
    scale, top = WIDTH / (right - left), max(int(found.counts.max()), 1)
    path, end = [], 0.0
    for i, count in enumerate(found.counts):
        begin = (found.low - left + i * step) * scale  # low + i * step may equal low
        end = begin + step * scale
        if count and end > 0 and begin < WIDTH:
            begin, end = max(begin, 0), min(end, WIDTH)
            path.append(
                f"M{begin:.1f} {HEIGHT}V{HEIGHT * (1 - count / top):.1f}H{end:.1f}V{HEIGHT}"
            )
    ends = _apart(left, right)
    text = f"{label}, {kind}: histogram from {ends[0]} to {ends[1]}"
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(text)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<path d="{"".join(path)}"/></svg>'
        f'<span class="ends"><span>{ends[0]}</span><span>{ends[1]}</span></span>'
    )


def overview(channels: Sequence[Channel], kind: str) -> str:
    """Return a chart of mean and standard deviation of channels, in order of their numbers."""
    values = [
        (c.mean, c.std) if kind == "before" else (0.0, c.std_after)
        for c in sorted(channels, key=lambda c: c.index)
    ]
    finite = [(mean, std) for mean, std in values if _is_number(mean) and _is_number(std)]
    if not finite:
        return "<p>No channel has a finite mean and standard deviation.</p>"
    low, high = ends_of(min(m - s for m, s in finite), max(m + s for m, s in finite))
    pitch, scale = WIDE / len(values), HIGH / (high - low)
    if not (_is_number(high - low) and _is_number(scale)):
        return "<p>The values are too large or too small to draw.</p>"
    width = pitch if pitch < 8 else min(pitch * 0.6, 60)
    bars, means = [], []
    for i, (mean, std) in enumerate(values):
        if not (_is_number(mean) and _is_number(std)):
            continue
        middle, y, half = (i + 0.5) * pitch, (high - mean) * scale, std * scale
        bars.append(f"M{middle:.1f} {y - half:.1f}V{y + half + 0.5:.1f}")
        means.append(f"M{middle - pitch * 0.35:.1f} {y:.1f}h{pitch * 0.7:.1f}")
    text = (
        f"{kind.capitalize()}: mean \N{PLUS-MINUS SIGN} standard deviation, "
        f"from {number(low)} to {number(high)}"
    )
    return (
        f'<figure class="{kind}"><figcaption>{text}</figcaption>'
        f'<svg role="img" aria-label="{text}, of every channel" '
        f'viewBox="0 -3 {WIDE} {HIGH + 6}" '
        'preserveAspectRatio="none">'
        f'<path class="bars" stroke-width="{width:.2f}" d="{"".join(bars)}"/>'
        f'<path class="means" d="{"".join(means)}"/></svg></figure>'
    )


def _apart(low: float, high: float) -> tuple[str, str]:
    """Return two numbers for readers with as many digits as they need to differ."""
    texts = [(number(low, digits), number(high, digits)) for digits in range(4, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[-1])


def _is_number(value: float) -> bool:
    return abs(value) < float("inf")
