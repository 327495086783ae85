"""The report: one page that needs nothing else, and the tables for the terminal and the README."""

from __future__ import annotations

import html
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from . import published
from .experiment import Curve, Figure, Preset
from .summary import curves, is_final, key

Run = tuple[Preset, dict[str, Any], list[dict[str, Any]]]

TEXT, GRID = "#010203", "#040506"
"""Colours that stand for the page's own, so that a figure follows light and dark."""
# Of regimes of one normaliser: not the presets' colours, which stand for normalisers.
_REGIME_COLORS = ("#1a9a9a", "#c2528b", "#9a8420", "#6b6fd6", "#8a8a8a")
# Where a heat strip is full: the paper calls what it clips "a small fraction".
_FULL = 0.1


class _Line(NamedTuple):
    label: str
    color: str
    dashed: bool
    points: Mapping[float, list[float]]  # step -> one value for each seed
    marks: tuple[tuple[float, float], ...] = ()


def table(preset: Preset, summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The result table: label, ours, n, the paper's number; arms that are not there yet are left out."""
    rows = []
    for label, of, paper in preset.rows:
        found = summary["evaluations"].get(of.arm, {}).get(key(preset, of))
        if found is not None:
            rows.append((label, _mean_std(found), str(found["n"]), paper))
    return rows


def markdown(preset: Preset, summary: dict[str, Any]) -> str:
    """The result table for a README."""
    lines = ["| | test accuracy, % | n | paper (ImageNet) |", "|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in table(preset, summary)]
    return "\n".join(lines)


def markdown_predictions(preset: Preset, summary: dict[str, Any]) -> str:
    """The predictions of a preset with their verdicts, for a README."""
    lines = ["| predicted before the run | expected, points | found | verdict |", "|---|--:|--:|---|"]
    for judged in summary["predictions"]:
        cells = (judged["claim"], _expected(judged), difference_text(judged), judged["verdict"])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
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


def _expected(judged: dict[str, Any]) -> str:
    return f"≥ {judged['at_least']:g}" if judged["within"] is None else f"within ±{judged['within']:g}"


def _mean_std(found: dict[str, Any]) -> str:
    std = found["accuracy_std"]
    return f"{found['accuracy_mean']:.1f}" + ("" if std is None else f" ± {std:.1f}")


def page(runs: Sequence[Run]) -> str:
    """The whole report as HTML; no part of it is loaded from elsewhere.

    Args:
        runs: for each preset, the preset, its `summary.summarize`, and the lines of results.jsonl (of several runs:
            see `summary.merge`).
    """
    contents = "".join(
        f"<li><a href='#{_e(preset.name)}'>{_t(preset.about)}</a>"
        f"<p class=soft>{_e(preset.scale)} {_e(summary['verdict'].partition('.')[0])}.</p></li>"
        for preset, summary, _ in runs
    )
    return _PAGE.format(
        style=_STYLE,
        about=_e("; ".join(preset.about for preset, _, _ in runs)),
        contents=f"<nav><ol>{contents}</ol></nav>" if len(runs) > 1 else "",
        sections="".join(_section(*run) for run in runs),
    )


def _section(preset: Preset, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    others = [
        learning_curves(preset, figure, records) for figure in preset.figures if figure.paper not in published.FIGURES
    ]
    parts = (
        ("Results", _results(preset, summary)),
        ("Predicted before the run", _predictions(summary)),
        ("The paper’s figures and ours", _pairs(preset, summary, records)),
        ("Other learning curves", _grid(others)),
        ("Steps to BN’s final accuracy", _steps_to(preset, summary)),
        ("What r and d do", _grid(corrections(preset, records)) + _clipped(summary)),
        ("Training against inference", _gaps(summary)),
        ("What a step costs", _costs(summary)),
        ("To keep in mind", _list(preset.caveats)),
        ("How it was made", _made(preset, summary, records)),
    )
    body = "".join(f"<h3>{_t(title)}</h3>{content}" for title, content in parts if content)
    return (
        f"<section id='{_e(preset.name)}'><h2>{_e(preset.about)}</h2>"
        f"<p>{_e(preset.scale)} {_t(summary['verdict'])}</p>{_other_settings(preset, records)}{body}</section>"
    )


# Parts of a section: HTML, or "" where the results do not have what it takes.


def _results(preset: Preset, summary: dict[str, Any]) -> str:
    rows = [tuple(map(_t, row)) for row in table(preset, summary)]
    return _with_text(_RESULTS, _table(("", "ours, %", "n", "paper, %"), rows, "results"))


def _predictions(summary: dict[str, Any]) -> str:
    rows = [
        (
            _t(judged["claim"]),
            _e(_expected(judged)),
            _e(difference_text(judged)),
            f"<span class={judged['verdict'].replace(' ', '-')}>{_e(judged['verdict'])}</span>",
        )
        for judged in summary["predictions"]
    ]
    return _with_text(summary["rule"], _table(("", "expected", "found, points", "verdict"), rows, "stacked"))


def _pairs(preset: Preset, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    drawn = "".join(_pair(preset, f, records) for f in preset.figures if f.paper in published.FIGURES)
    return f"<p class=soft>{_PAIRS.format(seeds=len(summary['seeds']))}</p>{drawn}" if drawn else ""


def _steps_to(preset: Preset, summary: dict[str, Any]) -> str:
    titles = {figure.paper: figure.title for figure in preset.figures}
    rows = []
    sources = []
    for number, found in summary.get("steps_to", {}).items():
        speed = published.SPEED.get(number)
        if speed is not None:
            sources.append(f"Figure {number} {speed.source}")
        rows.append(
            (
                _t(titles[number]),
                f"{found['accuracy']:.1f} %",
                "" if found["bn_steps"] is None else f"{found['bn_steps']:,.0f}",
                "never" if found["brn_steps"] is None else f"{found['brn_steps']:,.0f}",
                _ratio(found),
                f"{found['reached']} of {found['n']}",
                "" if speed is None else f"{speed.bn / speed.brn:.1f} ×",
            )
        )
    heads = ("", "BN ends at", "BN’s steps", "BRN’s steps", "ratio", "seeds", "paper’s ratio")
    text = _STEPS_TO + (f" Paper: {'; '.join(sources)}." if sources else "")
    return _with_text(text, _table(heads, rows, "stacked"))


def _ratio(found: dict[str, Any]) -> str:
    if found["ratio"] is None:
        return ""
    text = f"{found['ratio']:.1f} ×"
    return text if found["reached"] == found["n"] else f"({text})"


def _clipped(summary: dict[str, Any]) -> str:
    rows = []
    for name, found in summary.get("clip", {}).items():
        cells = [_e(name)]
        for what in ("r_clipped", "d_clipped"):
            layers = [(layer["name"], layer[what]) for layer in found["layers"] if layer[what] is not None]
            if found[what] is None or not layers:
                cells.append("not finite")
                continue
            worst, most = max(layers, key=lambda layer: layer[1])
            strip = "".join(
                f"<i title='{_e(layer)}: {100 * value:.2f} %' "
                f"style='background:rgb(224 112 44/{min(1.0, value / _FULL) ** 0.5:.2f})'></i>"
                for layer, value in layers
            )
            at_most = f", at most {100 * most:.2f} % (layer {_e(worst)})" if most > 0 else ""
            cells.append(f"<span class=strip>{strip}</span>{100 * found[what]:.2f} %{at_most}")
        rows.append(cells)
    return _with_text(
        _CLIPPED.format(full=100 * _FULL),
        _table(("", "r clipped, by layer", "d clipped, by layer"), rows, "stacked strips"),
    )


def _gaps(summary: dict[str, Any]) -> str:
    rows = []
    for name, found in summary.get("gap", {}).items():
        accuracy, loss = found.get("accuracy"), found.get("loss")
        if accuracy is not None:
            rows.append(
                (
                    _e(name),
                    f"{accuracy['training']:.1f}",
                    f"{accuracy['inference']:.1f}",
                    _signed(accuracy, 1),
                    "not finite" if loss is None else _signed(loss, 3),
                )
            )
    heads = ("", "in training, %", "in inference, %", "difference, points", "difference in loss")
    return _with_text(_GAPS, _table(heads, rows, "stacked"))


def _costs(summary: dict[str, Any]) -> str:
    rows = [
        (
            _e(name),
            f"{1000 * found['seconds_per_step']:.2f}",
            "" if found["ratio"] is None else f"{found['ratio']:.2f}",
            "" if found["data_share"] is None else f"{100 * found['data_share']:.0f} %",
            str(found["n"]),
        )
        for name, found in summary.get("cost", {}).items()
    ]
    return _with_text(_COSTS, _table(("", "ms a step", "of BN’s", "waiting for data", "n"), rows))


def _made(preset: Preset, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    made = "; ".join([*summary["versions"], *summary["hardware"]])
    hashes = ", ".join(sorted({r["config_hash"] for r in records}))
    shared, arms = _settings(preset, records)
    chosen = f"<p>{_t(preset.chosen)}</p>" if preset.chosen else ""
    return f"{chosen}{arms}{shared}<p class=soft>{_e(made)}. Settings {_e(hashes)}.</p>"


def _settings(preset: Preset, records: list[dict[str, Any]]) -> tuple[str, str]:
    """What all arms share, and what each has of its own."""
    seconds: dict[str, list[float]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for r in records:
        if is_final(r) and (r["split"], r["statistics"]) == ("val", "averages"):
            seconds.setdefault(r["arm"], []).append(r["seconds"])
            configs[r["arm"]] = r["config"]
    rows = []
    for name in (arm.name for arm in preset.arms if arm.name in configs):
        c = configs[name]
        text = (
            f"{_sampling(c['labels'])}; minibatch {c['batch_size']}, normalised in groups of {c['group']}; "
            f"{c['steps']:,} steps, learning rate {c['learning_rate']:g}, weight decay {c['weight_decay']:g}; "
            f"{statistics.fmean(seconds[name]):.1f} s a training"
        )
        rows.append((_e(name), _e(text)))
    told = {"preset", "labels", "batch_size", "group", "steps", "learning_rate", "weight_decay", "normalizer", "clip"}
    shared = [
        f"{name.replace('_', ' ')} {_plain(value)}"
        for name, value in next(iter(configs.values()), {}).items()
        if name not in told and all(config.get(name) == value for config in configs.values())
    ]
    text = f"<p class=soft>All arms: {_e('; '.join(shared))}.</p>" if shared else ""
    return text, _table(("", ""), rows, "settings")


def _sampling(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "i.i.d."
    # "per_batch" in results of before a minibatch could hold several sets of labels.
    text = f"{labels.get('labels', labels.get('per_batch'))} labels × {labels['images']}"
    return text if labels["spread"] == 1 else f"{text}, dealt out over {labels['spread']} parts"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(item)}" for name, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _other_settings(preset: Preset, records: list[dict[str, Any]]) -> str:
    """Predictions and texts are of the preset as it stands; whoever changed it by options is told so."""
    changes: dict[str, None] = {}
    configs = {r["arm"]: r["config"] for r in records}
    for arm in preset.arms:
        ours, theirs = preset.config(arm), configs.get(arm.name, {})
        for name in _PRESET_SETTINGS:
            if name in theirs and theirs[name] != ours[name]:
                changes[f"{name.replace('_', ' ')} {_plain(theirs[name])} instead of {_plain(ours[name])}"] = None
    if not changes:
        return ""
    text = "Not the settings of the preset, for which its predictions and texts were written"
    return f"<p class=warning>{text}: {_e('; '.join(changes))}.</p>"


# Figures


def _curves(lines: Iterable[Curve], records: list[dict[str, Any]]) -> list[_Line]:
    found = curves(records)
    drawn = []
    for line in lines:
        points: dict[float, list[float]] = {}
        for _, curve in sorted(found.get(line.measure, {}).items()):
            for step, accuracy in curve.items():
                points.setdefault(step, []).append(accuracy)
        drawn.append(_Line(line.label, line.color, line.dashed, points))
    return [line for line in drawn if line.points]


def learning_curves(preset: Preset, figure: Figure, records: list[dict[str, Any]]) -> str:
    """A figure of a preset as HTML, or "" where the results have none of its curves."""
    return _single(preset, figure, _curves(figure.curves, records), "% right")


def corrections(preset: Preset, records: list[dict[str, Any]]) -> list[str]:
    """Figures of how much r and d correct, and of how often they are clipped, in the course of training."""
    drawn = []
    for name, title, unit, scale, caption in _LOOKS:
        colors = iter(_REGIME_COLORS)
        lines = []
        for arm in preset.arms:
            if arm.normalizer == "brn" and arm.learning_rate is None:
                # All lines of an evaluation have the same r and d.
                seen = {(r["seed"], r["step"]): r.get(name) for r in records if r["arm"] == arm.name}
                points: dict[float, list[float]] = {}
                for (_, step), value in sorted(seen.items()):
                    if value is not None:
                        points.setdefault(step, []).append(value * scale)
                lines.append(_Line(arm.regime, next(colors), False, points))
        drawn.append(_single(preset, Figure(title, caption, ()), [line for line in lines if line.points], unit))
    return drawn


def _single(preset: Preset, figure: Figure, lines: list[_Line], unit: str) -> str:
    if not lines:
        return ""
    keys = "".join(f"<li>{_swatch(line)}{_t(line.label)}</li>" for line in lines)
    picture = _draw(f"{preset.name}: {figure.title}", lines, unit, "training steps")
    return (
        f"<figure><h4>{_t(figure.title)}</h4>{picture}<ul class=keys>{keys}</ul>"
        f"<figcaption>{_t(figure.caption)}</figcaption></figure>"
    )


def _pair(preset: Preset, figure: Figure, records: list[dict[str, Any]]) -> str:
    """Our curves and the paper's, side by side."""
    assert figure.paper is not None
    ours = _curves(figure.curves, records)
    if not ours:
        return ""
    theirs = published.FIGURES[figure.paper]
    shown = {line.label: line for line in ours}
    # A curve of theirs is what ours of the same arm, split and statistics is; parameters were averaged in the paper.
    style = {curve.measure[:3]: curve for curve in figure.curves}
    printed: dict[str, str] = {}
    their_lines = []
    for drawn in theirs.curves:
        like = style.get(drawn.measure[:3])
        label = drawn.label if like is None else like.label
        best = max(drawn.points, key=lambda point: point[1])[0]
        mark = (best if drawn.stated.steps is None else drawn.stated.steps, drawn.stated.accuracy)
        their_lines.append(
            _Line(
                label,
                _REGIME_COLORS[-1] if like is None else like.color,
                like is not None and like.dashed,
                {steps: [accuracy] for steps, accuracy in drawn.points},
                (mark,),
            )
        )
        printed[label] = drawn.stated.text
    keys = []
    for line in [*ours, *(line for line in their_lines if line.label not in shown)]:
        end = line.points[max(line.points)]
        text = f"{statistics.fmean(end):.1f}" + (f" ± {statistics.stdev(end):.1f}" if len(end) > 1 else "")
        keys.append((_swatch(line) + _t(line.label), text if line.label in shown else "", printed.get(line.label, "")))
    name = f"{preset.name}: {figure.title}"
    opens = _opening(figure, records)
    left = _draw(f"{name}, ours", ours, "% right", "training steps", opens)
    right = _draw(
        f"The paper’s {theirs.title}, beside {name}",
        their_lines,
        "% right",
        "thousands of steps",
        published.SCHEDULE[0],
    )
    return (
        f"<figure class=pair><h4>{_t(figure.title)}</h4><div class=figures>"
        f"<div><p class=panel>Ours</p>{left}</div>"
        f"<div><p class=panel>Paper’s Figure {figure.paper} "
        f"<span class=soft>(digitised from the paper’s figure, ±0.2 points)</span></p>{right}</div></div>"
        f"{_table(('', 'ours, %', 'paper, %'), keys, 'legend')}"
        f"<figcaption>{_t(figure.caption)}</figcaption></figure>"
    )


def _opening(figure: Figure, records: list[dict[str, Any]]) -> float | None:
    """The step at which the limits of the figure's BRN begin to open."""
    arms = {curve.measure.arm for curve in figure.curves}
    for r in records:
        if r["arm"] in arms and r["normalizer"] == "brn":
            return float(r["config"]["clip"]["warmup"])
    return None


def _swatch(line: _Line) -> str:
    return f"<span class=swatch style='border-top:3px {'dashed' if line.dashed else 'solid'} {line.color}'></span>"


def _draw(name: str, lines: list[_Line], unit: str, steps: str, opens: float | None = None) -> str:
    with matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.edgecolor": GRID,
            "text.color": TEXT,
        }
    ):
        canvas = Canvas(figsize=(4.8, 3.0), layout="constrained")
        axes = canvas.add_subplot()
        if opens is not None:
            axes.axvline(opens, color=TEXT, linewidth=0.8, linestyle=":", alpha=0.6)
        for line in lines:
            at = sorted(line.points)
            means = [statistics.fmean(line.points[step]) for step in at]
            style = "--" if line.dashed else "-"
            axes.plot(at, means, color=line.color, linewidth=1.6, linestyle=style, marker="o" if len(at) == 1 else "")
            if max(len(values) for values in line.points.values()) > 1:
                bands = [statistics.stdev(line.points[s]) if len(line.points[s]) > 1 else 0.0 for s in at]
                low, high = ([m + sign * b for m, b in zip(means, bands)] for sign in (-1, 1))
                axes.fill_between(at, low, high, color=line.color, alpha=0.18, linewidth=0)
            for x, y in line.marks:
                axes.plot(x, y, "o", markersize=5, markerfacecolor="none", color=line.color, clip_on=False)
        axes.set_xlabel(steps, color=TEXT)
        axes.set_ylabel(unit, color=TEXT)
        axes.tick_params(labelcolor=TEXT, bottom=False, left=False)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        if unit == "%":
            # A fraction that stays at 0 is a result, not a range of rounding errors.
            top = max(5.0, axes.get_ylim()[1])
            axes.set_ylim(-0.04 * top, top)
        elif unit.startswith("%"):
            # A little room below 0, or a curve that lies there could not be seen.
            axes.set_ylim(max(-2.0, axes.get_ylim()[0]), min(101.0, axes.get_ylim()[1]))
        axes.spines[["top", "right", "left"]].set_visible(False)
    return inline(canvas, name)


def inline(canvas: Canvas, name: str) -> str:
    """A figure of matplotlib as SVG for the middle of a page: its letters, its colours for TEXT and GRID.

    Args:
        canvas: the figure.
        name: what it shows, for who cannot see it; other figures of the page have other names.
    """
    file = io.StringIO()
    # The same results give the same page; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        canvas.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces are known, the size and the letters are the page's, and ids must not come twice.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"^<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg role="img" aria-label="{_e(name)}" \1>', svg)
    used = set(re.findall(r"#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace(TEXT, "currentColor").replace(GRID, "var(--line)")


# Small pieces


_e = html.escape


def _t(text: str) -> str:
    return _e(text).replace("_B", "<sub>B</sub>")


def _with_text(text: str, content: str) -> str:
    return f"{content}<p class=soft>{_t(text)}</p>" if content else ""


def _grid(figures: Iterable[str]) -> str:
    drawn = "".join(figures)
    return f"<div class=figures>{drawn}</div>" if drawn else ""


def _list(items: Iterable[str]) -> str:
    drawn = "".join(f"<li>{_t(item)}</li>" for item in items)
    return f"<ul>{drawn}</ul>" if drawn else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; "stacked" is a block for each row on a phone."""
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>"
        + "".join(f"<td data-head='{_e(head)}'>{cell}</td>" for head, cell in zip(heads[1:], row[1:]))
        + "</tr>"
        for row in rows
    )
    head = (
        f"<thead><tr>{''.join(f'<th scope=col>{_e(head)}</th>' for head in heads)}</tr></thead>" if any(heads) else ""
    )
    return f"<table class='{kind}'>{head}<tbody>{body}</tbody></table>" if body else ""


def _signed(found: dict[str, Any], digits: int) -> str:
    text = f"{found['mean']:+.{digits}f}"
    return text if found["std"] is None else f"{text} ± {found['std']:.{digits}f}"


# Settings that the command line can change and that lines have always had in this form, or not at all.
_PRESET_SETTINGS = (
    "steps",
    "batch_size",
    "group",
    "learning_rate",
    "image_size",
    "averaging",
    "precision",
)

_LOOKS = (
    (
        "r_clipped",
        "r clipped",
        "%",
        100,
        "Fraction of r outside its limits, which open until 31 % of the steps; BRN arms, one minibatch a seed.",
    ),
    ("d_clipped", "d clipped", "%", 100, "Fraction of d outside its limits, which open until 19 % of the steps."),
    ("r_mean", "Mean r", "", 1, "After clipping; near 1 if σ is the mean of σ_B."),
    (
        "d_abs_mean",
        "Mean size of d",
        "σ",
        1,
        "|d| after clipping: how far the groups’ means lie from the average, in σ.",
    ),
)

_RESULTS = """Ours: accuracy at the end of training, on test images that were looked at once, unless the row says
training images; inference by moving averages unless it says μ_B and σ_B; mean ± standard deviation over n seeds; 0.0
where the outputs were no longer finite numbers. Paper: Inception-v3 on ImageNet, single runs, the best of a curve;
compare differences, not levels."""

_PAIRS = """Validation accuracy by moving averages, unless the key says otherwise; bands are ± one standard deviation
over {seeds} seeds. The same colour means the same thing in both panels. Numbers beside the keys: ours at the end of the
curve, the paper’s as printed. Circles: what the paper printed, at the printed step, or where none is printed at the
best of the curve. Dotted: the step at which the limits on r and d begin to open; until then Batch Renormalization is
batch norm."""

_STEPS_TO = """Steps at which a validation curve, interpolated between evaluations, first reaches the accuracy at
which BN ends; means over the seeds whose BRN gets there (“seeds”: how many). In parentheses: not all do, and the mean
over the others flatters BRN. Where the learning rate falls to 0 both gain much at the end, which brings their steps
together."""

_CLIPPED = """One cell for each layer, from the input to the output: the fraction outside the limits over the second
half of training, when they are fully open; an empty cell is 0 %, a full one {full:g} % or more. The paper: “a small
fraction of rs, and none of ds”."""

_GAPS = """At the end, on training images: the forward of training, with its minibatches and its r and d, less
inference by moving averages. Batch Renormalization is there to close this gap. Mean ± standard deviation over
seeds."""

_COSTS = """Medians over n seeds, of the training steps alone; “of BN’s” is the ratio to BN of the same regime on the
same hardware. Other trainings may have run on the same machine; for timings see the benchmarks."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --soft: #5c5c63; --line: #d9d9de; --cell: #f1f1f4;
  --good: #1a7f42; --bad: #b3371f; --link: #1f5fae; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --ink: #e9e9ec; --soft: #a2a2ab; --line: #3a3b41; --cell: #26272c;
    --good: #58c481; --bad: #f08a70; --link: #86b6f2; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.8rem 0 0.5rem; padding-top: 1.2rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 0 0 0.3rem; }
p, ul, nav { max-width: 46rem; margin: 0.5rem 0; }
a { color: var(--link); }
nav li { margin: 0.6rem 0; } nav p { margin: 0; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.warning { border-left: 3px solid var(--bad); padding-left: 0.8rem; }
table { border-collapse: collapse; width: 100%; max-width: 60rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.35rem 0 0.35rem 0.9rem; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-size: 0.875rem; vertical-align: bottom; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2.4rem; }
figure { margin: 0; min-width: 0; }
.pair { margin: 1.2rem 0 2.4rem; } .pair .figures { align-items: end; gap: 0.8rem 2.4rem; }
.panel { margin: 0; font-size: 0.875rem; }
svg { display: block; width: 100%; height: auto; }
sub { font-size: 0.75em; line-height: 0; }
svg text { font-family: system-ui, sans-serif; }
.keys { list-style: none; margin: 0 0 0.3rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem;
  font-size: 0.875rem; }
.swatch { display: inline-block; width: 1.6rem; margin-right: 0.5rem; vertical-align: middle; }
.legend { margin: 0.5rem 0; max-width: 46rem; font-size: 0.875rem; }
.legend tbody th { padding-left: 2.1rem; text-indent: -2.1rem; } .legend th, .legend td { padding-top: 0.15rem;
  padding-bottom: 0.15rem; }
.held { color: var(--good); } .did-not-hold { color: var(--bad); }
.settings td { text-align: left; white-space: normal; }
.strips { margin-top: 1.4rem; } .strips thead th { text-align: left; }
.strips td { width: 42%; text-align: left; white-space: normal; font-size: 0.875rem; }
.strip { display: flex; height: 0.9rem; background: var(--cell); border: 1px solid var(--line); }
.strip i { flex: 1; } .strip i + i { border-left: 1px solid var(--line); }
@media (max-width: 46rem) {
  table { font-size: 0.875rem; }
  .stacked thead { display: none; }
  .stacked tr { display: block; border-bottom: 1px solid var(--line); padding: 0.5rem 0; }
  .stacked th { display: block; border: 0; padding: 0; }
  .stacked td { display: flex; justify-content: space-between; gap: 1rem; width: auto; border: 0; padding: 0;
    white-space: normal; text-align: right; }
  .stacked td:empty { display: none; }
  .stacked td::before { content: attr(data-head); color: var(--soft); text-align: left; flex: none; max-width: 50%; }
  .strips td { display: block; text-align: left; margin-top: 0.3rem; }
  .settings th, .settings td { display: block; padding: 0.1rem 0; } .settings th { border: 0; padding-top: 0.5rem; }
}
@media print { h2 { break-before: page; } figure, tr { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Renormalization: {about}</title>
<style>{style}</style>
<h1>Batch Renormalization against batch norm</h1>
<p>The experiments of S. Ioffe, “Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
Models” (2017), beside the paper’s own figures and numbers. The arms of an experiment differ in the normaliser and in
what is normalised together; data, seeds, initial weights and minibatches are the same. BN is batch norm, BRN Batch
Renormalization.</p>
{contents}
{sections}
</html>
"""
