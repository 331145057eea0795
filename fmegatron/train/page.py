"""report.html: a run on one page that needs nothing but itself: curves, time, mesh, memory, settings, environment.

Made from the files of the run's folder, metrics.jsonl, run.json and config.toml, so it can be made again for any old run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fmegatron.files import write_atomically
from fmegatron.train import chart, facts, metrics
from fmegatron.train.page_style import SCRIPT, STYLE

NAME = "report.html"
MOST = 2000  # points of a line; of more, the first, the least, the largest and the last of each stretch stay
MANY = 8  # lines of a chart
PARTS = ("data", "forward_backward", "optimizer")
TILES = {"step": "step", "loss": "loss", "heldout_loss": "held-out loss", "bits_per_byte": "held-out bits per byte",
         "tokens_per_second": "speed", "mfu": "MFU", "memory_bytes": "memory", "goodput": "goodput",
         "skipped": "skipped steps"}  # fmt: skip
Columns = Mapping[str, list[tuple[int, float]]]

# title: (what it shows, whether the axis is logarithmic, names of numbers; * stands for anything)
PANELS: tuple[tuple[str, str, bool, tuple[str, ...]], ...] = (
    ("Loss", "nats a token", False, ("loss", "heldout_loss", "unigram_loss", "validation/*/loss")),
    ("Bits per byte", "of held-out text", False, ("bits_per_byte", "validation/*/bits_per_byte")),
    ("Perplexity", "", True, ("perplexity", "heldout_perplexity")),
    ("Loss beyond token frequencies", "loss minus unigram loss, nats", False, ("unigram_normalised_loss",)),
    ("Learning rate", "", False, ("lr", "lr/*")),
    ("Betas and weights of momenta", "", False, ("beta*", "v1*", "v2*", "v3*")),
    ("Norms", "gradient before clipping, parameters", True, ("grad_norm", "param_norm")),
    ("Zeros", "elements of the gradient", False, ("zeros",)),
    ("Norms of updates and moments", "all parameters", True, ("optimizer/l2_norm/*/global",)),
    ("Speed", "tokens a second", False, ("tokens_per_second",)),
    ("TFLOP/s", "model FLOPs, all devices", False, ("tflops",)),
    ("MFU", "of the devices' dense peak", False, ("mfu",)),
    ("Parts of a step", "seconds", True, ("time/data", "time/forward_backward", "time/optimizer")),
    ("Memory", "bytes", False, ("memory_bytes", "memory_reserved_bytes")),
    ("Goodput", "of wall time since the run began", False, ("goodput",)),
    ("Largest attention logit", "by layer", False, ("attention/*.max_logit",)),
    ("Kurtosis of activations", "over layers; a Gaussian has 3", True, ("activations/kurtosis/*",)),
    ("Skewness of activations", "over layers", False, ("activations/skewness/*",)),
    ("Norm of activations", "over layers", True, ("activations/l2/*",)),
    ("Largest activation", "over layers", True, ("activations/max/*",)),
    ("Loss scale and skipped steps", "", False, ("loss_scale", "skipped")),
)


def write(folder: str | Path) -> Path:
    """Make DIR/report.html and return its path. Raises ValueError where the folder holds no run."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: no metrics.jsonl, so no run; name the folder of one (run.dir)")
    settings = folder / "config.toml"
    text = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    page = html(folder.name, metrics.read(folder / "metrics.jsonl"), facts.read(folder), text)
    write_atomically(folder / NAME, page)
    return folder / NAME


def html(name: str, records: Sequence[metrics.Clean], said: Mapping[str, Any], settings: str) -> str:
    """The page of a run: its records, what run.json says, and its configuration as TOML."""
    columns = columns_of(records)
    panels = [panel for title, what, log, names in PANELS if (panel := _panel(columns, title, what, log, names))]
    data = json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    sections = [
        f"<header><h1>{escape(name)}</h1><p>{escape(_line(said))}</p></header>",
        f'<section class="tiles">{"".join(_tiles(records))}</section>',
        f'<section><h2>Curves</h2><div class="panels">{"".join(panels)}</div></section>',
        f"<section><h2>Time</h2>{_time(records, said)}</section>",
        f"<section><h2>Mesh</h2>{_mesh(said.get('mesh', {}))}</section>",
        f"<section><h2>Environment</h2>{_table(said.get('environment', {}))}</section>",
        f"<section><h2>Settings</h2><pre>{escape(settings)}</pre></section>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
    tail = f'<div id="tip"></div><script type="application/json" id="data">{data}</script><script>{SCRIPT}</script>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(sections)}{tail}</body></html>\n'


def columns_of(records: Sequence[metrics.Clean]) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, number), ...]} of what was finite, at most `MOST` points each, the least and the largest among them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        step = int(record["step"] or 0)
        for name, x in record.items():
            if name != "step" and isinstance(x, int | float) and math.isfinite(x):
                found.setdefault(name, []).append((step, x))
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[tuple[int, float]], most: int = MOST) -> list[tuple[int, float]]:
    """Of each stretch the first, the least, the largest and the last point; all where these are few."""
    if len(points) <= most:
        return points
    size = -(-4 * len(points) // most)
    out: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {part[0], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1]), part[-1]}
        out += sorted(ends)
    return out


