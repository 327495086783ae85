"""Training an arm of an experiment: interrupted anywhere it goes on bitwise, and what breaks says so."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for _module in ("sklearn", "rich", "matplotlib"):
    # Before anything is imported that needs them.
    pytest.importorskip(_module, reason="needs the extra: pip install 'batchrenorm[paper]'")

from torchvision_shim import allow_torchvision  # noqa: E402

from batchrenorm.paper import checkpoints, cli, normalizers, presets, runs, training  # noqa: E402
from batchrenorm.paper import data as paper_data  # noqa: E402
from batchrenorm.paper.experiment import Arm, Labels, Preset  # noqa: E402
from batchrenorm.paper.models import Conv4, Torchvision  # noqa: E402

CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
STEPS = 8
TINY = replace(presets.smoke, name="tiny", steps=STEPS, evaluations=3, seeds=1, checkpoint_every=3)
PAIRED = Arm("noniid", "brn", group=16, labels=Labels(labels=8, images=4))
MICROBATCH = Arm("microbatch", "brn", group=4)
# Whose arms can all be divided.
SMALL = replace(TINY, arms=(MICROBATCH,))


class Interrupted(Exception):
    """By the one who watches the training."""


@pytest.fixture(scope="module")
def digits() -> paper_data.Data:
    return paper_data.load("digits")


@pytest.fixture(scope="module")
def images() -> paper_data.Data:
    """The digits as images of 16 x 16 pixels, uint8, which augmentation shifts and mirrors."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = (torch.as_tensor(pixels) * 15.9).to(torch.uint8).view(-1, 1, 8, 8)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = torch.as_tensor(labels, dtype=torch.int64)
    moments = {"mean": torch.full((1, 1, 1), 78.0), "std": torch.full((1, 1, 1), 95.0)}
    rows = torch.arange(len(y))
    parts = (rows[:1000], rows[1000:1200], rows[1200:1400])
    splits = [paper_data.InMemory(x, y, part, pad=2 if k == 0 else None, **moments) for k, part in enumerate(parts)]
    return paper_data.Data(*splits, classes=10, shape=(1, 16, 16))


@pytest.fixture(scope="module")
def photographs(images: paper_data.Data) -> paper_data.Data:
    """Three colours and 32 pixels, for nets of torchvision."""
    ((x, _),) = images.train.minibatches([range(64)])
    x = x.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3).contiguous()
    split = paper_data.InMemory(x, images.train.y[:64])
    return paper_data.Data(split, split, split, classes=10, shape=(3, 32, 32))


