"""Tokenizers in the files of other libraries: SentencePiece, tiktoken, GPT-2's vocab.json and merges.txt."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers as hf

from fmegatron.data.text import needed

# A .tiktoken file holds no pattern to cut text into words with. These are those of cl100k_base, taken unless the file's
# name says o200k, and of o200k_base.
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
          r"\s+(?!\S)|\s")  # fmt: skip
_UPPER, _LOWER, _ENDING = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])  # fmt: skip
ENDS: Mapping[str, int] = MappingProxyType({"cl100k_base": 100257, "o200k_base": 199999})  # ids of <|endoftext|>


def gpt2(path: Path) -> hf.Tokenizer:
    """GPT-2's byte-level BPE from vocab.json and the merges.txt beside it, either named; prefixes such as gpt2- are kept."""
    vocab = path.with_name(path.name.replace("merges.txt", "vocab.json"))
    merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    for file in (vocab, merges):
        if not file.is_file():
            raise ValueError(f"{file} is missing: GPT-2's tokenizer is two files, vocab.json and merges.txt")
    _check_merges(vocab, merges)
    inner = hf.Tokenizer(hf.models.BPE.from_file(str(vocab), str(merges)))
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    if inner.token_to_id("<|endoftext|>") is not None:
        inner.add_special_tokens(["<|endoftext|>"])
    return inner


def _check_merges(vocab: Path, merges: Path) -> None:
    """ValueError where merges are missing: nothing makes a token of several characters that is no mark such as <|x|>, [PAD]."""
    try:
        names = json.loads(vocab.read_bytes())
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    except ValueError as error:
        raise ValueError(f"{vocab} or {merges.name} is damaged ({error}): copy both files again") from None
    if wrong := next((number for number, pair in enumerate(pairs) if len(pair) != 2), None):
        raise ValueError(f"{merges}: merge {wrong} is {pairs[wrong]}, not two tokens: copy the file again")
    made = {"".join(pair) for pair in pairs}
    lost = [name for name in names if len(name) > 1 and name not in made and not (name[0] in "<[" and name[-1] in ">]")]
    if lost:
        said = f"no merge makes {lost[0]!r} and {len(lost) - 1} others of {vocab.name}"
        raise ValueError(f"{merges}: {said}: truncated, copy it again")


def _check_model(path: Path, model: bytes) -> None:
    """ValueError where a SentencePiece model ends before its last part: pieces (1), how it was trained (2), normalizer (3).

    Protocol Buffers read a file that ends between two fields without a word.
    """
    at, found = 0, set()
    while at < len(model):
        tag, at = _varint(model, at)
        if tag & 7 != 2:
            raise ValueError(f"{path} is not a SentencePiece model, or damaged at byte {at}: copy it again")
        size, at = _varint(model, at)
        at += size
        found.add(tag >> 3)
    if at != len(model) or not {1, 2, 3} <= found:
        raise ValueError(f"{path}: it ends at byte {len(model)} before its normalizer: truncated, copy it again")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            break
    return value, at


class SentencePiece:
    """A SentencePiece model; `eod` is its </s>, or the piece of that name."""

    def __init__(self, model: bytes, eod: str | None = None) -> None:
        library = needed("sentencepiece", "a SentencePiece model")
        self.model, self._eod = model, eod
        self.inner = library.SentencePieceProcessor(model_proto=model)
        if eod is not None and self.inner.piece_to_id(eod) == self.inner.unk_id():
            raise ValueError(f"the SentencePiece model has no piece {eod!r} to end documents with")

    @classmethod
    def from_file(cls, path: Path, eod: str | None = None) -> SentencePiece:
        """The model of a file. Raises ValueError where it is none."""
        model = path.read_bytes()
        _check_model(path, model)
        try:
            return cls(model, eod)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_piece_size())

    @property
    def eod(self) -> int:
        end = int(self.inner.piece_to_id(self._eod) if self._eod is not None else self.inner.eos_id())
        if end < 0:
            raise ValueError("the SentencePiece model has no </s> to end documents with: name a piece (eod=…)")
        return end

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        end = self.inner.eos_id() if self._eod is None else self.eod
        return str(self.inner.decode([int(i) for i in ids if i != end]))

    def token_bytes(self) -> None:
        return None  # a piece's spaces depend on its neighbours

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self.model, self._eod)


class Tiktoken:
    """A byte-level BPE of the tiktoken library: ranks, a pattern, special tokens of which <|endoftext|> ends documents."""

    def __init__(self, name: str, pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
        self.parts = name, pattern, dict(ranks), dict(special)
        self.inner = needed("tiktoken", name).Encoding(name, pat_str=pattern, mergeable_ranks=self.parts[2],
                                                       special_tokens=self.parts[3])  # fmt: skip

    @classmethod
    def from_file(cls, path: Path) -> Tiktoken:
        """A .tiktoken file: a line for each token, its bytes in base64 and its rank. <|endoftext|> comes after all of them."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line:
                try:
                    token, rank = line.split()
                    key, value = base64.b64decode(token, validate=True), int(rank)
                except (ValueError, binascii.Error):
                    raise ValueError(f"{path}:{number}: not a token in base64 and its rank") from None
                if value != len(ranks) or key in ranks:
                    said = f"token {key!r} of rank {value}, a new one of rank {len(ranks)} is due"
                    raise ValueError(f"{path}:{number}: {said}: damaged, copy the file again")
                ranks[key] = value
        if not ranks:
            raise ValueError(f"{path}: no token in it; each line is a token in base64 and its rank")
        if lost := [i for i in range(256) if bytes([i]) not in ranks]:
            raise ValueError(f"{path}: {len(ranks)} tokens, and none is byte {lost[0]}: truncated, copy the file again")
        pattern = O200K if path.stem.startswith("o200k") else CL100K
        return cls(path.stem, pattern, ranks, {"<|endoftext|>": ENDS.get(path.stem, max(ranks.values()) + 1)})

    @classmethod
    def named(cls, name: str) -> Tiktoken:
        """One of tiktoken's own, which it downloads or finds in the folder TIKTOKEN_CACHE_DIR."""
        library = needed("tiktoken", f"tiktoken:{name}")
        if name not in (names := library.list_encoding_names()):
            raise ValueError(f"tiktoken:{name}: tiktoken knows {', '.join(names)}")
        try:
            found = library.get_encoding(name)
        except OSError as error:
            raise ValueError(f"tiktoken:{name} cannot be fetched ({type(error).__name__}): give a .tiktoken file") from None
        return cls(name, found._pat_str, found._mergeable_ranks, found._special_tokens)

    @property
    def vocab_size(self) -> int:
        return int(self.inner.n_vocab)

    @property
    def eod(self) -> int:
        return int(self.inner.eot_token)

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode_ordinary(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.parts[3].values())
        return str(self.inner.decode([int(i) for i in ids if i not in special]))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.parts[2].items():
            sizes[rank] = len(token)
        return sizes

    def __reduce__(self) -> tuple[Any, ...]:
        return Tiktoken, self.parts
