"""A corpus: token files, the tokenizer that made them, and `quickstart`, which makes one from the Python at hand."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fmegatron.data import tokenizers
from fmegatron.data.batches import Rows
from fmegatron.data.blend import Blend, HeldOuts, gpt_blend
from fmegatron.data.compress import compressed_sizes
from fmegatron.data.gpt import GptOptions, GptSamples, Mock, split_bounds
from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.pack import Sizes, Steps, stepped
from fmegatron.data.prepare import Counts, write_documents
from fmegatron.data.samples import HeldOut, Ints, Samples
from fmegatron.data.sft import Long
from fmegatron.data.text import stdlib_documents, stdlib_files
from fmegatron.data.whole import Whole

VERSION = 1  # of what `quickstart` writes


Files = str | Mapping[str, float | None]  # a prefix, or a blend: {prefix: weight}, weights None: by size
MOCK = "mock"  # in place of a prefix: Megatron's mock data


@dataclass(frozen=True)
class Megatron:
    """Rows are drawn as megatron-core draws them, for `samples` of them (None: one epoch); its indices are kept in `cache`."""

    samples: int | None = None
    eod_mask_loss: bool = False
    cache: str | None = None


@dataclass(frozen=True)
class Corpus(tokenizers.Tokenized):
    """Where a corpus lies: prefixes of `.bin/.idx` pairs, or blends of them, and a tokenizer as `tokenizers.load` takes it.

    Where known: `counts` {"train": …, "valid": …}, and `bits_per_byte` {"gzip": …, "xz": …} of the held-out text. With a
    `split` string such as "969,30,1" train and valid are these parts of each file's sequences.
    """

    train: Files
    tokenizer: str
    valid: Files | None = None
    counts: Mapping[str, Counts] = field(default_factory=dict)
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None
    megatron: Megatron | None = None

    def samples(self, seq: int, seed: int, *, reset_positions: bool = False) -> Rows:
        """Training rows."""
        if self.megatron is not None:
            return self._megatron(self.megatron, GptOptions(seq, seed, reset_positions, self.megatron.eod_mask_loss))
        rows, weights = [], []
        for prefix, weight in _files(self.train).items():
            data = IndexedDataset(prefix)
            rows.append(Samples(data, seq, seed, reset_positions=reset_positions, vocab_size=self.vocab_size,
                                documents=self._documents(prefix, len(data), 0)))  # fmt: skip
            weights.append(weight)
        if len(rows) == 1:
            return rows[0]
        return Blend(rows, [row.per_epoch if weight is None else weight for row, weight in zip(rows, weights, strict=True)])

    def steps(
        self, seq: int, seed: int, sizes: Sizes, cache: str | Path, long: Long, *, reset_positions: bool = True
    ) -> Steps:
        """Training rows without end, a document each, in steps of so many tokens; the index is kept in `cache`."""
        files = _files(self.train)
        if len(files) > 1 or MOCK in files:
            raise ValueError(f"steps of so many tokens are made of one pair of files, not of {', '.join(files)}: merge them")
        data = IndexedDataset(prefix := next(iter(files)))
        documents = self._documents(prefix, len(data), 0)
        digest = hashlib.sha256(data.lengths.tobytes()).hexdigest()[:16]
        key = f"{digest} split={self.split} long={long}"
        whole = Whole(data, seq, long, documents, self.vocab_size)
        return stepped(whole, seq, seed, sizes, cache, key, reset_positions)

    def held_out(
        self, seq: int, batch: int, *, limit: int | None = None, reset_positions: bool = False
    ) -> HeldOut | HeldOuts:
        """Validation rows, `limit` of them at most; of a blend's data sets one after another, whatever their weights."""
        if self.valid is None:
            raise ValueError(f"the corpus of {self.train} has no held-out split")
        parts, sizes = [], self.codec.token_bytes()
        for prefix in _files(self.valid):
            data = IndexedDataset(prefix)
            documents = self._documents(prefix, len(data), 1)
            parts.append(HeldOut(data, seq, batch, token_bytes=sizes, limit=limit, reset_positions=reset_positions,
                                 vocab_size=self.vocab_size, documents=documents))  # fmt: skip
        return parts[0] if len(parts) == 1 else HeldOuts(parts, limit)

    def _megatron(self, how: Megatron, options: GptOptions) -> Rows:
        try:
            eod: int | None = self.codec.eod
        except ValueError:  # documents end where the file says so
            eod = None

        def make(prefix: str, samples: int | None) -> GptSamples:
            data = Mock(self.vocab_size, eod or 0) if prefix == MOCK else IndexedDataset(prefix)
            documents = self._documents(prefix, len(data.lengths), 0)
            return GptSamples(data, options, documents, samples, eod=eod, vocab_size=self.vocab_size, cache=how.cache)

        return gpt_blend(_files(self.train), how.samples, make, cache=how.cache)

    def _documents(self, prefix: str, size: int, part: int) -> Ints | None:
        if self.split is None:
            return None
        bounds = split_bounds(self.split, size)[part]
        if bounds is None or bounds[0] == bounds[1]:
            name = ("train", "valid")[part]
            raise ValueError(f"{prefix}: split {self.split!r} of {size} sequences leaves none for {name}: choose other weights")
        return np.arange(*bounds)


