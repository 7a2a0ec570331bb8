"""Bar chart of a run: time of all batch norms of ResNet-50, by library and op."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import OPS, PEERS, is_ours
from benchmarks.runs import Run
from benchmarks.tables import number, resnet_sums

OURS, OTHERS, FLOOR = "#1f5fa8", "#b4b8be", "#c0392b"
TITLES = {
    "forward": "Training forward",
    "backward": "Backward",
    "inference": "Inference",
    "relu": "Step of BN + ReLU",
    "add+relu": "Step of BN + add + ReLU",
}


def draw(run: Run, path: Path, dtype: str = "float32") -> None:
    """Draw a panel per op with a bar per peer, nbnorm's in colour, and the floor as a line.

    Ops that were not measured at every shape of ResNet-50 are left out.
    """
    rows = [row for row in run.rows if row.dtype == dtype]
    sums = {op: total for op in OPS if (total := resnet_sums([r for r in rows if r.op == op]))}
    if not sums:
        raise ValueError("the chart shows sums over ResNet-50: its shapes were not measured")
    counts = [len(total) for total in sums.values()]
    # Equal figures must give equal files: no date, and no random names of elements.
    with mpl.rc_context({"svg.hashsalt": "nbnorm", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(7.5, 0.19 * sum(counts) + 0.5 * len(counts)), layout="constrained")
        panels = figure.subplots(len(sums), squeeze=False, height_ratios=counts)[:, 0]
        for panel, (op, total) in zip(panels, sums.items(), strict=True):
            _bars(panel, TITLES[op], {name: 1e3 * seconds for name, seconds in total.items()})
        panels[-1].set_xlabel(f"ms for the 53 batch norms of ResNet-50, N = 32, {dtype}")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=150)


def _bars(panel: Axes, title: str, total: dict[str, float]) -> None:
    names = [name for name in PEERS if name in total]
    bars = panel.barh(
        names,
        [total[name] for name in names],
        color=[OURS if is_ours(name) else OTHERS for name in names],
        height=0.75,
    )
    panel.bar_label(bars, fmt=number, padding=3, color="#444444")
    panel.axvline(total["floor"], color=FLOOR, linewidth=1)
    panel.annotate(
        "floor", (total["floor"], 1), xycoords=("data", "axes fraction"), xytext=(2, 2),
        textcoords="offset points", color=FLOOR, fontsize=8,
    )  # fmt: skip
    panel.set_title(title, loc="left", fontweight="bold", pad=10)
    panel.invert_yaxis()
    panel.margins(x=0.08, y=0.01)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
