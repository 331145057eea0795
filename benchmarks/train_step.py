"""Training steps side by side with peers: same shape, same weights, same tokens, one run, interleaved rounds.

    python benchmarks/train_step.py [--quick] [--only fp32,small] [--rounds 20] [--out FILE]

steps     for each dtype and shape: each participant in its own process, told to step in turn; ratios are medians over
          rounds of times of the same round, with 95 % intervals by bootstrap over rounds
first     the start of those processes, from fork to the end of the first step, imports included, with empty caches; then
          again with the caches they left (warm), where peak resident memory is read after three steps
depth     first steps at 2, 4 and 16 layers: ours, compiled a kind of block at a time, against a module compiled whole

Ratios are printed first; rows as measured go to --out (JSON), a section to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
from peers import PEERS, TORCH  # noqa: E402
from report import write  # noqa: E402
from shapes import Shape, shape_of  # noqa: E402
from worker import Worker  # noqa: E402

Row = dict[str, Any]
OURS = ("fmegatron", "fmegatron remat", "fmegatron eager")
AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # |loss - median loss| at step 1


def race(dtype: str, name: str, shape: Shape, rounds: int, who: list[str], scratch: Path, warm: bool) -> list[Row]:
    """Rows of one dtype and shape: all who take part, side by side."""
    cell = {"dtype": dtype, "shape": name, "layers": shape.layers}
    rows: list[Row] = []
    caches = {peer: scratch / f"{dtype}-{name}-{peer.replace(' ', '-')}" for peer in who}
    workers = {}
    for peer in who:
        say(f"{dtype} {name}: {peer}, first step")
        workers[peer] = Worker(peer, shape, dtype, caches[peer])
        rows.append({**cell, "what": "first", "who": peer, **workers[peer].first})
    check_agreement(dtype, {peer: worker.first["loss"] for peer, worker in workers.items()})
    for worker in workers.values():
        worker.step()  # the second step may still compile or touch memory for the first time
    say(f"{dtype} {name}: {rounds} rounds")
    for i in range(rounds):
        for peer in who[i % len(who) :] + who[: i % len(who)]:
            rows.append({**cell, "what": "step", "who": peer, "round": i, **workers[peer].step()})
    for worker in workers.values():
        worker.stop()
    for peer in who if warm else ():
        say(f"{dtype} {name}: {peer}, warm start")
        rows.append({**cell, "what": "warm", "who": peer, **fresh(peer, shape, dtype, caches[peer])})
        shutil.rmtree(caches[peer], ignore_errors=True)
    return rows


def fresh(peer: str, shape: Shape, dtype: str, cache: Path) -> Row:
    """A process that starts, steps three times and ends."""
    worker = Worker(peer, shape, dtype, cache)
    worker.step(), worker.step()
    return {**worker.first, **worker.stop()}


def deep(depths: list[int], shape: Shape, scratch: Path) -> list[Row]:
    """First steps with empty caches at several depths, fp32."""
    rows: list[Row] = []
    for layers in depths:
        for peer in ("fmegatron remat", "module compiled"):
            say(f"{layers} layers: {peer}, first step")
            worker = Worker(peer, replace(shape, layers=layers), "fp32", scratch / f"depth-{layers}-{peer.replace(' ', '-')}")
            rows.append({"what": "depth", "who": peer, "dtype": "fp32", "layers": layers, **worker.first})
            worker.stop()
    return rows


def check_agreement(dtype: str, losses: dict[str, float]) -> None:
    """Same weights and tokens give the same first loss, or the numbers below would compare different things."""
    middle = float(np.median(list(losses.values())))
    off = {peer: loss for peer, loss in losses.items() if not abs(loss - middle) <= AGREE[dtype]}
    if off:
        raise SystemExit(f"losses of the first step do not agree in {dtype}: {losses}")


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> list[Row]:
    """The command; returns the rows."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a tiny shape and few rounds: whether it runs, not how fast")
    args.add_argument("--only", default="", help="comma-separated: fp32, bf16, small, wide, depth; and names of participants")
    args.add_argument("--rounds", type=int, default=20)
    args.add_argument("--out", type=Path, help="rows as measured, JSON")
    args.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"), help="where a section is added")
    given = args.parse_args(argv)
    only = {word.strip() for word in given.only.split(",") if word.strip()}
    known = {"fp32", "bf16", "small", "wide", "tiny", "depth", *PEERS}
    if only - known:
        args.error(f"--only does not know {', '.join(sorted(only - known))}: use {', '.join(sorted(known))}")
    pick = lambda names: [n for n in names if n in only] or list(names)  # noqa: E731
    shapes = ["tiny"] if given.quick else pick(["small", "wide"])
    rounds = min(given.rounds, 3) if given.quick else given.rounds
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fmegatron-bench-") as scratch:
        if only != {"depth"}:
            for name in shapes:
                for dtype in pick(["fp32", "bf16"]):
                    rows += race(dtype, name, shape_of(name, dtype), rounds, pick(PEERS), Path(scratch), warm=not given.quick)
        if "depth" in only or not only:
            rows += deep([2] if given.quick else [2, 4, 16], shape_of(shapes[0], "fp32"), Path(scratch))
    if given.out:
        given.out.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    command = " ".join(["python benchmarks/train_step.py", *(sys.argv[1:] if argv is None else argv)])
    write(rows, command, OURS, TORCH, None if given.quick else given.results)
    return rows


if __name__ == "__main__":
    main()
