"""The stall of a save: what a background save takes from training, against a save in the foreground; interleaved, medians.

    python benchmarks/checkpoint.py [MB] [rounds]

Prints one JSON line: seconds of a foreground save, of the call that starts a background save, their ratio, and how fast each
is against one copy of the state in memory.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fmegatron.sharding.chunks import whole
from fmegatron.train import checkpoint
from fmegatron.train.saver import Saver


def seconds(fn: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main(megabytes: int = 256, rounds: int = 7) -> dict[str, float]:
    """Medians over rounds in which both kinds take turns."""
    folder = Path(tempfile.mkdtemp(prefix="fmegatron-"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {f"params.layers.{i}.w": whole(torch.randn(megabytes * 1 << 14, device=device)) for i in range(16)}
    other = {key: torch.empty_like(chunks.pieces[0][1]) for key, chunks in state.items()}

    def copy() -> None:
        for key, chunks in state.items():
            other[key].copy_(chunks.pieces[0][1])
        if device == "cuda":
            torch.cuda.synchronize()

    def write(step: int, items: object, meta: object, group: object) -> Path:
        return checkpoint.save(folder, step, items, meta, keep=1)  # type: ignore[arg-type, return-value]

    front, back, whole_copy = [], [], []
    try:
        with Saver(write, background=True) as saver:
            for step in range(rounds + 1):  # the first one touches fresh memory, and is not counted
                whole_copy.append(seconds(copy))
                front.append(seconds(lambda step=step: write(2 * step, state, {}, None)))
                back.append(seconds(lambda step=step: saver.save(state, 2 * step + 1, {})))
                saver.wait()
    finally:
        shutil.rmtree(folder)
    a, b, c = (statistics.median(times[1:]) for times in (front, back, whole_copy))
    return {"MB": megabytes, "foreground_s": a, "stall_s": b, "ratio": b / a, "copy_s": c, "stall_in_copies": b / c}


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
