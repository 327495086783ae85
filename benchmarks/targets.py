"""What must hold (issue 4), and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import ADD_RELU, EVAL, PLAIN, RELU, TRAIN

Row = dict
H200, CPU = "NVIDIA H200", "CPU"
SMALL = 2e5
LARGE = 50e6


@dataclass(frozen=True)
class Target:
    machine: str
    what: str
    must: float
    aim: float
    values: Callable[[Sequence[Row]], list[float]]
    """One for each case that was measured; rows of the machine go in."""
    at_least: bool = False
    figure: str = "{:.2f}"

    def line(self, rows: Sequence[Row]) -> list[str]:
        """What, must, aim, measured from best to worst, verdict by the worst."""
        sign = "≥" if self.at_least else "≤"
        limits = [f"{sign} {self.figure.format(limit)}" for limit in (self.must, self.aim)]
        values = sorted(self.values([row for row in rows if _machine(row) == self.machine]), reverse=self.at_least)
        if not values:
            return [self.machine, self.what, *limits, "not measured", "–"]
        best, worst = values[0], values[-1]
        reaches = (lambda limit: worst >= limit) if self.at_least else (lambda limit: worst <= limit)
        verdict = "aim" if reaches(self.aim) else "must" if reaches(self.must) else "missed"
        span = self.figure.format(best)
        if len(values) > 1:
            span = f"{span} to {self.figure.format(worst)} ({len(values)} cases)"
        return [self.machine, self.what, *limits, span, verdict]


def _machine(row: Row) -> str:
    if row.get("kind", "cpu") == "cpu":
        return CPU
    return H200 if "H200" in row["device"] else row["device"]


def pick(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows with these values; a callable judges the value itself."""
    return [
        row
        for row in rows
        if all(want(row.get(key)) if callable(want) else row.get(key) == want for key, want in wanted.items())
    ]


def against(rows: Sequence[Row], ours: str, theirs: str, key: str, **wanted: object) -> list[float]:
    """Ours over theirs, in each case and pass that has both. `ratio`, to a base they share, is paired by rounds."""
    chosen = [row for row in pick(rows, **wanted) if key in row]
    rivals = {(row["case"], row["pass"]): row for row in chosen if row["implementation"] == theirs}
    mine = [row for row in chosen if row["implementation"] == ours and (row["case"], row["pass"]) in rivals]
    return [row[key] / rivals[row["case"], row["pass"]][key] for row in mine]


def small(row: Row) -> bool:
    return row["nbytes"] / {"fp32": 4}.get(row["dtype"], 2) <= SMALL


def _of(name: str, theirs: str, key: str = "ratio", **wanted: object) -> Callable[[Sequence[Row]], list[float]]:
    wanted = {"pass": TRAIN, "fused": PLAIN} | wanted
    return lambda rows: against([r for r in rows if "nbytes" in r], name, theirs, key, **wanted)


def _saved(fused: str) -> Callable[[Sequence[Row]], list[float]]:
    large = {"nbytes": lambda n: n >= LARGE, "fused": fused, "implementation": "brn"}
    return lambda rows: [row["saved"] for row in pick(rows, **large) if "saved" in row]


def _small(key: str = "ratio") -> Callable[[Sequence[Row]], list[float]]:
    return lambda rows: _of("brn", "bn", key)([r for r in rows if not r["model"] and small(r)])


def _faster(peer: str) -> Callable[[Sequence[Row]], list[float]]:
    return _of(peer, "brn")


_BIG = {"nbytes": lambda n: n >= LARGE, "dtype": "bf16"}
_24_MIB = {"nbytes": lambda n: 20 * 2**20 <= n <= 25 * 2**20, "dtype": "fp32", "channels_last": False}


def _last_or_bf16(rows: Sequence[Row]) -> list[float]:
    return _of("brn", "bn")(
        [r for r in rows if not r["model"] and not small(r) and (r["channels_last"] or r["dtype"] == "bf16")]
    )


def _share(rows: Sequence[Row]) -> list[float]:
    return [r["copy_share"] for r in pick(rows, implementation="brn", fused=PLAIN, **_BIG) if r["pass"] == TRAIN]


