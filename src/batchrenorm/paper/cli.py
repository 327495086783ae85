"""The command `batchrenorm`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from .experiment import Preset
from .presets import PRESETS

_EXTRAS = {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib"}


class _Refused(Exception):
    """The command cannot be done; the text says why, in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `batchrenorm`; None takes the process's.

    Returns:
        The exit status: 0, 2 where the command cannot be done, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="batchrenorm", description="Batch Renormalization: the paper's experiments.")
    parser.add_argument("--version", action="version", version=f"batchrenorm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    reproduce = commands.add_parser(
        "reproduce", help="train all arms of a preset and write the report; resumes by itself"
    )
    reproduce.add_argument("preset", help=", ".join(f"{p.name}: {p.about}" for p in PRESETS.values()))
    reproduce.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="results go to DIR/PRESET (default: runs)"
    )
    reproduce.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: the preset's)")
    reproduce.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core, at most 8)")
    reproduce.add_argument("--fresh", action="store_true", help="start over, forgetting the results that are there")
    report = commands.add_parser("report", help="write the report of a run again, or print its table")
    report.add_argument("run", type=Path, metavar="RUN_DIR")
    report.add_argument("--markdown", action="store_true", help="print the result table in Markdown, and write nothing")
    report.add_argument(
        "--into", type=Path, metavar="FILE", help="put that table between the lines <!-- PRESET:begin/end --> of a file"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "reproduce":
            _reproduce(options.preset, options.runs, options.seeds, options.workers, options.fresh)
        else:
            _report(options.run, options.markdown, options.into)
    except (_Refused, ValueError, OSError) as error:
        print(f"batchrenorm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _reproduce(name: str, runs_dir: Path, seeds: int | None, workers: int | None, fresh: bool) -> None:
    preset = _preset(name)
    if seeds is not None and seeds < 1:
        raise _Refused(f"expected --seeds >= 1, got {seeds}; the preset has {preset.seeds}")
    if workers is not None and workers < 0:
        raise _Refused(f"expected --workers >= 0, got {workers}; 0 trains in the main process")
    _need_extras()
    from rich.console import Console

    from . import runs
    from .progress import Progress

    directory = runs_dir / preset.name
    directory.mkdir(parents=True, exist_ok=True)
    if fresh:
        for file in ("results.jsonl", "summary.json", "report.html"):
            (directory / file).unlink(missing_ok=True)
    results = runs.Results(directory / "results.jsonl")
    jobs = results.missing(preset, seeds or preset.seeds)
    total = len(preset.arms) * (seeds or preset.seeds)
    console = Console(soft_wrap=True)
    console.print(f"{preset.about}: {len(preset.arms)} arms, {seeds or preset.seeds} seeds.", highlight=False)
    if len(jobs) < total:
        console.print(f"{total - len(jobs)} of {total} runs are in {directory} already.", highlight=False)
    try:
        with Progress(console, total, total - len(jobs)) as progress:
            if jobs:
                runs.run(preset, results, jobs, _cores() if workers is None else workers, progress)
            progress.phase("writing the report")
            summary = _write(preset, results.records, directory)
    except KeyboardInterrupt:
        kept = total - len(results.missing(preset, seeds or preset.seeds))
        console.print(
            f"Stopped. {kept} of {total} runs are done and kept in {directory}; the same command goes on from there.",
            highlight=False,
        )
        raise
    _print(summary, preset, console, directory)


def _report(directory: Path, markdown: bool, into: Path | None) -> None:
    _need_extras()
    from rich.console import Console

    from . import report, runs

    path = directory / "results.jsonl"
    if not runs.exists(path):
        raise _Refused(f"expected {path}, got nothing there; `batchrenorm reproduce` makes one, e.g. in runs/digits")
    results = runs.Results(path)
    if not results.records:
        raise _Refused(
            f"expected finished runs in {path}, got none; `batchrenorm reproduce` goes on where it was stopped"
        )
    preset = _preset(results.records[0]["preset"])
    results.check(preset, versions=False)
    if markdown or into is not None:
        from .summary import summarize

        text = report.markdown(preset, summarize(preset, results.records))
        if into is None:
            print(text)
        else:
            _paste(text, into, preset.name)
        return
    console = Console(soft_wrap=True)
    _print(_write(preset, results.records, directory), preset, console, directory)


def _paste(text: str, file: Path, name: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise _Refused(f"expected the lines {begin} and {end} in {file}, got a file without them; add them")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _write(preset: Preset, records: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    import json

    from . import report, runs
    from .summary import summarize

    summary = summarize(preset, records)
    runs.write_atomically(directory / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    runs.write_atomically(directory / "report.html", report.page(preset, summary, records))
    return summary


def _print(summary: dict[str, Any], preset: Preset, console: Any, directory: Path) -> None:
    from rich.table import Table

    from . import report

    table = Table(title="Test accuracy in percent, mean ± standard deviation over seeds")
    for heading in ("", "ours", "n", "paper"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in report.table(preset, summary):
        table.add_row(*row)
    console.print(table)
    table = Table("prediction", "difference in points", "verdict", title="Predicted before the run", show_lines=True)
    for judged in summary["predictions"]:
        table.add_row(judged["claim"], report.difference_text(judged), judged["verdict"])
    console.print(table)
    console.print(f"Report: {(directory / 'report.html').resolve()}", highlight=False)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise _Refused(
            f"expected a preset, one of {', '.join(PRESETS)}, got {name!r}; for example: batchrenorm reproduce digits"
        )
    return PRESETS[name]


def _need_extras() -> None:
    missing = [package for module, package in _EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise _Refused(
            f"expected the extra 'paper' to be installed, got no {', '.join(missing)}; "
            "run: pip install 'batchrenorm[paper]'"
        )


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not on every system
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
