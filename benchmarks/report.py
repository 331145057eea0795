"""From rows to ratios with confidence intervals, and a section of RESULTS.md."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def ratio(ours: Sequence[float], theirs: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """Median over rounds of ours / theirs in the same round, and its 95 % interval by bootstrap over rounds."""
    per_round = np.asarray(ours) / np.asarray(theirs)
    again = np.random.default_rng(0).integers(0, len(per_round), (draws, len(per_round)))
    medians = np.median(per_round[again], 1)
    return float(np.median(per_round)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def times(rows: Sequence[Row], dtype: str, shape: str) -> dict[str, list[float]]:
    """{participant: seconds by round}."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["what"], row.get("dtype"), row.get("shape")) == ("step", dtype, shape):
            found.setdefault(row["who"], []).append(row["seconds"])
    return found


def sections(rows: Sequence[Row], ours: Sequence[str], torch_peers: Sequence[str]) -> list[str]:
    """Lines of Markdown: ratios first."""
    cells = list(dict.fromkeys((row["dtype"], row["shape"]) for row in rows if row["what"] == "step"))
    lines = ["Step time, ours / theirs (below 1 is faster), median of rounds [95 % interval]:", ""]
    raced = [times(rows, *cell) for cell in cells]
    theirs = list(dict.fromkeys(who for cell in raced for who in cell if who not in ours))
    if theirs:
        lines += table(["", "", *theirs], ratio_rows(cells, raced, ours, theirs))
    lines += summary(rows, cells, raced, ours, torch_peers)
    head = ["dtype", "shape", "who", "step ms", "quartiles", "first s", "(cpu s)", "warm s", "(cpu s)", "peak MB", "imports MB"]
    lines += ["", "As measured:", "", *table(head, measured(rows, cells, raced))]
    depth = [row for row in rows if row["what"] == "depth"]
    if depth:
        body = [[row["layers"], row["who"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"] for row in depth]
        lines += ["", "First step by depth, fp32, empty caches, imports included:", ""]
        lines += table(["layers", "who", "first s", "(cpu s)"], body)
    return lines


def ratio_rows(
    cells: Sequence[tuple[str, str]], raced: Sequence[dict[str, list[float]]], ours: Sequence[str], theirs: Sequence[str]
) -> list[list[Any]]:
    """A row for each cell and each of ours."""
    body = []
    for (dtype, shape), cell in zip(cells, raced, strict=True):
        for mine in (who for who in ours if who in cell):
            found = [ratio(cell[mine], cell[peer]) if peer in cell else None for peer in theirs]
            body.append([f"{dtype} {shape}", mine, *("" if r is None else "{:.2f} [{:.2f}, {:.2f}]".format(*r) for r in found)])
    return body


def summary(
    rows: Sequence[Row], cells: Sequence[tuple[str, str]], raced: Sequence[dict[str, list[float]]], ours: Sequence[str],
    torch_peers: Sequence[str],
) -> list[str]:  # fmt: skip
    """Against the fastest and the leanest PyTorch peer."""
    lines = [""]
    for (dtype, shape), cell in zip(cells, raced, strict=True):
        mine, peers = [who for who in ours if who in cell], [who for who in torch_peers if who in cell]
        if not mine or not peers:
            continue
        best, fastest = (min(group, key=lambda who: np.median(cell[who])) for group in (mine, peers))
        text = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(cell[best], cell[fastest]))
        lines.append(f"- {dtype} {shape}: {best} takes {text} of the time of the fastest PyTorch peer ({fastest})")
        memory = {row["who"]: row["peak_mb"] for row in rows if row["what"] == "warm" and cellof(row) == (dtype, shape)}
        if memory:
            low, lean = (min((who for who in group if who in memory), key=memory.__getitem__) for group in (mine, peers))
            lines.append(f"- {dtype} {shape}: {low} has {memory[low] / memory[lean]:.2f} of the peak memory of {lean}")
    depth: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["what"] == "depth":
            depth.setdefault(row["layers"], {})[row["who"]] = row["seconds"]
    for layers, found in depth.items():
        a, b = found["fmegatron remat"], found["module compiled"]
        lines.append(f"- {layers} layers: first step {a:.1f} s, {a / b:.2f} of the whole-model compile")
    return lines


def cellof(row: Row) -> tuple[str, str]:
    """(dtype, shape) of a row."""
    return row["dtype"], row["shape"]


def measured(
    rows: Sequence[Row], cells: Sequence[tuple[str, str]], raced: Sequence[dict[str, list[float]]]
) -> list[list[Any]]:
    """A row for each participant of each cell."""
    body = []
    for cell, seconds in zip(cells, raced, strict=True):
        for who, found in seconds.items():
            low, mid, high = np.quantile(found, [0.25, 0.5, 0.75]) * 1000
            starts = [row for row in rows if row["what"] in ("first", "warm") and row["who"] == who and cellof(row) == cell]
            start = {row["what"]: row for row in starts}
            first, warm = start["first"], start.get("warm")
            more = [f"{warm[k]:.{d}f}" for k, d in WARM] if warm else [""] * len(WARM)
            cold = [f"{first['seconds']:.1f}", f"{first['cpu_seconds']:.1f}"]
            body.append([*cell, who, f"{mid:.0f}", f"{low:.0f}–{high:.0f}", *cold, *more])
    return body


WARM = (("seconds", 1), ("cpu_seconds", 1), ("peak_mb", 0), ("base_mb", 0))


def table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    text = [[str(x) for x in row] for row in (head, *body)]
    width = [max(len(row[i]) for row in text) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, width, strict=True)) + " |" for row in text]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]]


def machine() -> str:
    """This machine in a line: what is needed to read the numbers."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    known = {dist.name for dist in distributions()}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "jax", "optax") if name in known)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    cpu = names[0] if names else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}; load {load}"


def write(rows: Sequence[Row], command: str, ours: Sequence[str], torch_peers: Sequence[str], to: Path | None) -> None:
    """Print the section, and add it to a file."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    lines = [f"## {now}  `{command}`", "", machine(), "", *sections(rows, ours, torch_peers), ""]
    print("\n".join(lines))
    sys.stdout.flush()
    if to is not None:
        text = to.read_text() if to.exists() else "# Results, the newest last\n\nWritten by the benchmarks themselves.\n"
        to.write_text(text + "\n" + "\n".join(lines))
