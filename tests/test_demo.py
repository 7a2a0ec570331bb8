"""``python -m nbnorm demo`` writes a page whose numbers are those of the array."""

import importlib.util
import io
import math
import os
import re
import sys
import webbrowser
from fractions import Fraction
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from nbnorm import __main__, batch_norm_inference, batch_norm_stats
from nbnorm._demo import charts, report, times
from nbnorm._demo.data import open_data

needs_pillow = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason='needs the extra "demo"'
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Run in an empty folder, and time each function for as short as possible."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(times, "SECONDS", 0.0)


def demo(file, *arguments):
    """Run the command; return the page."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", output)
        __main__.main(["demo", str(file), "--no-open", *arguments])
    with open(output.getvalue().strip(), encoding="utf-8") as page:
        return page.read()


def rows_of(page):
    """Return {channel: (mean, std, std after, flags)} in the order of the page's table."""
    rows = {}
    table = page[page.index('<table id="channels">') :]
    for row in re.findall(r'<tr><th scope="row"(.*?)</tr>', table, re.S):
        label = unescape(re.search(r">(.*?)</th>", row)[1])
        values = map(float, re.findall(r'<td data-value="(.*?)">', row))
        flags = tuple(map(unescape, re.findall(r'<span class="flag">(.*?)</span>', row)))
        rows[label] = (*values, flags)
    return rows


def summary_of(page):
    return unescape(re.search(r'<ul class="summary">(.*?)</ul>', page)[1])


def test_numbers_of_a_floating_array_are_those_of_batch_norm_stats():
    x = np.random.default_rng(0).normal(3, 2, size=(6, 5, 7, 4)).astype(np.float32)
    np.save("x.npy", x)
    rows = rows_of(demo("x.npy"))
    moments = batch_norm_stats(x)
    assert len(rows) == 5
    for c in range(5):
        mean, std, after, flags = rows[str(c)]
        var = moments.var()[c]
        assert (mean, std) == (moments.mean[c], math.sqrt(var))
        assert after == math.sqrt(var / (var + 1e-5))
        assert not flags


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", ">i4", "?"])
def test_numbers_of_integers_are_exact(dtype):
    x = np.random.default_rng(1).integers(0, 200, size=(9, 11, 3)).astype(dtype)
    np.save("x.npy", x)
    page = demo("x.npy", "--axis", "-1")
    for c, (mean, std, *_) in rows_of(page).items():
        values = [Fraction(int(value)) for value in x[..., int(c)].flat]
        exact = sum(values) / len(values)
        var = sum((value - exact) ** 2 for value in values) / len(values)
        assert math.isclose(mean, exact, rel_tol=2**-50)
        assert math.isclose(std, math.sqrt(var), rel_tol=2**-50)
    assert ("converted" in page) == (dtype not in ("u1", "i2"))


def test_several_channel_axes_have_names_of_several_numbers():
    x = np.random.default_rng(2).normal(size=(8, 2, 3, 5))
    np.save("x.npy", x)
    for axis in "1,2", "2,1", "-3,2":
        rows = rows_of(demo("x.npy", f"--axis={axis}"))
        assert set(rows) == {str((i, j)) for i in range(2) for j in range(3)}
        assert rows["(1, 2)"][0] == batch_norm_stats(x, axis=(1, 2)).mean[1, 2]