def _panel(columns: Columns, title: str, what: str, log: bool, names: Sequence[str]) -> str:
    found = [name for pattern in names for name in columns if _fits(name, pattern)]
    if len(found) > MANY:  # layers: those over all of them say enough
        found = [name for name in columns if _fits(name, names[0].replace("*.", "") + "/*")] or found[:MANY]
    if not found:
        return ""
    picture = chart.lines({name: columns[name] for name in dict.fromkeys(found)}, log=log)
    shown = f'<span class="what">{escape(what)}</span>' if what else ""
    return f"<figure><figcaption>{escape(title)} {shown}</figcaption>{picture}</figure>" if picture else ""


def _fits(name: str, pattern: str) -> bool:
    before, star, after = pattern.partition("*")
    if not star:
        return name == pattern
    middle = name[len(before) : len(name) - len(after)]
    fits = name.startswith(before) and name.endswith(after) and len(name) >= len(before) + len(after)
    return fits and "/" not in middle


def _line(said: Mapping[str, Any]) -> str:
    model, mesh = said.get("model", {}), said.get("mesh", {})
    parts = [str(model.get("name", "")), f"{model['parameters']:,} parameters" if "parameters" in model else ""]
    parts += ["compiled" if mesh.get("compiled") else "eager" if mesh else ""]
    return ", ".join(part for part in parts if part)


def _tiles(records: Sequence[metrics.Clean]) -> list[str]:
    """The last value of what people ask for first."""
    out = []
    for name, label in TILES.items():
        last = next((r[name] for r in reversed(records) if isinstance(r.get(name), int | float)), None)
        if last is not None:
            form = metrics.FIELDS.get(name, ("",))[0]
            said = metrics.describe(name, {name: last}).removeprefix(form.partition("{")[0]) if form else f"{last:.6g}"
            out.append(f'<div class="tile"><b data-name="{name}" data-value="{json.dumps(last)}">{escape(said or "0")}</b>'
                       f"<span>{label}</span></div>")  # fmt: skip
    return out


def _number(record: metrics.Clean, name: str) -> float:
    x = record.get(name)
    return float(x) if isinstance(x, int | float) else 0.0


def _time(records: Sequence[metrics.Clean], said: Mapping[str, Any]) -> str:
    """Where the time went: totals of the parts, and when what was done."""
    total = {part.replace("_", " and "): sum(_number(r, f"time/{part}") for r in records) for part in PARTS}
    rest = sum(_number(r, "seconds") for r in records) - sum(total.values())
    total |= {"rest of steps": max(rest, 0.0)}
    total |= {part: sum(_number(r, f"time/{part}") for r in records) for part in ("validation", "checkpoint")}
    out = f"<h3>Totals of {len(records):,} steps</h3>{chart.share(total)}"
    began = float(said.get("started") or 0.0)
    if not began or not records or not records[-1].get("time"):
        return out
    spans: list[tuple[float, float, int, str]] = []
    for r in records:
        end = _number(r, "time") - began
        start = end - _number(r, "seconds")
        spans += _joined(spans, (start, end, 0, f"training, to step {r['step']}"))
        if "time/checkpoint" in r:
            spans.append((start - _number(r, "time/checkpoint"), start, 5, f"checkpoint before step {r['step']}"))
        if "time/validation" in r:
            spans.append((end, end + _number(r, "time/validation"), 4, f"validation at step {r['step']}"))
    last = max(stop for _, stop, _, _ in spans)
    starts = "".join(
        f"<li>session {n}: {float(s['started']) - began:,.0f} s after the first began, at step {s['steps']}</li>"
        for n, s in enumerate(said.get("sessions", []), 1)
    )
    key = "".join(f'<span class="key"><i class="b{n}"></i>{what}</span>'
                  for n, what in ((0, "training"), (4, "validation"), (5, "checkpoint")))  # fmt: skip
    return f'{out}<h3>Timeline</h3>{chart.timeline(spans, last)}<div class="legend">{key}</div><ul>{starts}</ul>'


def _joined(spans: list[tuple[float, float, int, str]], new: tuple[float, float, int, str]) -> list[Any]:
    """Training without a gap is one span: `spans` changed in place, or the new one to add."""
    if spans and spans[-1][2] == 0 and new[0] - spans[-1][1] < 0.05 * max(new[1] - new[0], 1e-3):
        spans[-1] = (spans[-1][0], new[1], 0, new[3])
        return []
    return [new]


def _mesh(mesh: Mapping[str, Any]) -> str:
    """The axes as a table, and each rank's coordinates where they are few."""
    axes: dict[str, int] = {name: size for name, size in mesh.get("axes", {}).items() if size > 1}
    rows = {"kind": mesh.get("kind", ""), "rules": mesh.get("rules", "")}
    rows |= {f"axis {name}": f"{size} ranks" for name, size in axes.items()}
    ranks = math.prod(axes.values())
    if not 1 < ranks <= 64:
        return _table(rows)
    cells = []
    for rank in range(ranks):
        rest, place = rank, []
        for name, size in reversed(axes.items()):
            place.append(f"{name} {rest % size}")
            rest //= size
        cells.append(f'<span class="rank"><b>{rank}</b> {" ".join(reversed(place))}</span>')
    wide = list(axes.values())[-1]
    style = f"grid-template-columns:repeat({wide},max-content)"
    return f'{_table(rows)}<div class="ranks" style="{style}">{"".join(cells)}</div>'


def _table(rows: Mapping[str, Any]) -> str:
    body = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{body}</table>"
