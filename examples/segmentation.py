"""Segmentation at batch 1, and inference in tiles: are there seams?

    python examples/segmentation.py --norm brn
    python examples/segmentation.py --norm bn

A small convolutional net is trained on crops of scikit-learn's two photographs, one at a time. There are no drawn
masks for them, so the labels come from a rule: a pixel is foreground if it is redder than green, which the net has to
find out. Then a whole photograph is predicted in tiles, with a margin of the net's receptive field, and compared with
the prediction in one piece. By averages a pixel does not know of tiles. With the statistics of each tile, the
work-around where a batch norm's averages are bad, it does: see Buglakova et al. (ICCV 2025,
https://arxiv.org/abs/2503.19545).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import batchrenorm as brn

MARGIN = 4  # on each side: a pixel sees 9 x 9, through four convolutions of 3 x 3


def photographs() -> tuple[Tensor, Tensor]:
    """(2, 3, 427, 640) float32 and (2, 427, 640) labels 0, 1."""
    x = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 127.5 - 1
    return x, (x[:, 0] > x[:, 1]).long()


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (3, 16, 16, 16):
        # Without padding, so that a tile with its margin is all that a pixel looks at.
        layers += [nn.Conv2d(inputs, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 2, 1))


def predict(model: nn.Module, image: Tensor, tile: int | None) -> Tensor:
    """(2, H, W) logits of one image, in one piece or in tiles."""
    padded = F.pad(image[None], (MARGIN,) * 4, mode="reflect")
    if tile is None:
        return model(padded)[0]
    rows, side = [], tile + 2 * MARGIN
    for top in range(0, image.shape[1], tile):
        columns = range(0, image.shape[2], tile)
        rows.append(torch.cat([model(padded[..., top : top + side, left : left + side])[0] for left in columns], -1))
    return torch.cat(rows, -2)


def seam(logits: Tensor, tile: int) -> float:
    """How much more the foreground's score jumps across the tiles' borders than across the columns beside them."""
    score = logits[1] - logits[0]
    jumps = (score[:, 1:] - score[:, :-1]).abs().mean(0)
    borders = torch.arange(tile, score.shape[1], tile) - 1
    return (jumps[borders].mean() / jumps[torch.cat([borders - 2, borders + 2])].mean()).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return accuracy and the difference that tiles make, by averages and by each tile's statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=("bn", "brn"), default="brn")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--crop", type=int, default=72)
    parser.add_argument("--tile", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x, y = photographs()
    model = network()
    if options.norm == "brn":
        alpha = max(0.01, 20 / options.steps)
        brn.convert_batchnorm(model, clip=brn.ClipSchedule.for_training(options.steps), momentum=alpha)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = options.crop
    for _ in range(options.steps):
        which, top, left = (int(torch.randint(end, ())) for end in (2, x.shape[2] - size, x.shape[3] - size))
        crop = x[which : which + 1, :, top : top + size, left : left + size]
        target = y[which : which + 1, top + MARGIN : top + size - MARGIN, left + MARGIN : left + size - MARGIN]
        loss = F.cross_entropy(model(crop), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found: dict[str, float] = {}
    with torch.no_grad():
        model.eval()
        whole, tiled = predict(model, x[0], None), predict(model, x[0], options.tile)
        found["accuracy"] = 100 * (whole.argmax(0) == y[0]).float().mean().item()
        found["difference"] = (whole - tiled).abs().max().item()
        found["seam"] = seam(tiled, options.tile)
        brn.to_batchnorm(model).train()  # the statistics of each tile, whatever the averages
        tiled = predict(model, x[0], options.tile)
        found["difference, tiles' statistics"] = (predict(model, x[0], None) - tiled).abs().max().item()
        found["seam, tiles' statistics"] = seam(tiled, options.tile)
    print(f"{options.norm}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