def test_what_is_notable_is_flagged_and_comes_first():
    x = np.random.default_rng(3).normal(size=(40, 12, 6))
    x[3, 7, 1], x[4, 7, :2], x[5, 9, 0] = np.nan, np.inf, -np.inf
    x[:, 2] = 0.1
    x[:, 4] *= 1e5
    x[:, 5] += 1e3
    x[:, 6] *= 1e-4
    x[:, 8] = 1e200 * np.arange(6)
    np.save("x.npy", x)
    page = demo("x.npy")
    rows = rows_of(page)
    flags = {label: row[-1] for label, row in rows.items() if row[-1]}
    assert set(list(rows)[:3]) == {"7", "8", "9"}
    assert list(rows)[3:7] == ["2", "4", "6", "5"]
    assert flags["7"] == ("1 NaN", "2 Inf")
    assert flags["8"] == ("squares overflow",)
    assert flags["9"] == ("1 Inf",)
    assert flags["2"] == ("constant",)
    typical = np.median([x[:, c].std() for c in range(12) if c not in (2, 7, 8, 9)])
    assert flags["4"] == (f"std {x[:, 4].std() / typical:.3g} times the median",)
    assert flags["5"] == (f"mean {1e3 / x[:, 5].std():.3g} std from 0",)
    assert "variance near eps" in flags["6"]
    assert len(flags) == 7
    assert rows["2"][1:3] == (0.0, 0.0)
    assert math.isnan(rows["7"][0])
    summary = summary_of(page)
    assert "3 of 12 channels (7, 8, 9) have NaN" in summary
    assert "1 of 12 channels (2) has one value only" in summary
    assert "1 of 12 channels (5) has a mean of 10" in summary
    assert "1 of 12 channels (6) has a variance" in summary
    spread = x[:, 4].std() / x[:, 6].std()
    assert f"(channel 6) to {x[:, 4].std():.4g} (channel 4), {spread:.3g} times" in summary


def test_an_ordinary_array_is_said_to_be_one():
    np.save("x.npy", np.random.default_rng(4).normal(size=(50, 3)))
    assert "Nothing stands out" in summary_of(demo("x.npy"))


# Histograms


def report_of(x, axis=None, **settings):
    """Return the report of an array, with some constants of the module replaced."""
    np.save("reported.npy", x)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(report, name, value)
        return report.report_of(open_data("reported.npy", axis=axis))


def test_histograms_count_every_value_before_and_after():
    x = np.random.default_rng(5).normal(2, 3, size=(500, 4)).astype(np.float32)
    found = report_of(x)
    assert found.sampled == found.count == 500
    moments = batch_norm_stats(x)
    y = batch_norm_inference(x, None, None, moments.mean, moments.var())
    for channel in found.channels:
        values = x[:, channel.index].astype(float)
        counts, edges = np.histogram(values, report.BINS)
        assert (channel.before.low, channel.before.high) == (edges[0], edges[-1])
        np.testing.assert_array_equal(channel.before.counts, counts)
        ends = -report.REACH, report.REACH
        counts, _ = np.histogram(y[:, channel.index].astype(float).clip(*ends), report.BINS, ends)
        assert (channel.after.low, channel.after.high) == ends
        np.testing.assert_array_equal(channel.after.counts, counts)


@pytest.mark.parametrize(("most", "width"), [(20, 1), (50, 2), (256, 8)])
def test_bins_of_integers_hold_as_many_integers_each(most, width):
    x = np.arange(most, dtype=np.uint8 if most <= 256 else np.int16)[:, None]
    (channel,) = report_of(x).channels
    for found in channel.before, channel.after:
        assert (found.counts == width).all()
        assert found.counts.sum() == most
    assert (channel.before.low, channel.before.high) == (-0.5, most - 0.5)
    rstd = 1 / math.sqrt(channel.std**2 + 1e-5)
    assert math.isclose(channel.after.high, (most - 0.5 - channel.mean) * rstd)


def test_values_that_are_not_finite_have_no_place_in_a_histogram():
    x = np.ones((6, 3))
    x[:, 1], x[2, 2] = np.nan, np.inf
    one, none, rest = sorted(report_of(x).channels, key=lambda channel: channel.index)
    assert one.before.counts.sum() == one.after.counts.sum() == 6
    assert none.before is none.after is rest.after is None
    assert rest.before.counts.sum() == 5


def test_values_near_the_largest_of_float64_can_be_drawn():
    np.save("x.npy", np.array([[1.7e308, 1.0], [-1.7e308, 2.0]]))
    assert rows_of(demo("x.npy"))["0"][-1]


