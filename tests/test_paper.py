"""The experiments: what is compared is comparable, what is finished is kept, the report says what the numbers say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

for _module in ("sklearn", "rich", "matplotlib"):
    # Before anything is imported that needs them.
    pytest.importorskip(_module, reason="needs the extra: pip install 'batchrenorm[paper]'")

from batchrenorm import BatchRenorm1d, ClipSchedule  # noqa: E402
from batchrenorm.paper import cli, evaluation, presets, report, runs, training  # noqa: E402
from batchrenorm.paper import data as paper_data  # noqa: E402
from batchrenorm.paper.experiment import Arm, Labels, Preset  # noqa: E402
from batchrenorm.paper.progress import Progress  # noqa: E402
from batchrenorm.paper.sampling import plan  # noqa: E402

TINY = replace(presets.smoke, name="tiny", steps=12, evaluations=3)
REQUIRED = {f"{regime}/{norm}" for regime in ("baseline", "microbatch", "noniid") for norm in ("bn", "brn")}


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def data() -> paper_data.Data:
    return paper_data.load(TINY.data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole tiny run."""
    runs_dir = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        assert cli.main(["reproduce", "tiny", "--runs", str(runs_dir), "--workers", "0"]) == 0
    return runs_dir / "tiny"


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


# What a run leaves behind


def test_every_evaluation_is_a_line_with_all_that_it_depends_on(finished: Path) -> None:
    records = lines(finished)
    assert {r["arm"] for r in records} == {arm.name for arm in TINY.arms}
    for r in records:
        assert {
            *("arm", "regime", "normalizer", "seed", "step", "split", "statistics", "accuracy", "loss"),
            *("r_clipped", "d_clipped", "r_mean", "d_mean", "config", "config_hash", "version", "commit", "hardware"),
        } <= r.keys()
        assert r["arm"] == f"{r['regime']}/{r['normalizer']}"
        assert 0 <= r["accuracy"] <= 100
        assert (r["r_mean"] is None) == (not r["normalizer"].startswith("brn"))
        assert r["config"]["torch"] == r["hardware"]["torch"] == torch.__version__
    keys = [(r["arm"], r["seed"], r["step"], r["split"], r["statistics"]) for r in records]
    assert len(set(keys)) == len(keys)
    assert {r["step"] for r in records} == {4, 8, 12}


def test_the_test_images_are_looked_at_once_at_the_end(finished: Path) -> None:
    assert {r["step"] for r in lines(finished) if r["split"] == "test"} == {12}


