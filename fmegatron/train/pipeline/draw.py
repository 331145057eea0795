"""A timeline as a picture: a row a rank, a box a computation; colour is what it does, shade is which stage of the rank."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fmegatron.train.pipeline.timeline import Timeline

COLORS: Mapping[str, tuple[str, str]] = MappingProxyType({  # first and last stage of a rank; told apart in grey too
    "F": ("#3b6fb6", "#a9c8ec"),
    "B": ("#c8702a", "#f3c79b"),
    "I": ("#2f8f6b", "#a5dcc5"),
    "W": ("#8a5aa8", "#d8c2e6"),
})
MEANING = MappingProxyType({"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"})


def draw(timelines: Sequence[Timeline], path: str | os.PathLike[str]) -> Path:
    """Write timelines, one under the other, as PNG or SVG by the path's end; the path. Times of one unit share a scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Path(path)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture is .png or .svg, not {out.name!r}")
    rows = sum(t.ranks for t in timelines)
    figure = Figure(figsize=(13, 0.75 * len(timelines) + 0.34 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [t.ranks + 1.4 for t in timelines]
    axes = figure.subplots(len(timelines), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for ax, timeline in zip(axes, timelines, strict=True):
        _draw_one(ax, timeline, max(t.span for t in timelines if t.unit == timeline.unit))
    kinds = {bar.action.kind for t in timelines for bar in t.bars}
    handles = [_patch(COLORS[kind][0], MEANING[kind]) for kind in COLORS if kind in kinds]
    if any(len({bar.action.stage for bar in t.row(0)}) > 1 for t in timelines):
        handles.append(_patch("#d9d9d9", "lighter: later stages of a rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    return out


def _draw_one(ax: object, timeline: Timeline, span: float) -> None:
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb

    assert isinstance(ax, Axes)
    start = min(bar.start for bar in timeline.bars)
    for rank in range(timeline.ranks):
        row = timeline.row(rank)
        stages = sorted({bar.action.stage for bar in row})
        for bar in row:
            dark, light = (to_rgb(color) for color in COLORS[bar.action.kind])
            share = stages.index(bar.action.stage) / max(len(stages) - 1, 1)
            color = tuple(a + (b - a) * share for a, b in zip(dark, light, strict=True))
            width = bar.end - bar.start
            ax.barh(rank, width, left=bar.start - start, height=0.9, color=color, edgecolor="white", linewidth=0.4)
            if width > span / 110:
                text = "black" if share > 0.5 else "white"
                x = bar.start - start + width / 2
                ax.text(x, rank, str(bar.action.microbatch), ha="center", va="center", fontsize=6.5, color=text)
    ax.set_xlim(0, span)
    ax.set_ylim(timeline.ranks - 0.5, -0.5)
    ax.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)], fontsize=8)
    ax.tick_params(axis="both", length=0, labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    peaks = ", ".join(map(str, timeline.peaks()))
    title = f"{timeline.name}: span {timeline.span:.4g}{timeline.unit}, bubble {timeline.bubble:.1%}, peak activations {peaks}"
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(timeline.unit.strip() or "time, in the unit of --forward", fontsize=7)


def _patch(color: str, label: str) -> object:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
