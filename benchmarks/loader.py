"""What the loader costs a training step: the time that a step waits for its batch, as a share of the step.

    python benchmarks/loader.py [--steps 12] [--to benchmarks/RESULTS.md]

Text of 8 million tokens in 20,000 documents of very unequal lengths, and 20,000 conversations packed first-fit; each source
feeds the same training step (quickstart's model, 8 rows of 256 tokens). Stall is the time inside `next(feed)`.

ahead 0      the batch is made in the training thread: the whole cost
ahead 2      the default: two batches made ahead by a thread, which shares this machine's cores with the step
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from report import machine, table  # noqa: E402

from fmegatron import models, optim, train  # noqa: E402
from fmegatron.data import Cycle, Fim, IndexedDataset, IndexedWriter, Mixture, Packed, Rows, Samples, Turns, first_fit  # noqa: E402
from fmegatron.data.batches import batches  # noqa: E402
from fmegatron.sharding import SINGLE  # noqa: E402

SEQ, BATCH, VOCAB = 256, 8, 4096


def write(folder: Path, name: str, lengths: np.ndarray, high: int) -> None:
    """A pair of files of random tokens below `high`."""
    draw = np.random.default_rng(0)
    with IndexedWriter(folder / name, "<u2") as out:
        out.add_documents(draw.integers(0, high, length) for length in lengths)


def sources(folder: Path) -> dict[str, Rows]:
    """The rows that are raced, over files written to `folder`."""
    draw = np.random.default_rng(1)
    write(folder, "text", np.minimum(draw.pareto(1.2, 20_000) * 80 + 2, 100_000).astype(int), VOCAB - 8)
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
    model = models.preset("llama3:quickstart", vocab=VOCAB)
    tx = optim.adamw(1e-3)
    step, state = train.make_step(model, tx, SINGLE), train.init(model, tx, SINGLE, 0)

    def run(batch: dict) -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    return run


def race(rows: Rows, step: Callable[..., None], steps: int) -> dict[int, tuple[float, float]]:
    """{ahead: (mean seconds waited for a batch, mean seconds of a step)}, turn by turn."""
    feeds = {ahead: batches(rows, BATCH, ahead=ahead) for ahead in (0, 2)}
    waited, worked = {ahead: 0.0 for ahead in feeds}, {ahead: 0.0 for ahead in feeds}
    for number in range(steps + 2):
        for ahead, feed in feeds.items():
            start = time.perf_counter()
            batch = next(feed)
            got = time.perf_counter()
            step(batch)
            if number >= 2:  # the first ones open files, and fill what is made ahead
                waited[ahead] += got - start
                worked[ahead] += time.perf_counter() - got
    for feed in feeds.values():
        feed.close()
    return {ahead: (waited[ahead] / steps, worked[ahead] / steps) for ahead in feeds}


def main(argv: list[str] | None = None) -> dict[str, dict[int, tuple[float, float]]]:
    """Race all sources, print the section, and add it to `--to`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        step, found = trainer(), {}
        for name, rows in sources(Path(folder)).items():
            found[name] = race(rows, step, options.steps)
    body = []
    for name, result in found.items():
        for ahead, (waited, worked) in result.items():
            stall, share = f"{1000 * waited:.2f}", f"{100 * waited / (waited + worked):.2f} %"
            body.append([name, ahead, share, stall, f"{1000 * worked:.0f}", f"{BATCH / waited:,.0f}" if ahead == 0 else ""])
    head = ["source", "ahead", "stall", "waited ms", "step ms", "rows/s made"]
    command = f"python benchmarks/loader.py --steps {options.steps}"
    lines = [f"## {datetime.now():%Y-%m-%d %H:%M}  `{command}`", "", machine(), "", *table(head, body), ""]
    print("\n".join(lines))
    if options.to:
        with open(options.to, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))
    return found


if __name__ == "__main__":
    main()
