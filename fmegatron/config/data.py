"""Keys of [data] and [streaming]; config/__init__.py makes groups of them. docs/data.md says what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.toml import option


@dataclass(frozen=True)
class Data:
    """The text, its tokens, and how samples are cut from it."""

    source: str = option("stdlib", "stdlib (this Python's own), a prefix of .bin and .idx, mock, or your.module:function")
    kind: Literal["text", "bert", "t5"] = option("text", "rows of source: text; bert's or t5's, for a model.function")
    masked: dict[str, Any] = option({}, "of bert: cls, sep, mask, ...; of t5: bos, eos, sentinels, ...; see data.MaskedText")
    blend: dict[str, Any] = option({}, "prefix = weight for several, in place of source")
    valid_blend: dict[str, Any] = option({}, "the same for held-out text, in place of valid")
    split: str | None = option(None, "parts of source or blend for train, valid and test, such as 969,30,1")
    order: Literal["own", "megatron"] = option("own", "how samples are drawn: as megatron-core does, for the same seed")
    eod_mask_loss: bool = option(False, "order megatron: what follows an end of document counts for nothing")
    pad_vocab: int = option(1, "the model's vocabulary is rounded up to a multiple of this", at_least=1)
    valid: str | None = option(None, "prefix of held-out text; none: what stdlib keeps for it, else no validation")
    tokenizer: str | None = option(None, "tokenizer.json, its folder, byte, null:SIZE; none: model.hf's, or stdlib's")
    vocab_size: int = option(4096, "of the tokenizer that stdlib trains", at_least=257)
    seq: int = option(256, "tokens in a sample", at_least=1)
    document_mask: bool = option(True, "attention stays inside a document")
    reset_positions: bool = option(True, "positions start anew in each document")
    cache: str | None = option(None, "folder of tokenized text and indices; none: cache/ beside the run's")
    sft: str | None = option(None, "JSONL of conversations, or your.module:function, in place of source; valid: another")
    chat: str | None = option(None, "template: chatml, llama3, plain, a Jinja file or folder; none: the tokenizer's")
    pack: bool = option(True, "several conversations a row, as many as fit; else one")
    long: Literal["error", "truncate", "drop"] = option("error", "of a conversation (step_tokens: a document) longer than seq")
    step_tokens: int | None = option(None, "a step has so many tokens at most, in rows of like lengths", at_least=1)
    step_multiple: int = option(64, "of step_tokens: rows are as long as a multiple of this, or as seq", at_least=1)
    mixture: dict[str, Any] = option({}, "weights by consumed samples: [data.mixture.0], [data.mixture.\"5000:9000\"], a ramp")
    fim: dict[str, Any] = option({}, "fill in the middle: prefix, middle, suffix (tokens), rate, spm, characters")
    ahead: int = option(2, "batches made before they are needed", at_least=0)
    workers: int = option(1, "threads that make them", at_least=1)
    skip: tuple[str, ...] = option((), 'samples to leave out, as ["first:stop", ...]')
    streams: tuple[dict[str, Any], ...] = option((), "MDS folders in place of source: tables of local, remote, ...")
    arguments: dict[str, Any] = option({}, "arguments of your function")


@dataclass(frozen=True)
class Streaming:
    """How data.streams are mixed, shuffled and fetched; named as mosaicml-streaming names it."""

    column: str = option("tokens", "where a sample has its tokens: integers, or bytes of dtype")
    dtype: str | None = option(None, "of tokens that are bytes, such as int64")
    valid: tuple[dict[str, Any], ...] = option((), "held-out streams")
    pack: bool = option(False, "several samples a row, as many as fit, of one shard; what counts samples then counts rows")
    replica_groups: tuple[str, ...] = option((), "groups of streams by part of the batch; none: each group once")
    epoch_size: int | None = option(None, "samples in an epoch, by the streams' proportions; none: as they are", at_least=1)
    shuffle: bool = option(True, "a new order each epoch")
    shuffle_algo: Literal["py1e", "py1br", "py1s", "py2s", "naive"] = option("py1e", "which samples come near each other")
    shuffle_seed: int | None = option(None, "of the order; none: run.seed", at_least=0)
    shuffle_block_size: int | None = option(None, "samples; none: 4 million over the canonical nodes", at_least=2)
    num_canonical_nodes: int | None = option(None, "parts of the shards that ranks read; none: 1, or 64", at_least=1)
    sampling_method: Literal["balanced", "fixed"] = option("balanced", "draws anew each epoch, or always the same")
    sampling_granularity: int = option(1, "samples drawn at a time from a shard", at_least=1)
    batching_method: Literal["random", "stratified", "per_stream", "device_per_stream"] = option("random", "how streams mix")
    device_batch: int | None = option(None, "of device_per_stream: rows that are of one stream", at_least=1)
    predownload: int | None = option(None, "samples to have shards ready for; none: 8 batches", at_least=0)
    cache_limit: int | None = option(None, "bytes of fetched shards on disk; none: all stay", at_least=1)
    download_retry: int = option(2, "times to try a fetch again", at_least=0)
    validate_hash: str | None = option(None, "the hash to check; none: one that the index has")
