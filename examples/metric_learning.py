"""Metric learning: every minibatch is a few labels with a few images each, so it is not i.i.d.

    python examples/metric_learning.py --norm brn
    python examples/metric_learning.py --norm bn

The net embeds scikit-learn's handwritten digits; it is trained on the digits 0 to 4 and asked about 5 to 9, which it
has never seen: is the nearest neighbour of an image the same digit (recall at 1)? Loss and miner are
pytorch-metric-learning's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchrenorm as brn


def recall_at_1(embedded: Tensor, labels: Tensor) -> float:
    """Percent of the items whose nearest other item has the same label."""
    distance = torch.cdist(embedded, embedded).fill_diagonal_(torch.inf)
    return 100 * (labels[distance.argmin(1)] == labels).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return recall at 1 on seen and on unseen digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=("bn", "brn"), default="brn")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 8 - 1, torch.as_tensor(labels)
    seen, unseen = y < 5, y >= 5

    layers: list[nn.Module] = []
    for inputs in (64, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 16))
    if options.norm == "brn":
        alpha = max(0.01, 20 / options.steps)
        brn.convert_batchnorm(model, clip=brn.ClipSchedule.for_training(options.steps), momentum=alpha)

    # 2 labels with 8 images each: the company of an image tells its label.
    sampler = brn.LabelGroupBatchSampler(y[seen], 2, 8, num_batches=options.steps, seed=options.seed)
    miner, loss_of = TripletMarginMiner(margin=0.2), TripletMarginLoss(margin=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, target in DataLoader(TensorDataset(x[seen], y[seen]), batch_sampler=sampler):
        embedded = model(batch)
        loss = loss_of(embedded, target, miner(embedded, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        found = {name: recall_at_1(model(x[rows]), y[rows]) for name, rows in (("seen", seen), ("unseen", unseen))}
    print(f"{options.norm}: recall at 1 {found['seen']:.1f} % on seen, {found['unseen']:.1f} % on unseen digits")
    return found


if __name__ == "__main__":
    main()
