"""Research, not part of the package: backward passes of Batch Renormalization at tiny microbatches.

The theory is in docs/theory-backward.md. Many nets at a time: every tensor has a leading dimension of nets (seeds times
learning rates), which share nothing but the calls; on one thread these are what costs.

    python scripts/backward_study.py omniglot --data DIR --arm brn --arm regress-bare --lr 0.1 0.2 --out runs.jsonl

Layout of activations: (nets, channels, samples, positions); a microbatch is a stretch of samples.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchrenorm import ClipSchedule
from batchrenorm.paper import data as paper_data
from batchrenorm.paper import models
from batchrenorm.paper.sampling import IidPlan

EPS = 1e-5


@dataclass(frozen=True)
class Arm:
    """A normaliser and its backward."""

    norm: str = "brn"  # brn, bn, mabn, layer, group
    group: int = 4  # samples normalised together
    r_max: float = 3.0
    d_max: float = 5.0
    # own: the paper. unbiased: own times N / (N - 2). sums: moving averages of g and g h. ratio: of g and g h / E h².
    # regress: the coefficients of the regression of g on 1 and h, moved by what they leave.
    backward: str = "own"
    own: float = 0.0  # share of `own` that is left in sums and regress after the ramp
    rate: float = 0.1  # of the moving sums
    warm: str = "own"  # backward during the warm-up of the limits: own, or moving from the first step
    ramp: float = 1.0  # length of the ramp of limits and share, in those of the paper
    alpha: float = 0.0  # rate of mu and sigma; 0 is the task's
    fast: int = 0  # 1: averages and sums begin as cumulative means; the first step's backward is own
    weights: str = ""  # of the preceding weights' gradients: radial, centred, input, split; joined by +


_MOVING = Arm(backward="regress")
ARMS = {
    "bn32": Arm("bn", group=32),
    "brn32": Arm(group=32),
    "bn": Arm("bn"),
    "brn": Arm(),
    "brn-tight": Arm(r_max=1.5, d_max=0.5),
    "layer": Arm("layer"),
    "group": Arm("group"),
    "mabn": Arm("mabn"),
    "unbiased": Arm(backward="unbiased"),
    "unbiased-tight": Arm(backward="unbiased", r_max=1.5, d_max=0.5),
    "pilot": Arm(backward="sums", weights="radial"),
    "pilot-tight": Arm(backward="sums", weights="radial", r_max=1.5, d_max=1.0),
    "pilot-bare": Arm(backward="sums"),
    "regress-bare": _MOVING,
    "regress": replace(_MOVING, weights="radial"),
    "regress-centred": replace(_MOVING, weights="centred+radial"),
    "regress-input": replace(_MOVING, weights="input+radial"),
    "regress-input-bare": replace(_MOVING, weights="input"),
    "split": replace(_MOVING, weights="split"),
    "regress32": replace(_MOVING, weights="centred+radial", group=32),
    "split32": replace(_MOVING, weights="split", group=32),
}


class Renorm(torch.autograd.Function):
    """h = (x - mu_B) / sigma_B * r + d over the last dimension of x (nets, channels, groups, n), and its backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer) -> Tensor:
        arm, (r_max, d_max) = layer.arm, layer.limits
        var, mu_B = torch.var_mean(x, -1, correction=0, keepdim=True)
        sigma_B = (var + EPS).sqrt()
        r = (sigma_B / layer.sigma).clamp(1 / r_max, r_max)
        d = ((mu_B - layer.mu) / layer.sigma).clamp(-d_max, d_max)
        k = r / sigma_B
        h = torch.addcmul(d - mu_B * k, x, k)
        alpha = layer.at_least(layer.alpha)
        layer.mu.lerp_(mu_B.mean(2, keepdim=True), alpha)
        layer.sigma.lerp_(sigma_B.mean(2, keepdim=True), alpha)
        ctx.save_for_backward(h, r, d, k)
        ctx.layer, ctx.share = layer, 1.0 if arm.backward in ("own", "unbiased") else layer.share
        if arm.fast and layer.step == 0:
            ctx.share = 1.0
        return h

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        h, r, d, k = ctx.saved_tensors
        layer, share = ctx.layer, ctx.share
        arm, n = layer.arm, h.shape[-1]
        moving = arm.backward in ("sums", "ratio", "regress")
        if share > 0 or layer.split:
            # x_hat = (h - d) / r, so g - mean g - x_hat mean(g x_hat) in terms of h
            gm = g.mean(-1, keepdim=True)
            gx = ((g * h).mean(-1, keepdim=True) - d * gm) / r.square()
            own = g - gm + d * gx - h * gx
            if layer.split:
                layer.of_weights = own * (k * (n / (n - 2) if n > 2 else 1.0))
        if not moving:
            return own * (k * (n / (n - 2) if arm.backward == "unbiased" else 1.0)), None
        e = g - layer.s1 - h * layer.s2
        rate = layer.at_least(arm.rate)
        if arm.backward in ("sums", "ratio"):
            layer.s1.lerp_(g.mean((2, 3), keepdim=True), rate)
            scale = h.square().mean((2, 3), keepdim=True) if arm.backward == "ratio" else 1.0
            layer.s2.lerp_((g * h).mean((2, 3), keepdim=True) / scale, rate)
        else:
            layer.s1.add_(e.mean((2, 3), keepdim=True), alpha=rate)
            power = h.square().mean((2, 3), keepdim=True).clamp_(min=1.0)
            layer.s2.add_((e * h).mean((2, 3), keepdim=True) / power, alpha=rate)
        return (e if share == 0 else torch.lerp(e, own, share)) * k, None


