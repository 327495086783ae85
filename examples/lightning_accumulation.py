"""Lightning with gradient accumulation: the schedule counts optimiser steps, not forwards.

    python examples/lightning_accumulation.py --accumulate 4

A step of the schedule is a training forward unless somebody says otherwise; the callback says so. Data: scikit-learn's
digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchrenorm as brn


class RenormSteps(lightning.Callback):
    """Before every forward, the schedule stands where the optimiser stands."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        brn.set_step(pl_module, trainer.global_step)


class Classifier(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 64),
            brn.BatchRenorm1d(64, clip=brn.ClipSchedule.for_training(steps), momentum=max(0.01, 20 / steps)),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return the training accuracy and the position in the schedule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the optimiser")
    parser.add_argument("--accumulate", type=int, default=4)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 8 - 1, torch.as_tensor(labels)
    model = Classifier(options.steps)
    trainer = lightning.Trainer(
        max_steps=options.steps, accumulate_grad_batches=options.accumulate, callbacks=[RenormSteps()],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, drop_last=True))
    with torch.no_grad():
        accuracy = 100 * (model.net.eval()(x).argmax(1) == y).float().mean().item()
    step = int(model.net[1].num_batches_tracked)
    print(f"{accuracy:.1f} % of the training images; the schedule stands at {step} after {options.steps} steps")
    return {"accuracy": accuracy, "step": step}


if __name__ == "__main__":
    main()
