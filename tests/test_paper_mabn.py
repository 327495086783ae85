"""MABN against its formulae, written out one value at a time in float64, over steps and with random cotangents."""

from __future__ import annotations

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchrenorm import ClipSchedule
from batchrenorm.paper.mabn import CentredConv2d, CentredLinear, Mabn
from batchrenorm.paper.normalizers import normalize

EPS = 1e-5


class Published:
    """One channel of the rule, step by step and group by group: lists and numbers."""

    def __init__(self, window: int) -> None:
        self.x2: deque[float] = deque(maxlen=window)
        self.gz: deque[float] = deque(maxlen=window)
        self.running, self.iterations = 1.0, 0

    @staticmethod
    def _fill(window: deque[float]) -> None:
        """A first step of fewer groups than a window: their mean in the place of those before."""
        mean = math.fsum(window) / len(window)
        while len(window) < (window.maxlen or 0):
            window.appendleft(mean)

    def forward(self, groups: np.ndarray) -> np.ndarray:
        """h of ``(groups, values)``."""
        self.iterations += 1
        outputs, self.kept, moments = [], [], []
        for x in groups:
            own = float((x * x).mean())
            self.x2.append(own)
            chi2 = own if self.iterations == 1 else math.fsum(self.x2) / len(self.x2)
            root = math.sqrt(chi2 + EPS)
            r = root / math.sqrt(self.running + EPS)
            r = 1.0 if self.iterations < 100 else min(max(r, 1 / 5), 5.0)
            z = x / root
            self.kept.append((z, root, r))
            moments.append(chi2)
            outputs.append(r * z)
        if self.iterations == 1:
            self._fill(self.x2)
        mean = math.fsum(moments) / len(moments)
        self.running = mean if self.iterations == 1 else 0.98 * self.running + 0.02 * mean
        return np.stack(outputs)

    def backward(self, cotangents: np.ndarray) -> np.ndarray:
        """The gradient of x from that of h."""
        found = []
        for (z, root, r), dh in zip(self.kept, cotangents, strict=True):
            g = r * dh
            own = float((g * z).mean())
            self.gz.append(own)
            mean = own if self.iterations == 1 else math.fsum(self.gz) / len(self.gz)
            found.append((g - z * mean) / root)
        if self.iterations == 1:
            self._fill(self.gz)
        return np.stack(found)


@pytest.mark.parametrize("spatial", [(), (2,), (3, 2)])
@pytest.mark.parametrize(("samples", "group", "window"), [(8, 2, 4), (8, 8, 1), (4, 4, 1), (4, 1, 4), (4, 2, 4)])
def test_mabn_is_the_published_rule(samples: int, group: int, window: int, spatial: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(samples + 10 * group + len(spatial))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer, channels = Mabn(3, microbatch_size=group, window=window).double(), 3
    with torch.no_grad():
        layer.weight.copy_(random(channels))
        layer.bias.copy_(random(channels))
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    truth = [Published(window) for _ in range(channels)]
    # r is 1 for 99 steps; far scales afterwards reach both limits.
    clipped = set()
    for step in range(115):
        scale = 50.0 if 102 <= step < 106 else 1e-3 if step >= 110 else 1.0
        x = (scale * random(samples, channels, *spatial) + 0.3 * scale).requires_grad_()
        dy = random(samples, channels, *spatial)
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
        for c in range(channels):
            h = truth[c].forward(x.detach()[:, c].reshape(samples // group, -1).numpy())
            dy_c = dy[:, c].reshape(samples // group, -1).numpy()
            dx = truth[c].backward(weight[c] * dy_c)
            clipped |= {r for _, _, r in truth[c].kept if r in (0.2, 5.0)}
            # Sums in another order: a few float64 roundings, times the cancellation in g - z mean(g z).
            expected = (weight[c] * h + bias[c], dx, (h * dy_c).sum(), dy_c.sum())
            actual = (y[:, c], gradients[0][:, c], gradients[1][c], gradients[2][c])
            for a, e in zip(actual, expected, strict=True):
                np.testing.assert_allclose(
                    a.detach().reshape(np.shape(e)).numpy(), e, rtol=1e-11, atol=1e-12 * max(1.0, np.abs(e).max())
                )
    assert clipped == {0.2, 5.0}
    running = np.array([t.running for t in truth])
    np.testing.assert_allclose(layer.running_var.numpy(), running, rtol=1e-12)
    x = random(5, channels, *spatial)
    column = (-1, *[1] * len(spatial))
    plain = x.numpy() / np.sqrt(running + EPS).reshape(column) * weight.reshape(column) + bias.reshape(column)
    np.testing.assert_allclose(layer.eval()(x).detach().numpy(), plain, rtol=1e-12, atol=1e-14)


def test_mabn_goes_on_from_its_state() -> None:
    layer = Mabn(3, microbatch_size=2, window=4)
    for _ in range(3):
        layer(torch.randn(8, 3, requires_grad=True)).backward(torch.randn(8, 3))
    other = Mabn(3, microbatch_size=2, window=4)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x, dy = torch.randn(8, 3), torch.randn(8, 3)
    found = []
    for one in (layer, other):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        found.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert layer.num_batches_tracked == 4


def test_the_weights_before_mabn_are_centred_and_no_others() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Conv2d(3, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 4, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )
    plain = copy.deepcopy(net)
    clip = ClipSchedule.constant()
    normalize(net, "mabn", alpha=0.1, clip=clip, group=2, learn_gamma=False, minibatch=8)
    assert [type(layer) for layer in (net[0][0], net[1], net[4], net[6])] == [
        CentredConv2d,
        nn.Conv2d,
        CentredLinear,
        nn.Linear,
    ]
    assert [(layer.microbatch_size, layer.window) for layer in net.modules() if isinstance(layer, Mabn)] == [(2, 4)] * 2
    x, v = torch.randn(4, 2, 4, 4), torch.randn(4, 12)
    with torch.no_grad():
        shifted = [plain[0][0].weight, plain[4].weight]
        for weight in shifted:
            weight -= weight.mean(tuple(range(1, weight.ndim)), keepdim=True)
        torch.testing.assert_close(net[0][0](x), plain[0][0](x))
        torch.testing.assert_close(net[4](v), plain[4](v))
    # Their gradients are centred by that.
    net[4](v).backward(torch.randn(4, 5))
    torch.testing.assert_close(net[4].weight.grad.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
