"""What the monitor says is what the layers do; and nobody who is watched behaves differently."""

from __future__ import annotations

import copy
import csv
import functools
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision_shim import allow_torchvision

import batchrenorm as brn

CLIP = brn.ClipSchedule.constant(1.2, 0.3)


def model(**options: Any) -> nn.Module:
    options = {"clip": CLIP, "momentum": 0.1, **options}
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        brn.BatchRenorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        brn.BatchRenorm2d(4, **options),
    )


def batch(step: int) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 + 1


def by_hand(layer: brn.BatchRenorm, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """r, d before clipping and the outputs' distance, of each group by itself, in float64."""
    x = x.double()
    mu, sigma = layer.running_mean.double(), layer.running_std.double()
    rs, ds, gaps = [], [], []
    for group in x.split(size):
        mu_B, sigma_B = group.mean((0, 2, 3)), (group.var((0, 2, 3), correction=0) + layer.eps).sqrt()
        r, d = sigma_B / sigma, (mu_B - mu) / sigma
        r_max, d_max = layer.clip(0)
        v = [t.view(1, -1, 1, 1) for t in (mu_B, sigma_B, r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max), mu, sigma)]
        training, inference = (group - v[0]) / v[1] * v[2] + v[3], (group - v[4]) / v[5]
        rs, ds, gaps = [*rs, r], [*ds, d], [*gaps, (training - inference).square().mean()]
    return torch.cat(rs), torch.cat(ds), torch.stack(gaps).mean().sqrt()


@pytest.mark.parametrize("size", [None, 2])
def test_the_numbers(size: int | None) -> None:
    net = model(microbatch_size=size)
    for step in range(3):
        net(batch(step))
    x = batch(9)
    inputs = []
    handle = net[4].register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone()))
    expected = []
    net[4].register_forward_pre_hook(lambda m, args: expected.append(by_hand(m, args[0].detach(), size or 6)))
    with brn.RenormMonitor(net, every=1) as monitor:
        net(x)
    handle.remove()
    r, d, gap = expected[0]
    (reading,) = monitor.readings("4")
    close = pytest.approx
    assert (reading.r_min, reading.r_max) == close((r.min().item(), r.max().item()), rel=1e-4)
    assert (reading.d_min, reading.d_max) == close((d.min().item(), d.max().item()), rel=1e-4)
    assert reading.r_median == close(r.sort().values[round(0.5 * (len(r) - 1))].item(), rel=1e-4)
    assert reading.r_clipped_low == close((r < 1 / 1.2).double().mean().item())
    assert reading.r_clipped_high == close((r > 1.2).double().mean().item())
    assert reading.d_clipped_low == close((d < -0.3).double().mean().item())
    assert reading.d_clipped_high == close((d > 0.3).double().mean().item())
    assert reading.d_clipped > 0
    assert reading.r_clipped > 0
    assert (reading.r_limit, reading.d_limit) == close((1.2, 0.3))
    assert reading.gap == close(gap.item(), rel=1e-4)
    assert math.isnan(reading.mu_drift)


def test_drift() -> None:
    net = model()
    net(batch(0))
    with brn.RenormMonitor(net, every=2) as monitor:
        mu, sigma = net[1].running_mean.clone(), net[1].running_std.clone()
        net(batch(1))
        net(batch(2))
        mu_drift = ((net[1].running_mean - mu) / sigma).square().mean().sqrt() / 2
        sigma_drift = ((net[1].running_std - sigma) / sigma).square().mean().sqrt() / 2
        net(batch(3))
    last = monitor.readings("1")[-1]
    assert (last.step, last.mu_drift, last.sigma_drift) == (
        2,
        pytest.approx(mu_drift.item(), rel=1e-4),
        pytest.approx(sigma_drift.item(), rel=1e-4),
    )


