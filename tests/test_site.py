"""The site builds without a warning, needs nothing from elsewhere, and its links lead somewhere."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
NEEDED = (
    *("math_core", "matplotlib", "myst_parser", "numpydoc", "pydata_sphinx_theme", "sphinx"),
    *("sphinx_gallery", "ziamath"),
)

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason='needs the extra "docs"'
)


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Take a tag's address, and its id."""
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag in ("img", "script", "source", "video", "iframe") and attributes.get("src"):
            self.loads.append(attributes["src"])
        elif tag == "link" and attributes["href"] != "#":
            self.loads.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build everything anew; return the pages by their paths."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html")
    child = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    paths = [path for path in (folder / "html").rglob("*.html") if "_static" not in path.parts]
    assert len(paths) > 30
    return {path: Page(path) for path in paths}


def test_links_lead_to_pages_and_places_that_are_there(site):
    broken = []
    for path, page in site.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or link == "#":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = target.is_file()
            if there and url.fragment and target in site:
                there = unquote(url.fragment) in site[target].places
            if not there:
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_pages_load_nothing_from_elsewhere(site):
    for path, page in site.items():
        for address in page.loads:
            url = urlsplit(address)
            assert not url.scheme, f"{path.name}: {address}"
            assert not url.netloc, f"{path.name}: {address}"
            assert (path.parent / unquote(url.path)).is_file(), f"{path.name}: {address}"


def test_formulas_need_no_program_to_be_drawn(site):
    path = next(path for path in site if path.name == "math.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("<math") > 100
    assert "\\frac" not in text
    assert not any("mathjax" in address.lower() for address in site[path].loads)


def test_every_task_is_one_click_from_the_start_page(site):
    start = site[min(site, key=lambda path: len(path.parts)).with_name("index.html")]
    tasks = ("quickstart", "conventions", "freeze", "fold", "sync", "integrations", "population")
    for name in (*tasks, "gpu", "threads", "warmup", "api", "math", "numerics", "determinism"):
        assert any(link.startswith(f"{name}.html") for link in start.links), name
