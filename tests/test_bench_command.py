"""`batchrenorm bench`. No test here depends on how long anything takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision_shim import allow_torchvision

from batchrenorm import BatchRenorm2d, bench, timing
from batchrenorm.paper.cli import main

pytest.importorskip("rich", reason="needs the extra: pip install 'batchrenorm[paper]'")
allow_torchvision()
FAST = ["--seconds", "1e-9", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _collects_no_garbage() -> Iterator[None]:
    """A whole collection before each timing takes longer than all the rest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])


def test_layers_of_every_rank_form_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "4,8", "2x3x5", "4,8,3,3", "2,3,2,2,2", *FAST]) == 0
    out = capsys.readouterr().out
    for shape in ("4x8", "2x3x5", "4x8x3x3", "2x3x2x2x2"):
        assert sum(line.split()[:1] == [shape] for line in out.splitlines()) == 3
    assert "bn again" in out
    assert "The same code twice differs by up to" in out
    words = ["bench", "--shape", "4,8,3,3", "--relu", "--layout", "channels_last", "--dtype", "bf16", *FAST]
    assert main(words) == 0
    assert "bf16, channels_last, cpu" in capsys.readouterr().out


def test_what_is_timed_is_the_layer_in_the_asked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    right = BatchRenorm2d.forward

    def forward(self, x):  # type: ignore[no-untyped-def]
        seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last), self.activation, self.training))
        return right(self, x)

    monkeypatch.setattr(BatchRenorm2d, "forward", forward)
    lines = list(bench.layers((4, 8, 3, 3), torch.float16, "cpu", channels_last=True, relu=True, seconds=0.0))
    assert [line.run for line in lines] == ["training", "its forward", "inference"]
    assert set(seen) == {(torch.float16, True, "relu", True), (torch.float16, True, "relu", False)}


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.norm(x), "aux": x.mean()}


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef net():\n  return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\nnothing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--input", "2,3,8,8", *FAST, "--model"]
    assert main([*words, "my_nets:net", "--dtype", "bf16", "--layout", "channels_last"]) == 0
    assert "training step" in capsys.readouterr().out
    for name, text in {
        "my_nets:other": "expected a function or class other in my_nets, got none",
        "my_nets:nothing": "expected a function or class nothing",
        "no_such_nets:net": "expected no_such_nets to be importable",
        "torch.nn:Tanh": "expected a model with batch norm, got Tanh without any",
        "builtins:dict": "expected builtins:dict to make a torch.nn.Module, got dict",
        "resnet50": "expected PACKAGE:NAME as in torchvision:resnet50, got 'resnet50'",
    }.items():
        assert main([*words, name]) in (1, 2)
        assert text in capsys.readouterr().err
    assert main(["bench", "--model", "my_nets:net", "--input", "2,5,8,8", *FAST]) == 2
    assert "expected a model that takes float inputs of shape (2, 5, 8, 8), it says:" in capsys.readouterr().err
    sys.modules.pop("my_nets")


def test_a_model_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="needs the extra: pip install 'batchrenorm[vision]'")
    words = ["bench", "--input", "2,3,32,32", *FAST, "--model"]
    assert main([*words, "torchvision:resnet18"]) == 0
    assert "torchvision:resnet18 2x3x32x32" in capsys.readouterr().out
    assert main([*words, "torchvision:resnet1"]) == 2
    assert "expected a classification model of torchvision, got 'resnet1'" in capsys.readouterr().err


def test_candidates_do_not_share_and_step_trains() -> None:
    net = _net()
    net(torch.randn(2, 3, 6, 6))
    three = bench.candidates(net)
    assert isinstance(three["renorm"][1], BatchRenorm2d)
    assert isinstance(three["norm"][1], nn.BatchNorm2d)
    before = {name: one[0].weight.clone() for name, one in three.items()}
    bench.step(three["renorm"], (2, 3, 6, 6), torch.float32, "cpu", channels_last=True)()
    assert not torch.equal(three["renorm"][0].weight, before["renorm"])
    assert torch.equal(three["norm"][0].weight, before["norm"])
    assert three["renorm"][1].num_batches_tracked == three["norm"][1].num_batches_tracked + 1


def test_outputs_may_be_several() -> None:
    line = bench.model(_Pair(), (2, 3, 4, 4), torch.float32, "cpu", seconds=0.0)
    assert line.run == "training step"
    assert line.norm.ratio == 1.0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "expected --shape or --model, one of them"),
        (["--shape", "4,8", "--model", "a:b"], "expected --shape or --model, one of them"),
        (["--model", "a:b"], "expected --model and --input together"),
        (["--shape", "4,8", "--input", "3"], "expected --model and --input together"),
        (["--model", "a:b", "--input", "2,3", "--relu"], "expected --relu with --shape"),
        (["--shape", "4,x"], "expected a shape as 32,64,56,56, got '4,x'"),
        (["--shape", "4"], "expected a shape N,C or"),
        (["--shape", "4,0"], "expected a shape N,C or"),
        (["--shape", "1,8"], "expected more than one value per channel"),
        (["--shape", "4,8", "--layout", "channels_last"], "expected a 4-d or 5-d shape for channels_last"),
        (["--shape", "4,8", "--threads", "0"], "expected --threads >= 1, got 0"),
        (["--shape", "4,8", "--seconds", "0"], "expected --seconds > 0, got 0.0"),
        (["--shape", "4,8", "--device", "nowhere"], "nowhere"),
    ],
)
def test_what_is_refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", *words]) in (1, 2)
    out, err = capsys.readouterr()
    assert err.startswith("batchrenorm: ")
    assert text in err
    assert out == ""


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--shape", "4,8", "--device", "cuda"]) == 2
    assert "expected a GPU for --device cuda" in capsys.readouterr().err


def test_the_table_shows_the_noise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = (timing.Times(2.0, 1.0, (1.0, 1.0), 9), timing.Times(2.4, 1.2, (1.1, 1.3), 9))
    line = bench.Line("4x8", "training", *times, timing.Times(1.0, 0.5, (0.4, 0.6), 9))
    monkeypatch.setattr(bench, "layers", lambda *_: iter([line]))
    assert main(["bench", "--shape", "4,8", *FAST]) == 0
    out = capsys.readouterr().out
    assert "1.20 (1.10–1.30)" in out
    assert "0.50 (0.40–0.60)" in out
    assert "differs by up to 20%" in out