def train(
    preset: Preset,
    data: paper_data.Data,
    checkpoint: Path | None = None,
    arm: Arm = MICROBATCH,
    stop: Callable[[int], bool] = lambda step: False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    def progress(step: int, accuracy: float | None) -> None:
        if stop(step):
            raise Interrupted

    return training.train(preset, arm, seed, data, CPU, progress, checkpoint)


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise, but for times."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not str(key).endswith("seconds"):
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (one, other) in enumerate(zip(a, b)):
            assert_same(one, other, f"{where}/{k}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, f"{where}: {a} and {b}"


# Whatever interrupts it, a training is the same training

SETTINGS = {
    "sgd, cosine": (SMALL, MICROBATCH, "digits"),
    "rmsprop, exponential, warmup, averaging": (
        # 50 falls of the learning rate in 100 steps: one every second.
        replace(
            SMALL, steps=100, optimizer="rmsprop", decay="exponential", warmup=3, averaging=0.99, weight_decay=1e-3
        ),
        PAIRED,
        "digits",
    ),
    "convolutions, augmentation, accumulate, channels_last, averaging": (
        replace(SMALL, model=Conv4(8), augment=True, accumulate=2, channels_last=True, averaging=0.9),
        PAIRED,
        "images",
    ),
    "bfloat16, label smoothing, learnt gamma": (
        replace(SMALL, precision="bfloat16", label_smoothing=0.1, learn_gamma=True),
        MICROBATCH,
        "digits",
    ),
    "float16, accumulate, moving averages alone": (
        replace(SMALL, precision="float16", accumulate=2),
        Arm("baseline", "moving-average", group=16, may_diverge=True),
        "digits",
    ),
    # The limits of r and d depend on the step.
    "late, when the limits are open": (
        replace(SMALL, steps=60, learning_rate=0.02),
        Arm("baseline", "brn", group=8, steps=60),
        "digits",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_interrupted_after_every_step_is_the_uninterrupted_one(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    preset, arm, data_name = SETTINGS[name]
    data = request.getfixturevalue(data_name)
    # Interrupted after its last step it leaves everything that it is in a checkpoint.
    with pytest.raises(Interrupted):
        train(preset, data, tmp_path / "whole.pt", arm, stop=lambda step: step == preset.steps)
    checkpoint = tmp_path / "parts.pt"
    for step in range(1, preset.steps + 1):
        with pytest.raises(Interrupted):
            train(preset, data, checkpoint, arm, stop=lambda step: True)
        assert checkpoints.load(checkpoint, CPU)["step"] == step
    assert_same(*(checkpoints.load(tmp_path / file, CPU) for file in ("whole.pt", "parts.pt")))
    records = train(preset, data, checkpoint, arm)
    assert without_seconds(records) == without_seconds(train(preset, data, None, arm))
    assert {record["step"] for record in records} == {round(preset.steps * k / 3) for k in (1, 2, 3)}


def test_groups_of_a_label_that_validation_images_do_not_suffice_for(images: paper_data.Data) -> None:
    """200 validation images are about 20 of each digit: they are judged by the averages alone."""
    for wanted, statistics in ((16, {"averages", "batch"}), (32, {"averages"})):
        arm = Arm("one-label", "brn", labels=Labels(labels=32 // wanted, images=wanted), group=16)
        found = train(replace(SMALL, arms=(arm,), model=Conv4(8)), images, arm=arm)
        assert {r["statistics"] for r in found if r["split"] == "val"} == statistics
        assert {r["statistics"] for r in found if r["split"] == "train"} == {"averages", "training"}


def test_what_differs_shows(digits: paper_data.Data, tmp_path: Path) -> None:
    """The comparison above sees a difference of one bit, and other settings give other numbers."""
    for name, learning_rate in (("a", 0.1), ("b", 0.1000001)):
        with pytest.raises(Interrupted):
            train(replace(SMALL, learning_rate=learning_rate), digits, tmp_path / name, stop=lambda step: step == STEPS)
    a, b = (checkpoints.load(tmp_path / name, CPU) for name in "ab")
    with pytest.raises(AssertionError, match="model"):
        assert_same(a["model"], b["model"], "model")


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
@pytest.mark.slow
def test_dropout_goes_on_where_it_was(name: str, photographs: paper_data.Data, tmp_path: Path) -> None:
    """Dropout in the one, in the other whole blocks dropped too: a function of seed and step, and of nothing else."""
    allow_torchvision()
    pytest.importorskip(
        "torchvision", exc_type=ImportError, reason="needs the extra: pip install 'batchrenorm[vision]'"
    )
    preset = replace(SMALL, model=Torchvision(name), batch_size=8, steps=4, evaluations=4, checkpoint_every=1)
    with pytest.raises(Interrupted):
        train(preset, photographs, tmp_path / "whole.pt", stop=lambda step: step == 4)
    with pytest.raises(Interrupted):
        train(preset, photographs, tmp_path / "parts.pt", stop=lambda step: step == 2)
    torch.manual_seed(17)
    with pytest.raises(Interrupted):
        train(preset, photographs, tmp_path / "parts.pt", stop=lambda step: step == 4)
    whole = checkpoints.load(tmp_path / "whole.pt", CPU)
    assert_same(whole, checkpoints.load(tmp_path / "parts.pt", CPU))
    # And there is randomness: other seeds of it give other nets.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "_seed_dropout", lambda self: torch.manual_seed(5))
        with pytest.raises(Interrupted):
            train(preset, photographs, tmp_path / "other.pt", stop=lambda step: step == 4)
    other = checkpoints.load(tmp_path / "other.pt", CPU)
    assert not torch.equal(whole["model"]["classifier.1.weight"], other["model"]["classifier.1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-mnist", "omniglot"])
def test_real_images_go_on_where_they_were(name: str, tmp_path: Path) -> None:
    if not (SHARED / name.replace("-", "_")).is_dir():
        pytest.skip(f"{name} is not in {SHARED}")
    preset = presets.PRESETS[name]
    steps = {"steps": 6, "evaluations": 2}
    preset = replace(preset, **steps, model=Conv4(8), augment=True, accumulate=1)
    data = paper_data.load(name, root=SHARED, cache=tmp_path / "cache")
    arm = replace(preset.arm("noniid/brn"), steps=None)
    whole = train(preset, data, None, arm)
    with pytest.raises(Interrupted):
        train(preset, data, tmp_path / "c.pt", arm, stop=lambda step: step == 4)
    assert without_seconds(train(preset, data, tmp_path / "c.pt", arm)) == without_seconds(whole)
    assert {r["parameters"] for r in whole} == {"last", "averaged"}


def test_a_killed_process_loses_the_steps_since_the_last_checkpoint(digits: paper_data.Data, tmp_path: Path) -> None:
    """A kill leaves what stands on disk: a checkpoint every 3 steps."""
    kept: dict[int, bytes] = {}
    checkpoint = tmp_path / "c.pt"

    def look(step: int) -> bool:
        kept[step] = checkpoint.read_bytes() if checkpoint.exists() else b""
        return False

    whole = train(SMALL, digits, checkpoint, stop=look)
    for step, content in kept.items():
        if content:
            checkpoint.write_bytes(content)
            assert checkpoints.load(checkpoint, CPU)["step"] == step // 3 * 3
            assert without_seconds(train(SMALL, digits, checkpoint)) == without_seconds(whole)
        else:
            assert step < 3
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("normalizer", ["bn", "brn", "moving-average", "layer"])
def test_parts_are_one_minibatch(normalizer: str, digits: paper_data.Data, tmp_path: Path) -> None:
    """Accumulated, a training is that of whole minibatches, but for rounding: gradients, averages, limits, average."""
    preset = replace(SMALL, averaging=0.9, learning_rate=0.05, steps=20)
    arm = Arm("microbatch", normalizer, group=4)
    states = []
    for k in (1, 2, 4):
        with pytest.raises(Interrupted):
            train(replace(preset, accumulate=k), digits, tmp_path / f"{k}.pt", arm, stop=lambda step: step == 20)
        states.append(checkpoints.load(tmp_path / f"{k}.pt", CPU))
    first, *others = states
    for other in others:
        for name, value in first["model"].items():
            # 20 steps double an error of 2^-24 less often than 6 times.
            torch.testing.assert_close(other["model"][name], value, rtol=1e-5, atol=1e-6)
        for one, two in zip(first["averaged"], other["averaged"], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert other["model"].get("1.num_batches_tracked", 20) == 20


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(digits: paper_data.Data, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """After 4 of 8 steps."""
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    with pytest.raises(Interrupted):
        train(replace(SMALL, averaging=0.9), digits, path, stop=lambda step: step == 4)
    return path.read_bytes()


def test_checkpoints_are_data_and_not_code(checkpoint: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(checkpoint)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["step"] == 4
    assert state["averaged"]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.2},
        {"batch_size": 64},
        {"steps": 9},
        {"averaging": 0.99},
        {"precision": "bfloat16"},
        {"seed": 1},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(
    changes: dict[str, Any], checkpoint: bytes, digits: paper_data.Data, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(checkpoint)
    seed = changes.get("seed", 0)
    preset = replace(SMALL, **{"averaging": 0.9, **{key: value for key, value in changes.items() if key != "seed"}})
    with pytest.raises(ValueError, match=r"expected a checkpoint of the present settings .*c\.pt.* with --fresh"):
        train(preset, digits, path, seed=seed)
    assert path.read_bytes() == checkpoint


def test_a_damaged_checkpoint_is_refused_or_whole(checkpoint: bytes, digits: paper_data.Data, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed: no other exception, and never a silently wrong state."""
    path = tmp_path / "c.pt"
    path.write_bytes(checkpoint)
    good = checkpoints.load(path, CPU)
    drawn = random.Random(0)
    spoilt = [b"", b"not a checkpoint", b"{}", checkpoint[:1], checkpoint[: len(checkpoint) // 2], checkpoint[:-1]]
    spoilt += [checkpoint[: drawn.randrange(len(checkpoint))] for _ in range(50)]
    for _ in range(300):
        place = drawn.randrange(len(checkpoint))
        spoilt.append(
            checkpoint[:place] + bytes([checkpoint[place] ^ (1 << drawn.randrange(8))]) + checkpoint[place + 1 :]
        )
    refused = []
    for content in spoilt:
        path.write_bytes(content)
        try:
            found = checkpoints.load(path, CPU)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert_same(found, good)  # the byte was padding
    assert len(refused) > 100
    message = re.compile(r"expected a checkpoint in .*c\.pt, got .*; delete it, and .* starts over")
    assert not [text for text in refused if not message.fullmatch(text)]
    path.write_bytes(checkpoint[:-100])
    with pytest.raises(ValueError, match="expected a checkpoint"):
        train(replace(SMALL, averaging=0.9), digits, path)


def test_something_else_in_its_place_is_refused(digits: paper_data.Data, tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        train(SMALL, digits, tmp_path / "c.pt")


def test_a_full_disk_keeps_the_last_checkpoint(
    digits: paper_data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(SMALL, digits)
    path = tmp_path / "c.pt"
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if path.exists():
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"expected room for .*c\.pt, got: No space left on device; .* is kept"):
            train(SMALL, digits, path)
    assert checkpoints.load(path, CPU)["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert without_seconds(train(SMALL, digits, path)) == without_seconds(whole)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(where)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield where
    subprocess.run(["umount", str(where)], check=True, capture_output=True)


def test_a_really_full_disk_keeps_the_last_checkpoint(digits: paper_data.Data, full_disk: Path) -> None:
    path, filler = full_disk / "c.pt", full_disk / "filler"
    with pytest.raises(Interrupted):
        train(SMALL, digits, path, stop=lambda step: step == 4)
    filler.write_bytes(bytes(48 * 1024 - path.stat().st_size // 4096 * 4096))
    with pytest.raises(OSError, match="No space left on device"):
        train(SMALL, digits, path)
    assert checkpoints.load(path, CPU)["step"] == 4
    filler.unlink()
    assert without_seconds(train(SMALL, digits, path)) == without_seconds(train(SMALL, digits))


# The command


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


def reproduce(directory: Path, *options: str) -> int:
    return cli.main(["reproduce", "tiny", "--runs", str(directory), "--workers", "0", *options])


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "tiny" / "results.jsonl").read_text().splitlines()]


def arms(directory: Path) -> set[str]:
    return {record["arm"] for record in results(directory)}


def test_an_arm_that_diverges_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absurd = Arm("absurd", "brn", learning_rate=1e20)
    first = replace(TINY, arms=(absurd, MICROBATCH, replace(absurd, regime="expected", may_diverge=True)))
    monkeypatch.setitem(presets.PRESETS, "tiny", first)
    assert reproduce(tmp_path) == 1
    said = capsys.readouterr()
    assert re.search(
        r"^batchrenorm: expected a finite loss of absurd/brn, seed 0, got NaN .* lower the", said.err, re.M
    )
    assert "Traceback" not in said.err
    assert "failed: expected a finite loss of absurd/brn" in said.out
    assert arms(tmp_path) == {"microbatch/brn", "expected/brn"}
    # A NaN is no number of JSON, and no right answer either.
    diverged = [record for record in results(tmp_path) if record["arm"] == "expected/brn"]
    assert {record["loss"] for record in diverged if record["step"] == STEPS} == {None}
    assert {record["accuracy"] for record in diverged if record["step"] == STEPS} == {0.0}
    assert not list((tmp_path / "tiny" / "checkpoints").glob("*"))
    assert (tmp_path / "tiny" / "report.html").exists()
    # The others are done; it fails again.
    before = (tmp_path / "tiny" / "results.jsonl").read_bytes()
    assert reproduce(tmp_path) == 1
    assert "2 of 3 runs are in" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "results.jsonl").read_bytes() == before


def test_a_net_that_is_not_finite_is_not_kept(digits: paper_data.Data, tmp_path: Path) -> None:
    """Between two looks at the loss there may be checkpoints; a resumed training could only fail."""
    with pytest.raises(training.Diverged, match="the last checkpoint is kept"):
        train(replace(SMALL, checkpoint_every=1, learning_rate=1e6, steps=40, evaluations=1), digits, tmp_path / "c.pt")
    state = checkpoints.load(tmp_path / "c.pt", CPU)
    assert all(value.isfinite().all() for value in state["model"].values()), state["step"]


def test_some_arms_now_and_others_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "--arms", "microbatch,baseline/brn") == 0
    first = {"microbatch/bn", "microbatch/brn", "baseline/brn"}
    assert arms(tmp_path) == first
    capsys.readouterr()
    assert reproduce(tmp_path, "--arms", "noniid") == 0
    assert arms(tmp_path) == first | {"noniid/bn", "noniid/brn"}
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert set(summary["arms"]) == arms(tmp_path)
    capsys.readouterr()
    # Of other settings, were they of the arms now wanted or not.
    assert reproduce(tmp_path, "--arms", "halves", "--learning-rate", "0.2") == 2
    assert "expected results of the present settings" in capsys.readouterr().err
    assert reproduce(tmp_path, "--arms", "halves,microbtach") == 2
    assert "expected arms of tiny, got microbtach; it has baseline/bn, " in capsys.readouterr().err


def test_fresh_forgets_checkpoints_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a directory that is named as users do: from where they are."""
    monkeypatch.chdir(tmp_path)
    runs_directory = Path("runs")
    assert reproduce(runs_directory, "--arms", "microbatch/bn") == 0
    stale = runs.checkpoint(runs.Place(runs_directory / "tiny"), TINY.arm("microbatch/bn"), 0)
    stale.write_bytes(b"of other settings")
    stale.with_name(stale.name + ".new").write_bytes(b"killed in the middle of it")
    assert reproduce(runs_directory, "--arms", "microbatch/bn", "--fresh") == 0
    assert not list(stale.parent.iterdir())
    # torchrun repeats the command as it was given: it must not start over again and again.
    (runs_directory / "tiny" / "summary.json").write_text("kept")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert reproduce(runs_directory, "--arms", "microbatch/bn", "--fresh") == 0
    assert "1 of 1 runs are in" in capsys.readouterr().out


def test_options_are_settings(tmp_path: Path) -> None:
    options = [
        "--steps",
        "4",
        "--batch-size",
        "64",
        "--precision",
        "bfloat16",
        "--averaging",
        "0.9",
        "--accumulate",
        "2",
    ]
    options += ["--optimizer", "rmsprop", "--learning-rate", "0.01", "--evaluations", "2", "--channels-last"]
    assert reproduce(tmp_path, "--arms", "microbatch/brn", *options) == 0
    records = results(tmp_path)
    assert {record["step"] for record in records} == {2, 4}
    assert {record["parameters"] for record in records} == {"last", "averaged"}
    config = records[0]["config"]
    assert (config["batch_size"], config["precision"], config["accumulate"]) == (64, "bfloat16", 2)
    assert (config["learning_rate"], config["channels_last"], config["averaging"]) == (0.01, True, 0.9)
    assert config["optimizer"].startswith("rmsprop")
    # 6.5% of the steps: the limits follow.
    assert config["clip"]["r_full"] <= 4


def test_precision_is_lower_where_it_is_asked_for(digits: paper_data.Data) -> None:
    # Hardly a step: float16 leaves out the first, and what a training makes of rounding is another question.
    preset = replace(SMALL, steps=1, evaluations=1, learning_rate=1e-9)
    losses = {
        precision: next(r["loss"] for r in train(replace(preset, precision=precision), digits) if r["split"] == "test")
        for precision in ("float32", "bfloat16", "float16")
    }
    assert len(set(losses.values())) == 3
    for precision, bits in (("bfloat16", 8), ("float16", 11)):
        # Rounding of this many bits in each of 3 layers, of logits up to 4, in one direction for the right and in the
        # other for the wrong.
        assert losses[precision] == pytest.approx(losses["float32"], abs=2.0**-bits * 3 * 4 * 2)


def test_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        assert reproduce(tmp_path, "--tensorboard", "--arms", "microbatch/brn") == 2
        assert "for --tensorboard, got none; run: pip install tensorboard" in capsys.readouterr().err
        pytest.skip("needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert reproduce(tmp_path, "--tensorboard", "--arms", "microbatch/brn") == 0
    events = EventAccumulator(str(tmp_path / "tiny" / "tensorboard" / "microbatch-brn-0")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, STEPS + 1)]
    assert [event.step for event in events.Scalars("accuracy/test/averages/last")] == [STEPS]


@pytest.mark.slow
def test_compiled_it_is_the_same_training(digits: paper_data.Data, tmp_path: Path) -> None:
    """By Inductor, up to rounding."""
    states = []
    for mode in (None, "default"):
        path = tmp_path / f"{mode}.pt"
        with pytest.raises(Interrupted):
            train(replace(SMALL, compile=mode), digits, path, stop=lambda step: step == 6)
        states.append(checkpoints.load(path, CPU))
    eager, compiled = states
    assert eager["model"].keys() == compiled["model"].keys()
    for name, value in eager["model"].items():
        torch.testing.assert_close(compiled["model"][name], value, rtol=1e-5, atol=1e-6)
    losses = [[record["loss"] for record in state["records"]] for state in states]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_averaged_net_is_what_it_says(digits: paper_data.Data) -> None:
    """The average over all nets of the training, with weights from its formula, in float64."""
    from batchrenorm.paper.averaging import AveragedNet

    net = training.build(SMALL, MICROBATCH, digits, 0)
    averaged = AveragedNet(net, 0.5)

    def values() -> list[torch.Tensor]:
        parameters = [p.detach().double().clone() for p in net.parameters() if p.requires_grad]
        return parameters + normalizers.get_averages(net)

    expected = values()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        net(torch.randn(32, 64, generator=generator))
        averaged.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, values())]
    for one, other in zip(averaged.values, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with averaged.applied(net):
        layer = next(m for m in net.modules() if isinstance(m, nn.Linear))
        torch.testing.assert_close(layer.weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    assert math.isclose(averaged.decay, 0.5)
