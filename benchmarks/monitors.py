"""What monitors cost: steps of one small model with and without them, in turn, ratio first.

    python benchmarks/monitors.py [--rounds 30] [--compile]

bare         the step, and its loss read
default      what a run does unless told otherwise: clock, records to a file, norms each 10th step. A round takes two steps
             without norms and one with them, each beside a bare one, and weighs them 9 to 1
KIND         one kind of statistics at each step, in each third round, against the round's bare steps: an interval of 1

A row is printed each five rounds: wall time, and the process's CPU time, which a busy machine stretches less.

The model is the quickstart's (3.2M parameters, 4 x 128 tokens a step), so that parameters weigh much against tokens: the
passes over parameters that norms are cost the more the smaller the batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from report import ratio  # noqa: E402

from fmegatron import models, optim  # noqa: E402
from fmegatron.config import RunConfig  # noqa: E402
from fmegatron.config.monitors import Monitors  # noqa: E402
from fmegatron.sharding import SINGLE  # noqa: E402
from fmegatron.train.book import Book, Taken  # noqa: E402
from fmegatron.train.meter import KINDS, Meter  # noqa: E402
from fmegatron.train.metrics import JsonLines  # noqa: E402
from fmegatron.train.optimizers import numbers_of  # noqa: E402
from fmegatron.train.state import init  # noqa: E402
from fmegatron.train.step import make_step  # noqa: E402

SIZES = {"layers": 4, "embed": 192, "heads": 6, "kv": 2, "mlp": 512, "vocab": 4096, "tied": False}
BATCH, SEQ, CYCLE = 4, 128, 10


def contestants(folder: Path, compile: bool) -> dict[str, Callable[..., None]]:
    """{name: one step}, all of one state in turn, so that none has better memory; of those that measure run(True) is one that
    intervals fall on."""
    model, tx = models.preset("llama3:debug", **SIZES), optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-4))
    step = make_step(model, tx, SINGLE, compile=compile, donate=True)
    tokens = torch.randint(0, 4096, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.ones(BATCH, SEQ)}

    held = [init(model, tx, SINGLE)]

    def bare(due: bool = False) -> None:
        held[0], numbers = step(held[0], batch)
        float(numbers["loss"])

    def monitored(name: str, monitors: Monitors) -> Callable[..., None]:
        number = [0]
        meter, writer = Meter(monitors, step, "cpu"), JsonLines(folder / f"{name}.jsonl")
        settings = {"seq": SEQ, "flops": 1e9, "numbers": numbers_of(RunConfig()), "precision": "fp32"}
        book = Book([writer], SINGLE.mesh, **settings)

        def run(due: bool = False) -> None:
            number[0] += CYCLE - number[0] % CYCLE if due else 2 if number[0] % CYCLE == CYCLE - 1 else 1
            meter.begin(number[0])
            held[0], numbers = meter(held[0], batch, {})
            book.add(number[0], Taken(BATCH, BATCH * SEQ), numbers, meter.clock)

        return run

    quiet = {kind: 0 for kind in KINDS}
    alone = {kind: Monitors(**{**quiet, kind: 1}) for kind in KINDS}
    every = {"default": Monitors(), "records": Monitors(**quiet), **alone}
    return {"bare": bare, **{name: monitored(name, monitors) for name, monitors in every.items()}}


Times = dict[str, tuple[list[float], list[float]]]  # by name: wall and CPU seconds, round by round


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """The command; returns {name: (ratio of wall time to bare, low, high)}."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=30)
    args.add_argument("--compile", action="store_true", help="compiled blocks; each kind that looks into them compiles again")
    options = args.parse_args(argv)
    torch.set_num_threads(1)
    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = contestants(Path(folder), options.compile)
        for run in runs.values():
            run(True)
        for i in range(options.rounds):
            race(runs, times, i, [name for name in runs if name not in ("bare", "default")] if i % 3 == 0 else [])
            if i % 5 == 4 and i + 1 < options.rounds:
                print(row("default", times, i + 1), flush=True)
    for name in times:
        if name != "bare":
            print(row(name, times, len(times[name][0])), flush=True)
    print(f"a bare step takes {np.median(times['bare'][0]) * 1e3:.1f} ms; the goal: default at most 1.02")
    return {name: ratio(wall, against(times, name)[0]) for name, (wall, _) in times.items() if name != "bare"}


def race(runs: dict[str, Callable[..., None]], times: Times, number: int, others: list[str]) -> None:
    """One round: default beside bare, who is first changes; then one step of each other kind."""
    spent = {name: (0.0, 0.0) for name in ("default", "bare", *others)}
    for turn, (due, weight) in enumerate(((False, 0.45), (True, 0.1), (False, 0.45))):
        for name in (("bare", "default"), ("default", "bare"))[(number + turn) % 2]:
            wall, own = timed(runs[name], due)
            share = weight if name == "default" else 1 / 3
            spent[name] = spent[name][0] + share * wall, spent[name][1] + share * own
    for name in others[number % len(others) :] + others[: number % len(others)] if others else ():
        spent[name] = timed(runs[name], True)
    for name, pair in spent.items():
        for kept, x in zip(times.setdefault(name, ([], [])), pair, strict=True):
            kept.append(x)


def timed(run: Callable[..., None], due: bool) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    wall, own = time.perf_counter(), time.process_time()
    run(due)
    return time.perf_counter() - wall, time.process_time() - own


def against(times: Times, name: str) -> tuple[list[float], list[float]]:
    """The bare steps of the rounds in which `name` ran."""
    wall, own = times["bare"]
    every = 1 if len(times[name][0]) == len(wall) else 3
    return wall[::every], own[::every]


def row(name: str, times: Times, rounds: int) -> str:
    """A line of results."""
    (wall, own), bare = times[name], against(times, name)
    (middle, low, high), cpu = ratio(wall, bare[0]), ratio(own, bare[1])
    said = f"{middle:.3f} [{low:.3f}, {high:.3f}]   CPU {cpu[0]:.3f} [{cpu[1]:.3f}, {cpu[2]:.3f}]"
    return f"{name:<12} / bare  {said}   {rounds} rounds"


if __name__ == "__main__":
    main()
