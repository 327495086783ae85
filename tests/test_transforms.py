"""torch.func, ensembles, torch.export, double backward: the decomposed backend inside other people's machinery."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import batchrenorm as brn


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6, bias=False),
        brn.BatchRenorm1d(6, momentum=0.3, clip=brn.ClipSchedule(1.5, 0.7, warmup=1, d_full=2, r_full=3)),
        nn.Tanh(),
        nn.Linear(6, 2),
    ).double()


def loss(model: nn.Module, state: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor, target: Tensor) -> Tensor:
    return ((functional_call(model, state, (x,)) - target) ** 2).mean()


def data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(9, n, generator=generator, dtype=torch.double) for n in (5, 2))  # type: ignore[return-value]


def test_func_grad_equals_autograd_and_moves_the_averages_given_to_it() -> None:
    torch.manual_seed(0)
    model = mlp()
    reference = copy.deepcopy(model)
    params = {k: v.detach().clone() for k, v in model.named_parameters()}
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, target = data(generator)
        grads = grad(lambda p, b, x=x, t=target: loss(model, (p, b), x, t))(params, buffers)
        reference.zero_grad()
        ((reference(x) - target) ** 2).mean().backward()
        for name, p in reference.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-12)
    for name, b in reference.named_buffers():
        torch.testing.assert_close(buffers[name], b, rtol=1e-10, atol=1e-12)
    assert int(model[1].num_batches_tracked) == 0  # the module's own state was not touched


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ensemble(compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    members = [mlp() for _ in range(3)]
    params, buffers = stack_module_state(members)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(members[0]).to("meta")

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return loss(skeleton, (p, b), x, t)

    gradients = vmap(grad(one), in_dims=(0, 0, None, None))
    if compiled:
        gradients = torch.compile(gradients, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, target = data(generator)
        grads = gradients(params, buffers, x, target)
        for i, member in enumerate(members):
            member.zero_grad()
            ((member(x) - target) ** 2).mean().backward()
            for name, p in member.named_parameters():
                torch.testing.assert_close(grads[name][i], p.grad, rtol=1e-10, atol=1e-12)
    for i, member in enumerate(members):
        for name, b in member.named_buffers():
            torch.testing.assert_close(buffers[name][i], b, rtol=1e-10, atol=1e-12)


def test_double_backward_of_a_gradient_penalty() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 2, dtype=torch.double, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.double), torch.rand(3, dtype=torch.double) + 0.5

    def first(backend: str) -> Tensor:
        y = brn.batch_renorm(x, mean.clone(), var.clone(), training=True, backend=backend, microbatch_size=4)
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return dx

    (got,) = torch.autograd.grad((first("decomposed") ** 2).sum(), x)

    groups = x.split(4)
    sigma = (var + 1e-5).sqrt()
    y = torch.cat([brn.reference.batch_renorm(g, mean, sigma)[0] for g in groups])
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad((dx**2).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [5, 2**15], ids=["small", "large"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_double_backward_of_atens_backend(n: int, microbatch_size: int | None) -> None:
    """Small tensors go through torch's own differentiable batch norm, large ones through a node written in Python."""
    x = torch.randn(n, 3, dtype=torch.double, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.double), torch.rand(3, dtype=torch.double) + 0.5
    weight, bias, u = torch.randn(3, 3, dtype=torch.double).requires_grad_().unbind()
    cotangent = torch.randn_like(x)
    second = []
    for backend in ("decomposed", "aten"):
        y = brn.batch_renorm(
            x, mean.clone(), var.clone(), weight, bias, training=True, backend=backend, microbatch_size=microbatch_size
        )
        # A cotangent that needs no gradient, so that only the dependence on x and weight is left.
        dx, dweight = torch.autograd.grad(y, (x, weight), cotangent, create_graph=True)
        second.append(torch.autograd.grad((dx**2).sum() + (dweight * u).sum(), (x, weight)))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(2, 6, 3, dtype=torch.double)
    mean, var = torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double)

    def f(x: Tensor) -> Tensor:
        return brn.batch_renorm(x, mean.clone(), var.clone(), training=True)

    # Against the reverse mode (<u, J v> = <J^T u, v>) and not against differences, which would see r and d move.
    u = torch.randn(6, 3, dtype=torch.double)
    _, jvp = torch.func.jvp(f, (x,), (v,))
    _, vjp = torch.func.vjp(f, x)
    torch.testing.assert_close((u * jvp).sum(), (vjp(u)[0] * v).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")  # torch's own, while it exports
def test_export_of_training_keeps_its_state(strict: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = mlp()
    reference = copy.deepcopy(model)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (torch.randn(8, 5, dtype=torch.double),), dynamic_shapes=({0: batch},), strict=strict
    )
    exported = program.module()
    for n in (7, 4, 12):
        x = torch.randn(n, 5, dtype=torch.double)
        torch.testing.assert_close(exported(x), reference(x), rtol=1e-12, atol=1e-12)
    state = exported.state_dict()
    for name, b in reference.named_buffers():
        torch.testing.assert_close(state[name], b, rtol=1e-12, atol=1e-12)
    mutated = program.run_decompositions().graph_signature.buffers_to_mutate.values()
    assert sorted(mutated) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]


def test_export_of_inference_is_one_batch_norm() -> None:
    program = torch.export.export(mlp().eval(), (torch.randn(8, 5, dtype=torch.double),))
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert operators.count(torch.ops.aten.batch_norm.default) == 1
    assert len(operators) == 4


def test_the_operator_is_well_formed() -> None:
    """Schema, fake tensors, autograd registration and dynamic shapes, by torch's own checker."""
    mu_B, sigma_B = torch.randn(2, 3), torch.rand(2, 3) + 0.5
    averages = torch.randn(3), torch.rand(3)
    limits = torch.tensor([0.1, 3.0, 5.0], dtype=torch.double)
    for step in (None, torch.tensor(3)):
        for share in (None, torch.tensor([0.5, 0.5])):
            arguments = (mu_B, sigma_B, *averages, step, share, limits, 1e-5, torch.empty(1))
            torch.library.opcheck(torch.ops.batchrenorm.correct.default, arguments)


@pytest.mark.parametrize("device", ["meta"])
def test_a_model_on_no_device_has_shapes(device: str) -> None:
    layer = brn.BatchRenorm2d(3, device=device)
    y = layer(torch.empty(2, 3, 4, 4, device=device))
    assert y.shape == (2, 3, 4, 4)
    assert y.device.type == device
