"""Figures of the docs, drawn when the site is built: from the mathematics, and from the committed results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numbers_of_results as numbers
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import batchrenorm as brn
from batchrenorm.paper import presets, report
from batchrenorm.paper.report import GRID, TEXT, inline

Array = NDArray[np.float64]

BLUE, ORANGE, GREEN, PURPLE = "#2f7ed8", "#e0702c", "#3f9d5a", "#9a63c4"


class Projection(NamedTuple):
    """What the gradient of one channel of three samples goes through; `tests/test_docs_site.py` holds it to be so."""

    x: Array  # (3,)
    dy: Array  # (3,), the gradient of y
    scaled: Array  # dy * gamma * r / sigma_B
    dx: Array  # of that, what is perpendicular to (1, 1, 1) and to x


GAMMA, MU, SIGMA = 1.0, 0.3, 1.6


def projection() -> Projection:
    """For eps = 0 and open limits, from nothing but the paper's words: scale, then project."""
    x, dy = np.array([-1.2, 0.4, 1.4]), np.array([0.9, -0.35, 1.1])
    r = x.std() / SIGMA
    scaled = dy * GAMMA * r / x.std()
    plane, _ = np.linalg.qr(np.stack([np.ones(3), x], 1))  # an orthonormal basis of the plane of 1 and x
    return Projection(x, dy, scaled, scaled - plane @ (plane.T @ scaled))


def _projection() -> str:
    p = projection()
    with _style():
        canvas = Figure(figsize=(4.8, 3.4))
        axes = canvas.add_axes((0.0, -0.25, 1.0, 1.4), projection="3d", computed_zorder=False)
        axes.set_axis_off()
        axes.set_proj_type("ortho")
        one, along = np.ones(3) / np.sqrt(3), p.x / np.linalg.norm(p.x)
        normal = np.cross(one, along)
        normal *= np.sign(normal @ p.dx)
        # From the side and a little above the plane, so that what leaves it is seen leaving.
        _look(axes, eye=0.42 * normal + 0.9 * (0.8 * one - 0.6 * along), up=normal)
        corners = np.array([0.8 * (a * one + b * along) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))])
        axes.plot_trisurf(*corners.T, triangles=[[0, 1, 2], [0, 2, 3]], color=BLUE, alpha=0.13, linewidth=0)
        axes.plot(*np.stack([-0.4 * normal, 1.1 * normal], 1), color=TEXT, linewidth=0.8, linestyle=":")
        arrows = (
            (0.8 * one, BLUE, "(1, 1, 1)", "left"),
            (0.8 * along, BLUE, "x", "left"),
            (p.dy, GREEN, "γ dy", "left"),
            (p.scaled, ORANGE, "γ dy r / σ$_B$", "left"),
            (p.dx, PURPLE, "dx ", "right"),
        )
        for v, color, label, side in arrows:
            axes.quiver(0, 0, 0, *v, color=color, linewidth=2.0, arrow_length_ratio=0.09)
            axes.text(*(1.04 * v), label, color=color, ha=side)
        axes.plot(*np.stack([p.scaled, p.dx], 1), color=TEXT, linewidth=1.0, linestyle="--")
        for limit in (axes.set_xlim, axes.set_ylim, axes.set_zlim):
            limit(-0.62, 0.62)
        svg = inline(canvas, "Scale, then project: the gradient of three samples lies on a line")
    return _figure(
        svg,
        "Three samples, so a gradient is a point in space. The plane holds 1 and x: the directions in which a step "
        "would shift or stretch the minibatch. γ dy is first scaled (orange), then loses its shadow on the plane; what "
        "is left, dx, lies on the dotted normal.",
    )


def _look(axes: object, eye: Array, up: Array) -> None:
    """Turn the axes so that `eye` points at the reader, and `up` upwards."""
    eye = eye / np.linalg.norm(eye)
    elev, azim = np.arcsin(eye[2]), np.arctan2(eye[1], eye[0])
    # What is upwards and to the right without a roll; then the roll that takes `up` upwards.
    upwards = np.array([-np.sin(elev) * np.cos(azim), -np.sin(elev) * np.sin(azim), np.cos(elev)])
    right = np.array([-np.sin(azim), np.cos(azim), 0.0])
    roll = np.arctan2(up @ right, up @ upwards)
    axes.view_init(*np.rad2deg((elev, azim, roll)))  # type: ignore[attr-defined]


