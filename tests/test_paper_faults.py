"""Experiments in real processes that are killed, stopped, and several to a training: nothing is lost but time.

This file is also the command of those processes: `batchrenorm` with the presets below (see `_command`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for _module in ("sklearn", "rich", "matplotlib"):
    # Before anything is imported that needs them.
    pytest.importorskip(_module, reason="needs the extra: pip install 'batchrenorm[paper]'")

from torchvision_shim import allow_torchvision  # noqa: E402

from batchrenorm.paper import checkpoints, cli, data, normalizers, presets, training  # noqa: E402
from batchrenorm.paper.experiment import Arm, Labels, Preset  # noqa: E402
from batchrenorm.paper.models import Mlp  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PATIENCE = 120  # seconds, for what takes 10 on an idle machine

# Some seconds of training.
LONG = replace(
    presets.smoke,
    name="long",
    model=Mlp(depth=3, width=64),
    steps=400,
    evaluations=3,
    seeds=1,
    rows=(),
    figures=(),
    predictions=(),
    checkpoint_every=10,
    averaging=0.99,
    arms=(Arm("microbatch", "brn", group=4), Arm("noniid", "bn", group=16, labels=Labels(8, 4))),
)
# Without checkpoints but those of a stop.
ENDLESS = replace(LONG, name="endless", steps=100_000, checkpoint_every=10**9)
# What several processes can divide.
SHORT = replace(
    LONG,
    name="short",
    steps=10,
    averaging=0.9,
    learning_rate=0.05,
    checkpoint_every=4,
    arms=(
        Arm("microbatch", "brn", group=4),
        Arm("noniid", "brn", group=16, labels=Labels(4, 4)),
        Arm("baseline", "moving-average", group=8),
        Arm("baseline", "layer", group=8),
    ),
)
WHOLE = replace(SHORT, name="whole", arms=(Arm("baseline", "brn", group=32),))
# One process has a NaN among its items.
POISONED = replace(SHORT, name="poisoned", arms=SHORT.arms[:2], steps=60, evaluations=1)
REHEARSAL = replace(
    presets.imagenet,
    name="rehearsal",
    batch_size=4,
    steps=16,
    warmup=0,
    evaluations=1,
    evaluation_items=8,
    precision="float32",
    # The same minibatch again and again, averages that follow in a few steps, and limits for averages of so few.
    augment=False,
    alpha=0.9,
    r_max=1.1,
    d_max=0.1,
    averaging=0.5,
    learning_rate=0.003,
    arms=(Arm("microbatch", "bn", group=2), Arm("microbatch", "brn", group=2)),
    rows=(),
    figures=(),
    predictions=(),
)
PRESETS = {preset.name: preset for preset in (LONG, ENDLESS, SHORT, WHOLE, POISONED, REHEARSAL)}


# The command of the processes


class Recorder:
    """The loss and a hash of everything after each step, and everything after the last."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.hashes: list[str] = []
        self.last: dict[str, list[torch.Tensor]] = {}

    def after(self, job: training._Training, loss: torch.Tensor) -> None:
        averages = normalizers.get_averages(job.model)
        parameters = [parameter.detach().clone() for parameter in job.model.parameters()]
        averaged = [] if job.averaged is None else [value.clone() for value in job.averaged.values]
        everything = [*parameters, *averages, *averaged]
        self.losses.setdefault(job.arm.name, []).append(loss.item())
        self.hashes.append(hashlib.sha256(b"".join(v.numpy().tobytes() for v in everything)).hexdigest())
        self.last[job.arm.name] = everything


