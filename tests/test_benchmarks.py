"""The benchmark counts, refuses and reports rightly. No test here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import gc
import getpass
import json
import math
import platform
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package is not installed; it is run from the root of the repository

from batchrenorm import ClipSchedule  # noqa: E402
from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import exactness, implementations, tables, timing  # noqa: E402
from benchmarks.cases import CASES, EVAL, FORWARD, TRAIN, Case  # noqa: E402
from benchmarks.measure import measure, saved_bytes  # noqa: E402

SMALL = Case("small", (8, 6, 4, 4), implementations=("bn", "bn again", "brn", "copy"))
MICRO = Case("micro", (8, 6), passes=(TRAIN,), implementations=("brn", "brn again", "brn 8x4", "bn 8x4 looped", "copy"))


def _rows(case: Case) -> list[dict]:
    place = cli.environment("cpu", torch.get_num_threads())
    return [place | row for row in measure(case, seconds=0.0)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return _rows(SMALL) + _rows(MICRO)


def test_rows_say_what_was_measured_on_what(rows: list[dict]) -> None:
    small = [row for row in rows if row["case"] == "small"]
    assert {(row["pass"], row["implementation"]) for row in small} == {
        (direction, name) for direction in (TRAIN, FORWARD, EVAL) for name in SMALL.implementations
    }
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        assert {"date", "commit", "dirty", "device", "cores", "threads", "versions"} <= row.keys()
        assert {"case", "shape", "dtype", "channels_last", "pass", "implementation", "base", "rounds"} <= row.keys()
        assert row["ms"] > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        if row["implementation"] != "copy":
            assert row["copy_share"] > 0
            assert row["error_y"] < 1e-5
            if row["pass"] != EVAL:
                assert row["error_dx"] < 1e-5
                assert row["saved"] >= 1.0  # x; and here, where x is small, vectors


def test_rows_name_no_host_and_no_path(rows: list[dict]) -> None:
    text = json.dumps(rows)
    assert str(ROOT) not in text
    assert "/" not in text
    for name in (platform.node(), getpass.getuser()):
        assert f'"{name}"' not in text


def test_all_names_of_all_cases_are_known_and_fit_the_allocator() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    known = {"bn", "brn", "keras", "torchrl", "sb3", "copy", "brn 8x4", "bn 8x4 looped", "bn compiled", "brn compiled"}
    for case in CASES:
        assert {name.removesuffix(" again") for name in case.implementations} <= known
        assert case.implementations[1] == f"{case.implementations[0]} again"
        assert case.nbytes < 32 * 2**20


# The gate.


def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the public name, so that this test knows nothing of the library's inside: d is clipped to 0.
    right = ClipSchedule.__call__
    monkeypatch.setattr(ClipSchedule, "__call__", lambda self, step: (right(self, step)[0], 0.0))


def test_gate_passes_for_ours() -> None:
    assert max(exactness.gate(["brn", "brn 8x4"]).values()) < 1e-5


def test_gate_refuses_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _planted(monkeypatch)
    monkeypatch.setattr(tables, "append", lambda *_: pytest.fail("recorded"))
    threads = torch.get_num_threads()
    try:
        assert cli.main(["run", "--quick", "--threads", str(threads)]) == 1
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert "refused: brn disagrees with batchrenorm.reference" in err
    assert " ms" not in out


def test_a_case_on_which_ours_is_wrong_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _planted(monkeypatch)
    with pytest.raises(exactness.Refused, match="brn is wrong in training on 'small': error_y"):
        _rows(SMALL)


def test_peers_that_disagree_are_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name, state, ndim, dtype):  # type: ignore[no-untyped-def]
        layer = implementations.build("brn", state, ndim, dtype)
        return dataclasses.replace(layer, train=lambda x: 2 * layer.train(x))

    monkeypatch.setattr(exactness, "build", build)
    lines: list[str] = []
    assert exactness.gate(["torchrl"], say=lines.append)["torchrl"] > 0.1
    assert "torchrl disagrees" in lines[0]


def test_error_of_what_is_not_finite_is_infinite() -> None:
    assert exactness.error(torch.tensor([1.0, math.nan]), torch.ones(2, dtype=torch.float64)) == math.inf
    assert exactness.error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0], dtype=torch.float64)) == 0.25


# Time and bytes.


def test_ratios_are_paired_within_a_round() -> None:
    # The machine slows down fivefold half-way: ratios of medians would not be 2.
    machine = [1.0, 1.0, 1.0, 5.0, 5.0]
    times = {"bn": machine, "slow": [2 * t for t in machine], "rare": [30.0, None, None, 10.0, None]}
    summary = timing.summarise(times, "bn")
    assert summary["slow"] == timing.Times(2000.0, 2.0, (2.0, 2.0), 5)
    assert summary["rare"] == timing.Times(20000.0, 16.0, (9.0, 23.0), 2)
    assert summary["bn"].ratio == 1.0


def test_every_round_times_the_base_and_the_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(seconds: float):  # type: ignore[no-untyped-def]
        def run() -> None:
            now[0] += seconds

        return run

    times = timing.time_rounds({"bn": call(0.010), "fast": call(0.00025), "slow": call(0.125)}, "bn", seconds=1.0)
    assert all(t == pytest.approx(0.010) for t in times["bn"])
    assert all(t == pytest.approx(0.00025) for t in times["fast"])
    assert [number for number, t in enumerate(times["slow"]) if t is not None][:3] == [0, 3, 6]
    assert len(times["bn"]) == len(times["fast"]) == len(times["slow"]) > 10


def test_garbage_collection_is_off_while_timing_and_on_after() -> None:
    seen = []
    timing.time_rounds({"bn": lambda: seen.append(gc.isenabled())}, "bn", seconds=0.0)
    assert not any(seen)
    assert gc.isenabled()


def test_saved_bytes_counts_a_storage_once() -> None:
    x = torch.randn(100, requires_grad=True)
    size, _ = saved_bytes(lambda: (x * x.view(100)).exp())
    assert size == 2 * 400  # x, twice, and the result of exp


# Tables.


def _row(**changes: object) -> dict:
    return {
        "date": "2026-01-02T00:00:00+00:00",
        "commit": "b" * 40,
        "dirty": False,
        "device": "CPU",
        "threads": 2,
        "versions": {"torch": "2"},
        "case": "conv",
        "pass": TRAIN,
        "implementation": "bn",
        "base": "bn",
        "ms": 10.0,
        "ratio": 1.0,
        "ratio_quartiles": [1.0, 1.0],
        "copy_share": 0.8,
        "saved": 1.0,
        "error_y": 1e-7,
        "error_dx": 2e-7,
    } | changes


def test_table_takes_the_latest_commit_and_the_last_of_repeated_rows() -> None:
    old = _row(commit="a" * 40, date="2026-01-01T00:00:00+00:00", ms=99.0)
    ours = _row(implementation="brn", ratio=1.04, ratio_quartiles=[1.01, 1.06], copy_share=0.75)
    chosen = tables.select([_row(ms=77.0), old, _row(), ours])
    assert [row["ms"] for row in chosen] == [10.0, 10.0]
    text = tables.tables(chosen)
    assert "| nn.BatchNorm, ms | batchrenorm      | share, batchrenorm |" in text
    assert "| conv | fwd+bwd | 10               | 1.04 (1.01–1.06) | 75%                |" in text
    assert "1.00; 1e-07, 2e-07" in text
    assert "uncommitted" not in text
    assert tables.select([_row(), old], commit="aaa") == [old]
    with pytest.raises(ValueError, match="expected a commit that was measured"):
        tables.select([old], commit="c")
    with pytest.raises(ValueError, match="measure first"):
        tables.select([])


def test_tables_of_real_rows(rows: list[dict]) -> None:
    text = tables.tables(rows)
    assert text.count("| small ") == 4  # three passes, and the bytes
    assert "batchrenorm again" in text
    assert "batchrenorm, ms" in text  # microbatches are compared with one batch of ours
    assert "|" not in tables.tables(rows, markdown=False)


def test_rows_survive_the_file_and_the_table_lands_between_the_markers(
    rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    tables.append(rows[:2], tmp_path / "results" / "cpu.jsonl")
    tables.append(rows[2:], tmp_path / "results" / "cpu.jsonl")
    assert tables.load([tmp_path / "results" / "cpu.jsonl"]) == rows
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    for _ in range(2):
        assert cli.main(["table", "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"above\n{tables.BEGIN}\n")
    assert text.endswith(f"|\n{tables.END}\nbelow\n")
    assert "old" not in text
    assert text.count("nn.BatchNorm again") == 1
    readme.write_text("no markers")
    assert cli.main(["table", "--into", str(readme)]) == 1
    assert readme.read_text() == "no markers"