def _files(files: Files) -> Mapping[str, float | None]:
    return {files: None} if isinstance(files, str) else files


Report = Callable[[str], None]  # is told, line by line, what is being done


def quickstart(folder: str | Path, vocab_size: int = 4096, report: Report = lambda line: None) -> Corpus:
    """The standard library as a corpus, made once, whole or not at all, in a subfolder of `folder`.

    Its name tells the Python version, the vocabulary and a hash of the files. The tokenizer learns from "train" only.
    """
    root = Path(folder) / _name(vocab_size)
    if not (root / "corpus.json").is_file():
        if root.exists():
            raise ValueError(f"{root} lacks its corpus.json: remove the folder and it is made again")
        scratch = root.with_name(f".{root.name}.{uuid.uuid4().hex}.tmp")
        scratch.mkdir(parents=True)
        try:
            _build(scratch, vocab_size, report)
            os.rename(scratch, root)
        except OSError:
            if not (root / "corpus.json").is_file():  # another process may have been faster: then theirs is as good
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    facts = json.loads((root / "corpus.json").read_text())
    counts = {split: Counts(**values) for split, values in facts["counts"].items()}
    return Corpus(
        str(root / "train"), str(root / "tokenizer.json"), str(root / "valid"), counts, facts["bits_per_byte"]
    )


def _name(vocab_size: int) -> str:
    files = Path(sysconfig.get_paths()["stdlib"])
    listing = [(path.relative_to(files).as_posix(), path.stat().st_size) for path in stdlib_files(files)]
    facts = hashlib.sha256(repr((VERSION, tokenizers.PIECES, listing)).encode()).hexdigest()
    return f"stdlib-py{platform.python_version()}-v{vocab_size}-{facts[:8]}"


def _build(folder: Path, vocab_size: int, report: Report) -> None:
    splits = {split: list(stdlib_documents(split)) for split in ("train", "valid")}
    report(f"learning {vocab_size} tokens from {len(splits['train'])} files of Python's standard library")
    codec = tokenizers.train_bpe((text for _, text in splits["train"]), vocab_size)
    codec.save(folder / "tokenizer.json")
    counts = {}
    for split, texts in splits.items():
        counts[split] = write_documents(texts, folder / split, codec, append_eod=True)
        report(f"{split}: {counts[split].bytes:,} bytes, {counts[split].tokens:,} tokens")
    held_out = "".join(text for _, text in splits["valid"]).encode()
    bits = {name: 8 * size / len(held_out) for name, size in compressed_sizes(held_out).items()}
    facts = {"counts": {split: value._asdict() for split, value in counts.items()}, "bits_per_byte": bits}
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))
