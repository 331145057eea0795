"""What tests of several folders share: small models, random batches, what a run has left behind. Imported by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmegatron import data
from fmegatron.models import Model
from fmegatron.models.gpt import Config, gpt


def model(**more: Any) -> Model:
    """Two layers with a vocabulary that tp pads."""
    return gpt(Config(**{"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 16, "vocab": 21, "vocab_pad": 8, **more}))


def batches(steps: int, rows: int = 8, length: int = 8, vocab: int = 21, seed: int = 3) -> Iterator[dict[str, Tensor]]:
    """Random tokens, labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens, labels = (torch.randint(0, vocab, (rows, length), generator=generator) for _ in range(2))
        weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
        yield {"tokens": tokens, "labels": labels, "weights": weights}


def records_of(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, every line of them whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """The tensors of a run's checkpoints, byte by byte."""
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def held_out_nats(model: Model, params: Any, prefix: Path, seq: int) -> tuple[float, int]:
    """(sum of -log p, tokens) of a file of bytes whose documents end with 256, in rows of `seq`, by the logits alone."""
    stream = data.IndexedDataset(prefix).stream.astype("int64")
    documents = (stream == 256).cumsum() - (stream == 256)
    nats, count = 0.0, 0
    for first in range(0, len(stream) - 1, seq):
        tokens = torch.from_numpy(stream[first : first + seq + 1])
        n = len(tokens) - 1
        docs = torch.from_numpy(documents[first : first + n])
        starts = torch.tensor([int((docs < docs[i]).sum()) for i in range(n)])
        logits = model.logits(params, tokens[None, :-1], documents=docs[None], positions=(torch.arange(n) - starts)[None])
        nats += float(torch.nn.functional.cross_entropy(logits[0], tokens[1:], reduction="sum"))
        count += n
    return nats, count
