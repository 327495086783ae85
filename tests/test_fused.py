"""`activation` and `residual`: the ReLU and the sum in the layer's own passes, on every backend."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import oracle
import pytest
import torch
from test_exact import EPS, LAYOUTS, SHAPES, Averages, array, check, has_layout, minibatch, parameters, random_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchrenorm as brn
from batchrenorm.convert import BatchNormAct, FusedReLU

EPILOGUES = [("relu", False), (None, True), ("relu", True)]
OPEN = {"r_max": 1.5, "d_max": 0.7}


def residual_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(x.dtype)


def fused(
    x: Tensor, dy: Tensor, activation: str | None, residual: Tensor | None, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """One step of all of it; results by the letters of the paper, and `dresidual`."""
    averages = Averages(x.shape[1], dtype)
    weight, bias = parameters(x.shape[1], dtype)
    leaves = {"dx": x, "dgamma": weight, "dbeta": bias} | ({} if residual is None else {"dresidual": residual})
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = brn.batch_renorm(
        leaves["dx"],
        averages.mean,
        averages.var,
        leaves["dgamma"],
        leaves["dbeta"],
        training=True,
        momentum=0.3,
        eps=EPS,
        activation=activation,
        residual=leaves.get("dresidual"),
        **OPEN,
        **options,
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y, **dict(zip(leaves, gradients)), "mu": averages.mean, "sigma": (averages.var + EPS).sqrt()}


def verify(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: str | None,
    residual: bool,
    layout: str = "contiguous",
    other: str = "contiguous",
    microbatch_size: int | None = None,
    masked: bool = False,
    **options: Any,
) -> None:
    """Against the oracle's step, with the ReLU and the sum around it in NumPy."""
    x, dy = minibatch(shape, 6, dtype)
    weight, bias = parameters(shape[1], dtype)
    averages = Averages(shape[1], dtype)
    mask = random_mask(shape, 6) if masked else None
    x, dy = LAYOUTS[layout](x), LAYOUTS[other](dy)
    truth = oracle.train(
        array(x), averages.mu, averages.sigma, array(weight), array(bias), alpha=0.3, microbatch=microbatch_size,
        mask=None if mask is None else mask.numpy(), **OPEN,
    )  # fmt: skip
    addend = LAYOUTS[other](residual_like(x)) if residual else None
    z = truth.y if addend is None else truth.y + array(addend)
    open_ = z > 0
    if activation is not None:
        # Where z is 0 but for rounding (1e-4 of what is added up) either side of the ReLU is right: no gradient there.
        scale = oracle.terms(truth, array(dy), array(bias))["y"] + (0 if addend is None else 4.0)
        near = abs(z) < 1e-4 * scale.reshape(1, -1, *[1] * (len(shape) - 2))
        near = near.any(1, keepdims=True) if other == "expanded" else near
        dy = LAYOUTS[other](torch.where(torch.from_numpy(near), 0, dy))
    dz = array(dy) * open_ if activation is not None else array(dy)
    results = fused(
        x,
        dy,
        activation,
        addend,
        dtype,
        microbatch_size=microbatch_size,
        mask=mask,
        **options,
    )
    dresidual = results.pop("dresidual", None)
    if dresidual is not None:
        assert torch.equal(dresidual, torch.from_numpy(dz).to(dtype))  # a copy of dy with zeros: no arithmetic
    truth.y = z * open_ if activation is not None else z
    # |residual| below 4 is among the terms of y.
    check(results, truth, dz, bias.abs() + (0 if addend is None else 4), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, activation: str | None, residual: bool, dtype: torch.dtype, backend: str) -> None:
    verify(SHAPES[shape], dtype, activation, residual, backend=backend)


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["4d", "4d_vectors", "5d"])
def test_layouts(shape: str, layout: str, activation: str | None, residual: bool, backend: str) -> None:
    """Of x, and of the residual and the cotangent."""
    if not has_layout(layout, SHAPES[shape]):
        pytest.skip("channels_last is of rank 4 and 5")
    verify(SHAPES[shape], torch.float64, activation, residual, layout, "contiguous", backend=backend)
    verify(SHAPES[shape], torch.float64, activation, residual, "contiguous", layout, backend=backend)
    verify(SHAPES[shape], torch.float32, activation, residual, layout, layout, backend=backend)


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_microbatches_and_masks(layout: str, activation: str | None, residual: bool, backend: str) -> None:
    for shape, size in (((7, 5, 3, 4), 3), ((8, 17, 9, 2), 2), ((12, 40, 1, 1), 4)):
        verify(shape, torch.float64, activation, residual, layout, layout, size, backend=backend)
    if backend == "decomposed":
        verify((7, 5, 3, 4), torch.float32, activation, residual, layout, layout, 3, masked=True, backend=backend)


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large(layout: str, activation: str | None, residual: bool) -> None:
    """Nothing patched: units joined, threads, blocks of planes and rows that end anywhere."""
    for shape in ((8, 20, 45, 51), (3, 70, 47, 33), (2, 1030, 5, 3)):
        verify(shape, torch.float32, activation, residual, layout, layout)
        verify(shape, torch.float32, activation, residual, layout, "contiguous", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (4, 35, 9, 7), (24, 19, 1, 1)])
