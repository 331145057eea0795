"""What monitors cost: steps of one small model with and without them, in turn, ratio first.

    python benchmarks/monitors.py [--rounds 30] [--compile]

bare         the step, and its loss read
default      what a run does unless told otherwise: clock, records to a file, norms each 10th step; a round is 10 steps of each
KIND         one kind of statistics at each step, in each third round, against bare steps beside: what an interval of 1 costs

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


def contestants(folder: Path, compile: bool) -> dict[str, Callable[[], None]]:
    """{name: one step}, each with a state of its own."""
    model, tx = models.preset("llama3:debug", **SIZES), optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-4))
    step = make_step(model, tx, SINGLE, compile=compile, donate=True)
    tokens = torch.randint(0, 4096, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.ones(BATCH, SEQ)}

    def bare() -> Callable[[], None]:
        held = [init(model, tx, SINGLE)]

        def run() -> None:
            held[0], numbers = step(held[0], batch)
            float(numbers["loss"])

        return run

    def monitored(name: str, monitors: Monitors) -> Callable[[], None]:
        held, number = [init(model, tx, SINGLE)], [0]
        meter, writer = Meter(monitors, step, "cpu"), JsonLines(folder / f"{name}.jsonl")
        settings = {"seq": SEQ, "flops": 1e9, "numbers": numbers_of(RunConfig()), "precision": "fp32"}
        book = Book([writer], SINGLE.mesh, **settings)

        def run() -> None:
            number[0] += 1
            meter.begin(number[0])
            held[0], numbers = meter(held[0], batch, {})
            book.add(number[0], Taken(BATCH, BATCH * SEQ), numbers, meter.clock)

        return run

    quiet = {kind: 0 for kind in KINDS}
    alone = {kind: Monitors(**{**quiet, kind: 1}) for kind in KINDS}
    every = {"default": Monitors(), "records": Monitors(**quiet), **alone}
    return {"bare": bare(), **{name: monitored(name, monitors) for name, monitors in every.items()}}


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """The command; returns {name: (ratio to bare, low, high)}."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rounds", type=int, default=30)
    args.add_argument("--compile", action="store_true", help="compiled blocks; each kind that looks into them compiles again")
    options = args.parse_args(argv)
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = contestants(Path(folder), options.compile)
        for run in runs.values():
            run()
        names = list(runs)
        for i in range(options.rounds):
            spent = {"default": 0.0, "bare x 10": 0.0}
            for turn in range(CYCLE):  # the two that are to be compared closest take turns, and who is first changes
                for name in (("bare", "default"), ("default", "bare"))[(i + turn) % 2]:
                    begin = time.perf_counter()
                    runs[name]()
                    spent["bare x 10" if name == "bare" else name] += time.perf_counter() - begin
            others = [name for name in names if name != "default"] if i % 3 == 0 else []  # the whole ends within three minutes
            for name in others[i % len(names) :] + others[: i % len(names)]:
                begin = time.perf_counter()
                runs[name]()
                spent[name] = time.perf_counter() - begin
            for name, x in spent.items():
                seconds.setdefault(name, []).append(x)
    found = {"default": ratio(seconds["default"], seconds["bare x 10"])}
    found |= {name: ratio(seconds[name], seconds["bare"]) for name in names if name not in ("bare", "default")}
    for name, (middle, low, high) in found.items():
        print(f"{name:<12} / bare  {middle:.3f} [{low:.3f}, {high:.3f}]")
    middle = sorted(seconds["bare x 10"])[len(seconds["bare x 10"]) // 2] / CYCLE
    print(f"a bare step takes {middle * 1e3:.1f} ms; the goal: default at most 1.02")
    return found


if __name__ == "__main__":
    main()
