"""Small charts as SVG text, for a page without a network: lines over steps, and bars over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 210, 62, 12, 12, 30


def lines(series: Mapping[str, Points], *, log: bool = False, keys: Mapping[str, str] | None = None) -> str:
    """Lines over steps, a color each; keys: {label: name of its numbers among the page's data}. log: of the y axis, which then
    leaves out what is not above 0."""
    kept = {label: [(x, y) for x, y in points if not log or y > 0] for label, points in series.items()}
    kept = {label: points for label, points in kept.items() if points}
    every = [point for points in kept.values() for point in points]
    if not every:
        return ""
    low, high = min(y for _, y in every), max(y for _, y in every)
    if high <= low:
        pad = abs(low) * 0.1
        low, high = (low / 1.2, high * 1.2) if log else (low - pad, high + pad) if pad else (0.0, 1.0)
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    last = last if last > first else first + 1

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    out = []
    for y in logarithmic(low, high) if log else ticks(low, high):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(first, last, 5):
        out.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>')
    for number, points in enumerate(kept.values()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        if len(points) == 1:
            x, y = points[0]
            out.append(f'<circle class="s{number % 6}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>')
        out.append(f'<polyline class="s{number % 6}" points="{path}"/>')
    names = " ".join((keys or {}).get(label, label) for label in kept)
    frame = f'data-keys="{escape(names)}" data-first="{first}" data-last="{last}"'
    out.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    body = "".join(out)
    legend = "".join(f'<span class="key"><i class="b{n % 6}"></i>{escape(label)}</span>' for n, label in enumerate(kept))
    picture = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {frame}>{body}</svg>'
    return f'{picture}<div class="legend">{legend if len(kept) > 1 else ""}</div>'


def share(parts: Mapping[str, float]) -> str:
    """One bar of parts of a whole, with a legend that says each one's percent."""
    total = sum(parts.values()) or 1.0
    at, out, keys = 0.0, [], []
    for number, (label, x) in enumerate(parts.items()):
        wide = 940 * x / total
        said = f"{escape(label)}: {short(x)} s"
        out.append(f'<rect class="f{number % 6}" x="{at:.2f}" y="0" width="{max(wide - 1, 0.3):.2f}" height="22"><title>{said}'
                   "</title></rect>")  # fmt: skip
        keys.append(f'<span class="key"><i class="b{number % 6}"></i>{said}, {100 * x / total:.1f} %</span>')
        at += wide
    return f'<svg class="bar" viewBox="0 0 940 22" role="img">{"".join(out)}</svg><div class="legend">{"".join(keys)}</div>'


def timeline(spans: Sequence[tuple[float, float, int, str]], end: float) -> str:
    """Spans (start, end, number of the color, what), in seconds since the beginning, on one line with an axis of time."""
    end = end or 1.0
    out = []
    for start, stop, number, what in spans:
        x, wide = 940 * start / end, max(940 * (stop - start) / end, 0.4)
        box = f'class="f{number}" x="{x:.2f}" y="0" width="{wide:.2f}" height="26"'
        out.append(f"<rect {box}><title>{escape(what)}</title></rect>")
    for t in ticks(0, end, 8):
        out.append(f'<text x="{940 * t / end:.1f}" y="44" text-anchor="{"start" if t == 0 else "middle"}">{short(t)} s</text>')
    return f'<svg class="bar" viewBox="0 0 940 50" role="img">{"".join(out)}</svg>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def logarithmic(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, every n-th where they are many; round numbers where there are less than two."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(powers) < 2:
        return [y for y in ticks(low, high) if y > 0]
    return [10.0**n for n in powers[:: -(-len(powers) // 5)]]


def short(x: float) -> str:
    """A number as an axis says it: 12k, 3.2M, 0.001, 1e-05."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{x:.4g}"
