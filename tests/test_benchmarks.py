"""The benchmark counts, refuses and reports rightly. No test here depends on how long anything takes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import getpass
import json
import math
import platform
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package is not installed; it is run from the root of the repository

from batchrenorm import ClipSchedule, bench, timing  # noqa: E402
from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import exactness, gpu, implementations, plots, tables, targets  # noqa: E402
from benchmarks import measure as measuring  # noqa: E402
from benchmarks.cases import ADD_RELU, EVAL, EVERYONE, FORWARD, PASSES, SUITES, TRAIN, Case, suite  # noqa: E402
from benchmarks.measure import measure, saved_bytes  # noqa: E402

THREE = (TRAIN, FORWARD, EVAL)
SMALL = Case("small", (8, 6, 4, 4), passes=THREE)
MICRO = Case("micro", (8, 6), implementations=("brn", "brn again", "brn 8x4", "bn 8x4 looped", "copy"))
FUSED = Case("fused", (8, 6, 4, 4), "bf16", True, ADD_RELU, PASSES)


def _rows(case: Case) -> list[dict]:
    place = cli.environment("cpu", torch.get_num_threads())
    return [place | row for row in measure(case, seconds=0.0)]


@pytest.fixture(scope="module", autouse=True)
def _collects_no_garbage() -> Iterator[None]:
    """A whole collection before each timing takes longer than all the rest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return _rows(SMALL) + _rows(MICRO) + _rows(FUSED)


def test_rows_say_what_was_measured_on_what(rows: list[dict]) -> None:
    for case in (SMALL, FUSED):
        assert {(row["pass"], row["implementation"]) for row in rows if row["group"] == case.group} == {
            (direction, name) for direction in case.passes for name in case.implementations
        }
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        assert {"date", "commit", "dirty", "code", "kind", "device", "cores", "threads", "versions"} <= row.keys()
        assert {"case", "group", "shape", "dtype", "channels_last", "fused", "nbytes", "pass", "base"} <= row.keys()
        assert row["ms"] > 0
        assert row["rounds"] > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        if row["implementation"] != "copy":
            assert row["copy_share"] > 0
            assert row["launches"] > 0
            assert row["peak"] >= 1.0  # y, or dx
            if row["pass"] in (TRAIN, EVAL):
                assert row["error_y"] < (1e-2 if row["dtype"] == "bf16" else 1e-5)
            if row["pass"] == TRAIN:
                assert row["error_dx"] < (1e-2 if row["dtype"] == "bf16" else 1e-5)
                assert row["saved"] >= 1.0  # x; and here, where x is small, vectors


def test_rows_name_no_host_and_no_path(rows: list[dict]) -> None:
    text = json.dumps(rows)
    assert str(ROOT) not in text
    assert "/" not in text
    for name in (platform.node(), getpass.getuser()):
        assert f'"{name}"' not in text


def test_suites_have_what_they_promise() -> None:
    for name in SUITES:
        cases = suite(name)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert case.implementations[1] == f"{case.implementations[0]} again"
            assert not case.channels_last or len(case.shape) > 2
    for case in suite("cpu"):
        # Beyond 32 MiB the allocator maps memory anew in each call.
        assert case.model or case.nbytes < 32 * 2**20
    assert {case.dtype for case in suite("gpu")} == {"bf16", "fp16", "fp32"}
    assert {case.model for case in suite("gpu")} == {case.model for case in suite("cpu")} != {""}
    assert {case.shape[0] for case in suite("gpu") if case.group == "resnet50"} == {2, 4, 8, 32, 256}
    with pytest.raises(ValueError, match="expected a suite, one of quick, cpu, gpu, full, got 'all'"):
        suite("all")


def test_every_name_of_every_suite_is_known() -> None:
    state = implementations.State.random(6, "cpu")
    names = {name for kind in SUITES for case in suite(kind) for name in case.implementations}
    # The others are imported where they are measured, which takes seconds.
    assert {"copy", "keras", "torchrl", "sb3"} < names
    for name in names - {"copy", "keras", "torchrl", "sb3"}:
        if name in ("sync bn", "bn cudnn off"):
            with pytest.raises(implementations.Unavailable, match="on CUDA only"):
                implementations.build(name, state, 4, torch.float32)
        else:
            assert len(implementations.build(name, state, 4, torch.float32).parameters) == 2
    with pytest.raises(ValueError, match="expected the name of an implementation, got 'bm'"):
        implementations.build("bm", state, 4, torch.float32)


