"""Supervised fine-tuning: conversations to tokens, and to rows in which only what the assistant wrote is learned.

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …], "tools": […]}
    {"prompt": …, "completion": …}        two texts, the end of a document after them; or two lists of messages

A file of such lines, or any sequence or stream of such mappings (a Hugging Face data set), is tokenized once and kept on
disk as two pairs of `.bin/.idx`: tokens, and bits that say which of them are learned.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers as hf

from fmegatron.data import tokenizers
from fmegatron.data.chat import Chat, Span, load_chat
from fmegatron.data.cycle import Cycle, InOrder
from fmegatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from fmegatron.data.pack import Ints, Packed, PackIndex, Piece, Sizes, Steps, cached, first_fit, one_each, stepped

Example = Mapping[str, Any]
Source = str | Path | Sequence[Example] | Iterable[Example]
Long = Literal["error", "truncate", "drop"]
Spelled = tuple[str, list[Span], bool]  # text, what is learned of it, whether the end of a document follows

CHUNK = 256  # conversations tokenized at once
VERSION = 1  # of what is kept on disk


@dataclass(frozen=True)
class Conversations(tokenizers.Tokenized):
    """A corpus for fine-tuning. `chat`: as `load_chat` takes it; `cache`: the folder of its tokens and indices.

    `pack` lays as many conversations into a row as fit, else one a row; `long` says what becomes of one that is longer.
    """

    train: Source
    tokenizer: str
    chat: str
    cache: str | Path
    valid: Source | None = None
    pack: bool = True
    long: Long = "error"

    def samples(self, seq: int, seed: int, *, reset_positions: bool = True) -> Cycle:
        """Training rows without end, each epoch in an order of its own."""
        return Cycle(self._rows(self.train, seq, seed, reset_positions), seed)

    def held_out(self, seq: int, batch: int, *, limit: int | None = None, reset_positions: bool = True) -> InOrder:
        """Validation rows, `limit` of them at most."""
        if self.valid is None:
            raise ValueError("these conversations have no held-out part")
        return InOrder(self._rows(self.valid, seq, 0, reset_positions), batch, limit)

    def steps(self, seq: int, seed: int, sizes: Sizes, *, reset_positions: bool = True) -> Steps:
        """Training rows without end in steps of so many tokens, whatever `pack` says."""
        folder, turns = self._turns(self.train, seq)
        key = f"{folder.name} seq={seq} long={self.long}"
        return stepped(turns, seq, seed, sizes, self.cache, key, reset_positions)

    def _turns(self, source: Source, seq: int) -> tuple[Path, Turns]:
        folder = tokenize_conversations(source, self.cache, self.codec, load_chat(self.chat))
        return folder, Turns(folder, seq, self.long)

    def _rows(self, source: Source, seq: int, seed: int, reset_positions: bool) -> Packed:
        folder, turns = self._turns(source, seq)

        def index() -> dict[str, Any]:
            return (first_fit(turns.lengths, seq, seed) if self.pack else one_each(turns.lengths, seq))._asdict()

        key = f"{folder.name} seq={seq} long={self.long} pack={f'first_fit seed={seed}' if self.pack else 'one_each'}"
        return Packed(turns, PackIndex(**cached(self.cache, key, index)), seq, reset_positions=reset_positions)


class Turns:
    """Tokenized conversations from disk: `lengths` int64, the places that each takes; `turns[i]` tokens and weights.

    Those of more than `seq` places are dropped, or cut at the end, or refused with a ValueError.
    """

    def __init__(self, folder: str | Path, seq: int, long: Long = "error") -> None:
        self.tokens, self.targets = IndexedDataset(Path(folder) / "tokens"), IndexedDataset(Path(folder) / "targets")
        lengths = self.tokens.lengths.astype(np.int64) - 1
        self.seq, self.kept = seq, kept(lengths, seq, long, "conversations")
        self.lengths: Ints = np.minimum(lengths[self.kept], seq)

    def __getitem__(self, index: int) -> Piece:
        at, count = int(self.kept[index]), int(self.lengths[index]) + 1
        return self.tokens.get(at, 0, count), self.targets.get(at, 0, count)


def kept(lengths: Ints, seq: int, long: Long, what: str) -> Ints:
    """Which examples of these lengths are used: all, or with `long` "drop" those that fit. Raises ValueError, see `Turns`."""
    if (count := int((lengths > seq).sum())) and long == "error":
        raise ValueError(
            f"{count} of {len(lengths)} {what} are longer than seq {seq}, the longest has {lengths.max()} tokens: "
            'raise seq, or say long = "truncate" or "drop"'
        )
    left = np.flatnonzero(lengths <= seq) if long == "drop" else np.arange(len(lengths))
    if not len(left):
        raise ValueError(f"all {len(lengths)} {what} are longer than seq {seq}: raise it to {lengths.max(initial=1)}")
    return left


def tokenize_conversations(source: Source, cache: str | Path, codec: tokenizers.Tokenizer, chat: Chat) -> Path:
    """The folder below `cache` with the tokens of `source`, made where it is not there yet, whole or not at all.

    Its name is a hash of the conversations, the tokenizer and the template. Raises ValueError, naming the line, for what
    is no conversation, what the template refuses, and a conversation in which nothing is learned.
    """
    name = hashlib.sha256(repr((VERSION, _digest(source), chat.template, chat.specials, pickle.dumps(codec))).encode())
    root = Path(cache) / f"sft-{name.hexdigest()[:16]}"
    if not root.is_dir():
        scratch = root.with_name(f".{root.name}.{uuid.uuid4().hex}.tmp")
        scratch.mkdir(parents=True)
        try:
            with IndexedWriter(scratch / "tokens", token_dtype(codec.vocab_size)) as tokens:
                with IndexedWriter(scratch / "targets", np.uint8) as targets:
                    for ids, wanted in _encoded(examples(source), codec, chat):
                        tokens.add_document(ids)
                        targets.add_document(wanted)
            os.rename(scratch, root)
        except OSError:
            if not root.is_dir():  # another process may have been faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return root


def examples(source: Source) -> Iterator[tuple[str, Example]]:
    """(where it stands, the example) of each line of a JSONL file, or of each item of a sequence, or of a stream."""
    if not isinstance(source, str | Path):
        if isinstance(source, Iterator):
            raise ValueError("conversations are read twice, an iterator can be read once: give a list or a data set")
        sized: Any = source if hasattr(source, "__len__") else None  # lengths and numbers are enough, iter() is not asked for
        items = source if sized is None else (sized[i] for i in range(len(sized)))
        yield from ((f"example {i}", example) for i, example in enumerate(items))
        return
    if not Path(source).is_file():
        raise ValueError(f"{source} is not a file of conversations, one JSON object a line")
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{source}:{number}", json.loads(line)
                except ValueError as error:  # not UTF-8, or not JSON
                    raise ValueError(f"{source}:{number}: not JSON: {error}") from None


def spell(chat: Chat, example: Example) -> Spelled:
    """An example's text, the spans of it that are learned, and whether the end of a document follows, learned too."""
    if not isinstance(example, Mapping) or not ("messages" in example or {"prompt", "completion"} <= example.keys()):
        keys = ", ".join(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(f"neither messages nor prompt and completion in it, but {keys or 'nothing'}")
    if "messages" in example:
        return *chat.render(example["messages"], tools=example.get("tools")), False
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], True
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("prompt and completion are two texts or two lists of messages, not one of each")
    text, spans = chat.render([*prompt, *completion], tools=example.get("tools"))
    return text, spans[sum(message.get("role") == "assistant" for message in prompt) :], False


