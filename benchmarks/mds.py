"""MDS shards beside mosaicml-streaming, on the same files of token samples, in one process, in turn.

    python benchmarks/mds.py [--samples 8000] [--rounds 9]

write     samples to a folder of shards, uncompressed (ours also flushes each to the disk)
read      samples at random places, decoded, from a folder of this machine
rows      an epoch in the shuffled order as training rows: theirs through its iterator and then cut to tokens and labels of
          int64; ours with weights, positions and documents too, as a training run gets them
order     the shuffled order of an epoch of 2 million samples in 2,000 shards, py1e, 8 canonical nodes
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "tests/data/mds"))

import numpy as np  # noqa: E402
from oracle import stand_ins  # noqa: E402  empty modules for torchvision, which mosaicml-streaming imports

stand_ins()
import transformers  # noqa: E402, F401
from report import machine, ratio, table  # noqa: E402
from streaming import MDSWriter as TheirWriter  # noqa: E402
from streaming import StreamingDataset  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402

from fmegatron.data.mds import MDSWriter, Order, Stream, StreamRows, Streams, shuffle  # noqa: E402

SEQ, BATCH = 1024, 8
COLUMNS = {"tokens": "ndarray:uint16"}


def contestants(folder: Path, count: int) -> dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]]:
    """{what: (samples in a round, ours, theirs)}."""
    tokens = np.random.default_rng(0).integers(0, 50_000, (count, SEQ + 1)).astype(np.uint16)
    places = np.random.default_rng(1).permutation(count).tolist()
    sizes = np.random.default_rng(2).integers(900, 1100, 2000)

    def write(writer: Any, out: Path, **options: Any) -> None:
        shutil.rmtree(out, ignore_errors=True)
        with writer(columns=COLUMNS, out=str(out), size_limit=2**22, **options) as file:
            for row in tokens:
                file.write({"tokens": row})

    write(MDSWriter, folder / "data")
    streams = Streams([Stream(str(folder / "data"))])
    theirs = StreamingDataset(local=str(folder / "data"), batch_size=BATCH, shuffle=True, num_canonical_nodes=1)
    rows = StreamRows(streams, Order(num_canonical_nodes=1), SEQ, BATCH, vocab_size=50_000)

    def their_rows() -> int:
        total = 0
        for sample in theirs:
            wide = sample["tokens"].astype(np.int64)
            total += len({"tokens": wide[:-1], "labels": wide[1:]}["labels"])
        return total

    return {
        "write": (count, lambda: write(MDSWriter, folder / "a"), lambda: write(TheirWriter, folder / "b")),
        "read": (
            count,
            lambda: sum(len(streams.sample(i)["tokens"]) for i in places),
            lambda: sum(len(theirs[i]["tokens"]) for i in places),
        ),
        "rows": (count, lambda: sum(len(rows.row(i)["labels"]) for i in range(count)), their_rows),
        "order": (
            int(sizes.sum()),
            lambda: shuffle("py1e", sizes, 8, 9, 1).sum(),
            lambda: get_shuffle("py1e", sizes, 8, 9, 1).sum(),
        ),
    }


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """The command; returns {what: (seconds ours / theirs, low, high)}."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--samples", type=int, default=8000)
    args.add_argument("--rounds", type=int, default=9)
    args.add_argument("--save", type=Path, default=None)
    options = args.parse_args(argv)
    found, body = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for what, (count, ours, theirs) in contestants(Path(folder), options.samples).items():
            assert ours() == theirs(), f"{what}: the contestants read different things"
            seconds: list[list[float]] = [[], []]
            for turn in range(options.rounds):
                for who in (0, 1) if turn % 2 else (1, 0):
                    begin = time.perf_counter()
                    (ours, theirs)[who]()
                    seconds[who].append(time.perf_counter() - begin)
            found[what] = ratio(seconds[1], seconds[0])
            rates = [f"{count / sorted(each)[len(each) // 2]:,.0f}" for each in seconds]
            body.append([what, "{:.2f} [{:.2f}, {:.2f}]".format(*found[what]), *rates])
    lines = [f"## {time.strftime('%Y-%m-%d %H:%M')}  `python benchmarks/mds.py`", "", machine(), ""]
    lines += [f"Samples of {SEQ + 1} uint16 tokens. Samples a second, ours / theirs (above 1 is faster), median of rounds "
              "[95 % interval]:", ""]  # fmt: skip
    lines += [*table(["", "ours / theirs", "ours samples/s", "mosaicml-streaming samples/s"], body), ""]
    print("\n".join(lines))
    if options.save is not None:
        options.save.write_text(options.save.read_text() + "\n" + "\n".join(lines))
    return found


if __name__ == "__main__":
    main()