def test_launches_count_the_c_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if measuring.native.LIBRARY is None:
        pytest.skip("the package was installed without a C compiler")
    brn = implementations.build("brn", implementations.State.random(6, "cpu"), 2, torch.float32)
    x = torch.randn(8, 6)
    with_calls = measuring._profile(lambda: brn.train(x, None), x.nbytes, "cpu")
    monkeypatch.setattr(measuring, "_Counted", _Deaf)
    without = measuring._profile(lambda: brn.train(x, None), x.nbytes, "cpu")
    assert with_calls["launches"] == without["launches"] + 1
    assert with_calls["peak"] >= 1.0


class _Deaf:
    calls = 0

    def __init__(self, library: object) -> None:
        self.library = library

    def __getattr__(self, name: str) -> object:
        return getattr(self.library, name)


# The gate.


def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the public name, so that this test knows nothing of the library's inside: d is clipped to 0.
    right = ClipSchedule.__call__
    monkeypatch.setattr(ClipSchedule, "__call__", lambda self, step: (right(self, step)[0], 0.0))


def test_gate_passes_for_ours() -> None:
    assert max(exactness.gate(["brn", "brn 8x4"]).values()) < 1e-5


def test_gate_refuses_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _planted(monkeypatch)
    monkeypatch.setattr(cli, "append", lambda *_: pytest.fail("recorded"))
    threads = torch.get_num_threads()
    try:
        assert cli.main(["run", "--suite", "quick", "--threads", str(threads)]) == 1
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert "refused: brn disagrees with batchrenorm.reference" in err
    assert " ms" not in out


def test_a_case_on_which_ours_is_wrong_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _planted(monkeypatch)
    with pytest.raises(exactness.Refused, match="brn is wrong in training on 'small: 8x6x4x4 fp32': error_y"):
        _rows(SMALL)


def _without_relu(monkeypatch: pytest.MonkeyPatch, name: str, where: object, **wrong: object) -> None:
    """Of that implementation one function is replaced: the fused form without its ReLU."""
    right = implementations.build

    def build(asked: str, state, ndim, dtype, fused):  # type: ignore[no-untyped-def]
        layer = right(asked, state, ndim, dtype, fused)
        return dataclasses.replace(layer, **wrong) if asked == name else layer

    monkeypatch.setattr(where, "build", build)


def test_wrong_inference_of_a_fused_form_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_relu(monkeypatch, "brn", measuring, infer=lambda x, residual: x + residual)
    with pytest.raises(exactness.Refused, match=r"brn is wrong in inference on 'fused: .*': error_y"):
        _rows(FUSED)


def test_the_gate_looks_at_fused_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    right = implementations.build

    def build(name, state, ndim, dtype, fused):  # type: ignore[no-untyped-def]
        return right(name, state, ndim, dtype, "" if fused == "relu" else fused)

    monkeypatch.setattr(exactness, "build", build)
    with pytest.raises(exactness.Refused, match=r"'gate: .* relu': "):
        exactness.gate(["brn"])


def test_of_large_x_some_channels_are_enough_and_those_are_right() -> None:
    large = Case("large", (64, 64, 56, 56))
    channels = exactness.some_channels(large, "cpu").tolist()
    assert channels[0] == 0
    assert channels[-1] == 63
    assert 5 < len(channels) < 12
    assert len(exactness.some_channels(SMALL, "cpu")) == 6
    given = exactness.inputs(FUSED, "cpu")
    state = implementations.State.random(6, "cpu")
    whole = exactness.truth(FUSED, given, state, renorm=True)
    some = exactness.truth(FUSED, given, state, True, None, torch.tensor([0, 5]))
    assert torch.equal(some.y, whole.y[:, [0, 5]])
    assert torch.equal(some.gradients[0], whole.gradients[0][:, [0, 5]])
    assert some.dy.is_contiguous(memory_format=torch.channels_last)
    inference = exactness.inference_truth(FUSED, given, state)
    assert torch.equal(exactness.inference_truth(FUSED, given, state, torch.tensor([0, 5])), inference[:, [0, 5]])


def test_no_gradient_where_rounding_decides_the_relu() -> None:
    given = exactness.inputs(FUSED, "cpu")
    state = implementations.State.random(6, "cpu")
    expected = exactness.truth(FUSED, given, state, renorm=True)
    assert 0 < (expected.dy == 0).float().mean() < 0.1
    assert (expected.y >= 0).all()