def test_nothing_changes(cpu: str) -> None:
    """Output, gradients and state are bitwise those of a net that nobody watches, on every backend; then it is left."""
    results = []
    for watched in (True, False):
        torch.manual_seed(1)
        net = model()
        monitor = brn.RenormMonitor(net, every=2) if watched else None
        for step in range(4):
            y = net(batch(step))
            y.backward(torch.randn_like(y))
        if monitor is not None:
            assert len(monitor.readings()) == 4
            # On other forwards a layer has no hook at all.
            assert not any(m._forward_pre_hooks for m in net[1:])
            monitor.close()
            assert not net._forward_pre_hooks
            assert not net._forward_hooks
            assert len(monitor.readings()) == 4
        net.eval()
        results.append([y, *(p.grad for p in net.parameters()), *net.state_dict().values(), net(batch(9))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_look_at_a_number() -> None:
    """A watched step copies nothing to the host: on meta tensors there is nothing to look at."""
    with torch.device("meta"):
        net = model()
    with brn.RenormMonitor(net, every=1) as monitor:
        for _ in range(2):
            net(torch.empty(6, 3, 8, 8, device="meta"))
        assert len(monitor._kept) == 2


def test_an_error_in_the_forward_leaves_no_hook() -> None:
    net = model()
    monitor = brn.RenormMonitor(net, every=1)
    with pytest.raises((RuntimeError, ValueError)):
        net(torch.randn(2, 5, 8, 8))
    assert not any(m._forward_pre_hooks for m in net)
    net(batch(0))
    assert [r.layer for r in monitor.readings()] == ["1", "4"]


def test_masks_and_evaluation() -> None:
    layer = brn.BatchRenorm2d(3, clip=CLIP)
    monitor = brn.RenormMonitor(layer, every=1)
    x, mask = batch(0), torch.rand(6, 8, 8) > 0.5
    layer(x, mask=mask)
    real = x.movedim(1, -1)[mask]
    assert monitor.readings()[0].d_max == pytest.approx(real.mean(0).max().item(), rel=1e-4)
    layer.eval()
    layer(x)
    assert len(monitor.readings()) == 1


def test_checkpointing_and_compile() -> None:
    net = model()
    monitor = brn.RenormMonitor(net, every=1)
    net(batch(0))
    monitor.close()

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    recomputed = Recomputed()
    monitor = brn.RenormMonitor(recomputed, every=1)
    y = recomputed(batch(0))
    y.backward(torch.randn_like(y))
    assert [r.layer for r in monitor.readings()] == ["net.1", "net.4"]

    compiled = torch.compile(model(), backend="aot_eager")
    monitor = brn.RenormMonitor(compiled, every=3)
    for step in range(5):
        compiled(batch(step))
    assert [(r.step, r.layer) for r in monitor.readings()] == [(0, "1"), (0, "4"), (3, "1"), (3, "4")]
    assert compiled._orig_mod[1].num_batches_tracked == 5


def test_selective_checkpointing() -> None:
    """What it keeps it finds by counting operators; those of a reading are none of the forward's."""
    aten = torch.ops.aten

    def policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        kept = (aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.stack.default, aten.sort.default)
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = brn.BatchRenorm1d(4, clip=brn.ClipSchedule.constant(1.2, 0.3))

        def forward(self, x: Tensor) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(lambda x: self.norm(x * 2 + 1).tanh(), x, use_reentrant=False, context_fn=contexts)

    x, dy, gradients = torch.randn(16, 4), torch.randn(16, 4), []
    for watched in (True, False):
        net, leaf = Selective(), x.clone().requires_grad_()
        monitor = brn.RenormMonitor(net, every=1) if watched else None
        net(leaf).backward(dy)
        gradients.append(leaf.grad)
        if monitor is not None:
            assert len(monitor.readings()) == 1
    assert torch.equal(*gradients)


def test_errors_are_the_layers_own() -> None:
    net = nn.Sequential(brn.BatchRenorm1d(3))
    with brn.RenormMonitor(net, every=1):
        for x in (torch.randn(4, 5), torch.randn(3), [1.0]):
            with pytest.raises((TypeError, ValueError), match=r"^expected "):
                net(x)


def test_lazy_layers_and_ensembles() -> None:
    """Neither has averages that could be read: the one not yet, the other under vmap."""
    lazy = nn.Sequential(brn.LazyBatchRenorm1d())
    with brn.RenormMonitor(lazy, every=1) as monitor:
        lazy.eval()(torch.randn(8, 3))
        lazy.train()(torch.randn(8, 3))
    assert [r.step for r in monitor.readings()] == [0]

    layers = [brn.BatchRenorm1d(3) for _ in range(2)]
    state = torch.func.stack_module_state(layers)
    x = torch.randn(8, 3)

    def member(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    expected = torch.vmap(member)(*copy.deepcopy(state))
    with brn.RenormMonitor(layers[0], every=1) as monitor:
        assert torch.equal(torch.vmap(member)(*state), expected)
    assert monitor.readings() == []


def test_no_warning_of_limits_on_their_way() -> None:
    layer = brn.BatchRenorm1d(8, clip=brn.ClipSchedule(1.3, 0.4, 1, 3, 4))
    model = nn.Sequential(layer)
    with brn.RenormMonitor(model, every=1) as monitor:
        for step in range(5):
            assert not [w for w in monitor.warnings() if w.startswith(("r clipped", "training"))], step
            model(torch.randn(16, 8) * 7)
        assert [w for w in monitor.warnings() if w.startswith("r clipped in 100% of channels of 0: raise r_max")]


def test_warnings() -> None:
    net = model()
    monitor = brn.RenormMonitor(net, every=1)
    net.eval()(batch(0))
    net.train()
    net(batch(0) + 20)
    said = monitor.warnings()
    assert any("1 was evaluated before it was trained" in w for w in said)
    assert any(w.startswith("d clipped in ") and "of channels of 1: raise d_max or momentum" in w for w in said)
    assert any("training and inference outputs of 1 are" in w for w in said)

    still = model(momentum=0.0, clip=brn.ClipSchedule())
    still[4].eval()
    monitor = brn.RenormMonitor(still, every=1)
    for step in range(2):
        still(batch(step))
    said = monitor.warnings()
    assert len(said) == 2  # in warm-up what is clipped is no news
    assert any("4 was not reached in training mode" in w for w in said)
    assert any("averages of 1 never moved" in w for w in said)

    fine = model(clip=brn.ClipSchedule.constant(), momentum=0.01)
    fine[1].momentum = fine[4].momentum = None
    for step in range(20):
        fine(batch(step))
    monitor = brn.RenormMonitor(fine, every=1)
    for step in range(20, 22):
        fine(batch(step))
    assert monitor.warnings() == []


def test_outputs(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from rich.console import Console

    net = model()
    monitor = brn.RenormMonitor(net, every=1, keep=4)
    with pytest.raises(RuntimeError, match="at least one reading"):
        monitor.plot()
    monitor.summary(Console(file=io.StringIO()))
    for step in range(6):
        net(batch(step) + 5)
    text = io.StringIO()
    monitor.summary(Console(file=text, width=150))
    assert "training forward 5" in text.getvalue()
    assert "! d clipped in" in text.getvalue()
    assert {r.step for r in monitor.readings()} == {2, 3, 4, 5}

    figure = monitor.plot(tmp_path / "renorm.png")
    assert (tmp_path / "renorm.png").stat().st_size > 10_000
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (2, 4)
    assert shown[1, 3] == pytest.approx(monitor.readings("4")[-1].d_clipped)

    monitor.to_csv(tmp_path / "renorm.csv")
    with open(tmp_path / "renorm.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert float(rows[-1]["gap"]) == monitor.readings()[-1].gap

    seen: list[tuple[int, dict[str, float]]] = []
    monitor.log(lambda step, scalars: seen.append((step, scalars)))
    monitor.log(lambda step, scalars: seen.append((step, scalars)))
    assert [step for step, _ in seen] == [2, 3, 4, 5]
    assert seen[-1][1] == monitor.scalars()
    assert seen[-1][1]["renorm/4/gap"] == monitor.readings("4")[-1].gap


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = model()
    monitor = brn.RenormMonitor(net, every=1)
    net(batch(0))
    with SummaryWriter(tmp_path) as writer:
        monitor.log(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("renorm/1/gap")[0].value == pytest.approx(monitor.readings("1")[0].gap)


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_lightning(tmp_path: Path) -> None:
    allow_torchvision()  # which a library of Lightning's imports if it is there
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.net(x).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    module = Module()
    # Lightning calls training_step, and that the net.
    monitor = brn.RenormMonitor(module.net, every=2)
    logger = CSVLogger(tmp_path)
    lightning.Trainer(
        max_steps=6, log_every_n_steps=3, logger=logger, callbacks=[monitor.lightning_callback()], accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, torch.utils.data.DataLoader([batch(i)[0] for i in range(12)], batch_size=2))  # fmt: skip
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    for reading in monitor.readings("4"):
        assert float(rows[reading.step]["renorm/4/gap"]) == pytest.approx(reading.gap)
    assert {0, 2, 4} <= rows.keys()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face(tmp_path: Path) -> None:
    allow_torchvision()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    net = Net()
    monitor = brn.RenormMonitor(net, every=2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, logging_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": batch(i)[0]} for i in range(10)]
    trainer = transformers.Trainer(net, arguments, train_dataset=data, callbacks=[monitor.trainer_callback()])
    trainer.train()
    # Its history is written before its callbacks are asked, so the logs given to them are looked at.
    logs: dict[str, float] = {}
    monitor.trainer_callback().on_log(arguments, trainer.state, trainer.control, logs=logs)
    assert logs == monitor.scalars()
    assert "renorm/net.4/gap" in logs


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="every >= 1"):
        brn.RenormMonitor(model(), every=0)
