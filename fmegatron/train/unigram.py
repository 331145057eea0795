"""The loss of a model that knows nothing but how often each token comes: what the others' loss is to be measured against.

    unigram = mean over labels of -log p(label)        p = counts / sum of counts; where that is 0, the least normal number

It is a further term of the model's loss, of weight 0: so it is averaged over the tokens that the loss counts, on any mesh, in
any pipeline, and on held-out text apart from training text. The loss minus it is what has been learnt beyond frequencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmegatron import data
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Model
from fmegatron.models.model import Node, Values
from fmegatron.sharding import Sharding
from fmegatron.train.source import Source
from fmegatron.train.together import gloo, on_first

PIECE = 1 << 24  # tokens counted at a time


def unigram_of(c: RunConfig, source: Source, model: Model) -> tuple[Model, dict[str, float]]:
    """The model with the term that monitors.unigram asks for, and the weights of its terms. Raises ConfigError."""
    if c.monitors.unigram is None:
        return model, {}
    if model.output is None or c.model.loss:
        raise ConfigError("monitors.unigram goes with the cross-entropy of a language model: this run's loss is its own")
    vocab = getattr(model.config, "vocab", None) or (source.corpus.vocab_size if source.corpus is not None else 0)
    where = c.monitors.unigram
    counts = on_first(lambda: counts_of(where, source), gloo())  # the others read no text
    return with_unigram(model, probabilities(counts, vocab)), {"unigram": 0.0}


def counts_of(where: str, source: Source) -> dict[int, float]:
    """{token: how often it comes} in the training files, a blend's by their weights, or as a JSON file says."""
    if where != "text":
        try:
            found = json.loads(Path(where).read_text(encoding="utf-8"))
            return {int(token): float(n) for token, n in found.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"monitors.unigram = {where}: text, or a JSON file of counts by token: {error}") from None
    corpus = source.corpus
    files: Any = corpus.train if isinstance(corpus, data.Corpus) else None
    if files is None or "mock" in files:
        raise ConfigError("monitors.unigram = text counts token files, and this run has none: name a JSON file of counts")
    weights = dict(files) if isinstance(files, Mapping) else {files: None}
    total = np.zeros(0)
    for prefix, weight in weights.items():
        stream = data.IndexedDataset(prefix).stream
        counts = np.zeros(0)
        for start in range(0, len(stream), PIECE):
            counts = _added(counts, np.bincount(np.asarray(stream[start : start + PIECE]).astype(np.int64)))
        size = max(counts.sum(), 1)
        total = _added(total, counts / size * (size if weight is None else weight))
    return {int(token): float(total[token]) for token in np.flatnonzero(total)}


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def probabilities(counts: Mapping[int, float], vocab: int) -> Tensor:
    """[vocab] log p, fp32. Raises ConfigError where a token is not in the vocabulary, or nothing was counted."""
    total = math.fsum(counts.values())
    if not total > 0 or max(counts) >= vocab or min(counts) < 0:
        raise ConfigError(f"monitors.unigram: counts are of tokens 0 to {vocab - 1}, not of {max(counts, default='none')}")
    p = torch.zeros(vocab, dtype=torch.float64)
    p[list(counts)] = torch.tensor([n / total for n in counts.values()], dtype=torch.float64)
    return p.clamp(min=torch.finfo(torch.float32).tiny).log().float()


def with_unigram(model: Model, log_p: Tensor) -> Model:
    """The model with the term "unigram": give it the weight 0 (term_weights)."""

    def node(sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
        nats = -log_p.to(v["labels"].device)[v["labels"].clamp(0, len(log_p) - 1)]
        return {"loss.unigram": sh.total(nats * v["weights"], "batch seq")}

    def counts(sh: Sharding, values: Values) -> dict[str, Tensor]:
        return {**model.counts_of(sh, values), "unigram": sh.total(values["weights"], "batch seq")}

    index = max(one.index for one in model.chain) + 1
    last = Node(node, reads=("labels", "weights"), writes=("loss.unigram",), index=index, light=True)
    return replace(model, chain=(*model.chain, last), counts_of=counts)