def test_peers_that_disagree_are_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name, state, ndim, dtype, fused):  # type: ignore[no-untyped-def]
        layer = implementations.build("brn", state, ndim, dtype, fused)
        return dataclasses.replace(layer, train=lambda x, residual: 2 * layer.train(x, residual))

    monkeypatch.setattr(exactness, "build", build)
    lines: list[str] = []
    assert exactness.gate(["torchrl"], say=lines.append)["torchrl"] > 0.1
    assert "torchrl disagrees" in lines[0]


def test_error_of_what_is_not_finite_is_infinite() -> None:
    assert exactness.error(torch.tensor([1.0, math.nan]), torch.ones(2, dtype=torch.float64)) == math.inf
    assert exactness.error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0], dtype=torch.float64)) == 0.25


def test_a_peer_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchrl.modules.models.batchrenorm", "sb3_contrib.common.torch_layers", "keras"):
        monkeypatch.setitem(sys.modules, module, None)
    lines: list[str] = []
    case = Case("peers", (8, 6), implementations=EVERYONE)
    found = {row["implementation"] for row in measure(case, seconds=0.0, say=lines.append)}
    assert found == {"bn", "bn again", "brn", "copy"}
    assert len(lines) == len(EVERYONE) - 4
    assert sum("not installed" in line for line in lines) == 3


# Whole training steps.

STEP = Case("steps", (2, 3, 8, 8), implementations=("bn", "bn again", "brn"), model="resnet50")


def _net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU())


def test_steps_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load", lambda name: _net())
    rows = list(measure(STEP, seconds=0.0))
    assert [row["implementation"] for row in rows] == ["bn", "bn again", "brn"]
    assert {row["pass"] for row in rows} == {"step"}
    assert all(row["error_y"] < 1e-5 and row["launches"] > 3 for row in rows)


def test_a_model_that_converts_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load", lambda name: _net())
    monkeypatch.setattr(bench, "candidates", lambda net: {"norm": net, "again": net, "renorm": _net()})
    with pytest.raises(exactness.Refused, match="the converted resnet50 differs from the original in inference"):
        list(measure(STEP, seconds=0.0))


def test_steps_without_torchvision_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> torch.nn.Module:
        raise RuntimeError("expected torchvision to be importable")

    monkeypatch.setattr(bench, "load", load)
    lines: list[str] = []
    assert list(measure(STEP, seconds=0.0, say=lines.append)) == []
    assert lines == ["  left out: expected torchvision to be importable"]


# A run that goes on.


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "gate", lambda *_: {})
    threads = torch.get_num_threads()
    words = ["run", "--seconds", "0", "--threads", str(threads), "--resume", "--results", str(tmp_path)]
    monkeypatch.setattr(cli, "suite", lambda name: [Case("a", (8, 6)), Case("b", (8, 6)), Case("c", (8, 6))])
    whole = cli.measure

    def stopped(case: Case, **more: object):  # type: ignore[no-untyped-def]
        if case.group == "c":
            raise KeyboardInterrupt
        return whole(case, **more)

    monkeypatch.setattr(cli, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    monkeypatch.setattr(cli, "measure", whole)
    (path,) = tmp_path.glob("*.jsonl")
    assert len({row["case"] for row in tables.load([path])}) == 2
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "2 cases are recorded, 1 are to be measured" in capsys.readouterr().out
    before = path.read_text()
    assert cli.main(words) == 0
    assert path.read_text() == before
    # Of other code nothing counts.
    monkeypatch.setattr(cli, "code", lambda: "other")
    assert cli.main(words) == 0
    assert len(path.read_text()) == pytest.approx(2 * len(before), rel=0.1)


def test_the_digest_follows_the_code_and_not_the_paper() -> None:
    assert cli.code() == cli.code()
    assert len(cli.code()) == 12


def test_a_case_too_large_for_the_device_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(case: Case, **more: object):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cli, "gate", lambda *_: {})
    monkeypatch.setattr(cli, "measure", measure)
    words = ["run", "--suite", "quick", "--threads", str(torch.get_num_threads()), "--results", str(tmp_path)]
    assert cli.main(words) == 0
    assert "left out: it does not fit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--only", "nothing such"]) == 1
    assert "expected --only to match a case" in capsys.readouterr().err
    assert cli.main(["run", "--suite", "gpu", "--list", "--only", "^steps"]) == 0
    assert "steps: resnet50 256x3x224x224 bf16" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert cli.main(["run", "--device", "cuda"]) == 1
        assert "expected a GPU" in capsys.readouterr().err


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

    times = timing.time_rounds(
        {"bn": call(0.010), "fast": call(0.00025), "slow": call(0.125)}, "bn", seconds=1.0, clock=timing.wall("cpu")
    )
    assert all(t == pytest.approx(0.010) for t in times["bn"])
    assert all(t == pytest.approx(0.00025) for t in times["fast"])
    assert [number for number, t in enumerate(times["slow"]) if t is not None][:3] == [0, 3, 6]
    assert len(times["bn"]) == len(times["fast"]) == len(times["slow"]) > 10


