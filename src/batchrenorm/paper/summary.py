"""From results to numbers: mean and deviation over seeds, and whether each prediction held."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from .experiment import Measure, Prediction, Preset

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the normal's 1.96 is near enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
RULE = (
    "Differences are taken seed by seed, since the arms share seeds, and get Student's 95 % interval over the seeds. "
    "An interval that contains 0 is printed as “no difference”. “≥ m”: held if the interval excludes 0 and the mean "
    "difference is m or more. “Within ±m”: held if the whole interval lies within ±m, did not hold if the whole "
    "interval lies outside, otherwise undecided."
)


class Difference(NamedTuple):
    """A mean difference in points over shared seeds, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_noise(self) -> bool:
        """Zero lies in the interval."""
        return self.low <= 0 <= self.high


def difference(better: dict[int, float], worse: dict[int, float]) -> Difference | None:
    """The paired difference of two arms.

    Args:
        better: accuracy for each seed.
        worse: the same of the other arm.

    Returns:
        None if they share no seed; an infinite interval if they share only one.
    """
    pairs = [better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())]
    if not pairs:
        return None
    mean, n = statistics.fmean(pairs), len(pairs)
    if n == 1:
        return Difference(mean, -math.inf, math.inf, n)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def verdict(prediction: Prediction, found: Difference) -> str:
    """ "held", "did not hold", "no difference" or "undecided", by `RULE`."""
    if prediction.within is not None:
        m = prediction.within
        if -m <= found.low and found.high <= m:
            return "held"
        return "did not hold" if found.low > m or found.high < -m else "undecided"
    assert prediction.at_least is not None
    if found.is_noise:
        return "no difference"
    return "held" if found.low > 0 and found.mean >= prediction.at_least else "did not hold"


def final(records: Iterable[dict[str, Any]]) -> dict[Measure, dict[int, float]]:
    """The accuracy of each measure and seed at the end of training."""
    values: dict[Measure, dict[int, float]] = {}
    for record in records:
        if record["step"] == record["config"]["steps"]:
            measure = Measure(record["arm"], record["split"], record["statistics"])
            values.setdefault(measure, {})[record["seed"]] = record["accuracy"]
    return values


def spread(values: dict[int, float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample; None of a single seed) and count, as they stand in summary.json."""
    numbers = [values[seed] for seed in sorted(values)]
    return {
        "accuracy_mean": statistics.fmean(numbers),
        "accuracy_std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "n": len(numbers),
    }


def summarize(preset: Preset, records: list[dict[str, Any]]) -> dict[str, Any]:
    """All of summary.json.

    Args:
        preset: the experiment.
        records: the lines of results.jsonl, in any order.

    Returns:
        ``arms`` has test accuracy by moving averages; ``evaluations`` every other final measurement too.
    """
    values = final(records)
    order = [arm.name for arm in preset.arms]
    measures = sorted(values, key=lambda m: (order.index(m.arm), m.split, m.statistics))
    evaluations: dict[str, dict[str, Any]] = {}
    for m in measures:
        evaluations.setdefault(m.arm, {})[f"{m.split}/{m.statistics}"] = spread(values[m])
    return {
        "preset": preset.name,
        "about": preset.about,
        "unit": "percent",
        "arms": {name: found["test/averages"] for name, found in evaluations.items()},
        "evaluations": evaluations,
        "predictions": [_judged(prediction, values) for prediction in preset.predictions],
        "rule": RULE,
        "seeds": sorted({record["seed"] for record in records}),
        "versions": sorted(
            {f"batchrenorm {r['version']} ({r['commit']}), torch {r['hardware']['torch']}" for r in records}
        ),
        "hardware": sorted({f"{r['hardware']['cpu']}, {r['hardware']['cores']} cores" for r in records}),
    }


def _judged(prediction: Prediction, values: dict[Measure, dict[int, float]]) -> dict[str, Any]:
    found = difference(values.get(prediction.better, {}), values.get(prediction.worse, {}))
    judged: dict[str, Any] = {
        "claim": prediction.claim,
        "better": prediction.better._asdict(),
        "worse": prediction.worse._asdict(),
        "at_least": prediction.at_least,
        "within": prediction.within,
        "difference": None,
        "interval": None,
        "n": 0,
        "noise": None,
        "verdict": "not measured",
    }
    if found is not None:
        interval = [found.low, found.high] if found.n > 1 else None
        judged.update(difference=found.mean, interval=interval, n=found.n, noise=found.is_noise)
        judged["verdict"] = verdict(prediction, found)
    return judged