class Mabn(torch.autograd.Function):
    """Yan et al. 2020 as published: second moments over a minibatch's worth of groups up to the newest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer) -> Tensor:
        x2 = x.square().mean(-1, keepdim=True)
        v = x2 if layer.x2 is None else _window(layer.x2, x2)
        root = (v + EPS).sqrt()
        limit = 1.0 if layer.step < 100 else 5.0
        r = (root / layer.sigma).clamp(1 / limit, limit)
        z = x / root
        mean = v.mean(2, keepdim=True)
        layer.sigma.copy_(
            ((layer.sigma.square() - EPS).lerp(mean, 0.02) + EPS).sqrt() if layer.step else (mean + EPS).sqrt()
        )
        ctx.layer, layer.x2 = layer, x2
        ctx.save_for_backward(z, root, r)
        return z * r

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        z, root, r = ctx.saved_tensors
        g = g * r
        gz = (g * z).mean(-1, keepdim=True)
        mean = gz if ctx.layer.gz is None else _window(ctx.layer.gz, gz)
        ctx.layer.gz = gz
        return (g - z * mean) / root, None


def _window(before: Tensor, now: Tensor) -> Tensor:
    """Of each group the mean over itself and the G - 1 groups before it, in this step and the one before."""
    sums = torch.cat([before, now], 2).cumsum(2)
    groups = now.shape[2]
    return (sums[:, :, groups:] - sums[:, :, :groups]) / groups


class Project(torch.autograd.Function):
    """W a, whose weight gradient may come from inputs less their mean, or from the normaliser's own cotangent."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, a: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(W, a)
        ctx.layer = layer
        return W @ a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        W, a = ctx.saved_tensors
        layer = ctx.layer
        of_weights = g
        if layer.split:
            of_weights = layer.of_weights.view_as(g)
        if layer.input:
            mean = a.mean(-1, keepdim=True)
            a = a - (mean if layer.a_mean is None else layer.a_mean)
            layer.a_mean = mean if layer.a_mean is None else layer.a_mean.lerp(mean, 0.1)
        return of_weights @ a.mT, W.mT @ g if ctx.needs_input_grad[1] else None, None


