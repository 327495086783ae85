"""scripts/gpu.sh, rehearsed without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "gpu.sh", "--toy", "--out", str(out), *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_results(tmp_path: Path) -> None:
    for module in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(module, reason="needs the extra: pip install 'batchrenorm[paper]'")
    # The benchmarks want the peers of the extra 'bench'.
    peers = importlib.util.find_spec("torchrl") is not None and importlib.util.find_spec("sb3_contrib") is not None
    stages = ["facts", "tests", *(["benchmarks"] if peers else []), "experiments", "small_batches"]
    done = run(tmp_path, *stages)
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["toy"] is True
    assert facts["copy"]["GB/s read and written"] > 0
    assert "passed" in (tmp_path / "tests.log").read_text()
    assert not peers or "2x8x4x4 fp32" in (tmp_path / "benchmarks.log").read_text()
    arms = {
        json.loads(line)["arm"] for line in (tmp_path / "runs" / "smoke" / "results.jsonl").read_text().splitlines()
    }
    assert {"microbatch/brn", "noniid/brn"} <= arms
    assert (tmp_path / "stages.log").read_text().count("exit 0") == len(stages)
    # Started again, a finished stage has nothing to do.
    assert "runs are in" in run(tmp_path, "experiments").stdout


def test_a_stage_that_outlasts_its_limit_is_stopped(tmp_path: Path) -> None:
    done = run(tmp_path, "--limit", "1", "tests")
    assert done.returncode == 1
    assert "== tests: exit 124" in done.stdout


def test_unknown_stage(tmp_path: Path) -> None:
    done = run(tmp_path, "everything")
    assert done.returncode == 2
    assert "expected a stage" in done.stdout
