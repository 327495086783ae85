"""`python -m benchmarks`: see the package."""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
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
from .cases import SUITES, suite
from .exactness import Refused, gate
from .measure import measure
from .plots import plot
from .tables import RESULTS, append, load, paste, select, slug, tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=usage, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, print, record")
    run.add_argument("--suite", choices=SUITES, default=None, help="default: cpu, or gpu with --device cuda")
    run.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    run.add_argument("--seconds", type=float, default=0.5, help="for each case and pass, without warm-up (default 0.5)")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--device", default="cpu", help="cpu or cuda")
    run.add_argument("--resume", action="store_true", help="leave out what is recorded for this code and machine")
    run.add_argument("--results", type=Path, metavar="DIR", default=None, help="instead of benchmarks/results")
    run.add_argument("--no-record", action="store_true", help="print only")
    run.add_argument("--list", action="store_true", help="print the names of the cases, and measure nothing")
    table = commands.add_parser("table", help="the tables of recorded rows")
    table.add_argument("--markdown", action="store_true")
    table.add_argument("--headline", action="store_true", help="only training steps of the most telling cases")
    table.add_argument("--commit", default=None, help="instead of the latest one measured")
    table.add_argument("--into", type=Path, metavar="FILE", default=None, help="paste between the benchmark markers")
    table.add_argument("--results", type=Path, metavar="DIR", default=None, help="instead of benchmarks/results")
    plots = commands.add_parser("plot", help="the plots of recorded rows")
    plots.add_argument("--commit", default=None, help="instead of the latest one measured")
    plots.add_argument("--into", type=Path, metavar="DIR", default=None, help="default: beside the rows")
    plots.add_argument("--results", type=Path, metavar="DIR", default=None, help="instead of benchmarks/results")
    options = parser.parse_args(arguments)
    options.results = options.results or RESULTS
    try:
        return {"run": _run, "table": _table, "plot": _plot}[options.command](options)
    except (Refused, ValueError) as error:
        print(f"refused: {error}" if isinstance(error, Refused) else error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    every = suite(options.suite or ("cpu" if options.device == "cpu" else "gpu"))
    cases = [case for case in every if re.search(options.only, case.name)]
    if not cases:
        raise ValueError(f"expected --only to match a case, got {options.only!r}; --list without it prints all names")
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"expected a GPU for --device {options.device}, got none that torch can use")
    torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    print("exactness on small tensors, against batchrenorm.reference in float64:", flush=True)
    worst = gate(["brn", "brn 8x4", "keras", "torchrl", "sb3"], options.device)
    print("  largest error in float32: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    # Each timing begins with a collection; from here on those do not walk through all of torch and Keras.
    gc.collect()
    gc.freeze()
    place = environment(options.device, options.threads) | {"freed_memory_kept": kept}
    path = options.results / f"{slug(place['device'])}.jsonl"
    if options.resume and path.exists():
        same = ("code", "device", "threads", "versions")
        done = {row["case"] for row in load([path]) if all(row.get(key) == place[key] for key in same)}
        cases = [case for case in cases if case.name not in done]
        print(f"{len(done)} cases are recorded, {len(cases)} are to be measured")
    measured = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}, {case.nbytes / 2**20:.2g} MiB", flush=True)
        rows = []
        try:
            for row in measure(case, device=options.device, seconds=options.seconds):
                low, high = row["ratio_quartiles"]
                share = f"  {row['copy_share']:.0%} of copy" if "copy_share" in row else ""
                text = f"{row['ms']:9.3f} ms  {row['ratio']:6.2f} ({low:.2f}–{high:.2f})  {row['rounds']} rounds{share}"
                print(f"  {row['pass']:8} {row['implementation']:18} {text}", flush=True)
                rows.append(place | row)
        except torch.OutOfMemoryError:
            print("  left out: it does not fit the memory of the device")
            torch.cuda.empty_cache()
            continue
        measured += rows
        # After each case, so that an interrupted run keeps what it has.
        if not options.no_record:
            append(rows, path)
    if measured:
        print(f"\n{tables(measured, markdown=False)}")
    noise = sorted(abs(row["ratio"] - 1) for row in measured if row["implementation"].endswith(" again"))
    if noise and noise[len(noise) * 9 // 10] > 0.05:
        text = f"in a tenth of the cases by more than {noise[len(noise) * 9 // 10]:.0%}"
        print(f"\nThe same code twice differs {text}: repeat on an idle machine, or with --threads 1.")
    if not options.no_record:
        print(f"\nrecorded in {path.name}")
    return 0


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for everyone alike; False where there is no glibc.

    It would give 24 MiB back to the system after each call, and the next call, whose ever it is, would measure how the
    system hands out its pages: on a machine where these passes take 4 ms, another 12.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # From malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, the latter's largest.
    return bool(mallopt(-1, 2**31 - 1) and mallopt(-3, 32 * 2**20))


def _rows(options: argparse.Namespace) -> list[dict]:
    return select(load(sorted(options.results.glob("*.jsonl"))), options.commit)


def _table(options: argparse.Namespace) -> int:
    text = tables(_rows(options), options.markdown or options.into is not None, options.headline)
    if options.into is None:
        print(text)
    else:
        paste(text, options.into)
    return 0


def _plot(options: argparse.Namespace) -> int:
    for path in plot(_rows(options), options.into or options.results):
        print(path.name)
    return 0


def code() -> str:
    """A digest of all that decides a number here, also where there is no git."""
    root = Path(__file__).parent.parent
    files = sorted(path for top in ("src/batchrenorm", "benchmarks") for path in (root / top).rglob("*.[pch]*"))
    digest = hashlib.sha256()
    for path in files:
        if path.suffix in (".py", ".c", ".h") and "paper" not in path.parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: str, threads: int) -> dict[str, object]:
    """What the numbers depend on, and nothing that names the machine's owner."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "keras", "torchrl", "sb3-contrib", "torchvision"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        # The results themselves change with every run.
        "dirty": _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results") != "",
        "code": code(),
        "kind": torch.device(device).type,
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
