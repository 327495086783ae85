"""Numbers of the docs: all of them are read from the committed results."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

from batchrenorm.paper import runs

RESULTS = Path(__file__).parents[2] / "results"


@functools.cache
def summary(preset: str) -> dict[str, Any]:
    """The committed summary of a preset."""
    return json.loads((RESULTS / preset / "summary.json").read_text(encoding="utf-8"))


@functools.cache
def records(preset: str) -> list[dict[str, Any]]:
    """The lines of a preset's results."""
    return runs.Results(RESULTS / preset / "results.jsonl").records


def accuracy(preset: str, arm: str, of: str = "test/averages") -> str:
    """Mean ± standard deviation over seeds, in percent."""
    found = summary(preset)["evaluations"][arm][of]
    return f"{found['accuracy_mean']:.1f} ± {found['accuracy_std']:.1f}"


def difference(preset: str, better: str, worse: str) -> str:
    """Of the mean test accuracies, in points."""
    means = [summary(preset)["arms"][arm]["accuracy_mean"] for arm in (better, worse)]
    return f"{means[0] - means[1]:+.1f}"


def sweep() -> dict[tuple[float, float, float, str], list[float]]:
    """(alpha, r_max, d_max, arm) -> accuracy on validation images for each seed."""
    found: dict[tuple[float, float, float, str], list[float]] = {}
    for r in records("choosing"):
        clip = r["config"]["clip"]
        found.setdefault((r["config"]["alpha"], clip["r_max"], clip["d_max"], r["arm"]), []).append(r["accuracy"])
    return found


def _limits() -> str:
    found = sweep()
    alpha = min(alpha for alpha, r_max, d_max, _ in found if (r_max, d_max) == (1.0, 5.0))
    names = {(1.0, 0.0): "batch norm", (3.0, 0.0): "r alone", (1.0, 5.0): "d alone", (3.0, 5.0): "the paper's"}
    lines = ["| r_max | d_max | | groups of 4 | non-i.i.d. groups |", "|--:|--:|---|--:|--:|"]
    for r_max, d_max in sorted({(r, d) for a, r, d, _ in found if a == alpha}):
        cells = [_spread(found[alpha, r_max, d_max, arm]) for arm in ("microbatch/brn", "noniid/brn")]
        lines.append(f"| {r_max:g} | {d_max:g} | {names.get((r_max, d_max), '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _arms() -> str:
    """What the experiments of all presets say for the choice of a normaliser."""
    titles = {"digits": "pairs of digits", "omniglot": "Omniglot", "fashion-mnist": "Fashion-MNIST"}
    rows = (
        ("i.i.d., 32 together: BN", "baseline/bn"),
        ("BRN", "baseline/brn"),
        ("GroupNorm or LayerNorm", ("baseline/group", "baseline/layer")),
        ("groups of 4: BN", "microbatch/bn"),
        ("BRN", "microbatch/brn"),
        ("non-i.i.d. groups: BN", "noniid/bn"),
        ("BRN", "noniid/brn"),
    )
    lines = [f"| test accuracy, % | {' | '.join(titles.values())} |", "|---|--:|--:|--:|"]
    for label, arms in rows:
        names = (arms,) if isinstance(arms, str) else arms
        cells = [next(accuracy(p, name) for name in names if name in summary(p)["arms"]) for p in titles]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _clipped() -> str:
    lines = ["| | r clipped, % | d clipped, % |", "|---|--:|--:|"]
    for preset in ("digits", "omniglot", "fashion-mnist"):
        for arm in ("baseline/brn", "microbatch/brn", "noniid/brn"):
            steps = max(r["step"] for r in records(preset) if r["arm"] == arm)
            last = [r for r in records(preset) if r["arm"] == arm and r["step"] == steps and r["split"] == "val"]
            means = [100 * statistics.fmean(r[name] for r in last) for name in ("r_clipped", "d_clipped")]
            lines.append(f"| {preset}, {arm.partition('/')[0]} | {means[0]:.1f} | {means[1]:.1f} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


TABLES = {"limits": _limits, "arms": _arms, "clipped": _clipped}
