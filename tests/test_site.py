"""The site builds without warnings, loads nothing from other sites, and its links are valid."""

import importlib.util
import re
import shutil
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
    """A page's links, what it loads, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places, self.pictures = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Record a tag's address and id."""
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag in ("img", "script", "source", "video", "iframe") and attributes.get("src"):
            self.loads.append(attributes["src"])
            if tag == "img":
                self.pictures.append(attributes["src"])
        elif tag == "link" and attributes["href"] != "#":
            self.loads.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; return its pages by path."""
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


def start_of(site):
    """Return the path of the start page."""
    return min(site, key=lambda path: len(path.parts)).with_name("index.html")


def test_every_task_is_one_click_from_the_start_page(site):
    start = site[start_of(site)]
    tasks = ("quickstart", "conventions", "freeze", "fold", "sync", "integrations", "population")
    for name in (*tasks, "gpu", "threads", "warmup", "api", "math", "numerics", "determinism"):
        assert any(link.startswith(f"{name}.html") for link in start.links), name


# The gallery


@pytest.fixture(scope="module")
def gallery(site):
    """Return the gallery page's path and content."""
    path = start_of(site).parent / "generated" / "examples" / "index.html"
    return path, site[path], path.read_text(encoding="utf-8")


def test_every_card_has_a_picture_of_its_own(gallery):
    path, page, text = gallery
    import sphinx_gallery

    cards = text.count('class="sphx-glr-thumbcontainer"')
    pictures = [(path.parent / source).resolve().read_bytes() for source in page.pictures]
    assert cards == len(pictures) == len(set(pictures)) > 8
    static = Path(sphinx_gallery.__file__).parent / "_static"
    for name in ("no_image.png", "broken_example.png"):
        assert (static / name).read_bytes() not in pictures
    for name in ("figure1", "figure2", "shuffling_dropout"):
        assert any(f"sphx_glr_{name}_thumb" in source for source in page.pictures)


def test_the_gallery_has_every_program_and_no_module_that_they_share(gallery):
    _, page, text = gallery
    programs = {path.stem for path in (DOCS / "examples").glob("*.py")} - {"perceptron", "runs"}
    article = text[text.index("<article") : text.index("</article")]
    assert set(re.findall(r'href="(\w+)\.html', article)) == programs
    for name in ("perceptron", "runs"):
        assert any(link.endswith(f"/{name}.py") for link in page.links), name


# Layout, if there is a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
WIDTHS = (960, 1024, 1300, 1920)
PROBE = """<script>addEventListener("load", () => {
  const seen = (of) => [...document.querySelectorAll(of)].map((e) => e.getBoundingClientRect());
  const middles = seen(".bd-header .navbar-item, .bd-header .nav-item")
    .filter((box) => box.width).map((box) => Math.round((box.top + box.bottom) / 2));
  const cut = [...document.querySelectorAll("dl.py pre")]
    .filter((e) => e.scrollWidth > e.clientWidth).length;
  document.documentElement.setAttribute("data-seen",
    `${middles.length} items, apart ${Math.max(...middles) - Math.min(...middles)}, cut ${cut}`);
})</script></body>"""


def look(path, width, folder):
    """Render a page; return the number of header items, their vertical spread, and clipped code."""
    probe = path.with_name("probe.html")
    probe.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    try:
        child = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
             "--disable-background-networking", f"--window-size={width},900", "--dump-dom",
             probe.as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        probe.unlink()
    found = re.search(r'data-seen="(\d+) items, apart (-?\d+), cut (\d+)"', child.stdout)
    assert found, child.stderr
    return map(int, found.groups())


def test_the_navigation_fits_into_one_row(site, tmp_path):
    start = start_of(site)
    text = start.read_text(encoding="utf-8")
    head = text[text.index("bd-header__inner") : text.index("</header")]
    titles = [title.strip() for title in re.findall(r"nav-link[^>]*>([^<]+)</a>", head)]
    assert "Quick start" in titles
    # 8 pixels per letter, 16 between pages, and 230 for the name, search and theme.
    assert sum(8 * len(title) + 16 for title in titles) < 960 - 230
    assert "search-button-field" not in head
    if BROWSER:
        for width in WIDTHS:
            items, apart, _ = look(start, width, tmp_path)
            assert items > 7
            assert apart < 16, f"{width} pixels"


def test_code_of_the_reference_is_not_cut_off(site, tmp_path):
    style = (start_of(site).parent / "_static" / "site.css").read_text(encoding="utf-8")
    assert re.search(r"^dl\.py pre \{\n  white-space: pre-wrap;", style, re.M)
    if BROWSER:
        for path in site:
            if path.name in ("nbnorm.batch_norm_forward.html", "nbnorm.BatchNorm.html"):
                for width in (400, 1300):
                    *_, cut = look(path, width, tmp_path)
                    assert cut == 0, f"{path.name}, {width} pixels"
