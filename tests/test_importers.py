"""Move in: layers and state dicts of the other implementations infer here what they infer there.

The packages themselves where they are installed. data/*.json hold what chainer, sbx (Flax) and ludvb's package, which
do not install beside a current torch, computed in environments of their own: the state, an input x, its inference y.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchrenorm as brn

DATA = Path(__file__).parent / "data"


def recorded(name: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    def arrays(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: arrays(v) for k, v in tree.items()}
        return np.asarray(tree, dtype=np.float32 if isinstance(tree, (list, float)) else np.int64)

    case = json.loads((DATA / f"{name}.json").read_text())
    return arrays(case["state"]), torch.tensor(case["x"]), torch.tensor(case["y"])


def assert_inference(
    ours: Tensor, theirs: Tensor, x: Tensor, layer: brn.BatchRenorm, sigma: Tensor | None = None
) -> None:
    """Within rounding of float32: u = 2**-24 for each of x - mu, / sigma, * gamma, + beta, and as many of the source's.

    Both sides take sigma from a stored spread: translated in float64 it is rounded once, here by u (running_var), there
    by u; x - mu is a difference, whose operands are rounded to x's and mu's size. So 16 u of all terms' absolute
    values. In training x - mu_B is divided by another sigma: sigma_B / r.
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    mu = layer.running_mean.double().view(shape)
    sigma = (layer.running_std if sigma is None else sigma).double().view(shape)
    gamma = (torch.ones_like(mu) if layer.weight is None else layer.weight.detach().double().view(shape)) / sigma
    beta = torch.zeros_like(mu) if layer.bias is None else layer.bias.detach().double().view(shape)
    terms = gamma.abs() * (x.double().abs() + mu.abs()) + beta.abs()
    assert ((ours.double() - theirs.double()).abs() <= 16 * 2**-24 * terms).all()
    assert theirs.std() > 0.1  # and not a constant


def minibatch(step: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    stretch = torch.linspace(0.05, 2.0, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(shape, generator=generator) * stretch + stretch.flip(1)


def trained(layer: nn.Module, *shape: int, steps: int = 30) -> nn.Module:
    for p in layer.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    for step in range(steps):
        layer(minibatch(step, *shape))
    return layer.eval()


def torchrl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchrl.modules.models.batchrenorm", reason="torchrl is not installed")


def sb3() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sb3_contrib.common.torch_layers", reason="sb3-contrib is not installed")


def keras() -> Any:
    # The backend is read once, at the first import of the process.
    import os

    os.environ.setdefault("KERAS_BACKEND", "torch")
    module = pytest.importorskip("keras", reason="keras is not installed")
    if module.backend.backend() != "torch":
        pytest.skip("keras runs on another backend")
    return module


def avalanche() -> Any:
    """Avalanche's class as far as a conversion sees it; the package does not import beside a torch without CUDA."""
    module = ModuleType("avalanche.models.batch_renorm")

    class BatchRenorm2D(nn.Module):
        def __init__(self, C: int) -> None:
            super().__init__()
            self.num_features, self.eps, self.momentum = C, 1e-5, torch.tensor(0.01)
            self.gamma = nn.Parameter(torch.randn(1, C, 1, 1))
            self.beta = nn.Parameter(torch.randn(1, C, 1, 1))
            self.running_avg_mean = torch.ones(1, C, 1, 1)
            self.running_avg_std = torch.zeros(1, C, 1, 1)
            self.r_max, self.d_max = 1.0, 0.0

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.running_avg_mean) / self.running_avg_std * self.gamma + self.beta

    BatchRenorm2D.__module__ = module.__name__
    module.BatchRenorm2D = BatchRenorm2D  # type: ignore[attr-defined]
    return module


def test_torchrl() -> None:
    theirs = trained(torchrl().BatchRenorm1d(5, warmup_steps=1000, eps=1e-3), 8, 5)
    x = minibatch(99, 8, 5)
    ours = brn.BatchRenorm1d(5, eps=1e-5)
    state = brn.import_state_dict(theirs.state_dict(), "torchrl", source_eps=1e-3)
    ours.load_state_dict(state, strict=True)
    assert ours.num_batches_tracked == 30
    assert_inference(ours.eval()(x), theirs(x), x, ours)

    model = nn.Sequential(nn.Linear(5, 5), copy.deepcopy(theirs).train())
    weight = model[1].weight
    assert brn.convert_renorm(model) is model
    assert type(model[1]) is brn.BatchRenorm
    assert model[1].weight is weight
    assert model[1].training
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.01)
    assert model[1].clip == brn.ClipSchedule(3.0, 5.0, 1000, 1000, 1000)
    assert_inference(model[1].eval()(x), theirs(x), x, model[1])