def spans_encoder(codec: tokenizers.Tokenizer) -> Callable[[Sequence[Spelled]], Iterator[Piece]]:
    """What turns texts to tokens int64 [n] and uint8 [n]: 1 where a token has a character in one of the text's spans.

    Special tokens that the text spells out become themselves, as templates mean it. A tokenizer that cannot tell which
    characters a token stands for encodes each stretch on its own.
    """
    if not isinstance(codec, tokenizers.Bpe):
        return lambda spelled: (_by_stretch(codec, text, spans) for text, spans, _ in spelled)
    inner = hf.Tokenizer.from_str(codec.inner.to_str())
    inner.encode_special_tokens = False

    def encode(spelled: Sequence[Spelled]) -> Iterator[Piece]:
        encoded = inner.encode_batch([text for text, _, _ in spelled], add_special_tokens=False)
        for one, (_, spans, _) in zip(encoded, spelled, strict=True):
            offsets = np.array(one.offsets, np.int64).reshape(-1, 2)
            wanted = np.zeros(len(offsets), np.uint8)
            for first, stop in spans:
                wanted |= (offsets[:, 0] < stop) & (offsets[:, 1] > first)
            yield np.array(one.ids, np.int64), wanted

    return encode


def _by_stretch(codec: tokenizers.Tokenizer, text: str, spans: Sequence[Span]) -> Piece:
    cuts = [0, *(at for span in spans for at in span), len(text)]
    parts = [np.array(codec.encode(text[first:stop]), np.int64) for first, stop in pairwise(cuts)]
    wanted = [np.full(len(part), i % 2, np.uint8) for i, part in enumerate(parts)]
    return np.concatenate(parts), np.concatenate(wanted)


def _encoded(source: Iterator[tuple[str, Example]], codec: tokenizers.Tokenizer, chat: Chat) -> Iterator[Piece]:
    encode = spans_encoder(codec)
    while chunk := list(islice(source, CHUNK)):
        spelled = [_named(where, chat, example) for where, example in chunk]
        pieces = encode(spelled)
        for (where, _), (_, _, ends), (ids, wanted) in zip(chunk, spelled, pieces, strict=True):
            if ends:
                ids, wanted = np.append(ids, codec.eod), np.append(wanted, np.uint8(1))
            if not wanted[1:].any():
                raise ValueError(f"{where}: nothing that the assistant wrote, so nothing to learn")
            yield ids, wanted


def _named(where: str, chat: Chat, example: Example) -> Spelled:
    try:
        return spell(chat, example)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _digest(source: Source) -> str:
    """A hash of what the examples say."""
    if isinstance(source, str | Path) and Path(source).is_file():
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for _, example in examples(source):
        total.update(json.dumps(example, default=str).encode() + b"\n")
    return total.hexdigest()

