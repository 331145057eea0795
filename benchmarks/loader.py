"""What the loader costs a training step: the time that a step waits for its batch, as a share of the step.

    python benchmarks/loader.py [--seconds 8] [--ahead 2] [--workers 1] [--only text] [--to benchmarks/RESULTS.md]

Text of 2 million tokens in 20,000 documents of very unequal lengths, and 20,000 conversations packed first-fit; each source
feeds the same training step for so many seconds, in turn with the same step on a batch that is in memory already.

waited       inside `next(feed)`, by step: stall = waited / (waited + step), medians and the mean over all steps
step         fed / in memory: what the loader's thread takes from the step by running beside it
made         a batch made in the training thread: what is hidden where it is made ahead
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from report import machine, ratio, table  # noqa: E402

from fmegatron import config as configs  # noqa: E402
from fmegatron import models, optim, train  # noqa: E402
from fmegatron.data import Cycle, Fim, IndexedDataset, IndexedWriter, Mixture, Packed, Rows, Samples, Turns, first_fit  # noqa: E402
from fmegatron.data.batches import batches  # noqa: E402
from fmegatron.sharding import SINGLE  # noqa: E402

SEQ, BATCH, VOCAB = 128, 2, 4096  # of quickstart's model a step of about 50 ms on a core of a server


def write(folder: Path, name: str, lengths: np.ndarray, high: int) -> None:
    """A pair of files of random tokens below `high`."""
    draw = np.random.default_rng(0)
    with IndexedWriter(folder / name, "<u2") as out:
        out.add_documents(draw.integers(0, high, length) for length in lengths)


def sources(folder: Path) -> dict[str, Rows]:
    """The rows that are raced, over files written to `folder`."""
    draw = np.random.default_rng(1)
    write(folder, "text", np.minimum(draw.pareto(1.2, 20_000) * 20 + 2, 100_000).astype(int), VOCAB - 8)
    lengths = draw.integers(20, SEQ, 20_000)
    write(folder, "tokens", lengths, VOCAB)
    write(folder, "targets", lengths, 2)
    text, turns = Samples(IndexedDataset(folder / "text"), SEQ, 0, reset_positions=True), Turns(folder, SEQ)
    packed = Cycle(Packed(turns, first_fit(turns.lengths, SEQ, 0), SEQ), 0)
    fim = Fim(text, 0, VOCAB - 1, VOCAB - 2, VOCAB - 3, 0)
    return {"text": text, "packed conversations": packed, "fill in the middle": fim,
            "mixture of the three": Mixture([text, packed, fim], {0: (3, 1, 1), 1000: (1, 1, 1)})}  # fmt: skip


def trainer() -> Callable[..., None]:
    """A training step on a batch; it waits until the step is done."""
    model = models.preset("llama3:quickstart", **configs.load("quickstart").model.overrides, vocab=VOCAB)
    tx = optim.adamw(1e-3)
    step, state = train.make_step(model, tx, SINGLE), train.init(model, tx, SINGLE, 0)

    def run(batch: dict) -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    return run


class Found(NamedTuple):
    """Seconds of a source: each wait, each fed step, each step in memory; and of a batch made in the training thread."""

    waited: list[float]
    fed: list[float]
    memory: list[float]
    made: float

    @property
    def stall(self) -> float:
        """The share of all the fed time that was waiting."""
        return sum(self.waited) / (sum(self.waited) + sum(self.fed))


def race(rows: Rows, step: Callable[..., None], seconds: float, ahead: int, workers: int) -> Found:
    """Fed steps and steps on a batch in memory, turn by turn, for so long."""
    alone = batches(rows, BATCH, ahead=0)
    kept, count = next(alone), 20
    start = time.perf_counter()
    for _ in range(count):
        next(alone)
    made = (time.perf_counter() - start) / count
    feed, found = batches(rows, BATCH, ahead=ahead, workers=workers), Found([], [], [], made)
    for _ in range(3):  # files are opened, and what is made ahead is filled
        step(next(feed))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        batch = next(feed)
        got = time.perf_counter()
        step(batch)
        done = time.perf_counter()
        step(kept)
        found.waited.append(got - start)
        found.fed.append(done - got)
        found.memory.append(time.perf_counter() - done)
    feed.close()
    return found


def line(name: str, found: Found) -> list[str]:
    """A row of the table."""
    share, low, high = ratio(found.fed, found.memory)
    ms = [1000 * x for x in (np.median(found.waited), max(found.waited), np.median(found.fed), found.made)]
    waited, most, fed, made = (f"{x:.2f}" for x in ms)
    return [name, f"{100 * found.stall:.2f} %", waited, most, fed, f"{share:.3f} [{low:.3f}, {high:.3f}]", made]


def main(argv: list[str] | None = None) -> dict[str, Found]:
    """Race all sources, print each as it ends, then the section, and add it to `--to`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--ahead", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", help="one of the sources")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args(argv)
    found, body = dict[str, Found](), []
    head = ["source", "stall", "waited ms", "at most", "step ms", "step, fed / in memory", "made ms"]
    with tempfile.TemporaryDirectory() as folder:
        step = trainer()
        for name, rows in sources(Path(folder)).items():
            if options.only in (None, name):
                found[name] = race(rows, step, options.seconds, options.ahead, options.workers)
                body.append(line(name, found[name]))
                print(", ".join(f"{what} {value}" for what, value in zip(head, body[-1], strict=True)), flush=True)
    command = f"python benchmarks/loader.py --seconds {options.seconds:g} --ahead {options.ahead} --workers {options.workers}"
    lines = [f"## {datetime.now():%Y-%m-%d %H:%M}  `{command}`", "", machine(), "", *table(head, body), ""]
    print("\n".join(lines))
    if options.to:
        with open(options.to, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))
    return found


if __name__ == "__main__":
    main()