def _identity() -> str:
    """Three samples on a line: what they are normalised to, and what r and d make of it."""
    x, eps = projection().x, 0.0
    mu_B, sigma_B = x.mean(), np.sqrt(x.var() + eps)
    r, d = sigma_B / SIGMA, (mu_B - MU) / SIGMA
    rows = (
        ("x", x),
        ("(x − μ$_B$) / σ$_B$", (x - mu_B) / sigma_B),
        ("· r", (x - mu_B) / sigma_B * r),
        ("+ d  =  (x − μ) / σ", (x - mu_B) / sigma_B * r + d),
    )
    with _style():
        canvas = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = canvas.add_subplot()
        for k, (label, values) in enumerate(rows):
            axes.axhline(-k, color=GRID, linewidth=0.8)
            axes.scatter(values, [-k] * 3, color=[BLUE, GREEN, ORANGE], zorder=3, s=36)
            axes.text(-1.95, -k + 0.16, label, color=TEXT)
        inference = (x - MU) / SIGMA
        axes.scatter(inference, [-3] * 3, s=120, facecolors="none", edgecolors=TEXT, zorder=4)
        axes.axvline(0, color=GRID, linewidth=0.8)
        axes.set_xlim(-2, 2)
        axes.set_ylim(-3.5, 0.6)
        axes.set_yticks([])
        axes.tick_params(labelcolor=TEXT, bottom=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        svg = inline(canvas, "From batch norm to the inference output, on three samples")
    return _figure(
        svg,
        "Batch norm centres the three and makes their spread 1; r gives back the spread, d the place, that the "
        "averages say they have. Circles: the inference output of the same samples.",
    )


def _schedule() -> str:
    schedule, steps = brn.ClipSchedule(), range(0, 50_001, 500)
    limits = np.array([[float(v) for v in schedule(step)] for step in steps])
    with _style():
        canvas = Figure(figsize=(4.8, 2.6), layout="constrained")
        axes = canvas.add_subplot()
        for column, (name, color) in enumerate((("r_max", BLUE), ("d_max", ORANGE))):
            axes.plot(steps, limits[:, column], color=color, linewidth=1.8)
            axes.text(50_000, limits[-1, column] - 0.35, name, color=color, ha="right")
        axes.set_xlabel("training steps", color=TEXT)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _plain(axes)
        svg = inline(canvas, "The paper's schedule of the limits")
    return _figure(svg, "The default schedule, which is the paper's.")


def _alpha() -> str:
    found = numbers.sweep()
    with _style():
        canvas = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = canvas.add_subplot()
        keys = (("microbatch/brn", "groups of 4", BLUE), ("noniid/brn", "non-i.i.d. groups", ORANGE))
        for arm, label, color in keys:
            alphas = sorted(a for a, r_max, d_max, name in found if (r_max, d_max, name) == (3.0, 5.0, arm))
            values = [found[a, 3.0, 5.0, arm] for a in alphas]
            means, spread = [statistics.fmean(v) for v in values], [statistics.stdev(v) for v in values]
            axes.errorbar(alphas, means, spread, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("α (momentum)", color=TEXT)
        axes.set_ylabel("% right", color=TEXT)
        axes.legend(frameon=False, labelcolor=TEXT)
        _plain(axes)
        svg = inline(canvas, "Validation accuracy against alpha")
    return _figure(
        svg, "Validation accuracy after 1,500 steps on pairs of digits; mean and standard deviation of 3 seeds."
    )


def _curves(preset: str, title: str) -> Callable[[], str]:
    def drawn() -> str:
        of = presets.PRESETS[preset]
        figure = next(f for f in of.figures if f.title == title)
        return report.learning_curves(of, figure, numbers.records(preset))

    return drawn


def _clipped() -> str:
    return "".join(report.corrections(presets.digits, numbers.records("digits"))[:2])


def _style() -> object:
    return matplotlib.rc_context({"font.size": 10, "axes.edgecolor": GRID, "text.color": TEXT})


def _plain(axes: object) -> None:
    axes.grid(color=GRID, linewidth=0.6)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    axes.tick_params(labelcolor=TEXT, which="both", bottom=False, left=False)  # type: ignore[attr-defined]
    axes.spines[["top", "right", "left"]].set_visible(False)  # type: ignore[attr-defined]


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption.replace('σ_B', 'σ<sub>B</sub>')}</figcaption></figure>"


FIGURES: dict[str, Callable[[], str]] = {
    "projection": _projection,
    "identity": _identity,
    "schedule": _schedule,
    "alpha": _alpha,
    "clipped": _clipped,
    "microbatch": _curves("digits", "Normalised in groups of 4"),
    "noniid": _curves("digits", "Non-i.i.d. groups"),
    "blowup": _curves("digits", "High learning rate"),
}