def test_half(
    shape: tuple[int, ...], layout: str, activation: str | None, residual: bool, dtype: torch.dtype, backend: str
) -> None:
    """At most twice the error of the same in three steps, each rounded to half, against float64."""
    x, dy = (LAYOUTS[layout](t) for t in minibatch(shape, 3, dtype))
    addend = residual_like(x) if residual else None

    def three_steps(x: Tensor, dy: Tensor, addend: Tensor | None) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, addend) if t is not None]
        averages = Averages(shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32)
        y = brn.batch_renorm(
            leaves[0], averages.mean, averages.var, *parameters(shape[1], averages.mean.dtype), training=True,
            momentum=0.3, eps=EPS, backend="decomposed", **OPEN,
        )  # fmt: skip
        y = y if addend is None else y + leaves[1]
        y = y if activation is None else y.relu()
        return dict(zip(("y", "dx", "dresidual"), (y, *torch.autograd.grad(y, leaves, dy))))

    truth = three_steps(x.double(), dy.double(), None if addend is None else addend.double())
    # Where half rounds an output to 0, or across it, the gate is another: no gradient there.
    near = (truth["y"].abs() < 0.05) & (truth["y"] != 0) if activation is not None else torch.zeros_like(dy).bool()
    near |= (three_steps(x, dy, addend)["y"] > 0) != (truth["y"] > 0) if activation is not None else near
    dy = torch.where(near, 0, dy)
    truth = three_steps(x.double(), dy.double(), None if addend is None else addend.double())
    naive = three_steps(x, dy, addend)
    results = fused(x, dy, activation, addend, torch.float32, backend=backend)
    unit = torch.finfo(dtype).eps / 2
    for name in naive:
        assert results[name].dtype == dtype
        wrong = (results[name].double() - truth[name]).abs().max()
        bound = (naive[name].double() - truth[name]).abs().max()
        # One rounding of the largest value is what nobody can do without.
        assert wrong <= 2 * bound + unit * truth[name].abs().max(), name


