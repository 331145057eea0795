"""Every preset on every mesh of 8 ranks, pipelines too, against one device: a table, a heat map, the worst figure as last line.

Of the ways of models with experts (ep among the axes) each third.

    python experiments/equivalence/equivalence.py --folder runs/equivalence        (make equivalence)

The ways are shared out among processes of one thread each. Exit status 1 where an error is above 1e-10, or a step sends
anything but what the formula says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.progress import track

from fmegatron.testing.equivalence import Result, Way, compare, expert_ways, ways

TOLERANCE = 1e-10
Table = list[tuple[Way, Result]]


def markdown(results: Table) -> str:
    """The table, a line a case."""
    lines = ["| model | rules | mesh | schedule | microbatches | remat | loss | gradients | after 5 steps | traffic | flips |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for way, found in results:
        errors = " | ".join(f"{x:.1e}" for x in (found.loss, found.gradients, found.parameters))
        traffic = "= formula" if found.traffic else "differs"
        case = way.case
        model = way.model if way.model == "dense" else f"{way.model}, {way.form}"
        row = [model, case.rules, way.mesh, way.schedule, case.m, case.remat, errors, traffic, found.flips]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def heat_map(results: Table, file: Path) -> None:
    """The largest error of each case, rules by meshes; a cross where the traffic is not the formula's."""
    rules, meshes = list(dict.fromkeys(way.case.rules for way, _ in results)), sorted({way.mesh for way, _ in results})
    errors = np.full((len(rules), len(meshes)), np.nan)
    figure, axes = plt.subplots(figsize=(2 + 0.42 * len(meshes), 1.8 + 0.3 * len(rules)), layout="constrained")
    for way, found in results:
        row, column = rules.index(way.case.rules), meshes.index(way.mesh)
        errors[row, column] = np.log10(max(found.worst, 1e-17))
        if not found.traffic:
            axes.plot(column, row, "kx")
    image = axes.imshow(errors, vmin=-17, vmax=-10, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(meshes)), meshes, rotation=90)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_title(f"{len(results)} ways to lay a step over 8 ranks: largest error against one device, fp64")
    figure.colorbar(image, label="log10 of the error, in parts of a tensor's largest entry")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Run, write, and say the worst."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/equivalence"))
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args(arguments)
    matplotlib.use("agg")
    given.folder.mkdir(parents=True, exist_ok=True)
    start, chosen = time.monotonic(), (ways(8) + expert_ways(8)[::3])[:: given.every]
    with multiprocessing.get_context("spawn").Pool(given.workers, torch.set_num_threads, (1,)) as pool:
        found = pool.imap(compare, chosen)
        results = list(zip(chosen, track(found, "ways", len(chosen), disable=not sys.stderr.isatty()), strict=True))
    (given.folder / "equivalence.md").write_text(markdown(results), encoding="utf-8")
    heat_map(results, given.folder / "equivalence.png")
    wrong = [way for way, found in results if not found.traffic]
    worst = max(found.worst for _, found in results)
    print(f"{given.folder}/equivalence.md, equivalence.png, in {time.monotonic() - start:.0f} s")
    for way in wrong:
        print(f"traffic differs: {way}")
    flips = sum(found.flips for _, found in results)
    print(f"{len(results)} ways, traffic differs in {len(wrong)}, {flips} choices flipped, largest error {worst:.1e}")
    return int(bool(wrong) or worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
