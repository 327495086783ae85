"""Move in: state dicts and whole layers of the other implementations.

All of them normalise in inference by an average mean and an average spread. What differs is the spread's meaning:

    source        keeps                              training normalises by
    batchnorm     variance, Bessel's                 the biased variance
    torchrl       variance, times N / (N - 1), N of dimension 0 alone; the biased variance
    sb3           variance, Bessel's                 Bessel's variance
    sbx           variance, biased                   the biased variance
    chainer       variance, Bessel's                 the biased variance
    ludvb         standard deviation + epsilon       the same
    keras         variance for inference, mean and standard deviation for training: two sets of averages
    avalanche     standard deviation, epsilon inside, outside its state dict

Here `running_var` is ``sigma² - eps``. So the spread is translated to give the source's sigma in inference, to a
rounding. Two differences stay, and fade as training moves the averages: the root of an average variance is larger than
an average standard deviation, by Var[sigma_B] / 2 sigma, and Bessel's factor makes sigma larger by sigma / 2n for n
values per channel. Until then r is smaller by as much. And ludvb adds its epsilon to the standard deviation and not to
the variance, so in training its sigma_B of a nearly constant channel was larger than it is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .modules import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, Clip
from .schedule import ClipSchedule


class _Layout(NamedTuple):
    """How a source's layer names its state."""

    mean: str
    spread: str
    weight: str
    bias: str
    step: str | None
    eps: float  # the source's default, under the root; 0 where the spread has it inside
    is_std: bool = False
    others: tuple[str, ...] = ()  # state that says nothing here


_VARIANCE = "running_mean", "running_var", "weight", "bias", "num_batches_tracked"
LAYOUTS: dict[str, _Layout] = {
    "batchnorm": _Layout(*_VARIANCE, 1e-5),
    "torchrl": _Layout(*_VARIANCE, 1e-5),
    "ludvb": _Layout("running_mean", "running_std", "weight", "bias", "num_batches_tracked", 0.0, True),
    "sb3": _Layout("ra_mean", "ra_var", "scale", "bias", "steps", 1e-3),
    "sbx": _Layout("mean", "var", "scale", "bias", "steps", 1e-3, others=("r_max", "d_max")),
    "chainer": _Layout("avg_mean", "avg_var", "gamma", "beta", None, 2e-5, others=("N",)),
    "keras": _Layout(
        "moving_mean",
        "moving_variance",
        "gamma",
        "beta",
        None,
        1e-3,
        others=("moving_stddev", "renorm_mean", "renorm_stddev"),
    ),
}
_AVALANCHE = (
    "expected a state dict with the averages, got source='avalanche', whose layers keep them as plain attributes and "
    "save gamma and beta alone; load it into the Avalanche model it came from, if that is still in memory, and use "
    "convert_renorm, else train the averages anew"
)


def import_state_dict(
    state: Mapping[str, Any],
    source: str,
    *,
    eps: float = 1e-5,
    source_eps: float | None = None,
    keras_averages: str = "inference",
) -> dict[str, Any]:
    """Translate a state dict of another implementation into one that loads `strict=True`; the source is only read.

    ``running_var = source variance + source_eps - eps``, or ``source std² - eps``: sigma, and so inference, is the
    source's. Entries that belong to no normalising layer are passed on, with "." between the parts of their names.

    Args:
        state: the state dict of a layer or a model. Keras: ``{v.path: convert_to_numpy(v) for v in model.variables}``
            with `keras.ops.convert_to_numpy`. Chainer: what `save_npz` saved. sbx (Flax): ``{"params": ...,
            "batch_stats": ...}``, nested; kernels of dense layers become torch weights.
        source: "batchnorm", "ludvb", "torchrl", "sb3", "sbx", "keras" (3, or tf_keras), "chainer" or "avalanche".
        eps: epsilon of the layers that will load it.
        source_eps: epsilon of the source's layers, which its state does not tell; None is the source's default.
        keras_averages: Keras keeps two sets: "inference" (equal inference) or "training" (equal r and d).

    Returns:
        The new state dict, with tensors of its own. The step is the source's, or 0 where it counts none (`set_step`).

    Raises:
        ValueError: a wrong source, a missing or unexpected key, a wrong shape.

    Examples:
        >>> theirs = {"ra_mean": torch.zeros(3), "ra_var": torch.ones(3), "steps": torch.tensor(7),
        ...           "scale": torch.ones(3), "bias": torch.zeros(3)}
        >>> layer = BatchRenorm1d(3, eps=1e-3)
        >>> layer.load_state_dict(import_state_dict(theirs, "sb3", eps=1e-3), strict=True)
        <All keys matched successfully>

    Source: each implementation's inference; this module's table.
    """
    if source == "avalanche":
        raise ValueError(_AVALANCHE)
    layout = LAYOUTS.get(source)
    if layout is None:
        raise ValueError(f"expected source to be one of {[*sorted(LAYOUTS), 'avalanche']}, got {source!r}")
    if keras_averages not in ("inference", "training"):
        raise ValueError(f"expected keras_averages to be 'inference' or 'training', got {keras_averages!r}")
    entries = dict(_flat(state))
    layers = _layers(entries, layout)
    if not layers:
        raise ValueError(_no_layer(entries, source, layout))
    result: dict[str, Any] = {}
    taken: set[str] = set()
    for prefix in layers:
        own = {key[len(prefix) :]: key for key in entries if key.startswith(prefix) and "." not in key[len(prefix) :]}
        taken |= set(own.values())
        layer = {name: entries[key] for name, key in own.items()}
        _check_layer(prefix, layer, source, layout)
        shift = layout.eps if source_eps is None or layout.is_std else source_eps
        mean, spread, is_std = layer[layout.mean], layer[layout.spread], layout.is_std
        if source == "keras" and keras_averages == "training":
            if "renorm_mean" not in layer:
                raise ValueError(
                    f"expected {prefix}renorm_mean for keras_averages='training', got a layer without renorm; "
                    "use keras_averages='inference'"
                )
            mean, spread, is_std, shift = layer["renorm_mean"], layer["renorm_stddev"], True, 0.0
        result |= {
            prefix + key: value
            for key, value in _state(prefix, layer, layout, mean, spread, is_std, shift, eps).items()
        }
    for key, value in entries.items():
        if key not in taken:
            name, value = _other(key, value, source)
            result[name] = value
    return result