@pytest.mark.parametrize("affine", [True, False])
def test_sb3(affine: bool) -> None:
    theirs = trained(sb3().BatchRenorm1d(5, affine=affine, warmup_steps=10), 8, 5)
    x = minibatch(99, 8, 5)
    if affine:
        ours = brn.BatchRenorm1d(5)
        ours.load_state_dict(brn.import_state_dict(theirs.state_dict(), "sb3"), strict=True)
        assert ours.num_batches_tracked == 30
        assert_inference(ours.eval()(x), theirs(x), x, ours)
    converted = brn.convert_renorm(theirs)
    assert type(converted) is brn.BatchRenorm1d
    assert (converted.weight is not None) == affine
    assert_inference(converted(x), theirs(x), x, converted)


def test_a_critic_of_sb3_with_its_optimiser() -> None:
    """Trained there, converted, trained on here: Adam's moments stay with the parameters."""
    module = sb3()
    model = nn.Sequential(nn.Linear(4, 6), module.BatchRenorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters())

    def train(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(minibatch(step, 8, 4)).backward(torch.randn(8, 1))
            optimizer.step()

    train(range(3))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    brn.convert_renorm(model)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    weight = model[1].weight.detach().clone()
    train(range(3, 6))
    assert (model[1].weight != weight).any()
    assert optimizer.state[model[1].weight]["step"] == 6
    assert model[1].num_batches_tracked == 6


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras beside NumPy 2
@pytest.mark.parametrize("averages", ["inference", "training"])
@pytest.mark.parametrize("renorm", [True, False])
def test_keras(renorm: bool, averages: str) -> None:
    options = {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}} if renorm else {}
    layer = keras().layers.BatchNormalization(axis=1, momentum=0.8, **options)
    for step in range(20):
        layer(minibatch(step, 8, 5), training=True)
    layer.gamma.assign(np.linspace(0.5, 1.5, 5, dtype=np.float32))
    layer.beta.assign(np.linspace(-1, 1, 5, dtype=np.float32))
    x = minibatch(99, 8, 5)
    state = {v.path: keras().ops.convert_to_numpy(v) for v in layer.variables}
    if not renorm and averages == "training":
        with pytest.raises(ValueError, match="renorm_mean"):
            brn.import_state_dict(state, "keras", keras_averages=averages)
        return
    # In training sigma_B has an epsilon too: to compare it, the source's.
    eps = 1e-3 if averages == "training" else 1e-5
    ours = brn.import_state_dict(state, "keras", eps=eps, keras_averages=averages)
    prefix = next(iter(ours)).rpartition(".")[0] + "."
    new = brn.BatchRenorm1d(5, eps=eps, clip=brn.ClipSchedule.constant())
    new.load_state_dict({k.removeprefix(prefix): v for k, v in ours.items()}, strict=True)
    if averages == "inference":
        assert_inference(new.eval()(x), layer(x, training=False).detach(), x, new)
        converted = brn.convert_renorm(layer)
        assert_inference(converted.eval()(x), layer(x, training=False).detach(), x, converted)
        assert converted.clip == brn.ClipSchedule.constant(*((3.0, 5.0) if renorm else (np.inf, np.inf)))
    else:
        # The same r and d, from the averages that Keras trains by.
        sigma_B = (x.var(0, correction=0) + eps).sqrt()
        r = (sigma_B / new.running_std).clamp(1 / 3, 3)
        assert_inference(new.train()(x), layer(x, training=True).detach(), x, new, sigma_B / r)


@pytest.mark.parametrize("name", ["chainer", "ludvb"])
def test_recorded(name: str) -> None:
    state, x, y = recorded(name)
    eps = 1e-6 if name == "ludvb" else 1e-5
    ours = (brn.BatchRenorm2d if x.ndim == 4 else brn.BatchRenorm1d)(3, eps=eps)
    ours.load_state_dict(brn.import_state_dict(state, name, eps=eps), strict=True)
    assert_inference(ours.eval()(x), y, x, ours)
    assert ours.num_batches_tracked == (300 if name == "ludvb" else 0)


def test_recorded_flax() -> None:
    """A tree of a model: norms, and a dense layer between them."""
    state, x, y = recorded("sbx")
    model = nn.ModuleDict(
        {"BatchRenorm_0": brn.BatchRenorm1d(3), "Dense_0": nn.Linear(3, 4), "BatchRenorm_1": brn.BatchRenorm1d(4)}
    )
    model.load_state_dict(brn.import_state_dict(state, "sbx"), strict=True)
    model.eval()
    hidden = model["Dense_0"](model["BatchRenorm_0"](x))
    assert model["BatchRenorm_1"].num_batches_tracked == 60
    # The first norm's 16 u pass through the dense layer, as do its 3 products' roundings.
    size = (model["Dense_0"].weight.abs().sum() * hidden.abs().max() / model["BatchRenorm_1"].running_std.min()).item()
    torch.testing.assert_close(model["BatchRenorm_1"](hidden), y, rtol=0, atol=40 * 2**-24 * max(size, 1))


def test_a_constant_channel_of_ludvb_needs_a_small_epsilon() -> None:
    state, _, _ = recorded("ludvb")
    with pytest.raises(ValueError, match=r"running_std.*smaller eps"):
        brn.import_state_dict(state, "ludvb", eps=1e-1)


