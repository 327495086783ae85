"""How accuracy depends on alpha and on the limits: the curves of docs/choosing.md.

python scripts/choosing.py                    # goes on where it was stopped; about 15 minutes on one core

One setting at a time is moved away from those of `batchrenorm reproduce digits`, in its two regimes in which the limits
matter: groups of 4, and non-i.i.d. groups. Only validation images are looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from batchrenorm.paper import runs
from batchrenorm.paper.experiment import Preset
from batchrenorm.paper.presets import digits

RESULTS = Path(__file__).parent.parent / "results" / "choosing" / "results.jsonl"
ARMS = ("microbatch/brn", "noniid/brn")
SEEDS = 3
ALPHAS = (0.001, 0.004, 0.04, 0.12, 0.4, 1.0)
LIMITS = ((1.0, 0.0), (1.5, 0.5), (10.0, 20.0), (3.0, 0.0), (1.0, 5.0))


def settings() -> Iterator[Preset]:
    """The settings of the preset itself, then those with another alpha, then those with other limits."""
    preset = replace(digits, arms=tuple(digits.arm(name) for name in ARMS), evaluations=5)
    yield preset
    for alpha in ALPHAS:
        yield replace(preset, alpha=alpha)
    for r_max, d_max in LIMITS:
        yield replace(preset, r_max=r_max, d_max=d_max)


def main() -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    results = runs.Results(RESULTS)
    for seed in range(SEEDS):
        for preset in settings():
            for arm in preset.arms:
                if any((r["config_hash"], r["seed"]) == (runs.config_hash(preset, arm), seed) for r in results.records):
                    continue
                with tempfile.TemporaryDirectory() as checkpoints:
                    found = runs.run_job(preset, arm, seed, runs.Place(Path(checkpoints)), lambda step, accuracy: None)
                # Looked at by the averages on validation images, at the end.
                last = [r for r in found if (r["split"], r["statistics"]) == ("val", "averages")][-1]
                results.add([last])
                config = last["config"]
                print(
                    seed, arm.name, config["alpha"], config["clip"]["r_max"], config["clip"]["d_max"], last["accuracy"]
                )


if __name__ == "__main__":
    main()
