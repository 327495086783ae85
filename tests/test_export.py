"""Move out: exporters, fusers and quantisers get batch norm, and what they make of it infers the same."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchrenorm as brn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), brn.BatchRenorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), brn.BatchRenorm2d(8)
        self.fc, self.bn3 = nn.Linear(8, 6), brn.BatchRenorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        h = (self.bn2(self.conv2(h)) + h).relu()
        return self.bn3(self.fc(h.mean((2, 3))))


def net() -> nn.Module:
    model = Net()
    for layer in (model.bn1, model.bn2, model.bn3):
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias)
        layer.momentum = 0.3
    for _ in range(10):
        model(torch.randn(6, 3, 8, 8) * 2 + 1)
    return model


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(y: Tensor, model: nn.Module, tolerance_of: int = 1) -> None:
    """Error <= 2 x that of the unfolded net in float32, plus a rounding of each folded weight.

    A product of 3 * 3 * 8 terms is rounded at every addition: 72 u of the output's size, for each of three layers.
    """
    exact = copy.deepcopy(model).double().eval()(X.double())
    error = (model.eval()(X).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * error + 3 * 72 * 2**-24 * exact.abs().max()


def plain(model: nn.Module) -> nn.Module:
    return brn.to_batchnorm(copy.deepcopy(model)).eval()


def test_fold() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    folded = brn.fold_batchnorm(model, X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kinds = [type(m).__name__ for m in folded.modules()]
    assert not [k for k in kinds if "Norm" in k or "Renorm" in k]
    close(folded(X), model)
    # Without an input the norm behind the linear layer stays.
    kept = brn.fold_batchnorm(model)
    assert [type(m).__name__ for m in kept.modules() if "Norm" in type(m).__name__] == ["BatchNorm1d"]
    close(kept(X), model)


def test_what_is_not_folded() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), brn.BatchRenorm2d(3)
            self.shared, self.bn2, self.bn3 = nn.Conv2d(3, 3, 1), brn.BatchRenorm2d(3), brn.BatchRenorm2d(3)
            self.once = nn.Conv2d(3, 3, 1)
            self.linear, self.bn4 = nn.Linear(8, 8), brn.BatchRenorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            h = self.bn(h) + h  # used twice
            h = self.bn2(self.shared(h)) + self.bn3(self.shared(h))
            h = self.bn2(self.once(h))  # the norm used twice
            # (N, L, F) with L = F: the norm's channels are L
            return self.bn4(self.linear(h.flatten(1)[:, :64].unflatten(1, (8, 8))))

    model = Odd()
    for m in model.modules():
        if isinstance(m, brn.BatchRenorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    folded = brn.fold_batchnorm(model, X)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == 4
    assert torch.equal(folded(X), model.eval()(X))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(rank: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](3, 4, 2)
    model = nn.Sequential(conv, brn.BatchRenorm(4), nn.ReLU())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, *[4] * rank)
    folded = brn.fold_batchnorm(model)
    assert len(list(folded.children())) == 2
    # Of one in groups torch has no folding, so the norm stays.
    groups = nn.Sequential(type(conv)(4, 4, 2, groups=2), model[1])
    kept = brn.fold_batchnorm(groups)
    wide = torch.randn(2, 4, *[4] * rank)
    assert len(list(kept.children())) == 2
    assert torch.equal(kept(wide), groups.eval()(wide))
    # Up to 3 * 2**3 products a value.
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=24 * 4 * 2**-24 * 4)


def test_fuse_conv_bn() -> None:
    model = net()
    norm = plain(model)
    norm.conv1, norm.bn1 = fuse_conv_bn_eval(norm.conv1, norm.bn1), nn.Identity()
    close(norm(X), model)


def test_torch_export() -> None:
    model = net()
    program = torch.export.export(plain(model), (X,))
    assert torch.equal(program.module()(X), model.eval()(X))
    # And as it is: inference of ours is torch's own operator.
    ours = torch.export.export(model, (X,))
    assert torch.equal(ours.module()(X), model(X))


def test_torchscript(tmp_path: Path) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.freeze(torch.jit.script(plain(model)))
        torch.jit.save(scripted, tmp_path / "model.pt")
        close(torch.jit.load(tmp_path / "model.pt")(X), model)


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = net()
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        torch.onnx.export(plain(model), (X,), path, dynamo=True, external_data=False, verbose=False)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Conv") == 2
    # The norm behind the linear layer is a matrix product's, or stays; behind a Conv nothing is left.
    assert operators.count("BatchNormalization") <= 1
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    close(torch.from_numpy(y), model)


def test_quantisation() -> None:
    """PT2E of torchao: prepared and converted, the norms are folded, and the output is within int8 of the float one."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        model = net()
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(plain(model), (X,)).module(), quantizer)
        prepared(X)
        quantised = convert_pt2e(prepared)
        y = quantised(X)
    assert sum("batch_norm" in str(n.target) for n in quantised.graph.nodes) <= 1
    exact = model.eval()(X)
    # 8 bits: a step is 1/255 of a tensor's range; six tensors on the way, ranges of about 8 standard deviations.
    assert (y - exact).square().mean().sqrt() <= 6 * 8 / 255 * exact.std()
    assert not torch.equal(y, exact)