@pytest.mark.parametrize("value", [2.0**53, -1e20, 1e300, np.finfo(float).max, 5e-324, 2**63])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_values_that_are_equal_or_nearly_so_can_be_drawn(value, steps):
    dtype = np.uint64 if isinstance(value, int) else np.float64
    x = np.full((6, 1), value, dtype)
    for _ in range(steps):
        x[3:] = x[3:] - 2048 if dtype == np.uint64 else np.nextafter(x[3:], 0)
    (channel,) = report_of(x).channels
    found, values = channel.before, x.astype(float)
    assert found.low < found.high
    assert found.low <= values.min() <= values.max() <= found.high
    alike = (values == values[0]).all() or abs(value) < 1e-300
    assert sorted(found.counts[found.counts > 0]) == ([6] if alike else [3, 3])
    drawn = charts.histogram(found, "before", "0")
    bars = re.findall(r"M([\d.]+) [\d.]+V[\d.]+H([\d.]+)V", drawn)
    assert len(bars) == (1 if alike else 2)
    assert all(float(left) < float(right) for left, right in bars)
    assert '<svg class="before"' in demo("reported.npy")


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_sampled_evenly_but_statistics_are_of_all(order):
    x = np.random.default_rng(6).normal(size=(100, 3, 40))
    found = report_of(np.asarray(x, order=order), SAMPLED=1200)
    assert found.count == 4000
    assert 300 <= found.sampled <= 400
    assert all(channel.before.counts.sum() == found.sampled for channel in found.channels)
    mean = {channel.index: channel.mean for channel in found.channels}
    np.testing.assert_allclose([mean[c] for c in range(3)], x.mean(axis=(0, 2)), rtol=1e-10)


def test_of_many_channels_the_most_notable_are_listed(monkeypatch):
    x = np.random.default_rng(7).normal(size=(20, 30))
    x[:, 17] = 1
    x[0, 29] = np.nan
    np.save("x.npy", x)
    monkeypatch.setattr(report, "LISTED", 4)
    page = demo("x.npy")
    assert list(rows_of(page))[:2] == ["29", "17"]
    assert len(rows_of(page)) == 4
    assert "4 most notable channels of 30" in page


# Times


def test_times_are_of_bytes_that_are_read_and_written():
    for dtype, names in (
        ("f4", ["copy", "statistics", "normalise", "training forward (both)"]),
        ("u1", ["copy", "statistics", "normalise"]),
    ):
        x = np.arange(120).reshape(20, 6).astype(dtype)
        found = report_of(x)
        assert [timing.name for timing in found.timings] == names
        assert all(timing.seconds > 0 for timing in found.timings)
        both = x.nbytes + 4 * x.size
        expected = [both, x.nbytes, both, both][: len(names)]
        assert [timing.bytes for timing in found.timings] == expected


def test_the_least_time_counts_and_first_calls_do_not(monkeypatch):
    clock = [0.0]
    durations = iter([100.0, 3.0, 2.0, 4.0, *[5.0] * 6])

    def call():
        clock[0] += next(durations)

    monkeypatch.setattr(times, "perf_counter", lambda: clock[0])
    assert times._least({"call": call}) == {"call": 2.0}


def test_of_a_large_array_the_first_part_is_timed(monkeypatch):
    monkeypatch.setattr(times, "TIMED", 100)
    np.save("x.npy", np.ones((50, 10)))
    assert "on the first part, of shape (10, 10)" in demo("x.npy")


# The page


class Page(HTMLParser):
    """What a page loads, its tags, and its pictures without a name."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.unnamed = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Record a tag."""
        attributes = dict(attributes)
        self.tags.add(tag)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "svg" and not (attributes.get("role") == "img" and attributes.get("aria-label")):
            self.unnamed.append(attributes)


def test_the_page_loads_nothing_and_names_its_pictures():
    np.save("x.npy", np.random.default_rng(8).normal(size=(30, 5)))
    text = demo("x.npy")
    page = Page(text)
    assert page.loads == ["data:,"]
    assert not page.unnamed
    assert text.count("<svg") == 2 + 2 * 5
    for address in "http:", "https:", "//", "url(", "@import":
        assert address not in text.replace("// A click", "")
    assert "default-src 'none'" in text
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text


def test_ends_of_histograms_differ_in_words():
    assert charts.histogram(None, "after", "channel 0") == '<span class="none">NaN</span>'
    for low, high, ends in (
        (6.99991, 7.00023, ("6.9999", "7.0002")),
        (-0.5, 255.5, ("\N{MINUS SIGN}0.5", "255.5")),
        (1234567.0, 1234568.0, ("1234567", "1234568")),
    ):
        drawn = charts.histogram(report.Histogram(np.ones(3, int), low, high), "before", "<")
        found = re.search(r"<span>(.*?)</span><span>(.*?)</span>", drawn).groups()
        assert found == ends
        assert 'aria-label="&lt;, before' in drawn


