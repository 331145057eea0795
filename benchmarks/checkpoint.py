"""The stall of a save: what a background save takes from training, against a save in the foreground; interleaved, medians.

    python benchmarks/checkpoint.py [MB] [rounds]

The state is that of a small GPT with AdamW: many tensors, layer by layer in the file. Prints one JSON line: seconds of a
foreground save, of the call that starts a background save, their ratio in wall time and in the main thread's own CPU time
(which a busy machine and a slow disk do not stretch), and how many copies of the state in memory the call takes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fmegatron import models, optim, tree
from fmegatron.sharding import SINGLE
from fmegatron.train import checkpoint, saving
from fmegatron.train.saver import Saver
from fmegatron.train.state import init

PER_LAYER = 3 * (4 * 256 * 256 + 3 * 256 * 704) * 4  # bytes of a layer: parameters and two moments


def spent(fn: Callable[[], object]) -> tuple[float, float]:
    """Wall time of a call, and this thread's CPU time."""
    start, own = time.perf_counter(), time.thread_time()
    fn()
    return time.perf_counter() - start, time.thread_time() - own


def main(megabytes: int = 256, rounds: int = 7) -> dict[str, float]:
    """Medians over rounds in which both kinds take turns."""
    folder = Path(tempfile.mkdtemp(prefix="fmegatron-"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"embed": 256, "heads": 4, "kv": 4, "mlp": 704, "vocab": 512, "layers": max(megabytes * 2**20 // PER_LAYER, 1)}
    model = models.preset("llama3:debug", **sizes)
    state = tree.map(lambda x: x.to(device), init(model, optim.adamw(1e-4), SINGLE))
    other = tree.map(torch.empty_like, state)
    items = partial(saving.items, model, SINGLE)

    def copy() -> None:
        tree.map(lambda a, b: a.copy_(b), other, state)
        if device == "cuda":
            torch.cuda.synchronize()

    def write(step: int, items: object, meta: object, group: object) -> Path:
        return checkpoint.save(folder, step, items, meta, keep=1)  # type: ignore[arg-type, return-value]

    times: dict[str, list[tuple[float, float]]] = {"copy": [], "front": [], "back": []}
    try:
        with Saver(write, items, background=True) as saver:
            for step in range(rounds + 1):  # the first one touches fresh memory, and is not counted
                times["copy"].append(spent(copy))
                times["front"].append(spent(lambda step=step: write(2 * step, items(state), {}, None)))
                times["back"].append(spent(lambda step=step: saver.save(state, 2 * step + 1, {})))
                saver.wait()
    finally:
        shutil.rmtree(folder)
    wall, own = ({name: statistics.median(x[kind] for x in xs[1:]) for name, xs in times.items()} for kind in (0, 1))
    return {
        "MB": sum(x.nbytes for x in tree.leaves(state)) / 2**20,
        "foreground_s": wall["front"],
        "stall_s": wall["back"],
        "ratio": wall["back"] / wall["front"],
        "cpu_ratio": own["back"] / own["front"],
        "copy_s": wall["copy"],
        "stall_in_copies": wall["back"] / wall["copy"],
    }


if __name__ == "__main__":
    print(json.dumps({name: round(x, 4) for name, x in main(*map(int, sys.argv[1:])).items()}))