def test_avalanche() -> None:
    with pytest.raises(ValueError, match="gamma and beta alone"):
        brn.import_state_dict({"gamma": torch.ones(1, 3, 1, 1), "beta": torch.ones(1, 3, 1, 1)}, "avalanche")
    layer = avalanche().BatchRenorm2D(3)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ValueError, match="untrained layer"):
        brn.convert_renorm(model)
    assert model[0] is layer
    layer.running_avg_std = torch.rand(1, 3, 1, 1) + 0.1
    layer.running_avg_mean = torch.randn(1, 3, 1, 1)
    layer.r_max, layer.d_max = torch.tensor(2.0), 1.5
    brn.convert_renorm(model.eval())
    assert type(model[0]) is brn.BatchRenorm2d
    assert model[1][1] is model[0]
    assert model[0].clip == brn.ClipSchedule.constant(2.0, 1.5)
    x = minibatch(0, 4, 3, 5, 5)
    assert_inference(model[0](x), layer(x).detach(), x, model[0])


def test_ludvb_as_a_layer() -> None:
    class BatchRenorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.momentum, self.affine = 1e-3, 0.01, True
            state, _, _ = recorded("ludvb")
            self.weight, self.bias = (nn.Parameter(torch.tensor(state[k])) for k in ("weight", "bias"))
            for k in ("running_mean", "running_std", "num_batches_tracked"):
                self.register_buffer(k, torch.tensor(state[k]))

    _, x, y = recorded("ludvb")
    theirs, calls = BatchRenorm2d().eval(), []
    handle = theirs.register_forward_hook(lambda *args: calls.append("after"))
    theirs.register_forward_pre_hook(lambda layer, args, kwargs: calls.append("before"), with_kwargs=True)
    layer = brn.convert_renorm(theirs)
    assert type(layer) is brn.BatchRenorm2d
    layer(x)
    handle.remove()
    layer(x)
    assert calls == ["before", "after", "before"]
    assert layer.clip == brn.ClipSchedule()
    assert_inference(layer(x), y, x, layer)


def test_batchnorm_keeps_every_bit() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    model(torch.randn(4, 2, 3, 3))
    state = brn.import_state_dict(model.state_dict(), "batchnorm")
    ours = brn.convert_batchnorm(copy.deepcopy(model))
    ours.load_state_dict(state, strict=True)
    assert all(torch.equal(v, state[k]) and v is not state[k] for k, v in model.state_dict().items())
    del state["1.num_batches_tracked"]  # torch before 0.4.1
    assert brn.import_state_dict(state, "batchnorm")["1.num_batches_tracked"] == 0


SB3 = {"ra_mean": (3,), "ra_var": (3,), "scale": (3,), "bias": (3,), "steps": ()}


@pytest.mark.parametrize(
    ("change", "source", "words"),
    [
        ({}, "torchrl", "expected keys 'running_mean' and 'running_var'.*look like 'sb3'"),
        ({}, "pytorch", "expected source to be one of"),
        ({"ra_var": None}, "sb3", "expected key a.b.ra_var of source='sb3'"),
        ({"steps": None}, "sb3", "expected key a.b.steps"),
        ({"bias": None}, "sb3", "expected key a.b.bias"),
        ({"gamma": (3,)}, "sb3", "got key a.b.gamma"),
        ({"ra_var": (4,)}, "sb3", r"expected a.b.ra_var of shape \(3,\), got \(4,\)"),
        ({"steps": (1,)}, "sb3", r"expected a.b.steps of shape \(\), got \(1,\)"),
        ({"ra_mean": (1, 3, 1, 1)}, "sb3", "shape"),
    ],
)
def test_bad_input(change: dict[str, Any], source: str, words: str) -> None:
    shapes = {k: s for k, s in {**SB3, **change}.items() if s is not None}
    # A good layer before it: half a model is no result either.
    state = {f"{prefix}.{k}": torch.ones(s) for prefix, d in (("good", SB3), ("a.b", shapes)) for k, s in d.items()}
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match=words) as error:
        brn.import_state_dict(state, source)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in state.items())


@pytest.mark.parametrize(("source", "key"), [("torchrl", "running_var"), ("ludvb", "running_std")])
def test_a_spread_below_zero(source: str, key: str) -> None:
    state = {
        "running_mean": torch.zeros(3),
        key: torch.tensor([1.0, -1.0, 1.0]),
        "num_batches_tracked": torch.tensor(0),
    }
    with pytest.raises(ValueError, match=rf"expected {key} >= 0, got -1; it is no average of a spread"):
        brn.import_state_dict(state, source)


def test_a_model_that_mixes_kinds() -> None:
    state = {f"own.{k}": torch.ones(s) for k, s in SB3.items()}
    state |= nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    ours = brn.import_state_dict(state, "sb3", eps=1e-3)
    assert {"0.running_var", "own.running_var"} <= ours.keys()


def test_the_package_is_light() -> None:
    """torch is all it imports: counted in modules, since time depends on the machine."""
    code = (
        "import torch, sys; before = set(sys.modules); import batchrenorm; "
        "print(*(m for m in set(sys.modules) - before if not m.startswith('batchrenorm')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
