"""The command `batchrenorm`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta
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
    parser = argparse.ArgumentParser(
        prog="batchrenorm", description="Batch Renormalization: the paper's experiments, and its cost."
    )
    parser.add_argument("--version", action="version", version=f"batchrenorm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_reproduce(commands)
    report = commands.add_parser("report", help="write the report of one or several runs, or print its tables")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="runs of one preset are merged")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN_DIR)"
    )
    report.add_argument("--markdown", action="store_true", help="print the result table in Markdown, and write nothing")
    report.add_argument(
        "--predictions", action="store_true", help="print the predictions in Markdown, and write nothing"
    )
    report.add_argument(
        "--into", type=Path, metavar="FILE", help="put that table between the lines <!-- PRESET:begin/end --> of a file"
    )
    _add_bench(commands)
    options = parser.parse_args(arguments)
    try:
        {"reproduce": _reproduce, "report": _report, "bench": _bench}[options.command](options)
    except KeyboardInterrupt:
        return 130
    except BrokenProcessPool:
        print(
            "batchrenorm: expected all workers to live, but one was killed, perhaps for memory; the same command goes "
            "on from what is kept, and --workers makes them fewer",
            file=sys.stderr,
        )
        return 2
    except (_Refused, RuntimeError, ValueError, OSError) as error:
        print(f"batchrenorm: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    return 0


# Options that replace a field of the preset, and what they take.
_SETTINGS: dict[str, tuple[type, str]] = {
    "steps": (int, "optimiser steps; schedules follow"),
    "batch-size": (int, "items in a minibatch, over all processes"),
    "image-size": (int, "height and width in pixels"),
    "learning-rate": (float, "of all arms that have none of their own"),
    "optimizer": (str, "sgd or rmsprop"),
    "averaging": (float, "decay of the average of parameters, mu and sigma"),
    "evaluations": (int, "how often a training is looked at"),
    "precision": (str, "float32, or bfloat16 or float16 by autocast"),
    "compile": (str, "mode of torch.compile: default, reduce-overhead, max-autotune"),
    "accumulate": (int, "parts of a minibatch that go through the net one after the other"),
    "checkpoint-every": (int, "steps"),
}


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="train all arms of a preset and write the report; goes on where it was stopped",
        description="Train all arms of a preset and write the report. The same command goes on where it was stopped. "
        "Under torchrun all processes share each minibatch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets:\n" + "\n".join(f"  {p.name:14} {p.about}" for p in PRESETS.values()),
    )
    parser.add_argument("preset", metavar="PRESET")
    parser.add_argument("path", type=Path, nargs="?", metavar="PATH", help="the same as --data")
    add = parser.add_argument_group("where").add_argument
    add("--data", type=Path, metavar="DIR", help="where the images are (default: download what is public)")
    add("--cache", type=Path, metavar="DIR", help="for downloads and decoded images (default: ~/.cache/batchrenorm)")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="results go to DIR/PRESET (default: runs)")
    add("--device", help="cpu, cuda, cuda:1 (default: the preset's, else a GPU if there is one)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="trainings at a time (default: one for each core, at most 8; on a GPU 1)",
    )
    add(
        "--loaders", type=int, default=0, metavar="N", help="processes of each training that decode images (default: 0)"
    )
    add("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    add("--tensorboard", action="store_true", help="write scalars to RUN/tensorboard")
    add = parser.add_argument_group("what").add_argument
    add("--arms", metavar="A,B", help="only these, e.g. microbatch/bn,microbatch/brn; or a regime, e.g. microbatch")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: the preset's)")
    add("--model", metavar="NAME", help="a model of torchvision, e.g. resnet50, instead of the preset's")
    add("--channels-last", action="store_true", help="images as (N, H, W, C) in memory")
    for name, (kind, text) in _SETTINGS.items():
        if name == "compile":
            add("--compile", nargs="?", const="default", metavar="MODE", help=text)
        else:
            add(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on where it was stopped: what it does anyway")
    group.add_argument("--fresh", action="store_true", help="start over, forgetting results and checkpoints")


def _changed(options: argparse.Namespace) -> Preset:
    """The preset with what the options change."""
    preset = _preset(options.preset)
    changes: dict[str, Any] = {}
    for name in _SETTINGS:
        if (value := getattr(options, name.replace("-", "_"))) is not None:
            changes[name.replace("-", "_")] = value
    if options.channels_last:
        changes["channels_last"] = True
    if options.model is not None:
        from .models import Torchvision

        changes["model"] = Torchvision(options.model)
    if options.arms is not None:
        wanted = options.arms.split(",")
        changes["arms"] = tuple(arm for arm in preset.arms if arm.name in wanted or arm.regime in wanted)
        known = {arm.name for arm in preset.arms} | {arm.regime for arm in preset.arms}
        if unknown := [name for name in wanted if name not in known]:
            raise _Refused(
                f"expected arms of {preset.name}, got {', '.join(unknown)}; it has "
                f"{', '.join(arm.name for arm in preset.arms)}"
            )
    return replace(preset, **changes)


def _reproduce(options: argparse.Namespace) -> None:
    for name, least, about in (
        ("seeds", 1, "it is a count"),
        ("workers", 0, "0 trains in the main process"),
        ("loaders", 0, "0 decodes in the training process"),
    ):
        if (value := getattr(options, name)) is not None and value < least:
            raise _Refused(f"expected --{name} >= {least}, got {value}; {about}")
    if options.path is not None and options.data is not None:
        raise _Refused(f"expected PATH or --data, got {options.path} and {options.data}; give one")
    _need_extras()
    if options.tensorboard and find_spec("tensorboard") is None:
        raise _Refused("expected the package tensorboard for --tensorboard, got none; run: pip install tensorboard")
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    preset = _changed(options)
    device = options.device or preset.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise _Refused(f"expected a GPU for --device {device}, got none that torch can use; leave the option out")
    if not dist.is_torchelastic_launched():
        _run(preset, options, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # gloo also beside NCCL, for what is on the CPU: messages between the processes.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    store, rank, size = next(rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun's store outlives the processes that it starts again, with the addresses of the dead in it (issue
        # 135712 of pytorch). Several machines count apart: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them a new store.
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        preset.parts(dist.get_world_size())
        _run(preset, options, device)
    finally:
        dist.destroy_process_group()


def _run(preset: Preset, options: argparse.Namespace, device: str) -> None:
    import torch.distributed as dist
    from rich.console import Console

    from . import runs
    from .progress import Progress

    directory = options.runs / preset.name
    place = runs.Place(
        directory,
        device,
        options.path or options.data,
        options.cache,
        options.loaders,
        options.skip_corrupt,
        options.tensorboard,
    )
    replicas = dist.is_initialized()
    first = not replicas or dist.get_rank() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
        # torchrun starts the command again after a failure, and that time it goes on.
        if options.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            for pattern in ("results.jsonl", "summary.json", "report.html", "checkpoints/*"):
                for file in directory.glob(pattern):
                    file.unlink()
    console = Console(soft_wrap=True, quiet=not first)
    # Before any training: whatever is wrong with the data or the net shows now.
    if replicas:
        # One process of each machine fills the cache, for ImageNet in hours.
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
        fills = os.environ["LOCAL_RANK"] == "0"
        if not fills:
            dist.barrier(patient)
    data = runs.load(preset, place)
    if replicas and fills:
        dist.barrier(patient)
    runs.check(preset, data)
    results = runs.Results(directory / "results.jsonl")
    seeds = options.seeds or preset.seeds
    whole = _preset(options.preset)  # of which --arms may have chosen a few
    found = [results.missing(preset, seeds, whole.arms)] if first else [None]
    if replicas:
        dist.broadcast_object_list(found)
    jobs = found[0]
    assert jobs is not None
    total = len(preset.arms) * seeds
    console.print(f"{preset.about}: {len(preset.arms)} arms, {seeds} seeds.", highlight=False)
    if len(jobs) < total:
        console.print(f"{total - len(jobs)} of {total} runs are in {directory} already.", highlight=False)
    workers = options.workers
    if replicas or (workers is None and device != "cpu"):
        workers = 0
    elif workers is None:
        workers = _cores()
    failure: runs.Failed | None = None
    try:
        with Progress(console, total, total - len(jobs)) as progress:
            if jobs:
                try:
                    runs.run(preset, place, results, jobs, workers, progress)
                except runs.Failed as error:
                    failure = error
            progress.phase("writing the report")
            if first and results.records:
                summary = _write([(whole, results.records)], directory, directory / "report.html")[0]
    except KeyboardInterrupt:
        kept = total - len(results.missing(preset, seeds, whole.arms))
        console.print(
            f"Stopped. {kept} of {total} runs are done and kept in {directory}; the same command goes on from there, "
            "and from the checkpoints of the others.",
            highlight=False,
        )
        raise
    if first and results.records:
        _print(summary, whole, console, directory / "report.html")
    if failure is not None:
        raise failure


def _report(options: argparse.Namespace) -> None:
    _need_extras()
    from rich.console import Console

    from . import report, runs
    from .summary import merge, repeated, summarize

    by_preset: dict[str, list[list[dict[str, Any]]]] = {}
    for directory in options.runs:
        path = directory / "results.jsonl"
        if not runs.exists(path):
            raise _Refused(
                f"expected {path}, got nothing there; `batchrenorm reproduce` makes one, e.g. in runs/digits"
            )
        records = runs.Results(path).records
        if not records:
            raise _Refused(
                f"expected finished runs in {path}, got none; `batchrenorm reproduce` goes on where it was stopped"
            )
        by_preset.setdefault(records[0]["preset"], []).append(records)
    parts = [(_preset(name), merge(lists)) for name, lists in by_preset.items()]
    for name, lists in by_preset.items():
        for arm, seed in repeated(lists):
            print(f"{name}: {arm}, seed {seed} is in several runs; the first counts", file=sys.stderr)
    if options.markdown or options.predictions or options.into is not None:
        for preset, records in parts:
            summary = summarize(preset, records)
            text = (report.markdown_predictions if options.predictions else report.markdown)(preset, summary)
            if options.into is None:
                print(text)
            else:
                name = f"{preset.name}-predictions" if options.predictions else preset.name
                _paste(text, options.into, name)
        return
    console = Console(soft_wrap=True)
    single = options.runs[0] if len(options.runs) == 1 else None
    page = options.output or options.runs[0] / "report.html"
    for (preset, _), summary in zip(parts, _write(parts, single, page)):
        _print(summary, preset, console, page)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="what Batch Renormalization costs on your shapes or model, on this machine",
        description="Times Batch Renormalization against batch norm, interleaved, on this machine.",
        epilog="e.g. batchrenorm bench --shape 32,64,56,56 256,512 --dtype bf16\n"
        "     batchrenorm bench --model torchvision:resnet50 --input 8,3,224,224",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", nargs="+", metavar="N,C,...", help="of inputs of one layer")
    add("--model", metavar="PACKAGE:NAME", help="torchvision:resnet50, or a function of yours that makes a module")
    add("--input", metavar="N,...", help="shape of the model's minibatch")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of a layer's x; of a model by autocast")
    add("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    add("--relu", action="store_true", help="a layer that is followed by a ReLU")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    add("--seconds", type=float, default=2.0, help="for each line (default: 2); a model takes five times as long")


def _bench(options: argparse.Namespace) -> None:
    if find_spec("rich") is None:
        raise _Refused("expected the package rich for tables, got none; run: pip install 'batchrenorm[paper]'")
    if (options.shape is None) == (options.model is None):
        raise _Refused("expected --shape or --model, one of them; for example: batchrenorm bench --shape 32,64,56,56")
    if (options.model is None) != (options.input is None):
        raise _Refused("expected --model and --input together, as in --model torchvision:resnet50 --input 8,3,224,224")
    if options.model is not None and options.relu:
        raise _Refused("expected --relu with --shape, got it with --model; a model has its own")
    if options.threads is not None and options.threads < 1:
        raise _Refused(f"expected --threads >= 1, got {options.threads}; leave it out for torch's own number")
    if not options.seconds > 0:
        raise _Refused(f"expected --seconds > 0, got {options.seconds}")
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .. import bench

    shapes = [_shape(text) for text in options.shape or [options.input]]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise _Refused(f"expected a GPU for --device {device}, got none that torch can use; leave the option out")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype, last, seconds = bench.DTYPES[options.dtype], options.layout == "channels_last", options.seconds
    if options.model is not None:
        # Of the current directory too, as with python -m.
        sys.path.insert(0, "")
        net = bench.load(options.model)
        lines = [bench.model(net, shapes[0], dtype, device, last, 5 * seconds, options.model)]
    else:
        lines = [line for shape in shapes for line in bench.layers(shape, dtype, device, last, options.relu, seconds)]
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    title = f"{options.dtype}, {options.layout}, {device} ({where}), torch {torch.__version__}"
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("", "", "bn, ms", "bn again", "batchrenorm"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for line in lines:
        cells = (f"{t.ratio:.2f} ({t.quartiles[0]:.2f}–{t.quartiles[1]:.2f})" for t in line[3:])
        table.add_row(line.what, line.run, f"{line.norm.ms:.3g}", *cells)
    # Narrower, as where no terminal says its width, rich would cut the figures.
    console = Console(soft_wrap=True, width=max(Console().width, 110))
    console.print(table)
    noise = max(abs(line.again.ratio - 1) for line in lines)
    console.print(
        "Times relative to batch norm's: median (quartiles) of interleaved rounds. The same code twice differs by up "
        f"to {noise:.0%}; a smaller difference says nothing.",
        highlight=False,
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise _Refused(f"expected a shape as 32,64,56,56, got {text!r}") from None


def _paste(text: str, file: Path, name: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise _Refused(f"expected the lines {begin} and {end} in {file}, got a file without them; add them")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _write(
    parts: list[tuple[Preset, list[dict[str, Any]]]], directory: Path | None, page: Path
) -> list[dict[str, Any]]:
    import json

    from . import report, runs
    from .summary import summarize

    summaries = [summarize(preset, records) for preset, records in parts]
    if directory is not None:
        text = json.dumps(summaries[0], indent=2, allow_nan=False) + "\n"
        runs.write_atomically(directory / "summary.json", text)
    sections = [(preset, summary, records) for (preset, records), summary in zip(parts, summaries)]
    runs.write_atomically(page, report.page(sections))
    return summaries


def _print(summary: dict[str, Any], preset: Preset, console: Any, page: Path) -> None:
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
    console.print(f"Report: {page.resolve()}", highlight=False)


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
