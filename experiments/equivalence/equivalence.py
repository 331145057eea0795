"""Every preset on every mesh of 8 ranks, pipelines too, against one device: a table, a heat map, the worst figure as last line.

Of the ways of models with experts (ep among the axes) each third.

    python experiments/equivalence/equivalence.py --folder runs/equivalence        (make equivalence)

The ways are shared out among processes of one thread each. Each result goes to results.jsonl as it comes; `--resume` takes what
is there, which is right only while the code is the same. Exit status 1 where an error is above 1e-10, or a step sends
anything but what the formula says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
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


def fields(results: Table) -> dict[tuple[str, str], float]:
    """The largest error of the ways that share a preset and a mesh."""
    worst: dict[tuple[str, str], float] = {}
    for way, found in results:
        at = (way.case.rules, way.mesh)
        worst[at] = max(found.worst, worst.get(at, 0.0))
    return worst


def heat_map(results: Table, file: Path) -> None:
    """The fields, presets by meshes; a cross where the traffic is not the formula's."""
    rules, meshes = list(dict.fromkeys(way.case.rules for way, _ in results)), sorted({way.mesh for way, _ in results})
    errors = np.full((len(rules), len(meshes)), np.nan)
    figure, axes = plt.subplots(figsize=(2 + 0.3 * len(meshes), 2.4 + 0.3 * len(rules)), layout="constrained")
    for (name, mesh), worst in fields(results).items():
        errors[rules.index(name), meshes.index(mesh)] = np.log10(max(worst, 1e-17))
    for way, _ in (row for row in results if not row[1].traffic):
        axes.plot(meshes.index(way.mesh), rules.index(way.case.rules), "kx")
    image = axes.imshow(errors, vmin=-17, vmax=-10, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(meshes)), meshes, rotation=90)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_title(f"{len(results)} ways to lay a step over 8 ranks: largest error against one device, fp64")
    figure.colorbar(image, label="log10 of the error,\nin parts of a tensor's largest entry")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def line(way: str, found: Result) -> str:
    """One result, as JSON."""
    return json.dumps({"way": way} | asdict(found)) + "\n"


def kept(file: Path) -> dict[str, Result]:
    """The results of an earlier run, by way; a line that was cut off is passed over."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row.pop("way"): Result(**row) for row in rows}


def compared(chosen: list[Way], file: Path, workers: int) -> Iterator[Result]:
    """The result of each way in its order, those that `file` lacks computed and written there as they come."""
    before = kept(file)
    missing = [way for way in chosen if str(way) not in before]
    pool = multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,))
    with pool, file.open("w", encoding="utf-8") as out:
        out.writelines(line(way, found) for way, found in before.items())  # without one that was cut off
        coming = pool.imap(compare, missing)
        for way in chosen:
            if str(way) in before:
                yield before[str(way)]
                continue
            found = next(coming)
            out.write(line(str(way), found))
            out.flush()
            yield found


def main(arguments: list[str]) -> int:
    """Run, write, and say the worst."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/equivalence"))
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--resume", action="store_true", help="take the results that the folder has")
    given = parser.parse_args(arguments)
    matplotlib.use("agg")
    given.folder.mkdir(parents=True, exist_ok=True)
    start, chosen = time.monotonic(), (ways(8) + expert_ways(8)[::3])[:: given.every]
    file = given.folder / "results.jsonl"
    if not given.resume:
        file.unlink(missing_ok=True)
    found = compared(chosen, file, given.workers)
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
