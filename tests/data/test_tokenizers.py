"""Tokenizers: lossless, deterministic, one interface; the byte counts on which bits per byte rests."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data import tokenizers
from fmegatron.data.tokenizers import EOD, Bpe, Tokenizer, load, train_bpe

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # añadir 語 {EOD}\n" for i in range(200)]


@cache
def small() -> Bpe:
    return train_bpe(TEXTS, 400)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["bpe", "byte"]))
def test_lossless_and_every_byte_is_counted(text: str, kind: str) -> None:
    tokenizer: Tokenizer = small() if kind == "bpe" else load("byte")
    sizes = tokenizer.token_bytes()
    for plain in (text, EOD + text + EOD):  # the name of a special token in a text is text
        ids = tokenizer.encode(plain)
        assert tokenizer.decode([*ids, tokenizer.eod]) == plain
        assert tokenizer.encode_batch([plain, "x"]) == [ids, tokenizer.encode("x")]
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod for i in ids)
        assert sizes is not None and len(sizes) == tokenizer.vocab_size
        assert sizes[ids].sum() == len(plain.encode()) and sizes[tokenizer.eod] == 0


def test_training_is_deterministic_and_the_file_is_the_tokenizer(tmp_path: Path) -> None:
    small().save(tmp_path / "tokenizer.json")
    train_bpe(iter(TEXTS), 400).save(tmp_path / "again.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    for loaded in (load(tmp_path / "tokenizer.json"), load(tmp_path), pickle.loads(pickle.dumps(small()))):
        assert loaded.encode(TEXTS[7]) == small().encode(TEXTS[7])
        assert (loaded.vocab_size, loaded.eod) == (small().vocab_size, 0) == (400, 0)
    assert len(small().encode(TEXTS[7])) < len(TEXTS[7]) / 2


def test_a_hugging_face_folder_names_its_end_token(tmp_path: Path) -> None:
    inner = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "</s>": 5, "<end>": 9}, unk_token="a"))
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    inner.enable_truncation(2)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).eod == 5 and load(tmp_path).vocab_size == 10 and load(tmp_path).token_bytes() is None
    assert load(tmp_path).encode("a b a") == [0, 1, 0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert load(tmp_path).eod == 9 and load(tmp_path, eod="b").eod == 1
    with pytest.raises(ValueError, match="no token 'zzz'"):
        load(tmp_path, eod="zzz")


def test_null() -> None:
    tokenizer = load("null:100")
    assert (
        tokenizer.encode(" 3 1\n99 ") == [3, 1, 99] and tokenizer.decode([3, 100, 4]) == "3 4" and tokenizer.eod == 100
    )
    with pytest.raises(ValueError, match=r"ids 7\.\.101 outside 0\.\.100"):
        tokenizer.encode("7 101")
    with pytest.raises(ValueError, match="integers separated by spaces"):
        tokenizer.encode("7 x")
    with pytest.raises(ValueError, match="write null:SIZE"):
        _ = load("null").eod


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json is not a tokenizer"):
        load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no tokenizer at .*: give a tokenizer.json"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match="at least 257"):
        tokenizers.train_bpe(["x"], 200)
    none = Bpe(hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="name one"):
        _ = none.eod