@pytest.mark.parametrize("needed", ["dx", "dgamma", "dbeta", "dresidual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradient_of_one_input_alone(needed: str, activation: str | None, backend: str) -> None:
    x, dy = minibatch(SHAPES["4d_vectors"], 0)
    inputs = {"dx": x, "dgamma": parameters(16)[0], "dbeta": parameters(16)[1], "dresidual": residual_like(x)}

    def gradient(*names: str) -> Tensor:
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        averages = Averages(16)
        y = brn.batch_renorm(
            leaves["dx"], averages.mean, averages.var, leaves["dgamma"], leaves["dbeta"], training=True,
            residual=leaves["dresidual"], activation=activation, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(y, leaves[needed], dy)[0]

    assert torch.equal(gradient(needed), gradient(*inputs))


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_not_finite_values_are_the_relus(activation: str | None, residual: bool, backend: str) -> None:
    """NaN comes through, as through torch's ReLU, and with a NaN in its channel there is a gradient of NaN."""
    x, dy = minibatch(SHAPES["4d"], 0, torch.float32)
    x[0, 1, 0, 0] = torch.nan
    addend = residual_like(x) if residual else None
    if addend is not None:
        addend[0, 0, 0, 0], addend[1, 0, 0, 0] = torch.nan, -torch.inf
    results = fused(x, dy, activation, addend, torch.float32, backend=backend)
    assert results["y"][:, 1].isnan().all()
    assert results["dx"][:, 1].isnan().all()
    if addend is not None:
        assert results["y"][0, 0, 0, 0].isnan()
        assert results["y"][1, 0, 0, 0] == (0 if activation is not None else -torch.inf)
    assert results["mu"][1] == 0  # and the averages do not take it


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_what_is_kept_for_the_backward(activation: str | None, residual: bool, backend: str) -> None:
    """x; where the ReLU follows a sum, its output, which whatever takes it keeps anyway; no mask, no residual."""
    if backend == "decomposed":
        pytest.skip("plain operators keep what they keep; a compiler decides for them")
    x = torch.randn(16, 8, 32, 32, requires_grad=True)
    addend = torch.randn_like(x, requires_grad=True) if residual else None
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = brn.batch_renorm(
            x, torch.zeros(8), torch.ones(8), training=True, activation=activation, residual=addend, backend=backend
        )
    large = {pointer for pointer, size in kept.items() if size >= x.numel()}
    allowed = {x.data_ptr(), y.data_ptr()} if activation is not None and residual else {x.data_ptr()}
    assert large == allowed


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_second_derivative(activation: str | None, residual: bool, backend: str) -> None:
    """Of a gradient penalty, by finite differences, which would see r and d move if they were not shut."""
    x, dy = minibatch((4, 3, 3, 2), 0)
    addend = residual_like(x) if residual else None
    averages = Averages(3)

    def penalty(x: Tensor, *rest: Tensor) -> Tensor:
        y = brn.batch_renorm(
            x, averages.mean.clone(), averages.var.clone(), *parameters(3), training=True, activation=activation,
            residual=rest[0] if rest else None, backend=backend, r_max=1.0, d_max=0.0,
        )  # fmt: skip
        found = torch.autograd.grad((y * dy).sum(), [x, *rest], create_graph=True)
        return sum((g * g * dy).sum() for g in found)  # type: ignore[return-value]

    leaves = [t.requires_grad_() for t in (x, addend) if t is not None]
    assert torch.autograd.gradcheck(penalty, leaves)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    """A recomputation opens the same gates: with r and d of later averages it would open others."""

    def step(mode: bool) -> list[Tensor]:
        torch.manual_seed(0)
        mean, var = torch.randn(5), torch.rand(5) + 0.5

        def forward(x: Tensor, addend: Tensor) -> Tensor:
            return brn.batch_renorm(
                x, mean, var, training=True, momentum=0.3, activation="relu", residual=addend, backend=backend
            )

        ys, dys, leaves = [], [], []
        for number in range(2):
            x, dy = minibatch((6, 5, 4, 3), number, torch.float32)
            own = [t.requires_grad_() for t in (x, residual_like(x))]
            ys.append(checkpoint(forward, *own, use_reentrant=reentrant) if mode else forward(*own))
            dys.append(dy)
            leaves += own
        torch.autograd.backward(ys, dys)
        return [*(leaf.grad for leaf in leaves), mean, var]  # type: ignore[list-item]

    assert all(torch.equal(one, other) for one, other in zip(step(False), step(True), strict=True))


@pytest.mark.parametrize("residual", [False, True])
def test_compiled(residual: bool) -> None:
    layers = [brn.BatchRenorm2d(5, momentum=0.3, clip=brn.ClipSchedule.constant(), activation="relu") for _ in range(2)]
    compiled = torch.compile(layers[0], backend="aot_eager", fullgraph=True)
    for step in range(3):
        x, dy = minibatch((6, 5, 4, 3), step, torch.float32)
        leaves = [x, residual_like(x)] if residual else [x]
        found = []
        for layer in (compiled, layers[1]):
            own = [t.detach().requires_grad_() for t in leaves]
            y = layer(own[0], residual=own[1] if residual else None)
            found.append([y, *torch.autograd.grad(y, own, dy)])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # two programs of float32
    torch.testing.assert_close(layers[0].running_var, layers[1].running_var)


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("tracked", [True, False])
def test_inference(activation: str | None, residual: bool, tracked: bool) -> None:
    layer = brn.BatchRenorm2d(5, track_running_stats=tracked, activation=activation)
    x, _ = minibatch((6, 5, 4, 3), 0, torch.float32)
    layer(x)
    layer.eval()
    addend = residual_like(x) if residual else None
    plain = copy.deepcopy(layer)
    plain.activation = None
    expected = plain(x) if addend is None else plain(x) + addend
    assert torch.equal(layer(x, residual=addend), expected if activation is None else expected.relu())


def test_residual_of_another_type_is_taken_as_xs() -> None:
    """Under autocast the branches of a block come in different types."""
    layer = brn.BatchRenorm2d(5)
    x, dy = minibatch((6, 5, 4, 3), 0, torch.bfloat16)
    addend = torch.randn(x.shape, requires_grad=True)
    y = layer(x, residual=addend)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    assert addend.grad is not None
    assert addend.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, r"expected activation to be None or 'relu', got 'gelu'; apply"),
        ({"residual": torch.zeros(6, 5, 1, 1)}, ValueError, r"of the shape of x, \(6, 5, 4, 3\), got .*; expand"),
        ({"residual": torch.zeros(6, 5, 4, 3).long()}, TypeError, r"expected residual .* got torch.int64; convert"),
        ({"residual": 1.0}, TypeError, r"expected residual .* got float; convert"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    mean, var = torch.zeros(5), torch.ones(5)
    with pytest.raises(error, match=message):
        brn.batch_renorm(torch.randn(6, 5, 4, 3), mean, var, training=True, **options)
    assert torch.equal(mean, torch.zeros(5))
    with pytest.raises(ValueError, match="expected activation"):
        brn.BatchRenorm2d(5, activation="gelu")


# Conversion


def network(inplace: bool = False) -> nn.Sequential:
    """A pair, a pair in a pair's neighbourhood, a norm without, a ReLU that another norm shares."""
    shared = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        shared,
        nn.BatchNorm2d(4),
        shared,
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_pairs_in_a_sequential(inplace: bool) -> None:
    model = network(inplace)
    original = copy.deepcopy(model)
    keys = list(model.state_dict())
    brn.convert_batchnorm(model, clip=brn.ClipSchedule.constant(), fuse_relu=True)
    assert [m.activation for m in model.modules() if isinstance(m, brn.BatchRenorm)] == ["relu", "relu", *[None] * 3]
    assert [isinstance(m, FusedReLU) for m in (model[2], model[3][1], model[6], model[8])] == [True, True, False, False]
    assert list(model.state_dict()) == keys
    plain = brn.convert_batchnorm(copy.deepcopy(original), clip=brn.ClipSchedule.constant())
    for training in (True, False):
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
    # And back: the model that was, with new averages.
    brn.to_batchnorm(model)
    brn.to_batchnorm(plain)
    assert str(model) == str(plain)
    assert model[2].inplace is inplace
    assert torch.equal(model(x), plain(x))
    pickle.loads(pickle.dumps(model))


def test_where_says_what_is_fused() -> None:
    model = brn.convert_batchnorm(network(), fuse_relu=True, where=lambda name, _: name == "1")
    assert [type(m) for m in (model[2], model[3][1])] == [FusedReLU, nn.ReLU]
    assert type(model[3][0]) is nn.BatchNorm2d


def test_a_layer_that_was_built_with_an_activation() -> None:
    """It has no ReLU behind it that could come back: batch norm and ReLU become one module, at every place of it."""
    layer = brn.BatchRenorm2d(3, activation="relu")
    model = nn.ModuleDict({"one": nn.Sequential(layer, nn.Conv2d(3, 3, 1)), "two": layer})
    x, addend = torch.randn(2, 4, 3, 5, 5)
    layer(x)
    model.eval()
    expected = [model["one"](x), layer(x, residual=addend)]
    brn.to_batchnorm(model)
    assert model["two"] is model["one"][0]
    assert isinstance(model["two"], BatchNormAct)
    assert type(model["two"].norm) is nn.BatchNorm2d
    assert torch.equal(model["one"](x), expected[0])
    assert torch.equal(model["two"](x, residual=addend), expected[1])
    alone = brn.to_batchnorm(brn.BatchRenorm2d(3, activation="relu").eval())
    assert type(alone.norm) is nn.BatchNorm2d
    assert not alone.training
