"""`python -m benchmarks`: see the package."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import __doc__ as usage
from .cases import CASES
from .exactness import Refused, gate
from .measure import measure
from .tables import RESULTS, append, load, paste, select, tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=usage, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, print, record")
    run.add_argument("--quick", action="store_true", help="few cases, one second each, nothing recorded")
    run.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    run.add_argument("--compile", action="store_true", help="also the cases of torch.compile (slow)")
    run.add_argument("--seconds", type=float, default=None, help="for each case and pass (default 5)")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--device", default="cpu", help="cpu, or cuda: wall time of eager calls, synchronised")
    run.add_argument("--no-record", action="store_true", help="print only")
    table = commands.add_parser("table", help="the tables of recorded rows")
    table.add_argument("--markdown", action="store_true")
    table.add_argument("--headline", action="store_true", help="only forward and backward together")
    table.add_argument("--commit", default=None, help="instead of the latest one measured")
    table.add_argument("--into", type=Path, metavar="FILE", default=None, help="paste between the benchmark markers")
    options = parser.parse_args(arguments)
    try:
        return _run(options) if options.command == "run" else _table(options)
    except (Refused, ValueError) as error:
        print(f"refused: {error}" if isinstance(error, Refused) else error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    cases = [case for case in CASES if re.search(options.only, case.name)]
    cases = [case for case in cases if (case.quick or not options.quick) and (options.compile or not case.compiled)]
    if not cases:
        names = "; ".join(case.name for case in CASES)
        raise ValueError(f"expected --only to match a case, got {options.only!r}; there are: {names}")
    seconds = options.seconds or (1.0 if options.quick else 5.0)
    torch.set_num_threads(options.threads)
    print("exactness on small tensors, against batchrenorm.reference in float64:", flush=True)
    worst = gate(["brn", "brn 8x4", "keras", "torchrl", "sb3"], options.device)
    print("  largest error in float32: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    place = environment(options.device, options.threads)
    path = RESULTS / f"{slug(place['device'])}.jsonl"
    measured = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}, {case.nbytes / 2**20:.2g} MiB", flush=True)
        rows = []
        for row in measure(case, device=options.device, seconds=seconds):
            low, high = row["ratio_quartiles"]
            share = f"  {row['copy_share']:.0%} of copy" if "copy_share" in row else ""
            text = f"{row['ms']:9.3f} ms  {row['ratio']:6.2f} ({low:.2f}–{high:.2f})  {row['rounds']} rounds{share}"
            print(f"  {row['pass']:8} {row['implementation']:18} {text}", flush=True)
            rows.append(place | row)
        measured += rows
        # After each case, so that an interrupted run keeps what it has.
        if not (options.quick or options.no_record):
            append(rows, path)
    print(f"\n{tables(measured, markdown=False)}")
    noise = max((abs(row["ratio"] - 1) for row in measured if row["implementation"].endswith(" again")), default=0.0)
    if noise > 0.05:
        print(f"\nThe same code twice differs by up to {noise:.0%}: repeat on an idle machine, or with --threads 1.")
    if not (options.quick or options.no_record):
        print(f"\nrecorded in {path.relative_to(RESULTS.parent.parent)}")
    return 0


def _table(options: argparse.Namespace) -> int:
    rows = select(load(sorted(RESULTS.glob("*.jsonl"))), options.commit)
    text = tables(rows, options.markdown or options.into is not None, options.headline)
    if options.into is None:
        print(text)
    else:
        paste(text, options.into)
    return 0


def environment(device: str, threads: int) -> dict[str, object]:
    """What the numbers depend on, and nothing that names the machine's owner."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("keras", "torchrl", "sb3-contrib"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        # The results themselves change with every run.
        "dirty": _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results") != "",
        "device": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def slug(device: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")


def _git(*arguments: str) -> str | None:
    """The output, or None without git or outside a repository."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
