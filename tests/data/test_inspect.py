"""What inspect says is what numpy counts; verify finds every byte that is changed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron import cli
from fmegatron.data import IndexedDataset, IndexedWriter, tokenizers
from fmegatron.data.inspect import excerpt, picture, statistics
from fmegatron.data.verify import check_ids, record, verify

DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=20), max_size=8)


def write(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedWriter(prefix, np.uint16) as out:
        out.add_documents(documents)
    return IndexedDataset(prefix)


@settings(max_examples=50)
@given(DOCUMENTS, st.integers(1, 40), st.integers(0, 5))
def test_numbers_and_an_excerpt(documents: list[list[int]], tokens: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder, "x"), documents)
        found, ids = statistics(data), [i for document in documents for i in document]
        assert (found.documents, found.tokens, found.distinct) == (len(documents), len(ids), len(set(ids)))
        assert found.lengths.tolist() == list(map(len, documents))
        assert (found.smallest, found.largest) == (min(ids, default=0), max(ids, default=0))
        lines = list(excerpt(data, None, tokens, seed))
        shown = [int(word) for line in lines[1::2] for word in line.split()]
        assert len(shown) == min(tokens, len(ids))
        assert not shown or any(ids[i : i + len(shown)] == shown for i in range(len(ids)))
        for head, text in zip(lines[::2], lines[1::2], strict=True):  # "── document 2, tokens 3 to 9 of 12 ──"
            number, first, stop, size = (int(word.strip(",")) for word in head.split() if word.strip(",").isdigit())
            assert documents[number][first:stop] == [int(word) for word in text.split()] and len(documents[number]) == size


@pytest.mark.parametrize("documents", [[], [[]], [[1]], [[1, 2], [3] * 5000]])
def test_a_picture_of_anything(tmp_path: Path, documents: list[list[int]]) -> None:
    picture(statistics(write(tmp_path / "x", documents)), tmp_path / "x.png", "x")
    assert (tmp_path / "x.png").stat().st_size > 5000


@settings(max_examples=40)
@given(DOCUMENTS.filter(any), st.sampled_from([".bin", ".idx"]), st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_is_found(documents: list[list[int]], end: str, at: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "x")
        write(prefix, documents)
        record(prefix)
        assert all("as recorded" in line for line in verify(prefix)[1:])
        path = Path(f"{prefix}{end}")
        content = bytearray(path.read_bytes())
        content[at % len(content)] ^= change
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.(bin|idx)"):
            verify(prefix)


def test_ids_outside_of_the_vocabulary(tmp_path: Path) -> None:
    data = write(tmp_path / "x", [[1, 2], [], [3, 300, 4]])
    check_ids(data, 301)
    with pytest.raises(ValueError, match="id 300 in sequence 2, but the vocabulary ends at 299"):
        check_ids(data, 300)
    with pytest.raises(ValueError, match=r"x.bin at byte 6: id 300 in sequence 2, but the vocabulary ends at 256"):
        verify(tmp_path / "x", tokenizers.load("byte").vocab_size)
    (tmp_path / "x.sha256").write_text("nonsense\n")
    with pytest.raises(ValueError, match="x.sha256: not lines of a sha256 and a file name"):
        verify(tmp_path / "x")


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", b"hello"), ("b", b"you there")):
        write(tmp_path / name, [[*text, 256]])
    assert cli.main("data merge a b --output c".split()) == 0
    assert cli.main("data verify c --tokenizer byte --record".split()) == 0 and Path("c.sha256").is_file()
    capsys.readouterr()
    assert cli.main("data inspect c --tokenizer byte".split()) == 0
    out = capsys.readouterr().out
    assert "2 documents, 2 sequences, 16 tokens" in out and "tokens 0 to 6 of 6 ──\nhello\n── document 1" in out
    assert Path("c.lengths.png").is_file()
    Path("d.jsonl").write_text('{"x": "a", "y": "b"}')
    assert cli.main("tokenize d.jsonl --output d --key x,y --tokenizer byte".split()) == 0
    assert "d_x_document.bin, d_y_document.bin: 1 documents" in capsys.readouterr().out and Path("d_y_document.bin").is_file()
    for words, said in (("data", "expected inspect|verify|merge|convert PREFIX, got nothing"),
                        ("data inspect a b", "expected inspect|verify|merge|convert PREFIX, got inspect a b"),
                        ("data verify gone", "gone.idx does not exist")):  # fmt: skip
        assert cli.main(words.split()) == 2 and said in capsys.readouterr().err