def test_names_are_escaped():
    name = "<img src=x onerror=alert(1)>&$about'.npz"
    np.savez(name, **{"<b>a": np.ones((3, 2))})
    text = demo(name)
    page = Page(text)
    assert not {"img", "b"} & page.tags
    assert "<title>&lt;img src=x onerror=alert(1)&gt;&amp;$about&#x27;.npz" in text


def test_the_page_opens_in_a_browser_unless_told_not_to(monkeypatch, capsys, tmp_path):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    np.save("x.npy", np.ones((3, 2)))
    __main__.main(["demo", "x.npy"])
    assert capsys.readouterr().out == "x.html\n"
    assert opened == [(tmp_path / "x.html").as_uri()]
    (tmp_path / "pages").mkdir()
    __main__.main(["demo", "x.npy", "--no-open", "--output", "pages/one.html"])
    assert (tmp_path / "pages" / "one.html").exists()
    assert len(opened) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_a_name_that_is_not_utf8(capsys, tmp_path):
    """capsys's stdout is UTF-8 and strict, like a terminal's."""
    name = os.fsdecode(b"caf\xe9")
    np.save(f"{name}.npy", np.ones((3, 2)))
    __main__.main(["demo", f"{name}.npy", "--no-open"])
    assert capsys.readouterr().out == "caf?.html\n"
    assert "<title>caf?.npy" in (tmp_path / f"{name}.html").read_text(encoding="utf-8")


def test_an_array_of_several_is_chosen_by_name():
    np.savez("x.npz", a=np.ones((3, 2)), b=np.full((3, 4), 5.0))
    rows = rows_of(demo("x.npz", "--array", "b"))
    assert len(rows) == 4
    assert rows["0"][0] == 5.0
    np.savez("one.npz", np.ones((3, 2)))
    assert len(rows_of(demo("one.npz"))) == 2


def test_channels_that_seem_to_be_last_are_mentioned():
    np.save("x.npy", np.ones((4, 6, 5, 3), np.uint8))
    assert "pass --axis -1" in demo("x.npy")
    assert "pass --axis -1" not in demo("x.npy", "--axis", "1")


# Errors


@pytest.fixture
def files(tmp_path):
    """Write files that cannot be shown, and one that can."""
    np.save("good.npy", np.ones((3, 2)))
    np.savez("two.npz", a=np.ones((3, 2)), b=np.ones((3, 2)))
    np.savez("none.npz")
    np.save("flat.npy", np.ones(3))
    np.save("empty.npy", np.ones((0, 2)))
    np.save("text.npy", np.array([["a", "b"]]))
    np.save("complex.npy", np.ones((3, 2), complex))
    np.save("objects.npy", np.array([[None, 1]], object))
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    (tmp_path / "broken.npz").write_bytes(b"not an archive")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.npy", "FILE missing.npy does not exist; expected a .npy or .npz file"),
        ("broken.npy", "FILE broken.npy cannot be read as NumPy's format"),
        ("cut.npy", "FILE cut.npy cannot be read as NumPy's format"),
        ("broken.npz", "FILE broken.npz cannot be read as NumPy's format"),
        ("two.npz", "FILE two.npz has a, b: choose one with --array NAME"),
        ("two.npz --array c", "--array c is not in the file; FILE two.npz has a, b"),
        ("none.npz", "FILE none.npz has no arrays"),
        ("good.npy --array a", "--array a names an array of a .npz file, but FILE is good.npy"),
        ("flat.npy", "shape (3,), expected at least 2 axes: save x.reshape(-1, 1)"),
        ("empty.npy", "shape (0, 2), which holds no values"),
        ("text.npy", "dtype <U1, expected real numbers"),
        ("complex.npy", "dtype complex128, expected real numbers: save x.real and x.imag"),
        ("objects.npy", "Python objects, expected numbers: np.save(..., x.astype(float))"),
        ("good.npy --axis 2", "--axis: axis 2 is out of range for an array of shape (3, 2)"),
        ("good.npy --axis 0,1", "leaves no axis"),
        ("good.npy --axis last", "--axis is last, expected integers such as 1, -1 or 1,2,3"),
        ("good.npy --output folder", "--output folder is a folder, expected a file"),
        ("good.npy --output no/page.html", "there is no folder no; make it first"),
        ("good.npy --output good.npy", "--output good.npy is FILE itself"),
    ],
)
def test_errors_name_the_argument_and_write_nothing(arguments, message, files, capsys):
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["demo", *arguments.split(), "--no-open"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.iterdir() if path.is_file()} == before


