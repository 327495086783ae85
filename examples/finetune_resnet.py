"""Fine-tune a ResNet-18 at batch 2, with batch norm, frozen batch norm or Batch Renormalization.

    python examples/finetune_resnet.py --norm brn --weights resnet18.pth
    python examples/finetune_resnet.py --norm bn --steps 300

Data: scikit-learn's handwritten digits, enlarged to 64 pixels, so that the last maps have 2 x 2 positions: at 32
pixels they would have one, and two values per channel leave no gradient. Without --weights, a file as torchvision
publishes them, the net is random; then BRN needs its warm-up, and frozen batch norm makes no sense.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18

import batchrenorm as brn


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, (n, 3, size, size), with their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.as_tensor(labels)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def build(norm: str, weights: Path | None, steps: int) -> nn.Module:
    """The net with its normaliser, ready for 10 classes."""
    model = resnet18()
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.fc = nn.Linear(model.fc.in_features, 10)
    if norm == "brn":
        # Averages that are trained need no warm-up; those of a random net do.
        clip = brn.ClipSchedule.for_training(steps) if weights is None else brn.ClipSchedule.constant()
        brn.convert_batchnorm(model, clip=clip)
    return model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return the test accuracy and the loss of the last steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=("bn", "frozen", "brn"), default="brn")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--test-images", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x, y, x_test, y_test = digits(64)
    model = build(options.norm, options.weights, options.steps)
    print("pretrained" if options.weights else "random weights, no file was given")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for step in range(options.steps):
        model.train()
        if options.norm == "frozen":
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        rows = torch.randint(len(x), (options.batch_size,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {sum(losses[-200:]) / 200:.3f}")
    model.eval()
    n = options.test_images
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x_test[:n].split(100)]) == y_test[:n]
    found = {"accuracy": 100 * right.float().mean().item(), "loss": sum(losses[-50:]) / len(losses[-50:])}
    print(f"{options.norm}: {found['accuracy']:.1f} % of {n} test images")
    return found


if __name__ == "__main__":
    main()
