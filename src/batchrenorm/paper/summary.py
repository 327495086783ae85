"""From results to numbers: means over seeds, whether each prediction held, speed, clipping, gaps, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .experiment import Curve, Measure, Prediction, Preset

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the normal's 1.96 is near enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
RULE = (
    "Differences are taken seed by seed, since the arms share seeds, and get Student's 95 % interval over the seeds. "
    "An interval that contains 0 is printed as “no difference”. “≥ m”: held if the interval excludes 0 and the mean "
    "difference is m or more. “Within ±m”: held if the whole interval lies within ±m, did not hold if the whole "
    "interval lies outside, otherwise undecided."
)


def t95(degrees: int) -> float:
    """The two-sided 95 % point of Student's t."""
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96


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
    half = t95(n - 1) * statistics.stdev(pairs) / math.sqrt(n)
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


def merge(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One run out of several of the same preset, say from several machines.

    Args:
        runs: the lines of each results.jsonl.

    Returns:
        All lines; of a job (an arm with a seed) that several runs have done, those of the first (see `repeated`).

    Raises:
        ValueError: the runs are of several presets, or have an arm in common with different settings.
    """
    presets = sorted({record["preset"] for records in runs for record in records})
    if len(presets) > 1:
        raise ValueError(f"expected runs of one preset, got {', '.join(presets)}; merge those of each by themselves")
    settings: dict[str, dict[str, Any]] = {}
    merged: list[dict[str, Any]] = []
    done: set[tuple[str, int]] = set()
    for records in runs:
        for record in records:
            ours = {key: value for key, value in record["config"].items() if key not in ("batchrenorm", "torch")}
            first = settings.setdefault(record["arm"], ours)
            if ours != first:
                raise ValueError(
                    f"expected the same settings of {record['arm']} in every run, got {_unlike(first, ours)}; "
                    "report the runs apart, or repeat one with the settings of the other"
                )
        merged += [record for record in records if _job(record) not in done]
        done |= {_job(record) for record in records}
    return merged


def repeated(runs: Sequence[list[dict[str, Any]]]) -> list[tuple[str, int]]:
    """The jobs, as arm and seed, that several of the runs have done; `merge` takes them from the first."""
    jobs = [job for records in runs for job in {_job(record) for record in records}]
    return sorted({job for job in jobs if jobs.count(job) > 1})


def _job(record: dict[str, Any]) -> tuple[str, int]:
    return record["arm"], record["seed"]


def _unlike(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key, 'unknown')} and {other.get(key, 'unknown')}" for key in keys)


def measure(record: dict[str, Any]) -> Measure:
    """What a line of results.jsonl is a measurement of; lines of before there were averaged parameters do not say."""
    return Measure(record["arm"], record["split"], record["statistics"], record.get("parameters", "last"))


def is_final(record: dict[str, Any]) -> bool:
    """Whether a line is of the end of a training."""
    return record["step"] == record["config"]["steps"]


def final(records: Iterable[dict[str, Any]]) -> dict[Measure, dict[int, float]]:
    """The accuracy of each measure and seed at the end of training."""
    values: dict[Measure, dict[int, float]] = {}
    for record in records:
        if is_final(record):
            values.setdefault(measure(record), {})[record["seed"]] = record["accuracy"]
    return values


def curves(records: Iterable[dict[str, Any]]) -> dict[Measure, dict[int, dict[int, float]]]:
    """The accuracy of each measure by seed and step."""
    values: dict[Measure, dict[int, dict[int, float]]] = {}
    for record in records:
        of_seed = values.setdefault(measure(record), {}).setdefault(record["seed"], {})
        of_seed[record["step"]] = record["accuracy"]
    return values


def spread(values: dict[int, float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample; None of a single seed) and count, as they stand in summary.json."""
    found = _spread(values)
    return {"accuracy_mean": found["mean"], "accuracy_std": found["std"], "n": found["n"]}


def _spread(values: dict[int, float]) -> dict[str, Any]:
    numbers = [values[seed] for seed in sorted(values)]
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "n": len(numbers),
    }


def key(preset: Preset, of: Measure) -> str:
    """Where a measure of an arm stands in the summary: ``split/statistics``, of the preset's kind of parameters."""
    return f"{of.split}/{of.statistics}" + ("" if of.parameters == preset.parameters else f"/{of.parameters}")


