"""The report: one page that needs nothing else, and the tables for the terminal and the README."""

from __future__ import annotations

import html
import io
import re
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from .experiment import Curve, Figure, Measure, Preset

# Colours that stand for the page's own, so that a figure follows light and dark.
_TEXT, _GRID = "#010203", "#040506"


class _Line(NamedTuple):
    label: str
    color: str
    dashed: bool
    points: dict[int, list[float]]  # step -> one value for each seed


def table(preset: Preset, summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The result table: label, ours, n, the paper's number; arms that are not there yet are left out."""
    rows = []
    for label, measure, paper in preset.rows:
        found = summary["evaluations"].get(measure.arm, {}).get(f"{measure.split}/{measure.statistics}")
        if found is not None:
            rows.append((label, _mean_std(found), str(found["n"]), paper))
    return rows


def markdown(preset: Preset, summary: dict[str, Any]) -> str:
    """The result table for a README."""
    lines = ["| | test accuracy, % | n | paper (ImageNet) |", "|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in table(preset, summary)]
    return "\n".join(lines)


def difference_text(judged: dict[str, Any]) -> str:
    """The difference of a judged prediction, with its interval; "no difference" if that is noise."""
    if judged["difference"] is None:
        return ""
    text = f"{judged['difference']:+.1f}"
    if judged["interval"] is not None:
        low, high = judged["interval"]
        text += f" [{low:+.1f}, {high:+.1f}]"
    return f"no difference ({text})" if judged["noise"] else text


def _mean_std(found: dict[str, Any]) -> str:
    std = found["accuracy_std"]
    return f"{found['accuracy_mean']:.1f}" + ("" if std is None else f" ± {std:.1f}")


def page(preset: Preset, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The whole report as HTML; no part of it is loaded from elsewhere.

    Args:
        preset: the experiment.
        summary: see `summary.summarize`.
        records: the lines of results.jsonl.
    """
    e = html.escape
    results = "".join(
        f"<tr><th scope=row>{e(label)}</th><td>{e(ours)}</td><td>{e(n)}</td><td>{e(paper)}</td></tr>"
        for label, ours, n, paper in table(preset, summary)
    )
    predictions = "".join(
        f"<tr><th scope=row>{e(judged['claim'])}</th><td>{_expected(judged)}</td><td>{e(difference_text(judged))}</td>"
        f"<td class='{judged['verdict'].replace(' ', '-')}'>{e(judged['verdict'])}</td></tr>"
        for judged in summary["predictions"]
    )
    curves = "".join(_figure(figure, _curves(figure.curves, records), "% right") for figure in preset.figures)
    limits = "".join(
        _figure(Figure(title, caption, ()), _corrections(preset, records, key, scale), unit)
        for title, caption, key, scale, unit in (
            (
                "r clipped",
                "Fraction of r outside its limits, which open until 31 % of the steps; BRN arms, one minibatch a seed.",
                "r_clipped",
                100,
                "%",
            ),
            (
                "d clipped",
                "Fraction of d outside its limits, which open until 19 % of the steps.",
                "d_clipped",
                100,
                "%",
            ),
            ("Mean r", "After clipping; near 1 if σ is the mean of σ_B.", "r_mean", 1, ""),
            (
                "Mean size of d",
                "|d| after clipping: how far the groups' means lie from the average, in σ.",
                "d_abs_mean",
                1,
                "σ",
            ),
        )
    )
    verdicts = [judged["verdict"] for judged in summary["predictions"]]
    held = f"{verdicts.count('held')} of {len(verdicts)} predictions held."
    settings = "".join(
        f"<tr><th scope=row>{e(name)}</th><td>{e(value)}</td></tr>" for name, value in _settings(preset, records)
    )
    items = "".join(f"<li>{e(caveat)}</li>" for caveat in preset.caveats)
    made = "; ".join([*summary["versions"], *summary["hardware"]])
    return _PAGE.format(
        style=_STYLE,
        about=e(preset.about),
        held=held,
        seeds=len(summary["seeds"]),
        results=results,
        predictions=predictions,
        rule=e(summary["rule"]),
        curves=curves,
        limits=limits,
        chosen=e(preset.chosen),
        caveats=items,
        settings=settings,
        made=e(made),
        hashes=e(", ".join(sorted({r["config_hash"] for r in records}))),
    )


def _expected(judged: dict[str, Any]) -> str:
    return f"≥ {judged['at_least']:g}" if judged["within"] is None else f"within ±{judged['within']:g}"


def _settings(preset: Preset, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    seconds: dict[str, list[float]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for r in records:
        if r["step"] == r["config"]["steps"] and (r["split"], r["statistics"]) == ("test", "averages"):
            seconds.setdefault(r["arm"], []).append(r["seconds"])
            configs[r["arm"]] = r["config"]
    rows = []
    for arm in preset.arms:
        if arm.name in configs:
            c = configs[arm.name]
            labels = c["labels"]
            sampling = "i.i.d." if labels is None else f"{labels['per_batch']} labels × {labels['images']}"
            if labels is not None and labels["spread"] > 1:
                sampling += f", dealt out over {labels['spread']} parts"
            rows.append(
                (
                    arm.name,
                    f"{sampling}; minibatch {c['batch_size']}, normalised in groups of {c['group']}; "
                    f"{c['steps']} steps, learning rate {c['learning_rate']:g}, weight decay {c['weight_decay']:g}; "
                    f"{statistics.fmean(seconds[arm.name]):.1f} s a training",
                )
            )
    return rows


def _curves(curves: Iterable[Curve], records: list[dict[str, Any]]) -> list[_Line]:
    lines = []
    for curve in curves:
        points: dict[int, list[float]] = {}
        for r in records:
            if Measure(r["arm"], r["split"], r["statistics"]) == curve.measure:
                points.setdefault(r["step"], []).append(r["accuracy"])
        lines.append(_Line(curve.label, curve.color, curve.dashed, points))
    return lines


def _corrections(preset: Preset, records: list[dict[str, Any]], key: str, scale: float) -> list[_Line]:
    colors = iter(("#3f9d5a", "#2f7ed8", "#e0702c", "#9a63c4", "#8a8a8a"))
    lines = []
    for arm in preset.arms:
        if arm.normalizer == "brn" and arm.learning_rate is None:
            points: dict[int, list[float]] = {}
            for r in records:
                if (
                    r["arm"] == arm.name
                    and (r["split"], r["statistics"]) == ("train", "averages")
                    and r[key] is not None
                ):
                    points.setdefault(r["step"], []).append(r[key] * scale)
            lines.append(_Line(arm.regime, next(colors), False, points))
    return lines


def _figure(figure: Figure, lines: list[_Line], unit: str) -> str:
    lines = [line for line in lines if line.points]
    keys = "".join(
        f"<li><span style='border-color:{line.color};border-top-style:{'dashed' if line.dashed else 'solid'}'></span>"
        f"{html.escape(line.label)}</li>"
        for line in lines
    )
    return (
        f"<figure><h3>{html.escape(figure.title)}</h3>{_draw(figure.title, lines, unit)}<ul class=keys>{keys}</ul>"
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def _draw(title: str, lines: list[_Line], unit: str) -> str:
    # Fixed ids, so that the same results give the same page; the salt keeps ids of several figures apart.
    with matplotlib.rc_context({"svg.hashsalt": title, "font.size": 9.5, "axes.edgecolor": _TEXT, "text.color": _TEXT}):
        canvas = Canvas(figsize=(4.2, 2.7), layout="constrained")
        axes = canvas.add_subplot()
        for line in lines:
            steps = sorted(line.points)
            means = [statistics.fmean(line.points[s]) for s in steps]
            bands = [statistics.stdev(line.points[s]) if len(line.points[s]) > 1 else 0.0 for s in steps]
            axes.plot(steps, means, color=line.color, linewidth=1.6, linestyle="--" if line.dashed else "-")
            low, high = ([m + sign * b for m, b in zip(means, bands)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=line.color, alpha=0.18, linewidth=0)
        axes.set_xlabel("training steps", color=_TEXT)
        axes.set_ylabel(unit, color=_TEXT)
        axes.tick_params(colors=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if unit == "%":
            # A fraction that stays at 0 is a result, not a range of rounding errors.
            axes.set_ylim(-2.0, max(5.0, axes.get_ylim()[1]))
        if unit.startswith("%"):
            # A little room below 0, or a curve that lies there could not be seen.
            axes.set_ylim(max(-2.0, axes.get_ylim()[0]), min(101.0, axes.get_ylim()[1]))
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces are known, and the size is the page's.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --soft: #5c5c63; --line: #d9d9de;
  --good: #1a7f42; --bad: #b3371f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --ink: #e9e9ec; --soft: #a2a2ab; --line: #3a3b41; --good: #58c481; --bad: #f08a70; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0; }
p { max-width: 46rem; margin: 0.5rem 0; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
table { border-collapse: collapse; width: 100%; max-width: 60rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.35rem 0 0.35rem 0.9rem; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-size: 0.875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
.keys { list-style: none; margin: 0 0 0.3rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem;
  font-size: 0.875rem; }
.keys span { display: inline-block; width: 1.6rem; border-top: 3px solid; margin-right: 0.4rem;
  vertical-align: middle; }
.held { color: var(--good); } .did-not-hold { color: var(--bad); }
.settings td { text-align: left; white-space: normal; }
@media (max-width: 40rem) {
  table { font-size: 0.875rem; }
  .stacked thead { display: none; }
  .stacked tr { display: block; border-bottom: 1px solid var(--line); padding: 0.45rem 0; }
  .stacked th, .stacked td { display: inline; white-space: normal; border: 0; padding: 0; }
  .stacked th { display: block; }
  .stacked td + td::before { content: " · "; color: var(--soft); }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Renormalization: {about}</title>
<style>{style}</style>
<h1>Batch Renormalization against batch norm</h1>
<p>{about}. The experiments of S. Ioffe, “Batch Renormalization: Towards Reducing Minibatch Dependence in
Batch-Normalized Models” (2017), at a scale of minutes. The arms differ in the normaliser and in what is normalised
together; data, seeds, initial weights and minibatches are the same. {held}</p>

<h2>Results</h2>
<table class="results"><thead><tr><th></th><th>ours, %</th><th>n</th><th>paper, %</th></tr></thead>
<tbody>{results}</tbody></table>
<p class="soft">Ours: accuracy at the end of training, on test images that were looked at once, unless the row says
training images; inference by moving averages unless it says μ_B and σ_B; mean ± standard deviation over n seeds;
0.0 where the outputs were no longer finite numbers.
Paper: Inception-v3 on ImageNet, single runs, the best of a curve; compare differences, not levels.</p>

<h2>Predicted before the run</h2>
<table class="stacked"><thead><tr><th></th><th>expected</th><th>found, points</th><th>verdict</th></tr></thead>
<tbody>{predictions}</tbody></table>
<p class="soft">{rule}</p>

<h2>Learning curves</h2>
<p class="soft">Validation accuracy by moving averages, unless the key says otherwise; bands are ± one standard
deviation over {seeds} seeds.</p>
<div class="figures">{curves}</div>

<h2>What r and d do</h2>
<div class="figures">{limits}</div>

<h2>To keep in mind</h2>
<ul>{caveats}</ul>

<h2>How it was made</h2>
<p>{chosen}</p>
<table class="settings"><tbody>{settings}</tbody></table>
<p class="soft">{made}. Settings {hashes}.</p>
</html>
"""
