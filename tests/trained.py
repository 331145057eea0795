"""Runs of `fmegatron train` on real text, here and on four processes, and what their checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pieces import records_of
from processes import torchrun

from fmegatron.sharding.chunks import whole
from fmegatron.train import checkpoint

RANKS = Path(__file__).parent / "distributed" / "train_ranks.py"
SIZES = {"layers": 4, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64, "tied": True}


def words(text: Path, folder: Path, mesh: str, more: Mapping[str, Any], start: Path | None = None) -> str:
    """The command of a run of four steps. mesh: options of its own; more: others by key; start: a checkpoint to resume."""
    options = {"data.source": text / "train", "data.valid": text / "train", "data.tokenizer": "byte", "data.seq": 16}
    options |= {f"model.overrides.{key}": str(value).lower() for key, value in SIZES.items()}
    options |= {"training.steps": 4, "optimizer.schedule": "constant", "checkpoint.interval": 2, "checkpoint.keep": 0}
    options |= {"training.global_batch": 16, "training.compile": "false", "log.prompt": "''"}
    options |= {"validation.interval": 2, "validation.batches": 1, "run.dir": folder, **more}
    options |= {"checkpoint.resume": start} if start else {}
    return " ".join(["train debug", *(f"--{key}={value}" for key, value in options.items()), mesh])


def on_four_processes(commands: Sequence[str], timeout: float) -> str:
    """Run the commands one after the other on the same processes; what they print."""
    return torchrun(4, RANKS, *commands, timeout=timeout)


def step(folder: Path, number: int) -> Path:
    """The checkpoint of a step."""
    return folder / "checkpoints" / f"step-{number:08d}"


def tensors(found: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, whole."""
    wanted = {key: whole(torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in checkpoint.tensors(found).items()}
    checkpoint.load(found, wanted)
    return {key: chunks.pieces[0][1] for key, chunks in wanted.items()}


def records(folder: Path, key: str) -> list[float]:
    """A number of each step that has it."""
    return [record[key] for record in records_of(folder) if record.get(key) is not None]


def assert_bitwise(folder: Path, other: Path) -> None:
    """Two runs end in the same bits."""
    one, found = tensors(step(folder, 4)), tensors(step(other, 4))
    assert one.keys() == found.keys()
    assert [key for key in one if not torch.equal(one[key], found[key])] == []


def assert_alike(folder: Path, other: Path) -> None:
    """A run on a mesh ends where one device's (`other`) does, and its numbers on the way are those."""
    one, found = tensors(step(other, 4)), tensors(step(folder, 4))
    assert {key: x.shape for key, x in one.items()} == {key: x.shape for key, x in found.items()}
    for key, x in one.items():
        torch.testing.assert_close(found[key], x, atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    for key in ("loss", "grad_norm", "heldout_loss"):
        numbers = records(folder, key)
        assert numbers and numbers == pytest.approx(records(other, key)[-len(numbers) :], rel=1e-4)
