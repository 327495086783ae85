"""The experiments of docs/small-batches.md: tuning, test, robustness, stability map.

python scripts/small_batch.py PRESET tune     # every arm at every candidate, seeds 100 and 101, validation images;
                                              # then at halves of the lowest while that is the best
python scripts/small_batch.py PRESET choose   # prints what the tuning chose, for batchrenorm/paper/small_batch.py
python scripts/small_batch.py PRESET test     # every arm at its learning rate, seeds 0 to 4, test images at the end
python scripts/small_batch.py PRESET robust   # moving gradients in groups of 4, seeds 0 to 9, two rates 4 times apart
python scripts/small_batch.py PRESET map      # learning rate x samples normalised together, seeds 100 and 101
python scripts/small_batch.py PRESET share    # the same x the share of the microbatch's own gradient, early schedules

PRESET is small-batch, small-batch-conv or small-batch-fashion, --data DIR where the images lie. A stage goes
on where it was stopped; what is committed as .xz has to be unpacked for that.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from batchrenorm import ClipSchedule
from batchrenorm.paper import runs
from batchrenorm.paper.experiment import Arm, Preset
from batchrenorm.paper.presets import PRESETS
from batchrenorm.paper.small_batch import CANDIDATES
from batchrenorm.paper.summary import is_final

RESULTS = Path(__file__).parent.parent / "results"
TUNING_SEEDS = (100, 101)
GUESSING = 1.0  # percent; a rate at which the first seed learns nothing is not tried with the second
# What answers the question comes first, should the time not suffice.
ORDER = ("groups-4", "whole", "groups-2", "groups-8", "one-label", "pairs", "groups-1")
ROBUST = {"small-batch": (0.1, 0.4), "small-batch-conv": (0.025, 0.1), "small-batch-fashion": (0.05, 0.2)}
SHARES = (0.1, 0.3, 0.6)
EVERYWHERE = ("brn-moving", "brn-moving-early")
MAP_REGIMES = ("groups-4", "groups-2", "groups-8", "whole")

Records = list[dict[str, Any]]


class Job(NamedTuple):
    """One training."""

    arm: Arm
    seed: int
    own: float | None = None  # share of the microbatch's own gradient that stays for ever; None is the layer's 0


def tuning(preset: Preset, records: Records) -> Iterator[Job]:
    """Every arm at every candidate, and at halves of the lowest for as long as the lowest is the best.

    `records` are what has been found by the time that the next is asked for.
    """
    for arm in sorted(preset.arms, key=lambda arm: ORDER.index(arm.regime)):
        rates = list(CANDIDATES[preset.name])
        while rates:
            for seed in TUNING_SEEDS:
                for rate in rates:
                    yield Job(replace(arm, learning_rate=rate), seed)
            best = best_rate(records, arm)
            lower = [best / 2] if best is not None and best == min(validation(records, arm)) else []
            # The same again: whoever asks for the jobs has left these out.
            rates = lower if rates != lower else []


def validation(records: Records, arm: Arm) -> dict[float, list[float]]:
    """Accuracies in the end, for each learning rate that was tried; GUESSING, where it was with the first seed only."""
    found: dict[float, list[float]] = {}
    for r in records:
        if r["arm"] == arm.name and (r["split"], r["statistics"]) == ("val", "averages"):
            found.setdefault(r["config"]["learning_rate"], []).append(r["accuracy"])
    return found


def best_rate(records: Records, arm: Arm) -> float | None:
    """The learning rate of the best mean; None if none was tried with every seed."""
    means = {
        rate: statistics.fmean(values)
        for rate, values in validation(records, arm).items()
        if len(values) == len(TUNING_SEEDS)
    }
    return max(means, key=lambda rate: means[rate]) if means else None


def test(preset: Preset, records: Records) -> Iterator[Job]:
    """Every arm that has a learning rate."""
    for arm in sorted(preset.arms, key=lambda arm: ORDER.index(arm.regime)):
        if arm.learning_rate is not None:
            for seed in range(preset.seeds):
                yield Job(arm, seed)


def robust(preset: Preset, records: Records) -> Iterator[Job]:
    """One default setting, ten seeds, two learning rates."""
    for seed in range(10):
        for rate in ROBUST[preset.name]:
            for normalizer in EVERYWHERE:
                yield Job(replace(preset.arm(f"groups-4/{normalizer}"), learning_rate=rate), seed)


def stability(preset: Preset, records: Records) -> Iterator[Job]:
    """Where it trains, up to 8 times the rate chosen for groups of 4."""
    best = preset.arm("groups-4/brn-moving").learning_rate
    assert best is not None
    rate = CANDIDATES[preset.name][-1]
    while rate < 8 * best:  # the candidates themselves are in the tuning
        rate *= 2
        for regime in MAP_REGIMES:
            for seed in TUNING_SEEDS:
                for normalizer in (*EVERYWHERE, "brn"):
                    yield Job(replace(preset.arm(f"{regime}/{normalizer}"), learning_rate=rate), seed)


def share(preset: Preset, records: Records) -> Iterator[Job]:
    """How much of the moving gradient; none of it is "brn-early", and all "brn-moving-early", which are tuned."""
    for regime in ("groups-4", "groups-2", "groups-8"):
        for own in SHARES:
            for rate in CANDIDATES[preset.name]:
                for seed in TUNING_SEEDS:
                    yield Job(replace(preset.arm(f"{regime}/brn-moving-early"), learning_rate=rate), seed, own)


@contextlib.contextmanager
def keeping(own: float) -> Iterator[None]:
    """`ClipSchedule.own_share` falls to this and not to 0."""
    falls = ClipSchedule.own_share

    def own_share(schedule: ClipSchedule, step: int) -> float:
        return own + (1 - own) * falls(schedule, step)

    with mock.patch.object(ClipSchedule, "own_share", own_share):
        yield


STAGES = {
    "tune": (tuning, "tuning"),
    "test": (test, "results"),
    "robust": (robust, "robust"),
    "map": (stability, "map"),
    "share": (share, "share"),
}


def path(preset: str, stage: str, results: Path = RESULTS) -> Path:
    """The rows of a stage."""
    return results / preset / f"{STAGES[stage][1]}.jsonl"


def kept(found: Records, stage: str) -> Records:
    """All of a test; of the others the end, and of tuning and map nothing of test images."""
    if stage == "test":
        return found
    of = ("train", "val", "test") if stage == "robust" else ("train", "val")
    return [r for r in found if is_final(r) and r["split"] in of]


def run(preset: Preset, stage: str, data: Path | None, results_in: Path, only: tuple[str, ...]) -> None:
    """Do what is missing of a stage."""
    file = path(preset.name, stage, results_in)
    file.parent.mkdir(parents=True, exist_ok=True)
    results = runs.Results(file)
    for arm, seed, own in STAGES[stage][0](preset, results.records):
        # A loss that is not finite is an answer here.
        arm = replace(arm, may_diverge=True)
        job = (arm.name, runs.config_hash(preset, arm), seed, own)
        if only and arm.name not in only and arm.regime not in only and arm.normalizer not in only:
            continue
        if any((r["arm"], r["config_hash"], r["seed"], r.get("own")) == job for r in results.records):
            continue
        first = (*job[:2], TUNING_SEEDS[0])
        if stage == "tune" and any(
            (r["arm"], r["config_hash"], r["seed"]) == first and r["split"] == "val" and r["accuracy"] < GUESSING
            for r in results.records
        ):
            continue
        with tempfile.TemporaryDirectory() as checkpoints, contextlib.nullcontext() if own is None else keeping(own):
            place = runs.Place(Path(checkpoints), root=data)
            found = runs.run_job(preset, arm, seed, place, lambda step, accuracy: None)
        results.add([r if own is None else {**r, "own": own} for r in kept(found, stage)])
        end = [r for r in found if is_final(r) and (r["split"], r["statistics"]) == ("val", "averages")]
        print(
            preset.name,
            arm.name,
            f"{arm.learning_rate:g}",
            seed,
            end[-1]["accuracy"],
            f"{end[-1]['seconds']} s",
            flush=True,
        )


def choose(preset: Preset) -> dict[str, float]:
    """The learning rate of the best mean accuracy on validation images, of each arm that was tuned in full."""
    chosen: dict[str, float] = {}
    records = runs.Results(path(preset.name, "tune")).records
    for arm in preset.arms:
        found, best = validation(records, arm), best_rate(records, arm)
        full = set(CANDIDATES[preset.name]) <= found.keys() and all(
            len(values) == len(TUNING_SEEDS) or values[0] < GUESSING for values in found.values()
        )
        if full and best is not None and best != min(found):
            chosen[arm.name] = best
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=CANDIDATES)
    parser.add_argument("stage", choices=(*STAGES, "choose"))
    parser.add_argument("--data", type=Path)
    # Rows that are committed make the next ones those of a changed tree: write elsewhere, then move them.
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", default=[], help="arms, regimes or normalisers")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if options.stage == "choose":
        for name, rate in choose(preset).items():
            print(f'        "{name}": {rate:g},')
    else:
        run(preset, options.stage, options.data, options.results, tuple(options.only))


if __name__ == "__main__":
    main()
