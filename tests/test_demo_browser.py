"""The demo's page in a browser, where there is one: layout, themes, sorting."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from nbnorm import __main__

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, table = document.querySelector("#channels");
  const labels = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join(" ");
  const seen = [`wide ${root.scrollWidth - root.clientWidth}`,
    `loaded ${performance.getEntriesByType("resource").length}`,
    `back ${getComputedStyle(document.body).backgroundColor}`, `at first ${labels()}`];
  const button = [...table.querySelectorAll("button")].find((b) => b.textContent === "std");
  for (const order of ["descending", "ascending"]) {
    button.click();
    seen.push(`${button.parentNode.ariaSort} ${labels()}`);
  }
  const empty = [...document.querySelectorAll("svg path")].filter((path) => {
    const box = path.getBoundingClientRect();
    return !(box.width > 0 && box.height >= 0);
  });
  seen.push(`invisible ${empty.length}`);
  root.setAttribute("data-seen", seen.join("; "));
})</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write the page of an array of four channels, one with NaN."""
    folder = tmp_path_factory.mktemp("demo")
    x = np.random.default_rng(0).normal(size=(200, 4)) * [2, 0.5, 30, 1]
    x[7, 3] = np.nan
    np.save(folder / "x.npy", x)
    path = folder / "x.html"
    __main__.main(["demo", str(folder / "x.npy"), "--no-open", "--output", str(path)])
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    return path


def look(page, width, scheme):
    """Render the page; return what the probe saw."""
    child = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900",
         f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', child.stdout)
    assert found, child.stderr
    return found[1].split("; ")


@pytest.mark.parametrize(
    ("scheme", "back"), [(1, "rgb(255, 255, 255)"), (0, "rgb(20, 23, 28)")], ids=["light", "dark"]
)
@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_fits_loads_nothing_and_sorts(page, width, scheme, back):
    assert look(page, width, scheme) == [
        "wide 0",
        "loaded 0",
        f"back {back}",
        "at first 3 2 1 0",
        "descending 2 0 1 3",
        "ascending 1 0 2 3",
        "invisible 0",
    ]