def summarize(preset: Preset, records: list[dict[str, Any]]) -> dict[str, Any]:
    """All of summary.json.

    Args:
        preset: the experiment.
        records: the lines of results.jsonl, in any order.

    Returns:
        ``arms`` has test accuracy by moving averages; ``evaluations`` every other final measurement too. See
        `steps_to`, `clip`, `gap` and `cost`; what the lines do not say is left out there.

    Raises:
        ValueError: an arm is not of this preset.
    """
    values = final(records)
    order = [arm.name for arm in preset.arms]
    if unknown := sorted({of.arm for of in values} - set(order)):
        raise ValueError(
            f"expected arms of {preset.name} ({', '.join(order)}), got {', '.join(unknown)}; "
            "report them with the version that made them"
        )
    evaluations: dict[str, dict[str, Any]] = {}
    for of in sorted(values, key=lambda m: (order.index(m.arm), m.split, m.statistics, m.parameters)):
        evaluations.setdefault(of.arm, {})[key(preset, of)] = spread(values[of])
    judged = [_judged(prediction, values) for prediction in preset.predictions]
    return {
        "preset": preset.name,
        "about": preset.about,
        "unit": "percent",
        "arms": {name: found["test/averages"] for name, found in evaluations.items() if "test/averages" in found},
        "evaluations": evaluations,
        "predictions": judged,
        "verdict": verdict_sentence(judged),
        "rule": RULE,
        "steps_to": steps_to(preset, records),
        "clip": clip(preset, records),
        "gap": gap(preset, records),
        "cost": cost(preset, records),
        "seeds": sorted({record["seed"] for record in records}),
        "versions": sorted(
            {f"batchrenorm {r['version']} ({r['commit']}), torch {r['hardware']['torch']}" for r in records}
        ),
        "hardware": sorted({_hardware(r) for r in records}),
    }


def verdict_sentence(judged: Sequence[dict[str, Any]]) -> str:
    """How many predictions held, and which did not; "" where nothing was predicted."""
    if not judged:
        return ""
    by_verdict: dict[str, list[str]] = {}
    for prediction in judged:
        by_verdict.setdefault(prediction["verdict"], []).append(prediction["claim"])
    held = len(by_verdict.pop("held", ()))
    sentences = [f"{held} of {len(judged)} predictions held."]
    for name in ("did not hold", "no difference", "undecided", "not measured"):
        if name in by_verdict:
            sentences.append(f"{name.capitalize()}: {'; '.join(by_verdict[name])}.")
    return " ".join(sentences)


def _hardware(record: dict[str, Any]) -> str:
    found = record["hardware"]
    text = f"{found['cpu']}, {found['cores']} cores"
    if found.get("gpu"):
        text += f", {found['gpu']}"
    processes = record.get("world_size", 1)
    return text if processes == 1 else f"{text}, {processes} processes"


def first_reached(curve: Mapping[int, float], target: float) -> float | None:
    """The step at which a curve is at `target` for the first time.

    Args:
        curve: accuracy by step.
        target: accuracy.

    Returns:
        Interpolated between evaluations; the step of the first evaluation if that is there already; None if none is.
    """
    before: tuple[float, float] | None = None
    for step, accuracy in sorted(curve.items()):
        if accuracy >= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (target - before[1]) / (accuracy - before[1])
        before = (step, accuracy)
    return None


