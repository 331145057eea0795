"""What a run makes of its rows of text: a mixture whose weights are a schedule, documents with their middle moved.

    [data.mixture.0]                                 [data.fim]
    "corpus/web" = 3                                 prefix = "<|prefix|>"
    "corpus/code" = 1                                middle = "<|middle|>"
    [data.mixture."1000000:2000000"]   # a ramp      suffix = "<|suffix|>"
    "corpus/code" = 1                                rate = 0.5
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fmegatron import data
from fmegatron.config import ConfigError, RunConfig
from fmegatron.data import tokenizers

FIM = ("prefix", "middle", "suffix", "rate", "spm", "characters")


def files_of(mixture: Mapping[str, Any]) -> list[str]:
    """Prefixes of all files that a mixture names, in its order. Raises ConfigError."""
    names: dict[str, None] = {}
    for at, weights in mixture.items():
        if not isinstance(weights, Mapping) or not weights:
            raise ConfigError(f'data.mixture.{at} = {weights}: expected a table of weights, such as "corpus/web" = 3')
        names |= dict.fromkeys(weights)
    return list(names)


def mixed(c: RunConfig, corpus: Any) -> data.Rows:
    """Training rows of a corpus' files by the schedule of `data.mixture`. Raises ConfigError."""
    d = c.data
    others = {"blend": d.blend, "sft": d.sft, "streams": d.streams, 'order = "megatron"': d.order == "megatron"}
    if clash := [name for name, said in others.items() if said]:
        raise ConfigError(f"data.mixture and data.{clash[0]} are both set: drop one of the two")
    names, stages, last = files_of(d.mixture), dict[int, tuple[float, ...]](), None
    for start, stop, table in sorted((*_span(at), table) for at, table in d.mixture.items()):
        weights = tuple(_weight(start, name, table.get(name, 0)) for name in names)
        if last is not None and start < last:
            raise ConfigError(f"data.mixture: a stage at {start} samples, before the ramp to {last} has ended")
        if stop is None:
            stages[start] = weights
        elif not stages:
            raise ConfigError(f'data.mixture."{start}:{stop}": a ramp from nothing, name the weights at 0 too')
        else:
            stages |= data.ramp(start, stop, stages[max(stages)], weights)
        last = stop
    rows = [replace(corpus, train=name).samples(d.seq, c.run.seed, reset_positions=d.reset_positions) for name in names]
    try:
        return data.Mixture(rows, stages)
    except ValueError as error:
        raise ConfigError(f"data.mixture: {error}") from None


def stepped(c: RunConfig, corpus: Any) -> data.Steps:
    """Training rows in steps of `data.step_tokens`, each a multiple of training.global_batch rows. Raises ConfigError."""
    d, t = c.data, c.training
    others = {"data.blend": d.blend, "data.streams": d.streams, "data.mixture": d.mixture, "data.fim": d.fim,
              'data.order = "megatron"': d.order == "megatron", "training.batch_sizes": t.batch_sizes,
              "training.rampup_batch": t.rampup_batch, 'optimizer.unit = "samples"': c.optimizer.unit == "samples",
              'faults.on_bad = "rollback"': c.faults.on_bad == "rollback"}  # fmt: skip
    if clash := [name for name, said in others.items() if said]:
        raise ConfigError(f"data.step_tokens and {clash[0]} are both set: drop one of the two")
    assert d.step_tokens is not None
    sizes, how = data.Sizes(d.step_tokens, t.global_batch, d.step_multiple), {"reset_positions": d.reset_positions}
    try:
        if isinstance(corpus, data.Conversations):
            return corpus.steps(d.seq, c.run.seed, sizes, **how)
        cache = d.cache or c.run.folder.parent / "cache"
        return corpus.steps(d.seq, c.run.seed, sizes, cache, d.long, **how)
    except ValueError as error:
        raise ConfigError(f"data.step_tokens = {d.step_tokens}: {error}") from None


def _span(at: str) -> tuple[int, int | None]:
    """"5000" -> (5000, None); "5000:9000" -> (5000, 9000)."""
    first, colon, stop = at.partition(":")
    if not first.isdecimal() or (colon and not stop.isdecimal()) or (colon and int(stop) <= int(first)):
        raise ConfigError(f'data.mixture.{at}: expected a number of consumed samples, or a ramp as "5000:9000"')
    return int(first), int(stop) if colon else None


def _weight(start: int, name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ConfigError(f"data.mixture.{start}: {name} = {weight}: a weight is a number, at least 0")
    return weight


def fill_in_the_middle(c: RunConfig, codec: tokenizers.Tokenizer, rows: data.Rows) -> data.Rows:
    """Rows with some documents transformed, as `data.fim` says. Raises ConfigError."""
    table = c.data.fim
    if unknown := [name for name in table if name not in FIM]:
        raise ConfigError(f"data.fim has no {unknown[0]}, it has {', '.join(FIM)}")
    if c.data.sft:
        raise ConfigError("data.fim is for text, and data.sft is set: drop one of the two")
    rest: dict[str, Any] = {name: table[name] for name in ("rate", "spm") if name in table}
    rest |= {"codec": codec if table.get("characters", False) else None, "reset_positions": c.data.reset_positions}
    try:
        rest |= {name: tokenizers.token_id(codec, f"data.fim.{name}", table.get(name)) for name in FIM[:3]}
        return data.Fim(rows, c.run.seed, eod=codec.eod, **rest)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error) if "data.fim" in str(error) else f"data.fim: {error}") from None
