"""Text to token ids and back: byte-level BPE, plain bytes, and `null` (text that is already ids), behind one interface.

`load` takes what a user has: a tokenizer.json, a Hugging Face folder that holds one, GPT-2's vocab.json and merges.txt, a
SentencePiece model, a tiktoken file or name, or the words `byte`, `null`, `null:SIZE`. Text is
text: a document that happens to contain "<|endoftext|>" is not cut there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers as hf

from fmegatron.data import tokenizer_files

# Llama-3's words and numbers, but a line break takes the indentation after it and the punctuation before it along:
# ":\n        " is one piece. With 4,096 tokens the standard library has 3.90 bytes a token; Llama-3's split, 3.65.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?|[\r\n]+ *|\s+(?!\S)|\s+"
EOD = "<|endoftext|>"
KINDS = "a tokenizer.json, a folder with one, vocab.json and merges.txt, FILE.model, FILE.tiktoken, byte, null or null:SIZE"
END_NAMES = (EOD, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package needs; `eod` is the end-of-document id (ValueError where there is none)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """Bytes of text behind each id, int64 [vocab_size], 0 for special ids; None where an id alone cannot tell."""


class Bpe:
    """A tokenizer of the `tokenizers` library: what a tokenizer.json holds."""

    def __init__(self, inner: hf.Tokenizer, eod: str | None = None) -> None:
        inner.encode_special_tokens = True  # plain text stays plain
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self._names = [eod] if eod else [name for name in END_NAMES if inner.token_to_id(name) is not None]
        if eod and inner.token_to_id(eod) is None:
            raise ValueError(f"the tokenizer has no token {eod!r} to end documents with")

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)  # ids may have holes

    @property
    def eod(self) -> int:
        if not self._names:
            raise ValueError(f"no {' or '.join(END_NAMES)} in the tokenizer to end documents with: name one (eod=…)")
        index = self.inner.token_to_id(self._names[0])
        assert index is not None
        return index

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        if "ByteLevel" not in json.dumps(json.loads(self.inner.to_str())["decoder"]):
            return None
        added = self.inner.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            if index not in added:
                sizes[index] = len(token)  # byte-level: one character of the token's spelling is one byte of text
            elif not added[index].special:
                sizes[index] = len(token.encode())
        return sizes

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        self.inner.save(str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.inner.to_str(), self._names[0] if self._names else None)


class Bytes:
    """UTF-8 bytes as ids 0 to 255; 256 ends a document."""

    vocab_size, eod = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return np.append(np.ones(256, np.int64), 0)


class Null:
    """Text that is ids already, separated by white space; `size` ids, and then `size` itself ends a document."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    @property
    def vocab_size(self) -> int:
        return 2**31 - 1 if self.size is None else self.size + 1

    @property
    def eod(self) -> int:
        if self.size is None:
            raise ValueError("the null tokenizer has no end-of-document id: write null:SIZE, then SIZE ends documents")
        return self.size

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"the null tokenizer reads integers separated by spaces: {error}") from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"ids {min(ids)}..{max(ids)} outside 0..{self.vocab_size - 1}")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids if i != self.size)

    def token_bytes(self) -> None:
        return None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Bpe:
    """Learn a byte-level BPE of at most `vocab_size` tokens, EOD first; equal texts give an equal tokenizer."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size {vocab_size}: at least {len(alphabet) + 1}, the bytes and {EOD}")
    split = hf.pre_tokenizers.Split(hf.Regex(PIECES), "isolated")
    spell = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.Sequence([split, spell])
    inner.decoder = hf.decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        hf.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Bpe(inner, EOD)


def load(source: str | Path, eod: str | None = None) -> Tokenizer:
    """The tokenizer that `source` names.

    A tokenizer.json or a folder with one; a vocab.json or merges.txt with the other beside it, or their folder; FILE.model
    (SentencePiece); FILE.tiktoken; tiktoken:NAME; `byte`, `null` or `null:SIZE`. Raises ValueError for what is none.
    `eod` names the token that ends documents; without it a folder's tokenizer_config.json is asked for its eos_token.
    """
    word, _, size = str(source).partition(":")
    if word == "byte" and not size:
        return Bytes()
    if word == "null" and (not size or size.isdecimal()):
        return Null(int(size) if size else None)
    if word == "tiktoken" and size:
        return tokenizer_files.Tiktoken.named(size)
    path = Path(source)
    if path.is_dir():
        eod = eod or _eos_token(path / "tokenizer_config.json")
        names = ("tokenizer.json", "vocab.json", "tokenizer.model")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give {KINDS}")
    try:
        if path.suffix == ".model":
            return tokenizer_files.SentencePiece.from_file(path, eod)
        if path.suffix == ".tiktoken":
            return tokenizer_files.Tiktoken.from_file(path)
        if path.name.endswith(("vocab.json", "merges.txt")):
            return Bpe(tokenizer_files.gpt2(path), eod)
        return Bpe(hf.Tokenizer.from_file(str(path)), eod)
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}): give {KINDS}") from None


def padded_vocab(size: int, multiple: int = 128) -> int:
    """The vocabulary a model is given: `size` rounded up to a multiple, of 128 and the tensor-parallel size for example."""
    if min(size, multiple) < 1:
        raise ValueError(f"vocabulary {size}, multiple {multiple}: at least 1 each")
    return -(-size // multiple) * multiple


def _eos_token(path: Path) -> str | None:
    token = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.is_file() else None
    return token["content"] if isinstance(token, dict) else token


def _unpickled(text: str, eod: str | None) -> Bpe:
    return Bpe(hf.Tokenizer.from_str(text), eod)


def token_id(codec: Tokenizer, name: str, said: Any) -> int:
    """The id of a token, named by its text or its number. Raises ValueError; `name` is the setting."""
    found = codec.inner.token_to_id(said) if isinstance(codec, Bpe) and isinstance(said, str) else said
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < codec.vocab_size:
        known = f"the tokenizer has {codec.vocab_size} tokens"
        raise ValueError(f"{name} = {said}: name a token, by its text or its number ({known})")
    return found


class Tokenized:
    """A text that knows the tokenizer it was made with: a base of corpora, whose field `tokenizer` is what `load` takes."""

    tokenizer: str

    @cached_property
    def codec(self) -> Tokenizer:
        """The tokenizer itself."""
        return load(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Its size."""
        return self.codec.vocab_size
