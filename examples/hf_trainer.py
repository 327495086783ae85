"""Hugging Face's Trainer with gradient accumulation: the schedule counts optimiser steps, not forwards.

    python examples/hf_trainer.py --accumulate 4

Data: scikit-learn's digits. Any module that returns a loss will do as a model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import batchrenorm as brn


class RenormSteps(TrainerCallback):
    """Before every forward, the schedule stands where the optimiser stands."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        brn.set_step(kwargs["model"], state.global_step)

    on_substep_end = on_step_begin


class Classifier(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        clip = brn.ClipSchedule.for_training(steps)
        self.hidden = nn.Linear(64, 64)
        self.norm = brn.BatchRenorm1d(64, clip=clip, momentum=max(0.01, 20 / steps))
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.norm(self.hidden(x)).relu())
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return the training accuracy and the position in the schedule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the optimiser")
    parser.add_argument("--accumulate", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 8 - 1, torch.as_tensor(labels)
    model = Classifier(options.steps)
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=3e-3,
            gradient_accumulation_steps=options.accumulate, dataloader_drop_last=True, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"x": image, "labels": label} for image, label in zip(x, y)]
        Trainer(model, settings, train_dataset=rows, callbacks=[RenormSteps()]).train()
    with torch.no_grad():
        accuracy = 100 * (model.eval()(x)["logits"].argmax(1) == y).float().mean().item()
    step = int(model.norm.num_batches_tracked)
    print(f"{accuracy:.1f} % of the training images; the schedule stands at {step} after {options.steps} steps")
    return {"accuracy": accuracy, "step": step}


if __name__ == "__main__":
    main()
