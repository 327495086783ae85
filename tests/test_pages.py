"""What README.md, EXPERIMENTS.md and BENCHMARKS.md say is what the committed results say, and their code runs."""

from __future__ import annotations

import re
import sys
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
