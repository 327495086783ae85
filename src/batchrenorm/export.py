"""Move out: what leaves for another runtime leaves as plain batch norm, or as no norm at all.

A model goes as ``norm = to_batchnorm(copy.deepcopy(model)).eval()``, and what knows `nn.BatchNorm` takes it from there:

    torch.export.export(norm, (x,))
    torch.onnx.export(norm, (x,), "model.onnx", dynamo=True, external_data=False)      # one Conv for each Conv and norm
    torch.jit.script(norm)                                                            # TorchScript
    torch.nn.utils.fusion.fuse_conv_bn_eval(norm.conv1, norm.bn1)                     # one pair by hand
    prepare_pt2e(torch.export.export(norm, (x,)).module(), quantizer)                 # torchao's quantisation
    fold_batchnorm(model)                                                             # all pairs, in plain PyTorch

`to_batchnorm` leaves inference as it is to the last bit; folding rounds the weights anew. TensorRT and CoreML read the
ONNX file, or the exported program, and see a Conv.
"""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .convert import to_batchnorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batchnorm(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    """A copy of the model for inference, every norm folded into the convolution or linear layer right before it.

    ``weight' = weight * gamma / sigma`` and ``bias' = (bias - mu) * gamma / sigma + beta``: in inference the norm costs
    nothing any more. A norm stays a `nn.BatchNorm` where something stands between, where the layer before it has
    another use too, or where either is shared.

    Args:
        model: with Batch Renormalization, batch norm or both; in any mode. It does not change.
        example: inputs of the model, to fold linear layers too: only for ``(N, F)`` are their features the norm's
            channels, and the graph does not know shapes.

    Returns:
        A `torch.fx.GraphModule` in evaluation mode.

    Raises:
        torch.fx.proxy.TraceError: the forward depends on values; ONNX and `torch.export` fold such models too.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), brn.BatchRenorm2d(8), nn.ReLU())
        >>> [type(m).__name__ for m in fold_batchnorm(model).children()]
        ['Conv2d', 'ReLU']
    """
    graph_module = fx.symbolic_trace(to_batchnorm(copy.deepcopy(model)).eval())
    ranks: dict[fx.Node, int] = {}
    if example:
        ShapeProp(graph_module).propagate(*example)
        ranks = {n: len(m.shape) for n in graph_module.graph.nodes if hasattr(m := n.meta.get("tensor_meta"), "shape")}
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    for node in list(graph_module.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, layer = modules[node.target], modules[before.target]
        if type(norm) not in _NORMS or norm.running_mean is None or calls[norm] > 1 or calls[layer] > 1:
            continue
        # torch folds no transposed convolution in groups.
        if type(layer) in _CONVOLUTIONS or (type(layer) in _TRANSPOSED and layer.groups == 1):
            folded = fuse_conv_bn_eval(layer, norm, transpose=type(layer) in _TRANSPOSED)
        elif type(layer) is nn.Linear and ranks.get(before) == 2:
            folded = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        place = str(before.target)
        parent, _, name = place.rpartition(".")
        setattr(graph_module.get_submodule(parent), name, folded)
        modules[place] = folded
        calls[folded] = 1
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module
