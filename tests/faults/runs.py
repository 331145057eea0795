"""Small runs for the tests of faults: a configuration, rows (bad ones too), child processes, and what a run leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch._dynamo  # what several processes import when they first talk: once, here

from fmegatron import config
from fmegatron.train import loop
from fmegatron.train.checkpoint import latest

FORK = multiprocessing.get_context("fork")  # imports are done: quick
SIZES = {"layers": 1, "embed": 16, "heads": 2, "kv": 2, "mlp": 16, "vocab": 32, "context": 16}
TIMES = ("tokens_per_second", "tflops", "seconds", "memory", "mfu", "time", "goodput")  # and what begins so


class Words:
    """Rows of a small language; of the samples in `nan` the weights are nan, those in `strange` are of another language."""

    def __init__(self, nan: tuple[int, ...] = (), strange: tuple[int, ...] = ()) -> None:
        self.nan, self.strange = nan, strange

    def row(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(number)
        tokens = (rng.integers(0, 4) + np.arange(9) * rng.integers(1, 3)) % 8
        if number in self.strange:
            tokens = 31 - tokens
        weights = np.ones(8, np.float32) * (np.nan if number in self.nan else 1)
        row = {"tokens": tokens[:-1], "labels": tokens[1:], "weights": weights, "positions": np.arange(8)}
        return row | {"documents": np.zeros(8, np.int64), "sample": np.array(number)}


def table(folder: Path, **groups: dict[str, Any]) -> dict[str, Any]:
    """A run of 12 steps of 4 samples; `groups` over it."""
    base: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": {"preset": "llama3:debug", "overrides": SIZES},
        "data": {"source": "runs:Words", "seq": 8},
        "training": {"steps": 12, "global_batch": 4, "compile": False},
        "optimizer": {"lr": 1e-2, "warmup": 2, "schedule": "constant"},
        "checkpoint": {"interval": 3, "keep": 3},
        "validation": {"interval": 0},
    }
    return {name: base.get(name, {}) | groups.get(name, {}) for name in base | groups}


def train(folder: Path, **groups: dict[str, Any]) -> None:
    """Run it here."""
    torch.set_num_threads(1)
    loop.run(config.load("debug", table(folder, **groups)))


def start(folder: Path, environment: Mapping[str, str] = MappingProxyType({}), **groups: dict[str, Any]) -> Any:
    """Start it in a process of its own, whose output goes to DIR.log."""

    def child() -> None:
        os.environ.update(environment)
        speak(folder)
        train(folder, **groups)

    process = FORK.Process(target=child)
    process.start()
    return process


def speak(folder: Path) -> None:
    """This process and those that it starts write to DIR.log."""
    sys.stdout = sys.stderr = open(f"{folder}.log", "a", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)


def ranks(folder: Path, count: int = 2, **groups: dict[str, Any]) -> list[Any]:
    """Start it on so many processes, one machine's, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    groups = {"mesh": {"dp": count}} | groups
    return [start(folder, where | {"RANK": str(i), "LOCAL_RANK": str(i)}, **groups) for i in range(count)]


def joined(processes: list[Any]) -> list[int]:
    """Their exit codes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def curve(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote of each step, less the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [{name: x for name, x in record.items() if not name.startswith(TIMES)} for record in records]


def digest(folder: Path) -> dict[str, Any]:
    """The hashes of the last checkpoint's files: parameters, optimizer state, counters."""
    step = latest(folder / "checkpoints")
    manifest = json.loads((step / "manifest.json").read_text())
    return {"step": step.name, "files": manifest["files"], "watch": manifest["meta"]["watch"]}


def same_run(a: Path, b: Path) -> None:
    """Bit for bit the same loss curve and the same last state."""
    assert curve(a) == curve(b)
    assert digest(a) == digest(b)
