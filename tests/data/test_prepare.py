"""`tokenize`: the same file for any number of workers, equal to encoding by hand, and never half a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.prepare import CHUNK, Counts, tokenize


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8), st.booleans())
def test_documents_are_their_bytes(tmp_path: Path, texts: list[str], append_eod: bool) -> None:
    counts = tokenize([jsonl(tmp_path / "x.jsonl", texts)], tmp_path / "out", "byte", append_eod)
    data = IndexedDataset(tmp_path / "out")
    end = [256] if append_eod else []
    assert [tokens.tolist() for tokens in data] == [[*text.encode(), *end] for text in texts if text]
    assert len(data.documents) - 1 == len(texts) == counts.documents
    assert (counts.tokens, counts.bytes) == (len(data.stream), sum(len(text.encode()) for text in texts))


def test_workers_change_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", [f"{i} {i + 1}" for i in range(3 * CHUNK + 1)])
    seen: list[Counts] = []
    for workers in (1, 2):
        last = tokenize([file, file], tmp_path / f"out{workers}", "null:1000", True, workers, seen.append)
    assert seen[-1] == last == seen[len(seen) // 2 - 1] and last.documents == 2 * (3 * CHUNK + 1)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"out1{end}").read_bytes() == (tmp_path / f"out2{end}").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_the_line_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    file = jsonl(tmp_path / "x.jsonl", ["1", "2 x"])
    with pytest.raises(ValueError, match=r"x.jsonl:2: the null tokenizer reads integers"):
        tokenize([file], tmp_path / "out", "null:10", workers=workers)
    with pytest.raises(ValueError, match="workers 0"):
        tokenize([file], tmp_path / "out", "byte", workers=0)
    assert list(tmp_path.iterdir()) == [file]