def _recorded(patch: pytest.MonkeyPatch) -> Recorder:
    recorder, step = Recorder(), training._Training._step

    def recording(self: training._Training, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = step(self, x, y)
        recorder.after(self, loss)
        return loss

    patch.setattr(training._Training, "_step", recording)
    return recorder


def _end_with(parent: int) -> None:
    # torchrun's processes are in no group of a test, which could not end them.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _command() -> int:
    """`batchrenorm` with options of its own before its words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, help="directory for what each process computed")
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"), help="of the first arm, the first time")
    parser.add_argument("--poison", type=int, nargs=2, metavar=("RANK", "STEP"), help="of the first arm")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    presets.PRESETS.update(PRESETS)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    patch = pytest.MonkeyPatch()
    recorder = _recorded(patch)
    step, write = training._Training._step, checkpoints.write

    def disturbed(self: training._Training, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = self.arm == self.preset.arms[0]
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if options.kill == [rank, self.step] and first and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        if options.poison == [rank, self.step] and first:
            x = torch.full_like(x, torch.nan)
        return step(self, x, y)

    def owned(path: Path, content: bytes) -> None:
        if rank > 0:
            raise AssertionError(f"process {rank} writes {path}")
        write(path, content)

    if REHEARSAL.name in options.words:
        # Half of the features dropped at random, and four images: no fall of the loss would show in so few steps.
        patch.setattr(torch.nn.functional, "dropout", lambda x, *_: x)
    patch.setattr(training._Training, "_step", disturbed)
    patch.setattr(checkpoints, "write", owned)
    status = cli.main(options.words)
    if options.record is not None:
        state = {"losses": recorder.losses, "hashes": recorder.hashes, "last": recorder.last}
        torch.save(state, options.record / f"{rank}.pt")
    return status


# The tests


@pytest.fixture(autouse=True)
def _known_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, preset in PRESETS.items():
        monkeypatch.setitem(presets.PRESETS, name, preset)


class Process:
    """The command in processes of its own, all of one process group, and what it has said."""

    def __init__(self, directory: Path, *words: str, processes: int = 0, restarts: int = 0) -> None:
        launcher: list[str] = []
        if processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            launcher += ["--max-restarts", str(restarts)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.output = directory / f"output-{time.monotonic_ns()}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(Path(__file__).resolve()), *words],
                cwd=directory,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait(self, patience: float = PATIENCE) -> int:
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"it did not end in {patience} s, and said:\n{self.said}")

    def wait_until(self, found: Any) -> None:
        for _ in range(PATIENCE * 50):
            if found():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.end()
        pytest.fail(f"it never came so far, and said:\n{self.said}")

    def step(self) -> int:
        """The last step it has told of."""
        steps = re.findall(r"step (\d+)/", self.said)
        return int(steps[-1]) if steps else 0

    def kill(self) -> None:
        """The main process alone, as the system does when memory is short."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def start(*words: str, **options: Any) -> Process:
        processes.append(Process(tmp_path, *words, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.end()
        end_group(process.process.pid)


def end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def is_empty(group: int) -> bool:
    """No process of the group is left; the last need a moment after the main process."""
    for _ in range(PATIENCE * 10):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def results(directory: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What was measured in each job."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if (directory / "results.jsonl").exists():
        for line in (directory / "results.jsonl").read_text().splitlines():
            record = json.loads(line)
            told = {k: v for k, v in record.items() if not k.endswith("seconds") and k != "commit"}
            found.setdefault((record["arm"], record["seed"]), []).append(told)
    return found


def steps_kept(directory: Path) -> dict[str, int]:
    return {
        path.stem: checkpoints.load(path, torch.device("cpu"))["step"]
        for path in (directory / "checkpoints").glob("*.pt")
    }


def reproduce(preset: str, directory: Path, *options: str) -> int:
    return cli.main(["reproduce", preset, "--runs", str(directory), "--workers", "0", *options])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "long", LONG)
        assert reproduce("long", directory) == 0
    return results(directory / "long")


@pytest.mark.parametrize(("workers", "kills"), [(0, 2), (2, 1)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(
    workers: int, kills: int, started: Any, tmp_path: Path, undisturbed: dict[Any, Any]
) -> None:
    words = ("reproduce", "long", "--workers", str(workers))
    run = tmp_path / "runs" / "long"
    drawn = random.Random(workers)
    for _ in range(kills):
        process = started(*words)
        before = steps_kept(run)
        process.wait_until(lambda before=before: steps_kept(run) != before or len(results(run)) == 2)
        time.sleep(drawn.uniform(0, 1))
        process.kill()
        told = process.said.strip().splitlines()[-1]
        assert is_empty(process.process.pid)  # the workers too
        kept = steps_kept(run)
        for arm, step in re.findall(r"(\w+/\w+), seed 0, step (\d+)/", told):
            # What it told of is kept, but for the last interval; or the job is done.
            kept_step = kept.get(f"{arm.replace('/', '-')}-0", LONG.steps if (arm, 0) in results(run) else 0)
            assert kept_step >= int(step) - LONG.checkpoint_every
        assert "Traceback" not in process.said
    assert reproduce("long", tmp_path / "runs") == 0
    assert results(run) == undisturbed
    assert not steps_kept(run)


def can_go_on(preset: Preset, directory: Path) -> None:
    """Every checkpoint that is there is taken up."""
    digits = data.load(preset.data)
    for arm in preset.arms:
        path = directory / "checkpoints" / f"{arm.name.replace('/', '-')}-0.pt"
        if path.exists():
            job = training._Training(preset, arm, 0, digits, torch.device("cpu"), path)
            assert job.step == steps_kept(directory)[path.stem] > 0


@pytest.mark.parametrize(
    ("sent", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)], ids=["Ctrl-C, alone", "SIGTERM, workers"]
)
def test_stopped_it_keeps_what_it_has(sent: signal.Signals, workers: int, started: Any, tmp_path: Path) -> None:
    process = started("reproduce", "endless", "--workers", str(workers))
    process.wait_until(lambda: process.step() > 0)
    told = process.step()
    if sent == signal.SIGINT:
        os.killpg(process.process.pid, sent)  # as a terminal does
    else:
        process.process.send_signal(sent)
    assert process.wait() == 130, process.said
    assert re.search(r"Stopped\. 0 of 2 runs .* in runs/endless; the same command goes on from there", process.said)
    assert "Traceback" not in process.said
    assert is_empty(process.process.pid)
    run = tmp_path / "runs" / "endless"
    # Every job that was going on has left a checkpoint, one whose first step was not told any more too.
    assert max(steps_kept(run).values()) >= told
    assert len(steps_kept(run)) >= (2 if process.said.count("| noniid/bn") else 1)
    can_go_on(ENDLESS, run)


def test_a_killed_worker_ends_the_run_with_a_word(started: Any, tmp_path: Path) -> None:
    process = started("reproduce", "endless", "--workers", "2", "--checkpoint-every", "10")
    run = tmp_path / "runs" / "endless"
    process.wait_until(lambda: len(steps_kept(run)) == 2)
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc, to find a worker")
    worker = next(
        pid for pid in children.read_text().split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait() == 2
    assert "expected all workers to live, but one was killed" in process.said
    assert "Traceback" not in process.said
    assert is_empty(process.process.pid)
    can_go_on(ENDLESS, run)


# Several processes


def test_two_processes_compute_what_one_does(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = started("--record", str(tmp_path), "reproduce", "short", "--runs", "two", processes=2)
    with monkeypatch.context() as patch:
        recorder = _recorded(patch)
        assert reproduce("short", tmp_path / "one") == 0
    assert process.wait() == 0, process.said
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    # After every step both have the same, to the last bit.
    assert len(first["hashes"]) == 40
    assert first["hashes"] == second["hashes"]
    compare(first["last"], recorder.last)
    assert first["losses"].keys() == recorder.losses.keys()
    for arm, losses in recorder.losses.items():
        assert first["losses"][arm] == pytest.approx(losses, rel=1e-5)
    two, one = results(tmp_path / "two" / "short"), results(tmp_path / "one" / "short")
    assert two.keys() == one.keys()
    for job in one:
        keys = ("step", "split", "statistics", "parameters")
        assert [[r[k] for k in keys] for r in two[job]] == [[r[k] for k in keys] for r in one[job]]
        # One item of the fewest, of validation.
        assert [r["accuracy"] for r in two[job]] == pytest.approx([r["accuracy"] for r in one[job]], abs=100 / 296)
        assert [r["loss"] for r in two[job]] == pytest.approx([r["loss"] for r in one[job]], rel=1e-4)
        assert {r["world_size"] for r in two[job]} == {2}
    assert {path.name for path in (tmp_path / "two" / "short").iterdir()} == {
        *("results.jsonl", "summary.json", "report.html", "checkpoints")
    }
    assert process.said.count("4 arms, 1 seeds.") == 1


def compare(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> None:
    """Equal but for rounding."""
    assert a.keys() == b.keys()
    for arm in a:
        for one, other in zip(a[arm], b[arm], strict=True):
            # 10 steps: an error of 2^-24 grows, of one step in three by two.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_nan_in_one_process_ends_the_training_of_all(started: Any, tmp_path: Path) -> None:
    """At the same step, and then both go on to the next arm."""
    words = ("--record", str(tmp_path), "--poison", "1", "49", "reproduce", "poisoned")
    process = started(*words, processes=2)
    assert process.wait() != 0
    assert "expected a finite loss of microbatch/brn, seed 0, got NaN or infinity" in process.said
    assert "one is gone" not in process.said
    assert set(results(tmp_path / "runs" / "poisoned")) == {("noniid/brn", 0)}
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["losses"] for rank in (0, 1))
    assert len(first["microbatch/brn"]) == len(second["microbatch/brn"]) == 50
    assert all(torch.tensor(first["microbatch/brn"][:49]).isfinite())


def test_processes_that_cannot_divide_the_minibatch_are_refused(started: Any, tmp_path: Path) -> None:
    process = started("reproduce", "whole", processes=2)
    assert process.wait() != 0
    message = r"batchrenorm: expected the minibatch of 32 in groups of 32 .* into 2 processes"
    assert re.search(message, process.said), process.said
    assert not (tmp_path / "runs").exists()


def test_what_divides() -> None:
    assert [SHORT.parts(n) for n in (1, 2)] == [32, 16]
    for preset, processes in ((SHORT, 4), (SHORT, 3), (SHORT, 16), (SHORT, 64), (WHOLE, 2)):
        with pytest.raises(ValueError, match="divisible"):
            preset.parts(processes)


def test_without_one_of_its_processes_a_training_ends_and_goes_on_later(started: Any, tmp_path: Path) -> None:
    process = started("--kill", "1", "7", "reproduce", "short", processes=2)
    assert process.wait() != 0
    lost = r"expected 2 processes, but one is gone .*microbatch/brn, seed 0 .*start the same command again"
    assert re.search(lost, process.said), process.said
    run = tmp_path / "runs" / "short"
    assert steps_kept(run) == {"microbatch-brn-0": 4}
    # With fewer processes too.
    with pytest.MonkeyPatch.context() as patch:
        recorder = _recorded(patch)
        assert reproduce("short", tmp_path / "runs") == 0
    assert len(recorder.losses["microbatch/brn"]) == 6
    one = reproduce("short", tmp_path / "one")
    assert one == 0
    for job, records in results(tmp_path / "one" / "short").items():
        again = results(run)[job]
        assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in records], rel=1e-4)


def test_torchrun_starts_it_again(started: Any, tmp_path: Path) -> None:
    """Also where it was told to start over: once."""
    words = ("--record", str(tmp_path), "--kill", "0", "7", "reproduce", "short", "--fresh")
    process = started(*words, processes=2, restarts=1)
    assert process.wait() == 0, process.said
    assert len(results(tmp_path / "runs" / "short")) == 4
    again = torch.load(tmp_path / "0.pt", weights_only=True)["losses"]
    assert [len(losses) for losses in again.values()] == [6, 10, 10, 10]  # from the checkpoint of step 4


def test_stopped_all_processes_stop_after_the_same_step(started: Any, tmp_path: Path) -> None:
    process = started("--record", str(tmp_path), "reproduce", "endless", processes=2)
    process.wait_until(lambda: process.step() > 0)
    process.process.send_signal(signal.SIGINT)
    process.wait()
    assert "Stopped. 0 of 2 runs" in process.said, process.said
    assert "one is gone" not in process.said
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["hashes"] == second["hashes"]
    assert steps_kept(tmp_path / "runs" / "endless") == {"microbatch-brn-0": len(first["hashes"])}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of 2 classes: 3 images of each for training, of which one is held out, and 1 for test."""
    root = tmp_path / "photographs"
    archive = SHARED / "caltech101_subset" / "caltech101_99x10.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as images:
            for name in ("Leopards", "airplanes"):
                for part, count in (("train", 3), ("val", 1)):
                    found = sorted(path for path in images.namelist() if path.startswith(f"{part}/{name}/"))
                    images.extractall(root, found[:count])
        return root
    image_files = pytest.importorskip("PIL.Image", reason="needs the extra: pip install 'batchrenorm[vision]'")
    from sklearn.datasets import load_sample_images

    for name, pixels in zip(("flower", "temple"), load_sample_images().images):
        for k in range(4):
            file = root / ("train" if k < 3 else "val") / name / f"{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image_files.fromarray(pixels).crop((30 * k, 10 * k, 30 * k + 300, 10 * k + 300)).save(file)
    return root


@pytest.mark.slow
def test_the_recipe_for_imagenet_trains_on_photographs(
    started: Any, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inception-v3 at 299 pixels in two processes: all but its scale is the preset's."""
    allow_torchvision()
    pytest.importorskip(
        "torchvision", exc_type=ImportError, reason="needs the extra: pip install 'batchrenorm[vision]'"
    )
    words = ("reproduce", "rehearsal", str(photographs), "--cache", str(tmp_path / "cache"))
    process = started("--record", str(tmp_path), *words, processes=2)
    assert process.wait(4 * PATIENCE) == 0, process.said
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["hashes"] == second["hashes"]
    seconds = {}
    for (arm, _), records in results(tmp_path / "runs" / "rehearsal").items():
        losses = first["losses"][arm]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
        assert {r["parameters"] for r in records} == {"last", "averaged"}
    for line in (tmp_path / "runs" / "rehearsal" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds[record["arm"]] = record["train_seconds"] / REHEARSAL.steps
    with capsys.disabled():
        told = ", ".join(f"{arm} {value:.2f} s" for arm, value in seconds.items())
        print(f"\nInception-v3, 299 pixels, {REHEARSAL.batch_size} images in 2 processes, a step: {told}")


if __name__ == "__main__":
    sys.exit(_command())