def test_summary_holds_the_required_arms_in_percent(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["arms"].keys() >= REQUIRED
    assert summary["unit"] == "percent"
    last = [r for r in lines(finished) if r["step"] == 12 and r["arm"] == "noniid/brn" and r["split"] == "test"]
    by_averages = [r["accuracy"] for r in last if r["statistics"] == "averages"]
    arm = summary["arms"]["noniid/brn"]
    assert arm["n"] == len(by_averages) == 2
    assert arm["accuracy_mean"] == pytest.approx(sum(by_averages) / 2)
    assert arm["accuracy_std"] == pytest.approx(abs(by_averages[0] - by_averages[1]) / 2**0.5)
    by_batch = [r["accuracy"] for r in last if r["statistics"] == "batch"]
    assert summary["evaluations"]["noniid/brn"]["test/batch"]["accuracy_mean"] == pytest.approx(sum(by_batch) / 2)


def test_report_is_one_page_that_loads_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "://" not in page
    assert not re.findall(r"""(?:src|href)=["']?(?!["']?#)""", page)
    assert "@import" not in page
    assert len(re.findall(r"url\((?!#)", page)) == 0
    # A redrawn figure has the paper's panel beside ours; four more show r and d.
    redrawn = sum(figure.paper is not None for figure in TINY.figures)
    assert page.count("<svg") == len(TINY.figures) + redrawn + 4
    summary = json.loads((finished / "summary.json").read_text())
    for row in report.table(TINY, summary):
        assert row[1] in page
    for judged in summary["predictions"]:
        assert judged["verdict"] in page


def test_report_and_markdown_of_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_text() == page
    capsys.readouterr()
    assert cli.main(["report", str(finished), "--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(TINY.rows)
    assert {line.count("|") for line in table} == {5}
    mean = json.loads((finished / "summary.json").read_text())["arms"]["noniid/brn"]["accuracy_mean"]
    assert any(f"{mean:.1f} ±" in line for line in table)


# What is compared is comparable


def linear_weights(preset: Preset, arm: Arm, data: paper_data.Data, seed: int) -> list[torch.Tensor]:
    net = training.build(preset, arm, data, seed)
    return [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]


def test_arms_share_their_initial_weights(data: paper_data.Data) -> None:
    first = linear_weights(TINY, TINY.arms[0], data, seed=1)
    for arm in TINY.arms:
        assert all(torch.equal(a, b) for a, b in zip(first, linear_weights(TINY, arm, data, seed=1), strict=True))
    assert not torch.equal(first[0], linear_weights(TINY, TINY.arms[0], data, seed=2)[0])


def test_arms_share_their_minibatches(data: paper_data.Data) -> None:
    def of(name: str, seed: int = 1) -> list[list[int]]:
        found = plan(TINY.batch_size, TINY.arm(name).labels, data.train.y, 12, seed)
        return [list(batch) for batch in found]

    assert of("baseline/bn") == of("baseline/brn") == of("microbatch/bn") == of("microbatch/brn") == of("blowup/bn")
    assert of("noniid/bn") == of("noniid/brn")
    assert of("baseline/bn") != of("noniid/bn")
    assert of("baseline/bn") != of("baseline/bn", seed=2)
    assert of("noniid/bn") != of("noniid/bn", seed=2)
    # Halves are the same images in the same minibatches, dealt out differently.
    assert of("halves/bn") != of("noniid/bn")
    assert [sorted(batch) for batch in of("halves/bn")] == [sorted(batch) for batch in of("noniid/bn")]


def test_groups_are_what_the_arms_say(data: paper_data.Data) -> None:
    def labels_in_groups(name: str) -> list[int]:
        arm = presets.digits.arm(name)
        assert arm.group is not None
        batches = [list(b) for b in plan(presets.digits.batch_size, arm.labels, pairs.train.y, 50, 0)]
        groups = pairs.train.y[torch.tensor(batches)].view(-1, arm.group)
        return [len(group.unique()) for group in groups]

    pairs = paper_data.load("pairs-100")
    noniid, halves = labels_in_groups("noniid/bn"), labels_in_groups("halves/bn")
    arm = presets.digits.arm("noniid/bn")
    assert arm.labels is not None
    assert arm.group is not None
    assert max(noniid) == arm.group // arm.labels.images
    assert max(halves) == 2 * max(noniid)


def test_no_image_of_a_test_pair_is_in_a_training_pair() -> None:
    pairs = paper_data.load("pairs-100")

    def images(split: paper_data.Split) -> set[bytes]:
        ((x, _),) = split.minibatches([range(len(split.y))])
        return {image.numpy().tobytes() for image in x.view(-1, 64).unique(dim=0)}

    train, val, test = (images(split) for split in pairs[:3])
    # The data set itself holds a few identical images; none crosses by pairing.
    digits = paper_data.load("digits")
    twins = images(digits.train) & (images(digits.test) | images(digits.validation))
    assert train & (test | val) <= twins
    assert len(twins) < 5
    assert all(split.y.bincount().unique().numel() == 1 for split in pairs[:3])


def test_same_seed_same_numbers(tmp_path: Path) -> None:
    def numbers(seed: int) -> list[dict[str, Any]]:
        place = runs.Place(tmp_path / str(seed))
        records = runs.run_job(TINY, TINY.arm("noniid/brn"), seed, place, lambda step, accuracy: None)
        return [{k: v for k, v in r.items() if not k.endswith("seconds") and k != "seed"} for r in records]

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)


def test_corrections_are_those_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = BatchRenorm1d(4, clip=ClipSchedule.constant(1.5, 0.5), microbatch_size=8, eps=0.0)
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.2, 2.0, generator=generator)
    x = torch.randn(32, 4, generator=generator)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    (seen,) = evaluation.corrections(layer, x).values()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    y = layer(x)
    # From the output alone: a group's mean is d and its deviation is r.
    std, mean = torch.std_mean(y.detach().view(4, 8, 4), 1, correction=0)
    at_limit = ((std - 1.5).abs() < 1e-4) | ((std - 1 / 1.5).abs() < 1e-4)
    assert 0.2 < seen.r_clipped < 0.8
    assert seen.r_clipped == pytest.approx(at_limit.double().mean().item())
    assert seen.d_clipped == pytest.approx(((mean.abs() - 0.5).abs() < 1e-4).double().mean().item())
    assert seen.r_mean == pytest.approx(std.mean().item(), rel=1e-4)
    assert seen.d_mean == pytest.approx(mean.mean().item(), rel=1e-4, abs=1e-5)
    assert seen.d_abs_mean == pytest.approx(mean.abs().mean().item(), rel=1e-4)


def test_batch_statistics_leave_the_model_alone(data: paper_data.Data) -> None:
    net = training.build(TINY, TINY.arm("noniid/brn"), data, 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = plan(32, TINY.arm("noniid/brn").labels, data.validation.y, 3, 0)
    score = evaluation.with_batch_statistics(net, data.validation, batches, 16)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ((h, y),) = data.validation.minibatches([[item for batch in batches for item in batch]])
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, BatchRenorm1d):
                h = torch.cat([F.batch_norm(g, None, None, training=True) for g in h.split(layer.microbatch_size)])
            else:
                h = layer(h)
    assert score.accuracy == pytest.approx((h.argmax(1) == y).double().mean().item() * 100)


def test_the_training_forward_is_measured_as_it_is(data: paper_data.Data) -> None:
    net = training.build(TINY, TINY.arm("microbatch/brn"), data, 0)
    assert isinstance(net, nn.Sequential)
    batches = plan(32, None, data.train.y, 4, 0)
    for x, _ in data.train.minibatches(batches):  # averages of their own
        net(x)
    net_step = {int(layer.num_batches_tracked) for layer in net if isinstance(layer, BatchRenorm1d)}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    score = evaluation.in_training(net, data.train, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net_step == {4}
    right = total = 0
    for x, y in data.train.minibatches(batches):
        net.load_state_dict(before)  # what the forward of each minibatch would give, were it the next
        right += int((net(x).argmax(1) == y).sum())
        total += len(y)
    assert score.accuracy == pytest.approx(100 * right / total)


def test_an_answer_that_is_not_finite_is_wrong() -> None:
    split = paper_data.InMemory(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.long))
    net = nn.Linear(3, 2)
    assert evaluation.with_averages(net, split, range(4)) == evaluation.Score(0.0, None)


# Nothing finished is lost


class Interrupted(Progress):
    """A Ctrl-C in the middle of the third job."""

    def step(self, worker: int, arm: str, seed: int, steps: int, step: int, accuracy: float | None) -> None:
        super().step(worker, arm, seed, steps, step, accuracy)
        if self.done == 2 and step == 5:
            raise KeyboardInterrupt


def test_resumed_run_has_the_summary_of_an_uninterrupted_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "tiny", "--runs", str(tmp_path), "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("batchrenorm.paper.progress.Progress", Interrupted)
        assert cli.main(command) == 130
    assert "2 of 24 runs are done and kept" in capsys.readouterr().out
    kept = lines(tmp_path / "tiny")
    assert {(r["arm"], r["seed"]) for r in kept} == {("baseline/bn", 0), ("baseline/brn", 0)}
    # What a process killed in the middle of writing leaves.
    (tmp_path / "tiny" / "results.jsonl.new").write_text('{"arm": "base')
    assert cli.main(command) == 0
    assert "2 of 24 runs are in" in capsys.readouterr().out
    assert lines(tmp_path / "tiny")[: len(kept)] == kept
    again, whole = (json.loads((d / "summary.json").read_text()) for d in (tmp_path / "tiny", finished))
    assert {k: v for k, v in again.items() if k != "cost"} == {k: v for k, v in whole.items() if k != "cost"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    runs.write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        runs.write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run with two workers in a process group of its own, as in a terminal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrenorm.paper.cli", "reproduce", "smoke", "--seeds", "99", "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def group_ends(group: int) -> bool:
    """No process of the group is left; multiprocessing's own helper needs a moment after the main process."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_ctrl_c_keeps_what_is_done_and_ends_the_workers(started: subprocess.Popen[str], tmp_path: Path) -> None:
    assert started.stdout is not None
    seen = ""
    for line in started.stdout:
        seen += line
        if line.startswith("[3/"):
            break
    os.killpg(started.pid, signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, seen + output
    kept = re.search(r"Stopped. (\d+) of 1188 runs are done and kept in runs/smoke", output)
    assert kept is not None, seen + output
    assert "Traceback" not in output
    records = lines(tmp_path / "runs" / "smoke")
    done = {(r["arm"], r["seed"]) for r in records}
    assert len(done) == int(kept[1]) >= 3
    assert group_ends(started.pid)
    # Workers compute what the main process would.
    arm, seed = sorted(done)[0]
    here = runs.run_job(presets.smoke, presets.smoke.arm(arm), seed, runs.Place(tmp_path), lambda step, accuracy: None)
    there = [r for r in records if (r["arm"], r["seed"]) == (arm, seed)]
    times = dict.fromkeys(("seconds", "train_seconds", "data_seconds"))
    assert [r | times for r in here] == [r | times for r in there]


# Errors


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_unknown_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"expected a preset, one of digits.*got 'imagnet'", refused(capsys, "reproduce", "imagnet"))


def test_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else object())
    error = refused(capsys, "reproduce", "tiny", "--runs", str(tmp_path / "runs"))
    assert "got no scikit-learn; run: pip install 'batchrenorm[paper]'" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", [("--seeds", "0"), ("--workers", "-1")])
def test_counts_out_of_range(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: tuple[str, str]) -> None:
    assert f"expected {option[0]} >=" in refused(capsys, "reproduce", "tiny", "--runs", str(tmp_path), *option)


def test_results_of_other_settings_are_not_mixed_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(TINY, arms=TINY.arms[:1], rows=(), figures=(), predictions=(), seeds=1)
    monkeypatch.setitem(presets.PRESETS, "tiny", few)
    command = ("reproduce", "tiny", "--runs", str(tmp_path), "--workers", "0")
    assert cli.main(command) == 0
    before = (tmp_path / "tiny" / "results.jsonl").read_bytes()
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(few, learning_rate=0.2))
    capsys.readouterr()
    assert "start over with --fresh" in refused(capsys, *command)
    assert (tmp_path / "tiny" / "results.jsonl").read_bytes() == before
    assert cli.main((*command, "--fresh")) == 0
    assert {r["config"]["learning_rate"] for r in lines(tmp_path / "tiny")} == {0.2}


def test_damaged_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "results.jsonl").write_text('{"arm": "base\n')
    assert "expected JSON in line 1" in refused(capsys, "reproduce", "tiny", "--runs", str(tmp_path))


def test_report_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "results.jsonl" in refused(capsys, "report", str(tmp_path))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (Arm("microbatch", "bn", group=5), "divide the minibatch of 32, got 5"),
        (Arm("noniid", "bn", labels=Labels(5, 2)), r"labels times images .* minibatch of 32, got 5 \* 2"),
    ],
)
def test_arms_that_do_not_fit(arm: Arm, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, arms=(arm,))


def test_unknown_names_in_a_preset() -> None:
    with pytest.raises(ValueError, match="expected data"):
        paper_data.load("mnist")
    with pytest.raises(ValueError, match="expected optimizer of tiny"):
        replace(TINY, optimizer="adam")


def test_the_library_does_not_import_the_experiments() -> None:
    code = (
        "import sys, batchrenorm; "
        "print([m for m in sys.modules if m.startswith('batchrenorm.paper') or m in ('sklearn', 'matplotlib', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The presets


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_the_presets_measure_what_they_promise(preset: Preset) -> None:
    papers = not preset.name.startswith("small-batch")  # the others are no figures of the paper's
    assert not papers or {arm.name for arm in preset.arms} >= REQUIRED
    assert len({arm.name for arm in preset.arms}) == len(preset.arms)
    measures = [row.measure for row in preset.rows]
    measures += [m for p in preset.predictions for m in (p.better, p.worse)]
    measures += [curve.measure for figure in preset.figures for curve in figure.curves]
    for measure in measures:
        arm = preset.arm(measure.arm)
        assert measure.split in ("train", "val", "test")
        assert measure.parameters == preset.parameters
        assert measure.statistics == "averages" or (measure.split != "train" and arm.labels is not None)
    for p in preset.predictions:
        assert (p.at_least is None) != (p.within is None)
    for figure in preset.figures:  # test images are for the end
        assert "test" not in {curve.measure.split for curve in figure.curves}
    assert not papers or {figure.paper for figure in preset.figures} >= {"1", "2", "3"}


def test_halves_and_pairs_in_the_papers_minibatches() -> None:
    """16 groups of 32: every group has 16 labels with 2 images each; in halves no group of 16 has a pair."""
    preset = presets.tiny_imagenet
    y = torch.arange(100_000) % 1000
    for name, pairs in (("noniid/bn", True), ("halves/bn", False)):
        arm = preset.arm(name)
        assert arm.group is not None
        batch = plan(preset.batch_size, arm.labels, y, 2, 0)[1]
        assert len(batch) == 512
        for group in y[torch.tensor(batch)].view(-1, arm.group):
            _, counts = group.unique(return_counts=True)
            # Labels are drawn with replacement, so one may come twice.
            assert (counts.min() >= 2) == pairs
            assert len(counts) >= (arm.group // 2 if pairs else arm.group) - 3


def test_the_paper_schedule_of_imagenet() -> None:
    """5k, 25k, 40k of 130k steps, alpha 0.01, 50 groups of 32."""
    config = presets.imagenet.config(presets.imagenet.arm("baseline/brn"))
    assert config["alpha"] == 0.01
    assert (config["batch_size"], config["group"]) == (1600, 32)
    clip = config["clip"]
    assert abs(clip["warmup"] - 5000) < 100
    assert abs(clip["d_full"] - 25_000) < 400
    assert abs(clip["r_full"] - 40_000) < 400
    assert (clip["r_max"], clip["d_max"]) == (3.0, 5.0)


@pytest.mark.parametrize("normalizer", ["bn", "group", "layer", "moving-average"])
def test_every_normaliser_with_averaged_parameters(normalizer: str, tmp_path: Path) -> None:
    preset = replace(TINY, averaging=0.5, arms=(Arm("baseline", normalizer),), rows=(), figures=(), predictions=())
    records = runs.run_job(preset, preset.arms[0], 0, runs.Place(tmp_path), lambda step, accuracy: None)
    assert {r["parameters"] for r in records} == {"last", "averaged"}