def _state(
    prefix: str,
    layer: dict[str, Any],
    layout: _Layout,
    mean: Any,
    spread: Any,
    is_std: bool,
    shift: float,
    eps: float,
) -> dict[str, Tensor]:
    """The five keys of one layer. In float64, since sigma² - eps of a small sigma is a difference."""
    spread = _tensor(spread)
    if bool((spread < 0).any()):
        raise ValueError(
            f"expected {prefix}{layout.spread} >= 0, got {spread.min().item():.3g}; it is no average of a spread"
        )
    square = spread.double().square() if is_std else spread.double() + shift
    # A variance that needs no shift keeps its bits.
    variance = spread.clone() if not is_std and shift == eps else (square - eps).to(spread.dtype)
    if bool((variance < 0).any()):
        raise ValueError(
            f"expected sigma² >= eps = {eps} in every channel of {prefix}{layout.spread}, "
            f"got {square.min().item():.3g}; "
            "give the layers, and import_state_dict, a smaller eps"
        )
    state = {}
    if layout.weight in layer:
        state["weight"] = _tensor(layer[layout.weight]).clone()
    if layout.bias in layer:
        state["bias"] = _tensor(layer[layout.bias]).clone()
    # Keras and Flax may have one of the two alone; here it is both or none.
    for ours, other, fill in (("weight", "bias", 1.0), ("bias", "weight", 0.0)):
        if other in state and ours not in state:
            state[ours] = torch.full_like(state[other], fill)
    state["running_mean"] = _tensor(mean).clone()
    state["running_var"] = variance
    step = layer.get(layout.step) if layout.step is not None else None
    state["num_batches_tracked"] = torch.tensor(0 if step is None else int(step), dtype=torch.long)
    return state


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        # Keras and Chainer write "/"; TensorFlow appends the output's number; Flax has one tree for each collection.
        name = str(key).replace("/", ".").removesuffix(":0")
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if not prefix and name in ("params", "batch_stats") else f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _layers(entries: Mapping[str, Any], layout: _Layout) -> list[str]:
    """Prefixes of the layers: where either average is, if it is not another kind of layer's.

    A model may mix them: running_mean is batch norm's too, and there the spread tells.
    """
    found = {key.removesuffix(key.rpartition(".")[2]): None for key in entries if _name(key) in layout[:2]}
    if not any(prefix + layout.spread in entries for prefix in found):
        return []
    others = [other for other in LAYOUTS.values() if other[:2] != layout[:2]]
    return [p for p in found if not any(p + o.mean in entries and p + o.spread in entries for o in others)]


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _fits(entries: Mapping[str, Any]) -> list[str]:
    names = {_name(key) for key in entries}
    return [source for source, layout in LAYOUTS.items() if {layout.mean, layout.spread} <= names]


