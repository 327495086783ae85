"""The tables of docs/small-batches.md, from the committed results: python scripts/docs/small_batches.py."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from batchrenorm.paper import report, runs
from batchrenorm.paper.presets import PRESETS
from batchrenorm.paper.small_batch import TITLES, describe
from batchrenorm.paper.summary import is_final, summarize, t95

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "small-batches.md"
CLASSES = 964  # of Omniglot


class Outcome(NamedTuple):
    """The end of one training."""

    validation: float
    test: float | None
    failed: bool  # the loss on training images is no better than that of guessing


Outcomes = dict[tuple[str, float, int], Outcome]


def records(preset: str, stage: str) -> list[dict[str, Any]]:
    """The committed rows of a stage; none where it has not been run."""
    path = ROOT / "results" / preset / f"{stage}.jsonl"
    return runs.Results(path).records


def outcomes(preset: str, *stages: str) -> Outcomes:
    """By arm, learning rate and seed."""
    ends: dict[tuple[str, float, int], dict[tuple[str, str], dict[str, Any]]] = {}
    for stage in stages:
        for r in records(preset, stage):
            if is_final(r):
                key = r["arm"], r["config"]["learning_rate"], r["seed"]
                ends.setdefault(key, {})[r["split"], r["statistics"]] = r
    found = {}
    for key, end in ends.items():
        # As in training, where there is such a thing: averages may be bad for other reasons than a failed training.
        loss = end.get(("train", "training"), end["train", "averages"])["loss"]
        test = end.get(("test", "averages"))
        found[key] = Outcome(
            end["val", "averages"]["accuracy"],
            None if test is None else test["accuracy"],
            loss is None or not loss < math.log(CLASSES),
        )
    return found


def tests(found: Outcomes, arm: str, rate: float) -> dict[int, float]:
    """Test accuracy for each seed."""
    return {
        seed: outcome.test
        for (name, lr, seed), outcome in sorted(found.items())
        if (name, lr) == (arm, rate) and outcome.test is not None
    }


def share(top: list[float], bottom: list[float]) -> tuple[float, float, float] | None:
    """mean(top) / mean(bottom) of paired values, with Fieller's 95 % interval.

    Returns:
        None where mean(bottom) is not significantly above 0, as the interval is then unbounded.
    """
    n = len(top)
    if n < 2:
        return None
    a, b = statistics.fmean(top), statistics.fmean(bottom)
    scale = t95(n - 1) ** 2 / n
    aa, bb, ab = statistics.variance(top), statistics.variance(bottom), statistics.covariance(top, bottom)
    # (a - q b)^2 <= t^2 / n (aa - 2 q ab + q^2 bb)
    quadratic, linear, constant = b * b - scale * bb, a * b - scale * ab, a * a - scale * aa
    if b <= 0 or quadratic <= 0:
        return None
    root = math.sqrt(max(0.0, linear * linear - quadratic * constant))
    return a / b, (linear - root) / quadratic, (linear + root) / quadratic


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return "–" if not values else f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(name: str) -> str:
    """Every arm that has been run: test accuracy, and which share of BRN's loss against the whole it gets back."""
    preset, found = PRESETS[name], outcomes(name, "results")
    accuracy = {
        arm.name: tests(found, arm.name, arm.learning_rate) for arm in preset.arms if arm.learning_rate is not None
    }
    # Without these there is nothing that a gap could be measured against.
    those = [values for arm in ("whole/bn", "whole/brn", "whole/brn-early") if (values := accuracy.get(arm))]
    whole = max(those, key=lambda values: statistics.fmean(values.values()), default={})
    lines = [
        "| normalised together | normaliser | learning rate | test accuracy, % | n | failed | share of the gap, % |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for arm in preset.arms:
        values = accuracy.get(arm.name)
        if not values:
            continue
        gap, brn = "", accuracy.get(f"{arm.regime}/brn", {})
        if arm.regime != "whole" and arm.normalizer != "brn":
            seeds = sorted(values.keys() & brn.keys() & whole.keys())
            closed = share([values[s] - brn[s] for s in seeds], [whole[s] - brn[s] for s in seeds])
            gap = "–" if closed is None else "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * v for v in closed))
        failed = sum(o.failed for (a, rate, _), o in found.items() if (a, rate) == (arm.name, arm.learning_rate))
        lines.append(
            f"| {describe(arm)} | {TITLES[arm.normalizer]} | {arm.learning_rate:g} | "
            f"{_spread(list(values.values()))} | {len(values)} | {failed} | {gap} |"
        )
    return "\n".join(lines)


def tuned(name: str) -> str:
    """Validation accuracy of every candidate."""
    found = outcomes(name, "tuning")
    rates = sorted({rate for _, rate, _ in found})
    lines = [
        f"| normalised together | normaliser | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|---|{'--:|' * len(rates)}",
    ]
    for arm in PRESETS[name].arms:
        if arm.learning_rate is not None:
            cells = [
                ("**{}**" if rate == arm.learning_rate else "{}").format(_cell(found, arm.name, rate)) for rate in rates
            ]
            lines.append(f"| {describe(arm)} | {TITLES[arm.normalizer]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Outcomes, arm: str, rate: float) -> str:
    runs_there = [o for (a, lr, _), o in found.items() if (a, lr) == (arm, rate)]
    failed = sum(o.failed for o in runs_there)
    text = _spread([o.validation for o in runs_there])
    return f"{text} ({failed} of {len(runs_there)} failed)" if failed else text


def robust(name: str) -> str:
    """The moving gradient in groups of 4 with one default setting."""
    found = outcomes(name, "robust")
    lines = ["| normaliser | learning rate | test accuracy, % | least | n | failed |", "|---|--:|--:|--:|--:|--:|"]
    for arm, rate in sorted({(arm, rate) for arm, rate, _ in found}):
        values = list(tests(found, arm, rate).values())
        failed = sum(o.failed for (a, lr, _), o in found.items() if (a, lr) == (arm, rate))
        title = TITLES[PRESETS[name].arm(arm).normalizer]
        lines.append(f"| {title} | {rate:g} | {_spread(values)} | {min(values):.1f} | {len(values)} | {failed} |")
    return "\n".join(lines)


def stability(name: str) -> str:
    """Validation accuracy by learning rate and samples normalised together."""
    found = outcomes(name, "tuning", "map")
    regimes = ("groups-2", "groups-4", "groups-8", "whole")
    heads = ("2", "4", "8", "the minibatch")
    lines = [f"| normaliser | learning rate | {' | '.join(heads)} |", f"|---|--:|{'--:|' * len(heads)}"]
    for normalizer in ("brn-moving-early", "brn-moving", "brn-early", "brn"):
        arms = {f"{regime}/{normalizer}" for regime in regimes}
        for rate in sorted({rate for arm, rate, _ in found if arm in arms}):
            cells = [_cell(found, f"{regime}/{normalizer}", rate) for regime in regimes]
            lines.append(f"| {TITLES[normalizer]} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(name: str) -> str:
    """Validation accuracy by the share of the microbatch's own gradient, learning rate and samples together."""
    found: dict[tuple[float, float, str], list[float]] = {}
    whole = {"brn-moving-early": 0.0, "brn-early": 1.0}
    for stage in ("tuning", "share"):
        for r in records(name, stage):
            regime, normalizer = r["arm"].split("/")
            if normalizer in whole and (r["split"], r["statistics"]) == ("val", "averages") and is_final(r):
                own = r.get("own", whole[normalizer])
                found.setdefault((own, r["config"]["learning_rate"], regime), []).append(r["accuracy"])
    regimes = ("groups-2", "groups-4", "groups-8")
    lines = ["| own share | learning rate | 2 | 4 | 8 |", "|--:|--:|--:|--:|--:|"]
    for own, rate in sorted({(own, rate) for own, rate, regime in found if regime in regimes}):
        cells = [_spread(found.get((own, rate, regime), [])) for regime in regimes]
        lines.append(f"| {own:g} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predictions(name: str) -> str:
    """What was expected, and what came."""
    preset = PRESETS[name]
    rates = {arm.name: arm.learning_rate for arm in preset.arms}
    rows = [r for r in records(name, "results") if r["config"]["learning_rate"] == rates[r["arm"]]]
    return report.markdown_predictions(preset, summarize(preset, rows))


TABLES = {
    "test": table,
    "predictions": predictions,
    "tuning": tuned,
    "robust": robust,
    "map": stability,
    "share": shares,
}


def page(text: str) -> str:
    """The page with the tables of the committed results between its markers."""

    def made(found: re.Match[str]) -> str:
        kind, preset = found[1].split(" ")
        return f"<!-- {found[1]}:begin -->\n{TABLES[kind](preset)}\n<!-- {found[1]}:end -->"

    return re.sub(r"<!-- (\w+ [\w-]+):begin -->\n.*?<!-- \1:end -->", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
