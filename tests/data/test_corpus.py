"""The quickstart corpus: made once, whole or not at all, and its held-out bytes are the text's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmegatron.data import corpus
from fmegatron.data.batches import batch_at, held_out_batches
from fmegatron.data.corpus import Corpus, quickstart
from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.text import Document

TEXTS = {
    "train": [Document(f"{i}.py", f"x{i} = {i}\n" * 20) for i in range(30)],
    "valid": [Document("a.py", "x = 'é'\n" * 50), Document("b.py", ""), Document("c.py", "y = x3\n" * 9)],
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small library, so that the tests are fast."""
    monkeypatch.setattr(corpus, "stdlib_documents", lambda split: iter(TEXTS[split]))
    monkeypatch.setattr(corpus, "stdlib_files", lambda root: [])


@pytest.mark.usefixtures("few")
def test_made_once_and_read_back(tmp_path: Path) -> None:
    lines: list[str] = []
    made = quickstart(tmp_path, 300, lines.append)
    assert len(lines) == 3 and quickstart(tmp_path, 300, lines.append) == made and len(lines) == 3
    assert len(list(tmp_path.iterdir())) == 1 and made.vocab_size <= 300 and made.valid
    for split, prefix in (("train", made.train), ("valid", made.valid)):
        data = IndexedDataset(prefix)
        kept = [text for _, text in TEXTS[split] if text]
        assert [made.codec.decode(ids) for ids in data] == kept
        assert {int(ids[-1]) for ids in data} == {made.codec.eod}
        assert made.counts[split] == (len(TEXTS[split]), len(data.stream), len("".join(kept).encode()))
    quickstart(tmp_path, 301)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("few")
def test_held_out_bytes_are_those_of_the_predicted_text(tmp_path: Path) -> None:
    made = quickstart(tmp_path, 300)
    for limit in (None, 3):
        held_out = made.held_out(16, 4, limit=limit)
        labels = [n for b in held_out_batches(held_out) for n in b["labels"][b["weights"] > 0].tolist()]
        text = made.codec.decode(labels)
        assert "é" in text and "\ufffd" not in text and held_out.bytes == len(text.encode())
    total = made.counts["valid"].bytes
    first = int(IndexedDataset(made.valid or "").stream[0])
    assert made.held_out(16, 4).bytes == total - len(made.codec.decode([first]).encode())
    assert math.isclose(made.bits_per_byte["xz"] * total / 8, round(made.bits_per_byte["xz"] * total / 8))


@pytest.mark.usefixtures("few")
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "compressed_sizes", interrupt)
        quickstart(tmp_path, 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few")
def test_the_slower_of_two_builders_takes_the_other_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(split: str) -> Iterator[Document]:
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "stdlib_documents", lambda split: iter(TEXTS[split]))
            quickstart(tmp_path, 300)
        return iter(TEXTS[split])

    monkeypatch.setattr(corpus, "stdlib_documents", texts)
    made = quickstart(tmp_path, 300)
    assert [path.name for path in tmp_path.iterdir()] == [Path(made.train).parent.name]


@pytest.mark.usefixtures("few")
def test_samples_of_a_corpus(tmp_path: Path) -> None:
    made = quickstart(tmp_path, 300)
    batch = batch_at(made.samples(8, 0, reset_positions=True), 0, 4)
    assert batch["tokens"].shape == (4, 8) and (batch["positions"] < 8).all()
    with pytest.raises(ValueError, match="no held-out split"):
        Corpus(made.train, made.tokenizer).held_out(8, 4)
    with pytest.raises(ValueError, match="vocabulary ends at 256"):
        batch_at(Corpus(made.train, "byte").samples(64, 0), 0, 9)
    (Path(made.train).parent / "corpus.json").unlink()
    with pytest.raises(ValueError, match="remove the folder"):
        quickstart(tmp_path, 300)


def interrupt(data: bytes) -> dict[str, int]:
    raise KeyboardInterrupt
