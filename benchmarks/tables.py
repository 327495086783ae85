"""Rows in, rows out: the file of results, and the tables made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import TRAIN
from .targets import lost, target_table

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
Row = dict  # one line of a results file

TITLES = {
    "bn": "nn.BatchNorm",
    "sync": "SyncBatchNorm",
    "brn": "batchrenorm",
    "keras": "Keras renorm",
    "torchrl": "torchrl",
    "sb3": "sb3-contrib",
    "copy": "copy",
}


def slug(device: object) -> str:
    """A file's name for it."""
    return re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")


def append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


def select(rows: Sequence[Row], commit: str | None = None) -> list[Row]:
    """Rows of one commit (its beginning will do), by default of each device's last; of repeated ones the last.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError(f"expected rows in {RESULTS.name}/*.jsonl, got none; measure first: python -m benchmarks run")
    if commit is None:
        # The date of a run is that of its first row.
        latest = {row["device"]: row["commit"] for row in sorted(rows, key=lambda row: row["date"])}
        chosen = [row for row in rows if row["commit"] == latest[row["device"]]]
    else:
        chosen = [row for row in rows if row["commit"].startswith(commit)]
    if not chosen:
        known = sorted({row["commit"][:12] for row in rows})
        raise ValueError(f"expected a commit that was measured, got {commit!r}; there are {', '.join(known)}")
    last = {(r["device"], r["threads"], r["case"], r["pass"], r["implementation"]): r for r in chosen}
    return list(last.values())


_GRIDS = ("resnet50", "inception")
"""Groups that are many shapes at many batch sizes."""
_HEADLINE = ("", "peers", "micro", "steps")


def tables(rows: Sequence[Row], markdown: bool = True, headline: bool = False) -> str:
    """The targets; then for each device and number of threads times, launches, bytes and errors; then what was lost.

    The headline is the times of a training step in the most telling cases, and nothing else.
    """
    parts = []
    if headline:
        rows = [row for row in rows if row["pass"] in (TRAIN, "step") and row.get("group", "") in _HEADLINE]
    else:
        parts += ["Targets:", _format(*target_table(rows), markdown)]
    for machine in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["device"], row["threads"]) == machine]
        parts.append(_caption(mine).split(" Share:")[0] if headline else _caption(mine))
        fields: dict[tuple[str, ...], list[Row]] = {}
        for key in dict.fromkeys((row.get("group", ""), row["base"]) for row in mine):
            group = [row for row in mine if (row.get("group", ""), row["base"]) == key]
            if key[0] in _GRIDS:
                parts += [f"{key[0]}, forward and backward:", _format(*_grid(group), markdown)]
                continue
            names = tuple(dict.fromkeys(row["implementation"] for row in group))
            fields[(key[0], *names)] = group
            parts.append(_format(*_time_table(group, names, brief=headline), markdown))
        if headline:
            continue
        parts.append(
            "Launches, peak of memory and bytes kept for the backward in sizes of x; largest error of y and of dx "
            "against float64:"
        )
        parts += [_format(*_fact_table(group, names[1:]), markdown) for names, group in fields.items()]
    if not headline:
        header, lines = lost(rows)
        parts.append("Where something else is faster, by more than the spread:" if lines else "Nothing else is faster.")
        parts += [_format(header, lines, markdown)] * bool(lines)
    return "\n\n".join(parts)


def _caption(rows: Sequence[Row]) -> str:
    row = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    dirty = " with uncommitted changes" if any(row["dirty"] for row in rows) else ""
    gpu = (
        " On a GPU three ratios: the wall clock of eager calls, the GPU's clock, and replays of a CUDA graph; "
        "* marks tensors that stay in its L2 cache."
        if any("event_ms" in row for row in rows)
        else ""
    )
    kept = " Freed memory stays with the process." if row.get("freed_memory_kept") else ""
    return (
        f"{row['device']}, {row['threads']} threads, {row['date'][:10]}, commit {row['commit'][:12]}{dirty}; "
        f"{versions}. Times relative to the first column's, median (and quartiles) of interleaved rounds; the next "
        f"column is the same code again: the noise.{gpu} Share: bytes per second, for 3 passes over x forward, 5 "
        "backward, 2 in inference (and 1 more each with a residual), of a copy's. Launches on a CPU are operators of "
        f"ATen and calls of this package's C; what Inductor generates does not show there.{kept}"
    )


def title(name: str) -> str:
    first, *rest = name.split(" ", 1)
    return " ".join([TITLES.get(first, first), *rest])


def _case(row: Row) -> str:
    star = "" if row.get("cold_l2", True) else " *"
    return row["case"] + star


def _time_table(rows: Sequence[Row], names: Sequence[str], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    base = rows[0]["base"]
    rivals = [name for name in names if name not in (base, "copy")]
    ours = next((name for name in names if name.startswith("brn")), base)
    header = ["case", "pass", f"{title(base)}, ms", *map(title, rivals), f"share, {title(ours)}"]
    if brief:
        header = ["forward and backward", *header[2:-1]]
    lines = []
    for key in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        cells = {row["implementation"]: row for row in rows if (row["case"], row["pass"]) == key}
        line = [_case(cells[base]), key[1], _number(cells[base]["ms"])]
        line += [_ratio(cells[name], brief) if name in cells else "–" for name in rivals]
        share = cells.get(ours, {}).get("copy_share")
        lines.append([line[0], *line[2:]] if brief else [*line, "–" if share is None else f"{share:.0%}"])
    return header, lines


def _ratio(row: Row, brief: bool) -> str:
    if "event_ratio" in row:
        others = (f"{row[key]:.2f}" if key in row else "–" for key in ("event_ratio", "graph_ratio"))
        return " / ".join([f"{row['ratio']:.2f}", *others])
    spread = "" if brief else " ({:.2f}–{:.2f})".format(*row["ratio_quartiles"])
    return f"{row['ratio']:.2f}{spread}"


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Ours over the base: a line for each shape, dtype and form, a column for each batch size and layout."""
    rows = [row for row in rows if row["implementation"] == "brn" and row["pass"] == TRAIN]
    columns = sorted({(row["shape"][0], row["channels_last"]) for row in rows})
    header = ["C, H, W"] + [f"{N}{' channels_last' if last else ''}" for N, last in columns]
    lines = []
    for key in dict.fromkeys((tuple(row["shape"][1:]), row["dtype"], row["fused"]) for row in rows):
        cells = {
            (row["shape"][0], row["channels_last"]): _ratio(row, brief=True)
            for row in rows
            if (tuple(row["shape"][1:]), row["dtype"], row["fused"]) == key
        }
        what = f"{', '.join(map(str, key[0]))} {key[1]} {key[2]}".strip()
        lines.append([what, *(cells.get(column, "–") for column in columns)])
    return header, lines


def _fact_table(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in names if name != "copy" and not name.endswith(" again")]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {r["implementation"]: r for r in rows if r["case"] == case and ("saved" in r or r["pass"] == "step")}
        lines.append([case, *(_facts(cells[name]) if name in cells else "–" for name in names)])
    return ["case", *map(title, names)], lines


def _facts(row: Row) -> str:
    parts = [f"{row['launches']}"] if "launches" in row else []
    parts += [f"{row['host_us']:.0f} µs of the host"] if "host_us" in row else []
    parts += [", ".join(f"{row[key]:.2f}" for key in ("peak", "saved") if key in row)]
    parts += [", ".join(f"{row[key]:.0e}" for key in ("error_y", "error_dx") if key in row)]
    return "; ".join(filter(None, parts))


def _number(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _format(header: list[str], lines: list[list[str]], markdown: bool) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in (header, *lines)]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = "|".join("-" * (width + 2) for width in widths)
    body = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([body[0], f"|{rule}|", *body[1:]])


def paste(text: str, path: Path) -> None:
    """Put text between the markers of a file.

    Raises:
        ValueError: the file has no pair of markers.
    """
    old = path.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines {BEGIN} and {END} in {path}, got a file without them; add them")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
