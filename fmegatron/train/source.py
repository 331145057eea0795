"""A run's text: the rows to train on, the held-out ones, and the tokenizer, as the configuration names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fmegatron import config as configs
from fmegatron import data
from fmegatron.config import ConfigError, RunConfig
from fmegatron.data import mds
from fmegatron.train.mixing import files_of, fill_in_the_middle, mixed, stepped
from fmegatron.train.setup_batch import samples_before

Say = Callable[[str], None]
Text = data.Corpus | data.Conversations | mds.StreamCorpus | data.MaskedText


@dataclass(frozen=True)
class Source:
    """Training rows, and what is known of them: held-out text, the tokenizer, what compressors make of the held-out text."""

    rows: Any  # data.batches.Rows; None where another process reads for this one
    corpus: Text | None = None
    compressors: Mapping[str, float] = field(default_factory=dict)
    reads: bool = True

    @property
    def has_held_out(self) -> bool:
        """Whether there is held-out text."""
        return self.corpus is not None and self.corpus.valid is not None

    def held_out(self, c: RunConfig, batch: int, limit: int | None) -> data.HeldOut | data.HeldOuts | data.InOrder:
        """Held-out rows in batches, `limit` rows at most."""
        assert self.corpus is not None
        return self.corpus.held_out(c.data.seq, batch, limit=limit, reset_positions=c.data.reset_positions)


def source_of(c: RunConfig, say: Say, *, reads: bool = True) -> Source:
    """The text of a run, tokenized first where it is the standard library; reads: whether this process makes rows of it."""
    d = c.data
    corpus: Text
    if d.kind != "text":
        corpus = _masked(c)
    elif d.masked:
        raise ConfigError('data.masked is for data.kind = "bert" or "t5": say which')
    elif d.sft is not None:
        corpus = _conversations(c)
    elif d.streams:
        corpus = _streams(c)
    elif d.source == "stdlib" and not d.blend and not d.mixture:
        corpus = data.quickstart(d.cache or c.run.folder.parent / "cache", d.vocab_size, say)
    elif ":" in d.source and not d.blend and not d.mixture and "://" not in d.source and not Path(f"{d.source}.idx").exists():
        made = configs.imported(d.source)(**d.arguments)
        if not isinstance(made, data.Corpus):
            if not hasattr(made, "row"):
                raise ConfigError(f"data.source = {d.source}: returned {type(made).__name__}, not a Corpus nor rows")
            return Source(_left(made, d.skip) if reads else None, reads=reads)
        corpus = made
    else:
        corpus = _token_files(c)
    bits = corpus.bits_per_byte if isinstance(corpus, data.Corpus) else {}
    compressors = {f"{name} -9": value for name, value in bits.items()}
    return Source(_rows(c, corpus) if reads else None, corpus, compressors, reads)


def _rows(c: RunConfig, corpus: Text) -> data.Rows:
    d = c.data
    if d.step_tokens is not None:
        return _left(stepped(c, corpus), d.skip)
    rows = mixed(c, corpus) if d.mixture else corpus.samples(d.seq, c.run.seed, reset_positions=d.reset_positions)
    return _left(fill_in_the_middle(c, corpus.codec, rows) if d.fim else rows, d.skip)


def _token_files(c: RunConfig) -> data.Corpus:
    d = c.data
    names = files_of(d.mixture) if d.mixture else list(d.blend) or [d.source]
    for name in names:
        if name != "mock":
            _has_files("data.source", name)
    if "mock" in names and d.order != "megatron":
        raise ConfigError('data.source = mock: these are Megatron\'s, set data.order = "megatron"')
    tokenizer = d.tokenizer or c.model.hf
    if tokenizer is None:
        raise ConfigError("data.tokenizer: name the tokenizer that made the tokens (tokenizer.json, byte, null:SIZE)")
    if d.split is not None and (d.valid or d.valid_blend):
        raise ConfigError("data.split and a valid of its own are both set: drop one of the two")
    for key, weights in (("blend", d.blend), ("valid_blend", d.valid_blend)):
        if bad := [f"{name} = {weight}" for name, weight in weights.items() if not _positive(weight)]:
            raise ConfigError(f"data.{key}: {bad[0]}: a weight is a number above 0; leave out what is not to be read")
    train: data.Files = {name: float(weight) for name, weight in d.blend.items()} or d.source
    train = dict.fromkeys(names, 1.0) if d.mixture else train
    valid: data.Files | None = {name: float(weight) for name, weight in d.valid_blend.items()} or d.valid
    if d.split is not None and data.split_bounds(d.split, 1)[1] is not None and "mock" not in names:
        valid = train
    how = None
    if d.order == "megatron":
        cache = str(d.cache or c.run.folder.parent / "cache")
        how = data.Megatron(samples_before(c, c.training.steps), d.eod_mask_loss, cache)
    return data.Corpus(train, tokenizer, valid, split=d.split, megatron=how)


def _positive(weight: Any) -> bool:
    try:
        return 0 < float(weight) < float("inf")
    except (TypeError, ValueError):
        return False


def _masked(c: RunConfig) -> data.MaskedText:
    d = c.data
    others = {"blend": d.blend, "valid_blend": d.valid_blend, "split": d.split, "sft": d.sft, "streams": d.streams,
              "mixture": d.mixture, "fim": d.fim, "step_tokens": d.step_tokens,
              'order = "megatron"': d.order == "megatron"}  # fmt: skip
    if clash := [name for name, said in others.items() if said]:
        raise ConfigError(f'data.kind = "{d.kind}" and data.{clash[0]} are both set: drop one of the two')
    if d.tokenizer is None:
        raise ConfigError("data.tokenizer: name the tokenizer that made the tokens (tokenizer.json, byte, null:SIZE)")
    for prefix in (d.source, *([d.valid] if d.valid else [])):
        _has_files("data.source", prefix)
    assert d.kind != "text"
    made = data.MaskedText(d.source, d.tokenizer, d.kind, d.masked, d.valid)
    try:
        made.settings_of()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.masked: {error}") from None
    return made


def _has_files(key: str, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if "://" not in prefix and not Path(prefix + suffix).is_file():
            raise ConfigError(f"{key} = {prefix}: no file {prefix}{suffix} (fmegatron tokenize writes them)")


def _conversations(c: RunConfig) -> data.Conversations:
    d, tokenizer = c.data, c.data.tokenizer or c.model.hf
    if tokenizer is None:
        raise ConfigError("data.sft: name the data.tokenizer (a Hugging Face folder, tokenizer.json, byte), or a model.hf")
    assert d.sft is not None
    cache = d.cache or c.run.folder.parent / "cache"
    said: Any = d.sft
    if ":" in said and not Path(said).exists():
        said = configs.imported(said)(**d.arguments)
        if not (hasattr(said, "__getitem__") and hasattr(said, "__len__")):
            raise ConfigError(f"data.sft = {d.sft}: returned {type(said).__name__}, not a sequence of conversations")
    return data.Conversations(said, tokenizer, d.chat or tokenizer, cache, d.valid, d.pack, d.long)


def _streams(c: RunConfig) -> mds.StreamCorpus:
    s, tokenizer = c.streaming, c.data.tokenizer or c.model.hf
    if tokenizer is None:
        raise ConfigError("data.streams: name the data.tokenizer that made the tokens (tokenizer.json, byte, null:SIZE)")
    names = ("epoch_size", "shuffle", "shuffle_algo", "shuffle_block_size", "num_canonical_nodes", "sampling_method",
             "sampling_granularity", "batching_method", "device_batch")  # fmt: skip
    seed = c.run.seed if s.shuffle_seed is None else s.shuffle_seed
    return mds.StreamCorpus(
        [mds.stream_of(table, number) for number, table in enumerate(c.data.streams)],
        tokenizer,
        mds.Order(seed, **{name: getattr(s, name) for name in names}),
        c.training.global_batch,
        [mds.stream_of(table, number) for number, table in enumerate(s.valid)] or None,
        s.replica_groups,
        s.predownload,
        {"limit": s.cache_limit, "retries": s.download_retry, "hash": s.validate_hash},
        {"column": s.column, "dtype": s.dtype},
        (c.data.cache or c.run.folder.parent / "cache") if s.pack else None,
    )


def _left(rows: data.Rows, skip: tuple[str, ...]) -> data.Rows:
    """The rows without the samples to leave out."""
    if not skip:
        return rows
    try:
        ranges = [(int(first), int(stop)) for first, stop in (pair.split(":") for pair in skip)]
        return data.SkipSteps(rows, ranges) if isinstance(rows, data.Steps) else data.Skip(rows, ranges)
    except ValueError as error:
        raise ConfigError(f'data.skip = {list(skip)}: expected ["first:stop", ...]: {error}') from None


def tokenizer_file(source: Source) -> str | None:
    """What `tokenizers.load` takes to read the text again."""
    return source.corpus.tokenizer if source.corpus is not None else None


def sets(c: RunConfig, source: Source) -> dict[str, Source]:
    """{name: held-out text} of validation.sets. Raises ConfigError where a file is missing, or the run's text has no tokens."""
    corpus = source.corpus
    if c.validation.sets and not isinstance(corpus, data.Corpus):
        raise ConfigError("validation.sets are token files, read with a run's tokenizer: this run's text has none")
    out: dict[str, Source] = {}
    for name, prefix in c.validation.sets.items():
        _has_files(f"validation.sets.{name}", str(prefix))
        assert isinstance(corpus, data.Corpus)
        out[name] = Source(None, replace(corpus, valid=str(prefix), split=None), reads=source.reads)
    return out