def steps_to(preset: Preset, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much sooner Batch Renormalization is where batch norm ends, on the curves of the paper's figures.

    Both arms' steps are those at which the validation curve first reaches BN's final accuracy, seed by seed.

    Returns:
        By the number of the paper's figure: ``seeds`` has target accuracy, BN's and BRN's steps (None: never) of each
        seed; ``bn_steps``, ``brn_steps`` and their ratio are means over the ``reached`` seeds whose BRN gets there.
    """
    found = curves(records)
    result: dict[str, dict[str, Any]] = {}
    for figure in preset.figures:
        pair = None if figure.paper is None else _bn_and_brn(preset, figure.curves)
        if figure.paper is None or pair is None:
            continue
        bn_curves, brn_curves = (found.get(of, {}) for of in pair)
        seeds: list[dict[str, Any]] = []
        for seed in sorted(bn_curves.keys() & brn_curves.keys()):
            bn = bn_curves[seed]
            target = bn[max(bn)]
            seeds.append(
                {
                    "seed": seed,
                    "accuracy": target,
                    "bn_steps": first_reached(bn, target),
                    "brn_steps": first_reached(brn_curves[seed], target),
                }
            )
        if seeds:
            reached = [s for s in seeds if s["brn_steps"] is not None]
            bn_steps, brn_steps = (
                statistics.fmean(s[name] for s in reached) if reached else None for name in ("bn_steps", "brn_steps")
            )
            result[figure.paper] = {
                "bn": pair[0]._asdict(),
                "brn": pair[1]._asdict(),
                "accuracy": statistics.fmean(s["accuracy"] for s in seeds),
                "bn_steps": bn_steps,
                "brn_steps": brn_steps,
                "ratio": bn_steps / brn_steps if bn_steps is not None and brn_steps is not None else None,
                "reached": len(reached),
                "n": len(seeds),
                "seeds": seeds,
            }
    return result


def _bn_and_brn(preset: Preset, lines: Iterable[Curve]) -> tuple[Measure, Measure] | None:
    """Of a figure's curves, those of a regime's BN and BRN in validation."""
    arms = {arm.name: arm for arm in preset.arms}
    shown = [line.measure for line in lines if line.measure[1:3] == ("val", "averages") and line.measure.arm in arms]
    for brn in shown:
        for bn in shown:
            if (
                arms[brn.arm].normalizer == "brn"
                and arms[bn.arm].normalizer == "bn"
                and arms[brn.arm].regime == arms[bn.arm].regime
            ):
                return bn, brn
    return None


def clip(preset: Preset, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much of r and d lies outside the limits, over the second half of training, when they are fully open.

    Returns:
        By BRN arm: the mean fractions, over layers, and ``layers`` in the order of the forward.
    """
    result: dict[str, dict[str, Any]] = {}
    for arm in preset.arms:
        if arm.normalizer != "brn":
            continue
        layers: dict[str, dict[str, list[float]]] = {}
        seeds = set()
        for record in records:
            if record["arm"] != arm.name or 2 * record["step"] <= record["config"]["steps"]:
                continue
            for layer in record.get("layers", ()):
                seeds.add(record["seed"])
                fractions = layers.setdefault(layer["name"], {"r_clipped": [], "d_clipped": []})
                for name, values in fractions.items():
                    if layer[name] is not None:  # not finite
                        values.append(layer[name])
        means: list[dict[str, Any]] = [
            {"name": name, **{what: statistics.fmean(values) if values else None for what, values in fractions.items()}}
            for name, fractions in layers.items()
        ]
        if means:
            known = {what: [m[what] for m in means if m[what] is not None] for what in ("r_clipped", "d_clipped")}
            overall = {what: statistics.fmean(values) if values else None for what, values in known.items()}
            result[arm.name] = {**overall, "n": len(seeds), "layers": means}
    return result


def gap(preset: Preset, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What changes between training and inference, at the end, on training images.

    Returns:
        By arm: accuracy and loss of the training forward and of inference, and over seeds the difference, training less
        inference.
    """
    by_job: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        of = measure(record)
        if is_final(record) and (of.split, of.parameters) == ("train", preset.parameters):
            by_job.setdefault(_job(record), {})[of.statistics] = record
    result: dict[str, dict[str, Any]] = {}
    for arm in preset.arms:
        pairs = {
            seed: (found["training"], found["averages"])
            for (name, seed), found in by_job.items()
            if name == arm.name and {"training", "averages"} <= found.keys()
        }
        if not pairs:
            continue
        result[arm.name] = entry = {}
        for what in ("accuracy", "loss"):
            # A loss that is not finite is None in the lines.
            known = {
                seed: (training[what], inference[what])
                for seed, (training, inference) in pairs.items()
                if training.get(what) is not None and inference.get(what) is not None
            }
            if known:
                entry[what] = {
                    "training": statistics.fmean(training for training, _ in known.values()),
                    "inference": statistics.fmean(inference for _, inference in known.values()),
                    **_spread({seed: training - inference for seed, (training, inference) in known.items()}),
                }
    return result


def cost(preset: Preset, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a training step takes, without evaluations and without waiting for data.

    Returns:
        By arm: the median over seeds of the seconds a step; ``ratio``, the median over seeds of its ratio to the
        regime's BN on the same hardware; and ``data_share``, the median share of the time that was spent waiting for
        data. None where there is none.
    """
    seconds: dict[tuple[str, int, str], float] = {}
    waited: dict[str, dict[int, float]] = {}
    for record in records:
        if is_final(record) and record.get("train_seconds") is not None:
            trained = record["train_seconds"]
            seconds[record["arm"], record["seed"], _hardware(record)] = trained / record["step"]
            if record.get("data_seconds") is not None and trained > 0:
                share = record["data_seconds"] / (record["data_seconds"] + trained)
                waited.setdefault(record["arm"], {})[record["seed"]] = share
    result: dict[str, dict[str, Any]] = {}
    for arm in preset.arms:
        ours = {job[1:]: value for job, value in seconds.items() if job[0] == arm.name}
        if ours:
            bn = {job[1:]: value for job, value in seconds.items() if job[0] == f"{arm.regime}/bn"}
            ratios = [ours[job] / bn[job] for job in ours.keys() & bn.keys() if bn[job] > 0]
            result[arm.name] = {
                "seconds_per_step": statistics.median(ours.values()),
                "ratio": statistics.median(ratios) if ratios else None,
                "data_share": statistics.median(waited[arm.name].values()) if arm.name in waited else None,
                "n": len(ours),
            }
    return result


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
