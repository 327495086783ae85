"""Bias and variance of the backward passes against N, layer by layer, beside theory. See docs/theory-backward.md.

A dense net is trained for a while with batch norm at 32. Then mu and sigma are set to those of 4,096 images, so that
the forward is that of inference, whatever the microbatch; the gradient of the loss of all of them is taken through
batch norm over all of them, and minibatches of 32 in groups of N estimate it:

    signal: the mean estimate along the true gradient, 1 if unbiased
    noise: E|estimate - its mean|² / |true|², of minibatches of 32
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from backward_study import ARMS, EPS, TASKS, Arm, Layer, Nets, Renorm, optimise
from torch import Tensor

from batchrenorm import batch_renorm
from batchrenorm.paper import data as paper_data
from batchrenorm.paper.sampling import IidPlan

POPULATION = 4096
UNLIMITED = (float("inf"), float("inf"))


def gradients(nets: Nets, x: Tensor, y: Tensor) -> list[Tensor]:
    F.cross_entropy(nets(x, True), y).backward()
    for layer in nets.layers:
        layer.adjust_gradient()
    found = [layer.W.grad.clone() for layer in nets.layers]
    for p in nets.parameters:
        p.grad = None
    return found


def with_arm(nets: Nets, arm: Arm, moments: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    for layer, (mu, sigma, s1, s2) in zip(nets.layers, moments):
        layer.arm, layer.split, layer.input = arm, "split" in arm.weights, "input" in arm.weights
        layer.mu, layer.sigma, layer.s1, layer.s2 = mu, sigma, s1, s2
        layer.alpha, layer.limits, layer.share = 0.0, UNLIMITED, 0.0


def check() -> None:
    """The study's own backward is the package's; the sums of the regression are functions of the paper's two sums."""
    generator = torch.Generator().manual_seed(5)
    x, g = (torch.randn(1, 6, 8, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # 8 groups of 4
    layer = Layer(torch.zeros(1, 6, 2), Arm(backward="regress", own=1.0), 0.01, None)
    for name in ("mu", "sigma", "s1", "s2"):
        setattr(layer, name, torch.rand(1, 6, 1, 1, generator=generator, dtype=torch.float64) + 0.2)
    layer.limits, layer.share = (1.5, 0.5), 1.0
    mu, sigma, s1, s2 = (v.flatten().clone() for v in (layer.mu, layer.sigma, layer.s1, layer.s2))
    x.requires_grad_()
    found = torch.autograd.grad(Renorm.apply(x, layer), x, g)[0]
    y = batch_renorm(
        x[0].permute(1, 2, 0).reshape(32, 6), mu.clone(), sigma**2 - EPS, training=True, microbatch_size=4,
        r_max=1.5, d_max=0.5, backend="decomposed",
    )  # fmt: skip
    expected = torch.autograd.grad(y, x, g[0].permute(1, 2, 0).reshape(32, 6))[0]
    torch.testing.assert_close(found, expected)
    # docs/theory-backward.md, "In the package"
    x, g, mu, sigma, s1, s2 = x.detach()[0], g[0], mu[:, None], sigma[:, None], s1[:, None], s2[:, None]
    var, mu_B = torch.var_mean(x, -1, correction=0)
    sigma_B = (var + EPS).sqrt()
    r, d = (sigma_B / sigma).clamp(1 / 1.5, 1.5), ((mu_B - mu) / sigma).clamp(-0.5, 0.5)
    A, B = g.mean(-1), (g * (x - mu_B[..., None]) / sigma_B[..., None]).mean(-1)
    h2 = r**2 * var / (var + EPS) + d**2
    e = A - s1 - d * s2
    eh = r * B + d * A - d * s1 - h2 * s2
    torch.testing.assert_close(layer.s1.view(-1), (s1 + 0.1 * e.mean(1, keepdim=True)).view(-1))
    new = s2 + 0.1 * eh.mean(1, keepdim=True) / h2.mean(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(layer.s2.view(-1), new.view(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    check()
    task = TASKS["omniglot"]
    task = replace(
        task, widths=(128,) * options.depth, strides=(None,) * options.depth, steps=options.steps, alpha=0.02
    )
    normal = torch.randn(2**20, generator=torch.Generator().manual_seed(3))
    for N in (2, 4, 8, 16, 32):
        sigma = normal.view(-1, N).std(1, correction=0).mean()
        c = math.sqrt(2 / N) * math.exp(math.lgamma(N / 2) - math.lgamma((N - 1) / 2))
        print(f"N = {N}: E h² of normal x, sigma = E sigma_B: {normal.var() / sigma**2:.3f}, theory {1 / c**2:.3f}")
    data = paper_data.load(task.data, root=options.data, size=task.size)
    nets = Nets(task, ARMS["bn32"], [0], data.shape, data.classes)
    state = [[torch.zeros_like(p)] for p in nets.parameters]
    batches = data.train.minibatches(IidPlan(len(data.train.y), 32, options.steps, 0))
    for x, y in batches:
        F.cross_entropy(nets(x.flatten(2).transpose(0, 1).unsqueeze(0), True), y.unsqueeze(0)).backward()
        optimise(nets, "sgd", state, torch.tensor([0.1]))

    x, y = next(data.train.minibatches(IidPlan(len(data.train.y), POPULATION, 1, 1)))
    x, y = x.flatten(2).transpose(0, 1).unsqueeze(0), y.unsqueeze(0)
    # Population moments, then the population's gradient and sums.
    whole = Arm("brn", group=POPULATION, backward="regress", rate=1.0)
    for layer in nets.layers:
        layer.arm, layer.alpha, layer.limits, layer.share = whole, 1.0, (1.0, 0.0), 1.0
    true = gradients(nets, x, y)
    moments = [
        (layer.mu.clone(), layer.sigma.clone(), layer.s1 * (POPULATION / 32), layer.s2 * (POPULATION / 32))
        for layer in nets.layers
    ]
    arms = {
        "own": Arm(backward="own"),
        "unbiased": Arm(backward="unbiased"),
        "moving": Arm(backward="regress", rate=0.0),
        "moving, input": Arm(backward="regress", rate=0.0, weights="input"),
        "moving, radial": Arm(backward="regress", rate=0.0, weights="radial"),
        "moving, input+radial": Arm(backward="regress", rate=0.0, weights="input+radial"),
        "moving, split": Arm(backward="regress", rate=0.0, weights="split"),
    }
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([torch.randperm(POPULATION, generator=generator)[:32] for _ in range(options.draws)])
    print(f"{'':24}" + "".join(f"layer {i + 1:<12}" for i in range(options.depth)))
    for N in (2, 4, 8, 16, 32):
        crossed = range(options.depth, 0, -1)
        print(f"N = {N}, (1 - 2/N)^crossed  " + "".join(f"{(1 - 2 / N) ** c:<18.3f}" for c in crossed))
        for name, arm in arms.items():
            if N == 2 and name == "unbiased":
                continue
            with_arm(nets, replace(arm, group=N), moments)
            sums = [torch.zeros_like(t, dtype=torch.float64) for t in true]
            squares = [0.0] * len(true)
            for rows in draws:
                for i, g in enumerate(gradients(nets, x[:, :, rows], y[:, rows])):
                    sums[i] += g
                    squares[i] += float(g.double().square().sum())
            cells = []
            for t, s, q in zip(true, sums, squares):
                t = t.double()
                power = float(t.square().sum())
                mean = s / len(draws)
                signal = float((mean * t).sum()) / power
                noise = (q / len(draws) - float(mean.square().sum())) / power
                cells.append(f"{signal:5.2f} / {noise:7.1f}   ")
            print(f"  {name:22}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
