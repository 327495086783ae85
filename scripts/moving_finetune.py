"""Fine-tuning in tiny microbatches: the table of LOG.md, "what fine-tuning found". About two minutes on one core.

python scripts/moving_finetune.py --out results/backward/finetune.jsonl

A net of `batchrenorm reproduce digits` is trained as batch norm on minibatches of 32, then on in microbatches, limits
open from the first step. Validation images; gamma and beta are learned.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import batchrenorm as brn
from batchrenorm.paper import data, evaluation, models
from batchrenorm.paper.presets import digits
from batchrenorm.paper.sampling import plan

STEPS = 600
SETTINGS = [(2, 8, 0.01), (2, 8, 0.05), (2, 32, 0.01), (2, 32, 0.05), (4, 8, 0.01), (4, 8, 0.05), (4, 32, 0.05)]
# By name: limits, gradient, weight of the new value in the averages.
ARMS = {
    "bn": (brn.ClipSchedule.constant(1.0, 0.0), "microbatch", 0.01),
    "brn": (brn.ClipSchedule.constant(), "microbatch", 0.01),
    "moving": (brn.ClipSchedule.constant(), "moving", 0.01),
    "brn, 0.1": (brn.ClipSchedule.constant(), "microbatch", 0.1),
    "moving, 0.1": (brn.ClipSchedule.constant(), "moving", 0.1),
}


def train(net: nn.Module, pairs: data.Data, rate: float, minibatch: int, seed: int) -> float:
    """Accuracy on validation images, percent."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    net.train()
    for x, y in pairs.train.minibatches(plan(minibatch, None, pairs.train.y, STEPS, seed)):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    return evaluation.with_averages(net, pairs.validation, range(len(pairs.validation.y))).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = data.load(digits.data)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    for seed in range(options.seeds):
        trained = models.build(digits.model, pairs.shape, pairs.classes, seed)
        before = train(trained, pairs, 0.1, 32, seed)
        for group, minibatch, rate in SETTINGS:
            found = {}
            for arm, (clip, gradient, momentum) in ARMS.items():
                net = copy.deepcopy(trained)
                brn.convert_batchnorm(net, clip=clip, microbatch_size=group, gradient=gradient, momentum=momentum)
                found[arm] = train(net, pairs, rate, minibatch, seed + 100)
            row = {"seed": seed, "group": group, "minibatch": minibatch, "learning_rate": rate, "before": before}
            print(json.dumps(row | found), flush=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | found | {"commit": commit}) + "\n")


if __name__ == "__main__":
    main()
