"""Rows in, rows out: the file of results, and the tables made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import TRAIN

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
Row = dict  # one line of a results file

TITLES = {
    "bn": "nn.BatchNorm",
    "brn": "batchrenorm",
    "keras": "Keras renorm",
    "torchrl": "torchrl",
    "sb3": "sb3-contrib",
    "copy": "copy",
}


def append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


def select(rows: Sequence[Row], commit: str | None = None) -> list[Row]:
    """Rows of one commit (its beginning will do), by default the one measured last; of repeated ones the last.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError(f"expected rows in {RESULTS.name}/*.jsonl, got none; measure first: python -m benchmarks run")
    if commit is None:
        commit = max(rows, key=lambda row: row["date"])["commit"]
    chosen = [row for row in rows if row["commit"].startswith(commit)]
    if not chosen:
        known = sorted({row["commit"][:12] for row in rows})
        raise ValueError(f"expected a commit that was measured, got {commit!r}; there are {', '.join(known)}")
    last = {(r["device"], r["threads"], r["case"], r["pass"], r["implementation"]): r for r in chosen}
    return list(last.values())


def tables(rows: Sequence[Row], markdown: bool = True, headline: bool = False) -> str:
    """For each device and number of threads: times, then bytes and errors.

    The headline is the times of forward and backward together, and nothing else.
    """
    parts = []
    if headline:
        rows = [row for row in rows if row["pass"] == TRAIN]
    for machine in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["device"], row["threads"]) == machine]
        parts.append(_caption(mine).split(" Share:")[0] if headline else _caption(mine))
        # Cases with the same contestants share a table.
        fields: dict[tuple[str, ...], list[Row]] = {}
        for base in dict.fromkeys(row["base"] for row in mine):
            group = [row for row in mine if row["base"] == base]
            fields[tuple(dict.fromkeys(row["implementation"] for row in group))] = group
        for names, group in fields.items():
            parts.append(_format(*_time_table(group, names, brief=headline), markdown))
        if headline:
            continue
        parts.append("Kept for the backward, in sizes of x, and largest error of y and of dx against float64:")
        parts += [_format(*_fact_table(group, names), markdown) for names, group in fields.items()]
    return "\n\n".join(parts)


def _caption(rows: Sequence[Row]) -> str:
    row = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    dirty = " with uncommitted changes" if any(row["dirty"] for row in rows) else ""
    return (
        f"{row['device']}, {row['threads']} threads, {row['date'][:10]}, commit {row['commit'][:12]}{dirty}; "
        f"{versions}. Times relative to the first column's, median (and quartiles) of interleaved rounds; the next "
        "column is the same code again: the noise. Share: bytes per second, for 3 passes over x forward, 5 backward, "
        "2 in inference, of a copy's."
    )


def _title(name: str) -> str:
    first, *rest = name.split(" ", 1)
    return " ".join([TITLES.get(first, first), *rest])


def _time_table(rows: Sequence[Row], names: Sequence[str], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    base = rows[0]["base"]
    rivals = [name for name in names if name not in (base, "copy")]
    ours = next((name for name in names if name.startswith("brn")), base)
    header = ["case", "pass", f"{_title(base)}, ms", *map(_title, rivals), f"share, {_title(ours)}"]
    if brief:
        header = ["forward and backward", *header[2:-1]]
    lines = []
    for key in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        cells = {row["implementation"]: row for row in rows if (row["case"], row["pass"]) == key}
        line = [*key, _number(cells[base]["ms"])]
        for name in rivals:
            row = cells.get(name)
            spread = "" if row is None or brief else " ({:.2f}–{:.2f})".format(*row["ratio_quartiles"])
            line.append("–" if row is None else f"{row['ratio']:.2f}{spread}")
        share = cells.get(ours, {}).get("copy_share")
        lines.append([line[0], *line[2:]] if brief else [*line, "–" if share is None else f"{share:.0%}"])
    return header, lines


def _fact_table(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in names if name != "copy" and not name.endswith(" again")]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["implementation"]: row for row in rows if row["case"] == case and "saved" in row}
        line = [case]
        for name in names:
            row = cells.get(name)
            line.append("–" if row is None else "{saved:.2f}; {error_y:.0e}, {error_dx:.0e}".format(**row))
        lines.append(line)
    return ["case", *map(_title, names)], lines


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