def test_garbage_collection_is_off_while_timing_and_on_after() -> None:
    seen = []
    timing.time_rounds({"bn": lambda: seen.append(gc.isenabled())}, "bn", 0.0, timing.wall("cpu"))
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
        "launches": 7,
        "peak": 2.0,
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
    assert "7; 2.00, 1.00; 1e-07, 2e-07" in text
    assert "uncommitted" not in text
    assert tables.select([_row(), old], commit="aaa") == [old]
    with pytest.raises(ValueError, match="expected a commit that was measured"):
        tables.select([old], commit="c")
    with pytest.raises(ValueError, match="measure first"):
        tables.select([])


def test_tables_of_real_rows(rows: list[dict]) -> None:
    text = tables.tables(rows)
    # One for each pass, and one for the bytes; lines of what was lost begin with the device.
    assert text.count("\n| small: ") == 4
    assert text.count("\n| fused: ") == 5
    assert "batchrenorm again" in text
    assert "batchrenorm, ms" in text  # microbatches are compared with one batch of ours
    assert "|" not in tables.tables(rows, markdown=False)


def test_each_device_has_its_own_latest_commit() -> None:
    gpu = _row(device="GPU", commit="a" * 40, date="2026-01-01T00:00:00+00:00")
    assert tables.select([_row(), gpu]) == [_row(), gpu]


def _measured(name: str, ratio: float, **changes: object) -> dict:
    shape = {"shape": [32, 64, 56, 56], "nbytes": 25690112, "dtype": "fp32", "channels_last": False}
    spread = {"ratio_quartiles": [ratio - 0.01, ratio + 0.01]}
    form = {"fused": "", "model": "", "group": "peers"}
    return _row(implementation=name, ratio=ratio) | form | shape | spread | changes


def test_many_shapes_make_a_grid() -> None:
    some = [
        _measured(name, ratio, group="resnet50", shape=[N, 64, 56, 56], channels_last=last)
        for name, ratio in (("bn", 1.0), ("brn", 0.75))
        for N in (2, 4)
        for last in (False, True)
    ]
    text = tables.tables(some)
    assert "| C, H, W         | 2    | 2 channels_last | 4    | 4 channels_last |" in text
    assert "| 64, 56, 56 fp32 | 0.75 | 0.75            | 0.75 | 0.75            |" in text


def test_targets_are_judged_by_the_worst_row() -> None:
    rows = [_measured("bn", 1.0), _measured("brn", 0.6), _measured("keras", 3.0)]
    lines = {line[1]: line[4:] for line in targets.target_table(rows)[1]}
    assert lines["fp32 NCHW ~24 MiB, fwd+bwd against nn.BatchNorm2d"] == ["0.60", "aim"]
    assert lines["times faster than Keras, fwd+bwd"] == ["5.0", "aim"]
    assert lines["times faster than torchrl, fwd+bwd"] == ["not measured", "–"]
    rows += [_measured("bn", 1.0, case="other"), _measured("brn", 0.9, case="other")]
    lines = {line[1]: line[4:] for line in targets.target_table(rows)[1]}
    assert lines["fp32 NCHW ~24 MiB, fwd+bwd against nn.BatchNorm2d"] == ["0.60 to 0.90 (2 cases)", "must"]
    # No row of a CPU answers for the GPU, nor one of another GPU for that one.
    other = [row | {"kind": "cuda", "device": "NVIDIA H100", "dtype": "bf16", "nbytes": 10**8} for row in rows]
    assert all(line[4] == "not measured" for line in targets.target_table(other)[1])