def _no_layer(entries: Mapping[str, Any], source: str, layout: _Layout) -> str:
    fits = _fits(entries)
    looks = f", which look like {' or '.join(map(repr, fits))}" if fits else ""
    keys = sorted(entries)[:8]
    return (
        f"expected keys '{layout.mean}' and '{layout.spread}' of source={source!r}, got {keys}{looks}; "
        "name the source the state dict is from"
    )


def _check_layer(prefix: str, layer: Mapping[str, Any], source: str, layout: _Layout) -> None:
    required = [layout.mean, layout.spread]
    affine = {layout.weight, layout.bias} & layer.keys()
    if affine and source not in ("keras", "sbx"):
        required += [layout.weight, layout.bias]
    if layout.others and "renorm_mean" in layout.others and set(layout.others) & layer.keys():
        required += layout.others
    # Batch norm before its version 2, and Chainer, have none.
    if layout.step is not None and source != "batchnorm":
        required.append(layout.step)
    allowed = {*required, layout.weight, layout.bias, layout.step, *layout.others}
    for name in required:
        if name not in layer:
            raise ValueError(
                f"expected key {prefix}{name} of source={source!r}, got {sorted(layer)} in that layer; "
                "load a whole layer's state"
            )
    for name in layer:
        if name not in allowed:
            raise ValueError(
                f"expected of source={source!r} only {sorted(k for k in allowed if k)}, got key {prefix}{name}; "
                "name the source the state dict is from"
            )
    shape = tuple(layer[layout.mean].shape)
    for name, value in layer.items():
        got = tuple(getattr(value, "shape", ()))
        expected = () if name in (layout.step, "r_max", "d_max", "N") else shape
        if got != expected or (name == layout.mean and len(shape) != 1):
            raise ValueError(
                f"expected {prefix}{name} of shape {expected if len(shape) == 1 else '(C,)'}, got {got}; "
                "every vector of a layer has one entry per channel"
            )


def _other(key: str, value: Any, source: str) -> tuple[str, Any]:
    """What is of no normalising layer, as it is; but a dense layer of Flax as torch's."""
    if source == "sbx" and key.rpartition(".")[2] == "kernel" and getattr(value, "ndim", 0) == 2:
        return key.removesuffix("kernel") + "weight", _tensor(value).T.clone()
    return key, value.clone() if isinstance(value, Tensor) else torch.as_tensor(value)


def convert_renorm(model: nn.Module, *, clip: Clip | None = None) -> nn.Module:
    """Replace the Batch Renormalization layers of ludvb, torchrl, sb3-contrib and Avalanche by our own, in place.

    Inference is unchanged to a rounding. Weight and bias stay the same parameters, so an optimiser goes on with its
    state (not Avalanche's, whose ``(1, C, 1, 1)`` parameters become new ones); training flag, device, dtype, eps,
    momentum, step and hooks go along. The classes are recognised by module and name, so none of the packages is
    imported. A Keras layer (renorm or not, channels in dimension 1) or a Chainer link alone becomes a `BatchRenorm`.

    Args:
        model: a model, or one layer.
        clip: limits for all of them; None takes the source's own: ludvb the paper's schedule, torchrl and sb3-contrib a
            jump at their warm-up, Avalanche its limits of now, Keras its `renorm_clipping`, Chainer its rmax and dmax.

    Returns:
        The model; the new layer, if the model is one layer.

    Raises:
        ValueError: a layer that cannot be had here; nothing has been converted.

    Examples:
        >>> convert_renorm(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))[0]   # nothing to convert
        Linear(in_features=2, out_features=3, bias=True)
    """
    # Keras' layers and Chainer's links hold others' variables: they are only read, and have no parent here.
    if (source := _source(model)) in ("keras", "chainer"):
        return _foreign(model, source, clip)
    # All made before the first is put in place.
    made = {layer: _made(layer, found, clip) for layer in model.modules() if (found := _source(layer))}
    for parent in list(model.modules()):
        if parent in made:
            continue
        for name, child in parent._modules.items():
            if child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)


def _source(layer: object) -> str | None:
    module, name = type(layer).__module__, type(layer).__name__
    if isinstance(layer, BatchRenorm):
        return None
    if name in ("BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d") and _is_ludvb(layer):
        return "ludvb"  # its package has our name
    if module.startswith("torchrl.") and name == "BatchRenorm1d":
        return "torchrl"
    if module.startswith("sb3_contrib.") and name in ("BatchRenorm", "BatchRenorm1d"):
        return "sb3"
    if module.endswith("batch_renorm") and name == "BatchRenorm2D":
        return "avalanche"
    if module.startswith(("keras.", "tf_keras.")) and name == "BatchNormalization":
        return "keras"
    if module.startswith("chainer.") and name == "BatchRenormalization":
        return "chainer"
    return None


