"""What README.md, EXPERIMENTS.md and BENCHMARKS.md say is what the committed results say, and their code runs."""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", page, re.DOTALL)
    assert found, name
    return found[1]


@pytest.mark.parametrize(
    ("name", "page"), [("digits", "README.md"), ("omniglot", "EXPERIMENTS.md"), ("fashion-mnist", "EXPERIMENTS.md")]
)
def test_tables_of_experiments(name: str, page: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'paper' is not installed")
    from batchrenorm.paper import presets, report, runs, summary

    preset = presets.PRESETS[name]
    results = runs.Results(ROOT / "results" / name / "results.jsonl")
    results.check(preset, versions=False)
    assert {record["commit"].endswith("-dirty") for record in results.records} == {False}
    found = summary.summarize(preset, results.records)
    text = report.markdown(preset, found)
    assert between((ROOT / page).read_text(encoding="utf-8"), name) == text
    assert text.count("\n") > 10
    experiments = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert between(experiments, f"{name}-predictions") == report.markdown_predictions(preset, found)


def test_tables_of_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    pytest.importorskip("matplotlib", reason="the extra 'paper' is not installed")
    import small_batch
    import small_batches

    from batchrenorm.paper import presets, runs
    from batchrenorm.paper.small_batch import CHOSEN

    for name, chosen in CHOSEN.items():
        preset = presets.PRESETS[name]
        # Learning rates are what the committed tuning says, every arm with the same candidates and seeds.
        assert small_batch.choose(preset) == chosen
        for stage in small_batch.STAGES:
            found = runs.Results(small_batch.path(name, stage)).records
            assert not any(r["commit"].endswith("-dirty") for r in found)
            assert {r["split"] for r in found} <= (
                {"train", "val", "test"} if stage in ("test", "robust") else {"train", "val"}
            )
            for r in found:  # of the settings that the preset has now
                arm = replace(preset.arm(r["arm"]), learning_rate=r["config"]["learning_rate"])
                versions = {key: r["config"][key] for key in ("torch", "batchrenorm")}
                assert preset.config(arm) | versions == r["config"]
    page = small_batches.PAGE.read_text(encoding="utf-8")
    assert small_batches.page(page) == page
    assert page.count(":begin -->") == 13
    assert page.count("| BRN |") > 10


@pytest.mark.parametrize(("peak", "lowest"), [(0.2, 0.05), (0.05, 0.025), (0.03, 0.0125), (0.012, 0.00625)])
def test_tuning_goes_down_until_the_best_is_not_the_lowest(
    peak: float, lowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'paper' is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import small_batch

    from batchrenorm.paper import presets

    preset = presets.small_batch
    preset = replace(preset, arms=preset.arms[:2])
    records: list[dict[str, object]] = []
    for arm, seed, _ in small_batch.tuning(preset, records):
        rate = arm.learning_rate
        assert rate is not None
        records.append({
            "arm": arm.name, "seed": seed, "split": "val", "statistics": "averages", "config": {"learning_rate": rate},
            "accuracy": 50 - abs(math.log(rate / peak)),
        })  # fmt: skip
        assert len(records) < 99
    for arm in preset.arms:
        assert min(small_batch.validation(records, arm)) == lowest
        best = small_batch.best_rate(records, arm)
        assert lowest < best < 2 * peak
    # Whoever leaves an arm out does not wait for ever.
    del records[: 4 * len(small_batch.TUNING_SEEDS)]
    assert sum(1 for _ in small_batch.tuning(preset, records)) < 99


def test_the_share_of_a_gap_has_the_interval_that_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fieller's interval, against its own definition and against drawn samples."""
    pytest.importorskip("matplotlib", reason="the extra 'paper' is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))
    from small_batches import share

    assert share([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]) is None
    exact = share([3.0, 4.0, 5.0], [6.0, 8.0, 10.0])
    assert exact is not None
    assert exact == pytest.approx((0.5, 0.5, 0.5))
    rng = random.Random(0)
    inside, trials = 0, 2000
    for _ in range(trials):
        common = [rng.gauss(0, 1) for _ in range(5)]
        found = share([6 + c + rng.gauss(0, 1) for c in common], [10 + c + rng.gauss(0, 1) for c in common])
        assert found is not None
        inside += found[1] <= 0.6 <= found[2]
    # 95 % of 2,000, four standard errors either way.
    assert abs(inside / trials - 0.95) < 4 * (0.95 * 0.05 / trials) ** 0.5


def test_the_committed_report_is_small_and_loads_nothing() -> None:
    page = (ROOT / "results" / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2e6
    assert "://" not in page


@pytest.mark.parametrize(("page", "headline"), [("README.md", True), ("BENCHMARKS.md", False)])
def test_tables_of_benchmarks(page: str, headline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "benchmarks", raising=False)
    from benchmarks import tables

    rows = tables.select(tables.load(sorted(tables.RESULTS.glob("*.jsonl"))))
    assert not any(row["dirty"] for row in rows)
    text = tables.tables(rows, headline=headline)
    assert between((ROOT / page).read_text(encoding="utf-8"), "benchmark") == text
    assert text.count("\n") > 10


def test_code_of_the_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = {"model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))}
    for block in blocks:
        exec(block, names)
    assert type(names["model"][1]).__name__ == "BatchRenorm2d"
    assert names["norm"](torch.randn(2, 64, 4, 4)).shape == (2, 64, 4, 4)  # type: ignore[operator]


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["reproduce", "test"]
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_links_of_the_readme_exist() -> None:
    experiments = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README + experiments) if "://" not in link]
    assert len(links) >= 6
    assert all((ROOT / link).exists() for link in links)