# Images


def save_image(name, array, mode=None):
    from PIL import Image

    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(name)


@needs_pillow
@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((9, 7), ["grey"]),
        ((9, 7, 3), ["red", "green", "blue"]),
        ((9, 7, 4), ["red", "green", "blue", "alpha"]),
    ],
)
def test_numbers_of_an_image_are_those_of_its_pixels(shape, labels):
    pixels = np.random.default_rng(9).integers(0, 256, size=shape, dtype=np.uint8)
    save_image("image.png", pixels)
    rows = rows_of(demo("image.png"))
    pixels = pixels.reshape(63, -1)
    assert set(rows) == set(labels)
    for label, values in zip(labels, pixels.T, strict=True):
        assert rows[label][0] == values.sum() / 63
        assert math.isclose(rows[label][1], values.std(), rel_tol=1e-14)


@needs_pillow
def test_images_of_16_bits_keep_them():
    pixels = np.random.default_rng(10).integers(0, 60000, size=(8, 5), dtype=np.uint16)
    save_image("image.png", pixels)
    (row,) = rows_of(demo("image.png")).values()
    assert row[0] == pixels.sum() / 40


@needs_pillow
def test_a_folder_of_images_of_several_sizes_and_modes(tmp_path):
    random = np.random.default_rng(11)
    folder = tmp_path / "photos.2026"
    (folder / "deeper").mkdir(parents=True)
    (folder / "notes.txt").write_text("not an image")
    sizes = (4, 5, 3), (4, 5, 3), (6, 2, 3)
    colours = [random.integers(0, 256, size=size, dtype=np.uint8) for size in sizes]
    grey = random.integers(0, 256, size=(3, 3), dtype=np.uint8)
    for i, image in enumerate(colours):
        save_image(folder / ("deeper" if i else ".") / f"{i}.png", image)
    save_image(folder / "grey.PNG", grey)
    page = demo(folder)
    assert (tmp_path / "photos.2026.html").exists()
    assert "photos.2026: 4 images of 3 sizes, mode RGB" in page
    assert "Images of modes RGB, L are converted to RGB" in page
    colours.append(np.stack([grey] * 3, axis=-1))
    values = np.concatenate([image.reshape(-1, 3) for image in colours])
    rows = rows_of(page)
    for label, channel in zip(("red", "green", "blue"), values.T, strict=True):
        assert math.isclose(rows[label][0], channel.mean(), rel_tol=1e-15)
        assert math.isclose(rows[label][1], channel.std(), rel_tol=1e-14)
    assert f"{len(values)} values" in page


@needs_pillow
def test_errors_of_images(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    pixels = np.random.default_rng(12).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)

    def refuses(message, *arguments):
        with pytest.raises(SystemExit):
            __main__.main(["demo", "--no-open", *arguments])
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("*.html"))

    refuses("FILE folder is a folder without images", "folder")
    (tmp_path / "notes.txt").write_text("words")
    refuses("FILE notes.txt cannot be read", "notes.txt")
    save_image("image.png", pixels)
    refuses("--axis 0 is for arrays", "image.png", "--axis", "0")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:5000])
    refuses("FILE cut.png cannot be read as an image", "cut.png")
    save_image(folder / "a.png", pixels)
    save_image(folder / "b.png", np.ones((4, 4), np.uint16))
    refuses("kinds that do not mix: a.png (RGB), b.png (I;16); separate them", "folder")


def test_without_pillow_images_name_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        __main__.main(["demo", "image.png"])
    assert 'pip install "nbnorm-kernels[demo]"' in capsys.readouterr().err