def _step(model: str) -> Callable[[Sequence[Row]], list[float]]:
    return _of("brn", "bn", **{"model": model, "pass": "step"})


_LAST = _BIG | {"channels_last": True}
_FP16 = _LAST | {"dtype": "fp16"}
TARGETS = (
    Target(H200, "share of the copy rate, fwd+bwd", 0.85, 0.92, _share, True, "{:.0%}"),
    Target(H200, "against nn.BatchNorm2d eager, channels_last", 0.90, 0.65, _of("brn", "bn", **_LAST)),
    Target(
        H200, "against nn.BatchNorm2d eager, NCHW", 0.50, 0.15, _of("brn", "bn", **(_BIG | {"channels_last": False}))
    ),
    Target(H200, "against cuDNN fp16 channels_last", 1.10, 1.00, _of("brn", "bn", **_FP16)),
    Target(
        H200, "BRN+ReLU against torch.compile(BN+ReLU), kernels", 1.00, 0.85,
        _of("brn", "bn compiled", "graph_ms", fused=RELU, **_BIG),
    ),
    Target(
        H200, "BRN+add+ReLU against torch.compile(BN+add+ReLU), kernels", 1.00, 0.85,
        _of("brn", "bn compiled", "graph_ms", fused=ADD_RELU, **_BIG),
    ),
    Target(H200, "microbatches of 4 of 32 against one of 32", 1.10, 1.00, _of("brn 8x4", "brn", **_BIG)),
    Target(H200, "small tensors, eager wall", 2.00, 1.30, _small()),
    Target(H200, "small tensors, CUDA-graph replay", 1.20, 1.00, _small("graph_ms")),
    Target(H200, "ResNet-50 training step, converted against original", 1.02, 1.00, _step("resnet50")),
    Target(H200, "Inception-v3 training step, converted against original", 1.02, 1.00, _step("inception_v3")),
    # The vectors of length C are a hundredth of x and less here.
    Target(H200, "kept for the backward, in sizes of x", 1.01, 1.01, _saved(PLAIN)),
    Target(H200, "kept for the backward with ReLU, in sizes of x", 1.01, 1.01, _saved(RELU)),
    Target(CPU, "fp32 NCHW ~24 MiB, fwd+bwd against nn.BatchNorm2d", 1.00, 0.65, _of("brn", "bn", **_24_MIB)),
    Target(CPU, "channels_last or bf16, > 2e5 elements, fwd+bwd", 1.05, 1.00, _last_or_bf16),
    Target(CPU, "small (≤ 2e5 elements), fwd+bwd", 2.00, 1.50, _small()),
    Target(CPU, "times faster than Keras, fwd+bwd", 2.0, 4.0, _faster("keras"), True, "{:.1f}"),
    Target(CPU, "times faster than torchrl, fwd+bwd", 4.0, 8.0, _faster("torchrl"), True, "{:.1f}"),
    Target(CPU, "times faster than sb3-contrib, fwd+bwd", 4.0, 8.0, _faster("sb3"), True, "{:.1f}"),
)  # fmt: skip


def target_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    known = [row for row in rows if "nbytes" in row]  # rows of an older form say too little
    return ["on", "target", "must", "aim", "measured, best to worst", "reached"], [t.line(known) for t in TARGETS]


def lost(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Where another implementation is faster than ours by more than both their quartiles."""
    lines = []
    places = {(row["device"], row["case"], row["pass"]): None for row in rows if row["pass"] in (TRAIN, EVAL, "step")}
    for place in places:
        cells = {r["implementation"]: r for r in rows if (r["device"], r["case"], r["pass"]) == place}
        ours = cells.get("brn")
        rivals = [r for name, r in cells.items() if name.split()[0] not in ("brn", "copy") and "again" not in name]
        if ours is None or not rivals:
            continue
        best = min(rivals, key=lambda row: row["ratio"])
        if best["ratio_quartiles"][1] < ours["ratio_quartiles"][0]:
            lines.append([*place, best["implementation"], f"{best['ratio'] / ours['ratio']:.2f}"])
    return ["on", "case", "pass", "faster", "its time over ours"], lines
