"""Continual learning: a stream of digits sorted by label, with a few old ones replayed.

    python examples/continual.py --norm brn
    python examples/continual.py --norm bn

scikit-learn's handwritten digits come two labels at a time, and never again but for a small memory. Minibatches are
mostly of two labels, and their statistics are not those of the test, in which all ten come. The limits are tight,
as in AR1* (Lomonaco et al., https://arxiv.org/abs/1912.01100).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import batchrenorm as brn


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Learn the stream, and return the accuracy on test images of all digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=("bn", "brn"), default="brn")
    parser.add_argument("--steps", type=int, default=150, help="for each pair of labels")
    parser.add_argument("--replayed", type=int, default=4, help="old images in a minibatch of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 8 - 1, torch.as_tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]

    layers: list[nn.Module] = []
    for inputs in (64, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    if options.norm == "brn":
        clip = brn.ClipSchedule.for_training(5 * options.steps, r_max=1.25, d_max=0.5)
        brn.convert_batchnorm(model, clip=clip, momentum=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    memory = torch.empty(0, dtype=torch.long)
    for first in range(0, 10, 2):
        task = train[(y[train] == first) | (y[train] == first + 1)]
        for _ in range(options.steps):
            old = options.replayed if len(memory) else 0
            rows = task[torch.randint(len(task), (16 - old,))]
            if old:
                rows = torch.cat([rows, memory[torch.randint(len(memory), (old,))]])
            loss = F.cross_entropy(model.train()(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        memory = torch.cat([memory, task[:20]])
    with torch.no_grad():
        accuracy = 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()
    print(f"{options.norm}: {accuracy:.1f} % of the test images of all ten digits")
    return {"accuracy": accuracy}


if __name__ == "__main__":
    main()