def test_targets_of_the_gpu_read_their_rows() -> None:
    place = {"kind": "cuda", "device": "NVIDIA H200", "nbytes": 10**8, "dtype": "bf16"}
    times = {"bn": 1.0, "brn": 0.5, "bn compiled": 0.8, "brn 8x4": 0.4}
    rows = [
        _measured(name, ratio, graph_ms=ratio, event_ms=ratio, event_ratio=ratio, **place | more)
        for name, ratio in times.items()
        for more in (
            *(
                {"channels_last": last, "fused": fused, "case": f"{last} {fused}"}
                for last in (0, 1)
                for fused in ("", "relu", "add+relu")
            ),
            {"dtype": "fp16", "channels_last": True, "case": "half"},
            {"nbytes": 1000, "case": "small"},
            {"model": "resnet50", "pass": "step", "case": "r"},
            {"model": "inception_v3", "pass": "step", "case": "i"},
        )
    ]
    lines = [line for line in targets.target_table(rows)[1] if line[0] == "NVIDIA H200"]
    assert [line[1] for line in lines if line[4] == "not measured"] == []
    assert {line[5] for line in lines} <= {"aim", "must", "missed"}


def test_what_is_lost_is_listed() -> None:
    rows = [_measured("bn", 1.0), _measured("brn", 1.2), _measured("bn again", 0.5), _measured("copy", 0.1)]
    assert targets.lost(rows)[1] == [["CPU", "conv", TRAIN, "bn", "0.83"]]
    close = _measured("brn", 1.01) | {"ratio_quartiles": [0.9, 1.1]}
    assert targets.lost([rows[0], close])[1] == []
    assert "Nothing else is faster." in tables.tables([rows[0], close])


def test_plots_come_from_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'batchrenorm[paper]'")
    rows = [_measured("bn", 1.0), _measured("bn again", 1.02), _measured("brn", 0.6), _measured("keras", 3.0)]
    first = plots.plot(rows, tmp_path / "a")
    assert [path.name for path in first] == ["cpu-sizes.svg", "cpu-peers.svg"]
    assert "batchrenorm" in first[1].read_text()
    for a, b in zip(first, plots.plot(rows, tmp_path / "b")):
        assert a.read_bytes() == b.read_bytes()
    changed = plots.plot([*rows[:2], _measured("brn", 0.9)], tmp_path / "c")
    assert changed[0].read_bytes() != first[0].read_bytes()


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
    assert text.count("nn.BatchNorm again") == 2  # of two groups
    readme.write_text("no markers")
    assert cli.main(["table", "--into", str(readme)]) == 1
    assert readme.read_text() == "no markers"


# What only a GPU has, with its clock and its graphs played on the CPU.


class _Graph:
    def __init__(self) -> None:
        self.calls = 0

    def replay(self) -> None:
        self.calls += 1


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = timing.time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def test_columns_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = contextlib.nullcontext()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nothing,
        "graph": lambda graph: nothing,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    lines: list[str] = []
    turns = {name: [0, 0] for name in ("bn", "bn again")}

    def count(name: str, place: int):  # type: ignore[no-untyped-def]
        def call() -> None:
            turns[name][place] += 1

        return call

    calls = {name: [count(name, 0), count(name, 1)] for name in turns}
    timed = measuring._times(calls, "bn", 0.0, "cuda", lines.append, captured=True)
    for row in timed.values():
        assert {"ms", "ratio", "event_ms", "event_ratio", "host_us", "graph_ms", "graph_ratio"} <= row.keys()
    # Buffers take turns.
    assert all(abs(first - second) <= 10 for first, second in turns.values())
    assert lines == []
    assert "graph_ms" not in measuring._times(calls, "bn", 0.0, "cuda", lines.append, captured=False)["bn"]

    def fails(graph: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    assert gpu.graphs(calls, lines.append) == {}
    assert "bn not captured as a CUDA graph: RuntimeError: operation not permitted" in lines[0]


def test_buffers_outgrow_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(L2_cache_size=60 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu.sets(10**9, "cuda") == 1
    assert gpu.sets(60 * 2**20, "cuda") == 4
    assert gpu.is_cold(60 * 2**20, "cuda")
    assert gpu.sets(1000, "cuda") == 16
    assert not gpu.is_cold(1000, "cuda")
    assert gpu.sets(10**3, "cpu") == 1
    warm = _row(cold_l2=False, event_ratio=0.9, event_ms=1.0, graph_ratio=0.8)
    assert "| conv * |" in tables.tables([warm, warm | {"implementation": "brn"}])