class Layer:
    """Dense or 3x3 convolution without bias, normaliser, beta, ReLU; for all nets at a time."""

    def __init__(self, W: Tensor, arm: Arm, alpha: float, stride: int | None) -> None:
        self.arm, self.alpha, self.stride = arm, alpha, stride  # stride None: dense
        self.split, self.input = "split" in arm.weights, "input" in arm.weights
        nets, channels, _ = W.shape
        if "centred" in arm.weights:
            W = W - W.mean(-1, keepdim=True)
        self.W = W.clone().requires_grad_()
        self.beta = torch.zeros(nets, channels, 1, 1, requires_grad=True)
        self.mu, self.s1, self.s2 = (torch.zeros(nets, channels, 1, 1) for _ in range(3))
        self.sigma = torch.ones(nets, channels, 1, 1)
        self.x2: Tensor | None = None
        self.gz: Tensor | None = None
        self.a_mean: Tensor | None = None
        self.step, self.limits, self.share = 0, (1.0, 0.0), 1.0

    def at_least(self, rate: float) -> float:
        return max(rate, 1 / (self.step + 1)) if self.arm.fast else rate

    def linear(self, a: Tensor) -> Tensor:
        nets, C, B, P = a.shape
        W = self.W - self.W.mean(-1, keepdim=True) if self.arm.norm == "mabn" else self.W
        if self.stride is None:
            return Project.apply(W, a.transpose(2, 3).reshape(nets, C * P, B), self).unsqueeze(-1)
        side = math.isqrt(P)
        image = a.transpose(1, 2).reshape(nets * B, C, side, side)
        columns = F.unfold(image, 3, padding=1, stride=self.stride)  # (nets * B, 9 C, positions)
        positions = columns.shape[-1]
        columns = columns.view(nets, B, -1, positions).transpose(1, 2).reshape(nets, 9 * C, B * positions)
        return Project.apply(W, columns, self).view(nets, -1, B, positions)

    def __call__(self, a: Tensor, training: bool) -> Tensor:
        x = self.linear(a)
        nets, C, B, P = x.shape
        norm = self.arm.norm
        if norm == "layer":
            h = F.layer_norm(x.permute(0, 2, 1, 3), (C, P)).permute(0, 2, 1, 3)
        elif norm == "group":
            parts = max(g for g in range(1, 33) if C % g == 0 and (C // g >= 8 or g == 1))
            h = F.layer_norm(x.permute(0, 2, 1, 3).reshape(nets, B, parts, -1), (C // parts * P,))
            h = h.view(nets, B, C, P).permute(0, 2, 1, 3)
        elif not training:
            h = (x - self.mu) / self.sigma
        else:
            function = Mabn if norm == "mabn" else Renorm
            h = function.apply(x.reshape(nets, C, -1, self.arm.group * P), self).view_as(x)
        return F.relu(h + self.beta)

    def adjust_gradient(self) -> None:
        grad, W = self.W.grad, self.W.detach()
        if "centred" in self.arm.weights:
            grad.sub_(grad.mean(-1, keepdim=True))
        if "radial" in self.arm.weights:
            grad.addcmul_(W, -(grad * W).sum(-1, keepdim=True) / W.square().sum(-1, keepdim=True))


class Nets:
    """One net for each seed in `seeds`; equal seeds have equal weights, whatever the arm."""

    def __init__(self, task: Task, arm: Arm, seeds: list[int], shape: tuple[int, ...], classes: int) -> None:
        per_seed = {seed: task.weights(seed, shape, classes) for seed in set(seeds)}
        weights = [torch.stack(w) for w in zip(*(per_seed[seed] for seed in seeds))]
        *hidden, last = weights
        self.pooled = task.pooled
        self.layers = [Layer(W, arm, arm.alpha or task.alpha, stride) for W, stride in zip(hidden, task.strides)]
        self.last = last.clone().requires_grad_()
        self.bias = torch.zeros(len(seeds), classes, 1, requires_grad=True)
        self.parameters = [p for layer in self.layers for p in (layer.W, layer.beta)] + [self.last, self.bias]

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, training)
        x = x.mean(-1) if self.pooled else x.transpose(2, 3).flatten(1, 2)
        return self.last @ x + self.bias  # (nets, classes, samples)


@dataclass(frozen=True)
class Task:
    data: str
    size: int | None
    widths: tuple[int, ...]
    strides: tuple[int | None, ...]
    steps: int
    alpha: float
    pooled: bool = True  # the last layer sees the mean over positions

    def weights(self, seed: int, shape: tuple[int, ...], classes: int) -> list[Tensor]:
        if self.strides[0] is None:  # the weights of the experiments' own net
            net = models.build(models.Mlp(len(self.widths), self.widths[0]), shape, classes, seed)
            return [m.weight.detach() for m in net.modules() if isinstance(m, torch.nn.Linear)]
        generator = torch.Generator().manual_seed(seed)
        fans = [9 * c for c in (shape[0], *self.widths[:-1])] + [self.widths[-1] * (1 if self.pooled else 4)]
        return [
            torch.randn(out, fan, generator=generator) * math.sqrt(2 / fan)
            for out, fan in zip((*self.widths, classes), fans)
        ]


TASKS = {
    "omniglot": Task("omniglot", 15, (128,) * 4, (None,) * 4, 3000, 20 / 3000),
    # 14 -> 7 -> 4 -> 2 pixels, and four more at 2 x 2, where a microbatch of 4 has 16 values a channel
    "conv": Task("omniglot", 14, (32,) + (64,) * 6, (2, 2, 2) + (1,) * 4, 2000, 0.01, pooled=False),
    # Hardly an effect within its steps, and too hard for its steps (LOG.md).
    "conv-fashion": Task("fashion-mnist", None, (16, 32) + (48,) * 6, (2,) * 4 + (1,) * 4, 1000, 0.02),
    "conv-pooled": Task("omniglot", 14, (32, 48) + (64,) * 7, (2, 2, 2) + (1,) * 6, 3000, 20 / 3000),
}


def optimise(nets: Nets, kind: str, state: list[Any], lr: Tensor) -> None:
    """SGD, or RMSProp (decay 0.9, eps 1e-3), momentum 0.9, a learning rate for each net."""
    with torch.no_grad():
        for p, buffers in zip(nets.parameters, state):
            g, rates = p.grad, lr.view(-1, *[1] * (p.ndim - 1))
            if kind == "rmsprop":
                buffers[1].mul_(0.9).addcmul_(g, g, value=0.1)
                g = g / (buffers[1].sqrt() + 1e-3)
            buffers[0].mul_(0.9).add_(g)
            p.sub_(buffers[0] * rates)
            p.grad = None


@torch.no_grad()
def accuracy(nets: Nets, split: Any, seeds: int) -> list[float]:
    right, n = torch.zeros(seeds), len(split.y)
    for x, y in split.minibatches([range(i, min(i + 250, n)) for i in range(0, n, 250)]):
        x = x.flatten(2).transpose(0, 1).unsqueeze(0).expand(seeds, -1, -1, -1)
        right += (nets(x, False).argmax(1) == y).sum(1)
    return [round(100 * float(v) / n, 2) for v in right]


def train(
    task: Task, arm: Arm, seeds: list[int], rates: list[float], kind: str, warmup: float, data: Any, test: bool
) -> list[dict[str, Any]]:
    """One result for each seed and rate, that belong together."""
    nets, steps = Nets(task, arm, seeds, data.shape, data.classes), task.steps
    state = [[torch.zeros_like(p), torch.zeros_like(p)] for p in nets.parameters]
    ramp = [round(steps * arm.ramp * k / 130) for k in (5, 25, 40)]
    clip = ClipSchedule(arm.r_max, arm.d_max, *ramp)
    final = ClipSchedule(2.0, 0.0, *ramp)  # its r_max - 1 goes from 0 to 1 with the ramp
    plans = {seed: data.train.minibatches(IidPlan(len(data.train.y), 32, steps, seed)) for seed in set(seeds)}
    lr, norms = torch.tensor(rates), [layer.W.detach().flatten(1).norm(dim=1) for layer in nets.layers]
    smooth, curve, begun = torch.full((len(seeds),), math.log(data.classes)), [], time.perf_counter()
    for step in range(steps):
        drawn = {seed: next(plan) for seed, plan in plans.items()}
        x = torch.stack([drawn[seed][0] for seed in seeds]).flatten(3).transpose(1, 2)
        y = torch.stack([drawn[seed][1] for seed in seeds])
        for layer in nets.layers:
            layer.step = step
            layer.limits = (1.0, 0.0) if arm.norm == "bn" else clip(step)
            layer.share = arm.own if arm.warm == "moving" else 1 - (1 - arm.own) * (final(step)[0] - 1)
        losses = F.cross_entropy(nets(x, True), y, reduction="none").mean(1)
        losses.sum().backward()
        for layer in nets.layers:
            layer.adjust_gradient()
        rise = min(1.0, (step + 1) / (warmup * steps + 1))
        optimise(nets, kind, state, lr * rise * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        smooth.lerp_(losses.detach(), 0.01)
        if (step + 1) % (steps // 6) == 0:
            curve.append(accuracy(nets, data.validation, len(seeds)))
    grown = torch.stack([layer.W.detach().flatten(1).norm(dim=1) / n for layer, n in zip(nets.layers, norms)]).amax(0)
    tested = accuracy(nets, data.test, len(seeds)) if test else [None] * len(seeds)
    return [
        {
            "seed": seed,
            "lr": rates[i],
            "validation": curve[-1][i],
            "test": tested[i],
            "train_loss": round(float(smooth[i]), 4) if smooth[i].isfinite() else None,
            "diverged": not bool(smooth[i] < math.log(data.classes)),
            "weights_grew": round(float(grown[i]), 2) if grown[i].isfinite() else None,
            "curve": [c[i] for c in curve],
            "seconds": round((time.perf_counter() - begun) / len(seeds), 1),
        }
        for i, seed in enumerate(seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arm", action="append", required=True, help=f"any of {', '.join(ARMS)}; NAME,field=value,...")
    parser.add_argument("--lr", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "rmsprop"))
    parser.add_argument("--lr-warmup", type=float, default=0.0, help="fraction of the steps in which it rises")
    parser.add_argument("--test", action="store_true", help="look at the test images, once all is chosen")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task]
    if options.steps:
        task = replace(task, steps=options.steps, alpha=20 / options.steps)
    data = paper_data.load(task.data, root=options.data, size=task.size)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    pairs = [(seed, lr) for lr in options.lr for seed in seeds]
    for text in options.arm:
        name, *changes = text.split(",")
        arm = ARMS[name]
        for change in changes:
            field, value = change.split("=")
            arm = replace(arm, **{field: type(getattr(arm, field))(value)})
        found = train(
            task,
            arm,
            [s for s, _ in pairs],
            [lr for _, lr in pairs],
            options.optimizer,
            options.lr_warmup,
            data,
            options.test,
        )
        with options.out.open("a") as file:
            for result in found:
                line = {
                    "task": options.task,
                    "arm": text,
                    **asdict(arm),
                    "steps": task.steps,
                    "alpha": arm.alpha or task.alpha,
                }
                file.write(
                    json.dumps(
                        {
                            **line,
                            "optimizer": options.optimizer,
                            "lr_warmup": options.lr_warmup,
                            "commit": commit.strip(),
                            **result,
                        }
                    )
                    + "\n"
                )
        key = "test" if options.test else "validation"
        for lr in options.lr:
            mine = [r for r in found if r["lr"] == lr]
            std, mean = torch.std_mean(torch.tensor([r[key] for r in mine]), correction=min(1, len(mine) - 1))
            losses = [r["train_loss"] for r in mine][:3]
            grew = max(r["weights_grew"] or math.inf for r in mine)
            print(
                f"{options.task} {text:27} {options.optimizer} lr {lr:<6g} {key} {mean:5.1f} ± {std:4.1f} n {len(mine)}"
                f" diverged {sum(r['diverged'] for r in mine)}  loss {losses}  grew {grew:.1f}  "
                f"{mine[0]['seconds']:.1f} s a net",
                flush=True,
            )


if __name__ == "__main__":
    main()
