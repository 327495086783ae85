"""A forward that is run again (checkpointing, compilers) has the same r, d, gradients, and moves the averages once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchrenorm as brn

Forward = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Two layers, one with microbatches and one on its way through the schedule, and a checkpoint somewhere."""

    def __init__(self, mode: str = "none", reentrant: bool = False) -> None:
        super().__init__()
        # Momentum 0.3: at the paper's 0.01 wrong averages would hardly show.
        self.norm1 = brn.BatchRenorm1d(8, momentum=0.3, clip=brn.ClipSchedule(3.0, 5.0, warmup=1, d_full=3, r_full=5))
        self.norm2 = brn.BatchRenorm1d(8, momentum=0.3, clip=brn.ClipSchedule.constant(), microbatch_size=4)
        # No biases in front of the norms: their gradients are 0 up to rounding, which nothing can be compared with.
        self.linear1 = nn.Linear(6, 8, bias=False)
        self.linear2 = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4)
        self.mode = mode
        self.reentrant = reentrant

    def first(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm1(self.linear1(x)))

    def second(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm2(self.linear2(x)))

    def both(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def nested(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "none":
            return self.head(self.both(x))
        if self.mode == "selective":
            contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
            return self.head(checkpoint(self.both, x, use_reentrant=False, context_fn=contexts))
        body = self.nested if self.mode == "nested" else self.both
        return self.head(checkpoint(body, x, use_reentrant=self.reentrant))


def build(mode: str = "none", reentrant: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(mode, reentrant).double()


def train(net: Net, forward: Forward, order: tuple[int, ...], steps: int = 4, same_x: bool = False) -> list[Tensor]:
    """All gradients and buffers of some steps, each with several forwards before the backwards.

    These run in `order`; an empty one is one backward of all.
    """
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen: list[Tensor] = []
    for _ in range(steps):
        forwards = len(order) or 2
        xs = [
            (torch.randn(16, 6, generator=generator, dtype=torch.double) * 2 + 1).requires_grad_()
            for _ in range(forwards)
        ]
        if same_x:
            xs = [xs[0].detach().clone().requires_grad_() for _ in xs]
        cotangents = [torch.randn(16, 4, generator=generator, dtype=torch.double) for _ in xs]
        ys = [forward(x) for x in xs]
        optimizer.zero_grad()
        if not order:
            torch.autograd.backward(ys, cotangents)
        for i in order:
            ys[i].backward(cotangents[i])
        seen += [x.grad for x in xs if x.grad is not None]
        seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    return seen + [b.clone() for b in net.buffers()]


ORDERS = [(0, 1), (1, 0), (0, 1, 2), (1, 2, 0)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["plain", "nested"])
def test_checkpointing_changes_no_bit(mode: str, reentrant: bool, order: tuple[int, ...]) -> None:
    plain, checkpointed = build(), build(mode, reentrant)
    expected = train(plain, plain, order)
    for a, b in zip(expected, train(checkpointed, checkpointed, order), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [(), *ORDERS], ids=lambda order: str(order) if order else "one backward")
@pytest.mark.parametrize("mode", ["plain", "nested"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_equal_inputs_forwarded_twice_are_told_apart(mode: str, reentrant: bool, order: tuple[int, ...]) -> None:
    """As in R-Drop: one batch forwarded several times. The averages moved between the forwards."""
    plain, checkpointed = build(), build(mode, reentrant)
    expected = train(plain, plain, order, same_x=True)
    for a, b in zip(expected, train(checkpointed, checkpointed, order, same_x=True), strict=True):
        # Not bitwise: the reentrant kind adds the same gradients up in another order.
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_selective_checkpointing() -> None:
    plain, selective = build(), build("selective")
    expected = train(plain, plain, (1, 0))
    # Under a dispatch mode the decomposed backend runs instead of ATen's: the same up to rounding.
    for a, b in zip(expected, train(selective, selective, (1, 0)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def around(forward: Forward, reentrant: bool) -> Forward:
    return lambda x: checkpoint(forward, x, use_reentrant=reentrant)


def compiled_cases() -> list[object]:
    cases: list[object] = [
        pytest.param("aot_eager", mode, outside, order, id=f"aot_eager-{mode}-inside-{outside}-around-{order}")
        for mode in ("none", "plain", "nested")
        for outside in ("none", "non-reentrant", "reentrant")
        for order in ((0, 1), (1, 0))
    ]
    return cases + [
        pytest.param(
            "inductor", mode, outside, (0, 1), marks=pytest.mark.slow, id=f"inductor-{mode}-inside-{outside}-around"
        )
        for mode, outside in (("none", "none"), ("plain", "none"), ("nested", "non-reentrant"))
    ]


@pytest.mark.parametrize(("backend", "mode", "outside", "order"), compiled_cases())
def test_checkpointing_inside_and_around_compiled_parts(
    backend: str, mode: str, outside: str, order: tuple[int, ...]
) -> None:
    torch._dynamo.reset()
    plain, net = build(), build(mode)
    forward: Forward = torch.compile(net, backend=backend, fullgraph=True)
    if outside != "none":
        forward = around(forward, outside == "reentrant")
    expected = train(plain, plain, order)
    for a, b in zip(expected, train(net, forward, order), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_compiled_part_inside_a_checkpoint() -> None:
    torch._dynamo.reset()
    plain, net = build(), build("plain")
    net.second = torch.compile(net.second, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    expected = train(plain, plain, (0, 1))
    for a, b in zip(expected, train(net, net, (0, 1)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_one_layer_used_twice_in_a_checkpointed_compiled_graph() -> None:
    """Inside one graph the second call sees averages that stand in no buffer yet."""

    def build_shared() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList(
            [nn.Linear(6, 6, bias=False), brn.BatchRenorm1d(6, momentum=0.3, clip=brn.ClipSchedule.constant())]
        ).double()

    def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(layers[1](layers[0](x)))
        return x

    results = []
    for wrap in ("plain", "checkpointed", "compiled", "both"):
        torch._dynamo.reset()
        layers = build_shared()
        f: Forward = partial(forward, layers)  # type: ignore[arg-type]
        if wrap in ("checkpointed", "both"):
            f = around(f, False)
        if wrap in ("compiled", "both"):
            f = torch.compile(f, backend="aot_eager", fullgraph=True)
        generator = torch.Generator().manual_seed(2)
        seen = []
        for _ in range(3):
            x = torch.randn(10, 6, generator=generator, dtype=torch.double, requires_grad=True)
            f(x).backward(torch.randn(10, 6, generator=generator, dtype=torch.double))
            seen.append(x.grad)
        results.append(seen + [p.grad for p in layers.parameters()] + list(layers.buffers()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_forwards_without_a_backward_do_not_disturb() -> None:
    """Logging in training mode, recalibration: never recomputed, and more of them than are remembered."""
    plain, net = build(), build("plain")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 6, generator=generator, dtype=torch.double)
    cotangent = torch.randn(16, 4, generator=generator, dtype=torch.double)
    for model in (plain, net):
        with torch.no_grad():
            for _ in range(brn.correction.PENDING_FORWARDS + 3):
                model(x)
        model(x).backward(cotangent)
    for a, b in zip([p.grad for p in plain.parameters()], [p.grad for p in net.parameters()], strict=True):
        assert a is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward order", "reverse order"])
def test_as_many_forwards_may_wait_as_promised(reverse: bool) -> None:
    """A recomputation must not take the place of a forward that still waits."""
    waiting = range(brn.correction.PENDING_FORWARDS)
    order = tuple(reversed(waiting)) if reverse else tuple(waiting)
    plain, net = build(), build("plain")
    expected = train(plain, plain, order, steps=1)
    for a, b in zip(expected, train(net, net, order, steps=1), strict=True):
        assert torch.equal(a, b)


def test_second_backward_of_a_retained_graph() -> None:
    plain, net = build(), build("plain")
    x = torch.randn(16, 6, dtype=torch.double)
    cotangent = torch.randn(16, 4, dtype=torch.double)
    for model in (plain, net):
        y = model(x)
        y.backward(cotangent, retain_graph=True)
        model(x + 1)
        y.backward(cotangent)
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_unmatched_recomputation_is_an_error() -> None:
    net = build()
    with torch.no_grad():
        buffers = [b.clone() for b in net.buffers()]
    torch.manual_seed(4)

    def noisy(x: Tensor) -> Tensor:
        return net.both(x + torch.randn_like(x))

    y = checkpoint(
        noisy, torch.randn(16, 6, dtype=torch.double, requires_grad=True), use_reentrant=False, preserve_rng_state=False
    )
    moved = [b.clone() for b in net.buffers()]
    assert not torch.equal(buffers[0], moved[0])
    with pytest.raises(RuntimeError, match=r"expected the recomputation .* preserve_rng_state"):
        y.backward(torch.randn_like(y))
    for a, b in zip(moved, net.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_training_forward_inside_a_backward_is_an_error() -> None:
    layer = brn.BatchRenorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x)
    y.register_hook(lambda grad: layer(torch.randn(8, 3) + 5) + grad)
    with pytest.raises(RuntimeError, match="must not start inside a backward"):
        y.backward(torch.randn_like(y))


def test_overflow_is_recomputed_like_any_other_value() -> None:
    """A channel that overflowed has no mean by which its forward could be found; the others find it."""
    grads = []
    for mode in ("none", "plain"):
        net = build(mode)
        x = torch.randn(16, 6, dtype=torch.double)
        net(x)
        with torch.no_grad():
            net.linear1.weight[0] = torch.inf
        net(x).backward(torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double))
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_copies_of_a_layer_have_a_history_of_their_own() -> None:
    a = build("plain")
    b = copy.deepcopy(a)
    assert a.norm1._layer.untyped_storage() is not b.norm1._layer.untyped_storage()
    x = torch.randn(16, 6, dtype=torch.double)
    cotangent = torch.randn(16, 4, dtype=torch.double)
    with torch.no_grad():
        b.norm2.running_mean.fill_(0.7)  # type: ignore[union-attr]
    ys = [a(x), b(x)]
    for y in ys:
        y.backward(cotangent)
    plain = build()
    plain(x).backward(cotangent)
    for p, q in zip(plain.parameters(), a.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert not torch.equal(a.linear1.weight.grad, b.linear1.weight.grad)  # type: ignore[arg-type]


def test_ordinary_training_keeps_no_history() -> None:
    layer = brn.BatchRenorm1d(3)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert layer._layer.untyped_storage() not in brn.correction._HISTORIES


def test_history_dies_with_its_layer() -> None:
    layer = brn.BatchRenorm1d(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    before = len(brn.correction._HISTORIES)
    del layer
    assert len(brn.correction._HISTORIES) == before - 1


def test_policy_names_exist_in_this_torch() -> None:
    """What correction.py asks of torch beyond its public names; a new torch that drops one fails here first."""
    assert torch._C._current_graph_task_id() == -1
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not torch._C._are_functorch_transforms_active()
    assert CheckpointPolicy.MUST_SAVE != CheckpointPolicy.PREFER_RECOMPUTE
