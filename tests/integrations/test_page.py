"""docs/integrations.md: every host has a section whose example runs, and a row in the tables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
HOSTS = {
    "torch": "PyTorch", "autograd": "HIPS autograd", "mygrad": "mygrad", "thinc": "thinc",
    "onnx": "ONNX", "sklearn": "scikit-learn",
}  # fmt: skip


def test_every_host_is_there():
    files = (ROOT / "nbnorm" / "integrations").glob("[a-z]*")
    assert {file.stem for file in files} == set(HOSTS)
    measured = PAGE.partition("<!-- integrations: begin -->")[2]
    for host in ("PyTorch", "autograd", "mygrad", "thinc", "onnx"):  # docs/scaler.md has the other
        assert re.search(rf"^\| {host} [\w.+]+ +\| .*\dx", measured, re.M), host
    for host, title in HOSTS.items():
        assert f"| {title} | `{host}` |" in PAGE


@pytest.mark.parametrize("host", HOSTS)
def test_the_example_runs(host):
    pytest.importorskip(host)
    section = PAGE.partition(f"\n## {HOSTS[host]}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    exec(compile(block, f"integrations.md, {host}", "exec"), {"__name__": host})