def _is_ludvb(layer: object) -> bool:
    # Ours has a running_std too, but as a property and not in its state.
    return isinstance(layer, nn.Module) and any(name == "running_std" for name, _ in layer.named_buffers(recurse=False))


def _made(layer: Any, source: str, clip: Clip | None) -> BatchRenorm:
    eps = float(layer.eps)
    own: Clip
    kind: type[BatchRenorm]
    if source == "avalanche":
        kind, affine = BatchRenorm2d, True
        # Its parameters are (1, C, 1, 1).
        weight, bias = (
            Parameter(p.detach().flatten().clone(), requires_grad=p.requires_grad) for p in (layer.gamma, layer.beta)
        )
        own = ClipSchedule.constant(float(layer.r_max), float(layer.d_max))
        std = layer.running_avg_std.detach().flatten().to(weight.device, torch.float64)
        if bool((std.square() < eps * (1 - 1e-6)).any()):
            raise ValueError(
                f"expected running_avg_std >= sqrt(eps) = {eps**0.5:.3g}, got {std.min().item():.3g}; an untrained "
                "layer of Avalanche has 0 there, so train it first or make a new BatchRenorm2d"
            )
        state = {
            "running_mean": layer.running_avg_mean.detach().flatten().to(weight),
            "running_var": (std.square() - eps).clamp(min=0).to(weight),
            "num_batches_tracked": torch.tensor(0),
        }
    else:
        # std + epsilon of a constant channel is epsilon: epsilon² leaves it a variance >= 0.
        ours = eps * eps if source == "ludvb" else eps
        state = import_state_dict(layer.state_dict(), source, eps=ours, source_eps=eps)
        eps = ours
        affine = bool(getattr(layer, "affine", True))
        weight, bias = (layer.scale if source == "sb3" else layer.weight), layer.bias
        if source == "ludvb":
            kind = {"1": BatchRenorm1d, "2": BatchRenorm2d, "3": BatchRenorm3d}[type(layer).__name__[-2]]
            own = ClipSchedule()
        elif source == "torchrl":
            kind, own = BatchRenorm, _jump(layer.max_r, layer.max_d, layer.warmup_steps)
        else:
            # `steps > warmup_steps`: one step later than torchrl's.
            kind, own = BatchRenorm1d, _jump(layer.rmax, layer.dmax, layer.warmup_steps + 1)
    device, dtype = state["running_mean"].device, state["running_mean"].dtype
    new = kind(len(weight), eps, float(layer.momentum), affine, True, device, dtype, clip=own if clip is None else clip)
    new.load_state_dict(state, strict=False)
    if affine:
        new.weight, new.bias = weight, bias
    for name, hooks in vars(layer).items():
        if name.startswith(("_forward", "_backward")) and "_hooks" in name:
            new.__dict__[name] = hooks  # itself, by which the hooks' handles remove them
    return new.train(layer.training)


def _jump(r_max: float, d_max: float, warmup: int) -> ClipSchedule:
    return ClipSchedule(float(r_max), float(d_max), int(warmup), int(warmup), int(warmup))


def _foreign(layer: Any, source: str, clip: Clip | None) -> BatchRenorm:
    if source == "keras":
        state: dict[str, Any] = {v.name: _array(v) for v in layer.variables}
        limits = getattr(layer, "renorm_clipping", None) or {}
        eps, momentum = float(layer.epsilon), 1 - float(getattr(layer, "renorm_momentum", None) or layer.momentum)
        # A key that is missing is a limit that is not there.
        own: Clip = ClipSchedule.constant(
            float(limits.get("rmax", float("inf"))), float(limits.get("dmax", float("inf")))
        )
    else:
        state = {k: getattr(layer, k) for k in ("avg_mean", "avg_var")}
        state |= {k: v.data for k in ("gamma", "beta") if (v := getattr(layer, k, None)) is not None}
        eps, momentum = float(layer.eps), 1 - float(layer.decay)
        own = ClipSchedule.constant(float(layer.rmax), float(layer.dmax))
    ours = import_state_dict(state, source, eps=eps, source_eps=eps)
    new = BatchRenorm(len(ours["running_mean"]), eps, momentum, "weight" in ours, clip=own if clip is None else clip)
    new.load_state_dict(ours)
    return new


def _array(variable: Any) -> Any:
    # Keras 3 has `value`, a tensor of its backend; TensorFlow's variables have a method of that name.
    value = variable.value if not callable(getattr(variable, "value", None)) else variable
    return value.numpy() if hasattr(value, "numpy") and not isinstance(value, Tensor) else value
