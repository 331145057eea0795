"""A file of sentences as rows of masked text, by the settings of a table: what `data.kind` bert and t5 train on.

    bert    cls, sep, mask (tokens); pairs                                rate, longest, geometric, longer, short, words
    t5      bos, eos, sentinels (tokens); decoder_seq, mean_span          the same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fmegatron.data import tokenizers
from fmegatron.data.bert import Bert
from fmegatron.data.cycle import InOrder
from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.masking import Masking, continuations
from fmegatron.data.samples import Row
from fmegatron.data.t5 import T5

Kind = Literal["bert", "t5"]
TOKENS = {"bert": ("cls", "sep", "mask"), "t5": ("bos", "eos", "sentinels")}
OWN = {"bert": ("pairs", "short"), "t5": ("decoder_seq", "mean_span", "short")}
MASKING = ("rate", "longest", "geometric", "longer")


@dataclass(frozen=True)
class MaskedText(tokenizers.Tokenized):
    """A corpus for BERT or T5: prefixes of files of sentences (`fmegatron tokenize --split-sentences`), and the settings."""

    train: str
    tokenizer: str
    kind: Kind
    settings: Mapping[str, Any]
    valid: str | None = None

    def samples(self, seq: int, seed: int, *, reset_positions: bool = False) -> Checked:
        """Training rows without end."""
        return self._rows(self.train, seq, seed)

    def held_out(self, seq: int, batch: int, *, limit: int | None = None, reset_positions: bool = False) -> InOrder:
        """Validation rows, `limit` of them at most."""
        if self.valid is None:
            raise ValueError("this text has no held-out part")
        return InOrder(_Once(self._rows(self.valid, seq, 0)), batch, limit)

    def settings_of(self) -> dict[str, Any]:
        """The settings as arguments of `Bert` or `T5`. Raises ValueError for an unknown one, or a token that misses."""
        known = (*TOKENS[self.kind], *OWN[self.kind], *MASKING, "words")
        if unknown := [name for name in self.settings if name not in known]:
            raise ValueError(f"{self.kind} has no {unknown[0]}, it has {', '.join(known)}")
        tokens = {name: self._tokens(name) for name in TOKENS[self.kind]}
        own = {name: self.settings[name] for name in OWN[self.kind] if name in self.settings}
        how = {name: self.settings[name] for name in MASKING if name in self.settings}
        words = continuations(self.codec) if self.settings.get("words", False) else None
        default: dict[str, Any] = {"longest": 10, "geometric": True} if self.kind == "t5" else {}
        return {"masking": Masking(**(default | how), continues=words), **tokens, **own}

    def _rows(self, prefix: str, seq: int, seed: int) -> Checked:
        data, settings = IndexedDataset(prefix), self.settings_of()
        if self.kind == "bert":
            rows: Bert | T5 = Bert(data, seq, seed, vocab=self.vocab_size, **settings)
        else:
            rows = T5(data, seq, settings.pop("decoder_seq", seq), seed, **settings)
        return Checked(rows, self.vocab_size)

    def _tokens(self, name: str) -> Any:
        said = self.settings.get(name)
        if name == "sentinels":
            if not isinstance(said, list | tuple) or not said:
                raise ValueError(f"sentinels = {said}: a list of tokens, by their text or their number")
            return [tokenizers.token_id(self.codec, name, one) for one in said]
        return tokenizers.token_id(self.codec, name, said)


class Checked:
    """Rows whose ids are below `vocab_size`; another's raise ValueError, naming the file."""

    def __init__(self, rows: Bert | T5, vocab_size: int) -> None:
        self.rows, self.vocab_size = rows, vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Row:
        """Sample `number`."""
        row = self.rows.row(number)
        if (most := max(int(row[key].max()) for key in ("tokens", "labels"))) >= self.vocab_size:
            where = f"{self.rows.data.prefix}: id {most} in sample {number}"
            raise ValueError(f"{where}, but the vocabulary ends at {self.vocab_size - 1}: another tokenizer's files?")
        return row


class _Once:
    """Rows to be gone through once: one behind the last is padding."""

    def __init__(self, rows: Checked) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Row:
        row = self.rows.row(number)
        return row if number < len(self) else row | {"weights": np.zeros_like(row["weights"])}
