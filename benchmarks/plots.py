"""The rows as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import PLAIN, TRAIN
from .tables import Row, slug, title

_COLOURS = {"NCHW": "#0b5fa5", "channels_last": "#d1600a", "(N, C)": "#3a7d34"}
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^"}


def plot(rows: Sequence[Row], directory: Path) -> list[Path]:
    """An SVG of all sizes and one of the peers for each device; the same rows give the same bytes.

    Raises:
        ValueError: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("expected matplotlib for plots, got none; run: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    plain = [row for row in rows if row["pass"] == TRAIN and row.get("fused") == PLAIN and "nbytes" in row]
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in plain):
        mine = [row for row in plain if (row["device"], row["threads"]) == (device, threads)]
        for name, draw in (("sizes", _sizes), ("peers", _peers)):
            with matplotlib.rc_context({"svg.hashsalt": "batchrenorm", "font.size": 9, "svg.fonttype": "none"}):
                figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
                if draw(axes, mine):
                    axes.set_title(f"{device}, {threads} threads, commit {mine[-1]['commit'][:12]}", fontsize=8)
                    directory.mkdir(parents=True, exist_ok=True)
                    made.append(directory / f"{slug(device)}-{name}.svg")
                    figure.savefig(made[-1], metadata={"Date": None})
                plt.close(figure)
    return made


def _layout(row: Row) -> str:
    return "(N, C)" if len(row["shape"]) == 2 else "channels_last" if row["channels_last"] else "NCHW"


def _sizes(axes: Any, rows: Sequence[Row]) -> bool:
    """Ours over batch norm against the size of x, and between which ratios batch norm is to itself."""
    ours = [row for row in rows if row["implementation"] == "brn" and row["base"] == "bn"]
    if not ours:
        return False
    noise = sorted(row["ratio"] for row in rows if row["implementation"] == "bn again")
    if noise:
        low, high = noise[len(noise) // 20], noise[-1 - len(noise) // 20]
        axes.axhspan(low, high, color="0.9", label="batch norm twice (90 % of cases)")
    axes.axhline(1, color="0.5", linewidth=0.8)
    for layout, dtype in dict.fromkeys((_layout(row), row["dtype"]) for row in ours):
        some = [row for row in ours if (_layout(row), row["dtype"]) == (layout, dtype)]
        axes.plot(
            [row["nbytes"] / 2**20 for row in some],
            [row["ratio"] for row in some],
            linestyle="none",
            marker=_MARKERS[dtype],
            markersize=4,
            alpha=0.8,
            color=_COLOURS[layout],
            label=f"{layout} {dtype}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("size of x, MiB; forward + backward")
    axes.set_ylabel("time over nn.BatchNorm (logarithmic)")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _peers(axes: Any, rows: Sequence[Row]) -> bool:
    """A bar for each implementation in each case of the peers."""
    rows = [row for row in rows if row.get("group") == "peers"]
    names = [n for n in dict.fromkeys(r["implementation"] for r in rows) if n not in ("bn", "bn again", "copy")]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not names:
        return False
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        found = {row["case"]: row["ratio"] for row in rows if row["implementation"] == name}
        places = [(place, found[case]) for place, case in enumerate(cases) if case in found]
        axes.barh(
            [place + (number - (len(names) - 1) / 2) * height for place, _ in places],
            # From 1: to the left what is faster than batch norm.
            [ratio - 1 for _, ratio in places],
            height,
            left=1,
            label=title(name),
        )
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case.removeprefix("peers: ") for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time over nn.BatchNorm, forward + backward (logarithmic)")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return True
