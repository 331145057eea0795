"""Optimizer steps against the machine's copy and torch's fused AdamW, in one process, by turns.

    python benchmarks/optim.py [--elements 4000000] [--rounds 15] [--seconds 60] [--to benchmarks/RESULTS.md]

A step's bytes are what it must read and write at least: the gradient once, parameter and each slot twice, fp32. Each round runs
copy, torch's AdamW(fused=True), each of ours (compiled and donating), and beside it its peer in torch.optim, fused where it
can be, once, in turn. Compiling is what takes long: ours that are not compiled after --seconds are left out, in a line. Muon
is not among the default ones: its products take seconds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from report import machine, ratio, table  # noqa: E402

from fmegatron import optim, tree  # noqa: E402

OURS = ("adamw", "adam", "sgd", "lion", "qhadamw", "adopt", "aggmo_adopt", "adafactor")
PEERS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9, "fused": True}, "adam": {"fused": True}, "adamw": {"fused": True},
                                    "adafactor": {}, "muon": {}}  # and what torch.optim's is given
OWN: dict[str, dict[str, Any]] = {"aggmo_adopt": {"betas": (0.9, 0.99, 0.95), "vs": (0.5, 0.3)}, "sgd": {"momentum": 0.9},
                                  "muon": {"dtype": torch.bfloat16}}
COLUMNS = 512


Contestant = tuple[Callable[[], object], int]


def contestants(elements: int, names: Sequence[str] = OURS) -> dict[str, Contestant]:
    """{name: (one step, its bytes)}; each holds memory of its own."""
    shape = (max(elements // COLUMNS // 4, 1), COLUMNS)

    def draw() -> dict[str, torch.Tensor]:
        return {f"w{i}": torch.randn(shape) * 0.02 for i in range(4)}

    size = 4 * 4 * shape[0] * shape[1]
    source, target = torch.randn(size // 4), torch.empty(size // 4)
    found = {"copy": (lambda: target.copy_(source), 2 * size), "torch AdamW": theirs("adamw", draw)}
    for name in names:
        found[name] = ours(name, draw)
        if name in PEERS and name != "adamw":
            found[peer(name)] = theirs(name, draw)
    return found


def peer(name: str) -> str:
    """What torch's optimizer is called here."""
    return "torch " + {"sgd": "SGD", "adamw": "AdamW"}.get(name, name.capitalize())


def theirs(name: str, draw: Callable[[], dict[str, torch.Tensor]]) -> Contestant:
    """torch.optim's step, and its bytes."""
    weights = [torch.nn.Parameter(x) for x in draw().values()]
    for w in weights:
        w.grad = torch.randn_like(w)
    made = getattr(torch.optim, peer(name).split()[1])(weights, lr=1e-3, **PEERS[name])
    made.step()
    slots = [x for state in made.state.values() for x in state.values() if x.dim()]
    return made.step, 3 * _bytes(weights) + 2 * _bytes(slots)


def ours(name: str, draw: Callable[[], dict[str, torch.Tensor]]) -> Contestant:
    """A compiled, donating step, and its bytes."""
    tx = getattr(optim, name)(1e-3, **OWN.get(name, {}))
    step = optim.fuse(tx)
    params, grads = draw(), draw()
    held = [params, tx.init(params)]
    moved = 3 * _bytes(params) + 2 * _bytes(held[1])

    def run() -> None:
        held[:] = step(grads, held[1], held[0], donate=True)

    return run, moved


def compiled(runs: dict[str, Contestant], limit: float) -> dict[str, Contestant]:
    """Those whose first step was begun within so many seconds, each run once."""
    begin, found = time.perf_counter(), {}
    for name, run in runs.items():
        start = time.perf_counter()
        if len(found) >= 2 and start - begin > limit:  # copy and torch's are what ours are measured by
            print(f"{name} is left out: {limit:g} s for compiling are over", flush=True)
            continue
        run[0]()
        found[name] = run
        print(f"{name}: first step {time.perf_counter() - start:.1f} s", flush=True)
    return found


def _bytes(values: object) -> int:
    return sum(x.numel() * x.element_size() for x in tree.leaves(values))


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Race, print, and add the tables to a file; {name: ratio of seconds to its peer in torch.optim, else to torch's AdamW}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="for compiling, all together")
    parser.add_argument("--only", default=",".join(OURS))
    parser.add_argument("--note", default="one thread", help="what a reader must know of the machine's state")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = compiled(contestants(args.elements, args.only.split(",")), args.seconds)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(args.rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin = time.perf_counter()
            runs[name][0]()
            if i >= 2:
                seconds[name].append(time.perf_counter() - begin)
    rate = {name: [runs[name][1] / s for s in found] for name, found in seconds.items()}
    peers = {name: peer(name) if peer(name) in runs else "torch AdamW" for name in names}
    against = {name: ratio(seconds[name], seconds[peers[name]]) for name in names}
    body = []
    for name in names[1:]:
        cells = [against[name], ratio(seconds[name], seconds["torch AdamW"]), ratio(rate[name], rate["copy"])]
        said = ["{:.2f} [{:.2f}, {:.2f}]".format(*cell) for cell in cells]
        said[0] = said[0] if name in PEERS else ""
        body.append([name, *said, f"{np.median(seconds[name]) * 1e3:.1f}", f"{np.median(rate[name]) / 1e9:.1f}"])
    head = ["optimizer", "time / its peer", "time / torch AdamW", "bytes a second / copy", "ms", "GB/s"]
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    given = f"--elements {args.elements} --rounds {args.rounds} --only {args.only}"
    lines = [f"## {now}  `python benchmarks/optim.py {given}`", "", machine(), "",
             f"{args.elements:,} fp32 elements in four matrices; medians over rounds [95 % interval]; {args.note}:", "",
             *table(head, body), ""]
    print("\n".join(lines))
    if args.to:
        args.to.write_text(args.to.read_text() + "\n" + "\n".join(lines))
    return against


if __name__ == "__main__":
    main()
