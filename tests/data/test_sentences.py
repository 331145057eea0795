"""Sentences: nothing of a text is lost; punkt's cuts are those of nltk, with a model that is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import cli
from fmegatron.data import IndexedDataset, sentences, stdlib_documents, tokenize

ABBREVIATED = "He met Dr. Smith of Inc. Ltd. at noon. They spoke with Dr. Jones. It rained. "
OTHER = "At noon Smith left. The rain had rained on them. Jones and Smith said, as Dr. Jones does: no noon without Jones. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as NLTK_DATA wants it, with a model in the format of punkt_tab learned from a small text."""
    punkt, tables = pytest.importorskip("nltk.tokenize.punkt"), pytest.importorskip("nltk.tabdata")
    folder = tmp_path_factory.mktemp("nltk") / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    learned = punkt.PunktTrainer((ABBREVIATED + OTHER) * 40).get_params()
    assert "dr" in learned.abbrev_types and "noon" not in learned.abbrev_types
    write = tables.TabEncoder()
    for name, content in (
        ("collocations.tab", write.tups2tab(learned.collocations)),
        ("sent_starters.txt", write.set2txt(learned.sent_starters)),
        ("abbrev_types.txt", write.set2txt(learned.abbrev_types)),
        ("ortho_context.tab", write.ivdict2tab(learned.ortho_context)),
    ):
        (folder / name).write_text(content)
    return folder.parents[2]


@pytest.fixture
def found(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nltk finds the model."""
    monkeypatch.setattr("nltk.data.path", [str(model)])
    sentences.splitter.cache_clear()
    return model


@given(st.text(st.sampled_from("aB.!? \n\"')。")))
def test_joined_they_are_the_text(text: str) -> None:
    assert "".join(sentences.sentences(text)) == text and "" not in sentences.sentences(text)


def test_punkt_is_nltks(tmp_path: Path, found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sentences, in stretches as Megatron's tool hands them on."""
    import nltk.tokenize.punkt as punkt

    monkeypatch.setattr(sentences, "STRETCH", 5000)
    texts = [ABBREVIATED * 2, "", "one", *(text for _, text in list(stdlib_documents("valid"))[:4])]
    oracle = punkt.PunktTokenizer("english")
    expected = [part for text in texts for at in range(0, len(text), 5000) for part in oracle.tokenize(text[at : at + 5000])]
    assert expected[0] == "He met Dr. Smith of Inc. Ltd. at noon." and len(expected) > 100
    documents = [{"text": text} for text in texts]
    tokenize(documents, tmp_path / "x", "byte", split_sentences=True, splitter="punkt")
    assert [bytes(tokens.tolist()).decode() for tokens in IndexedDataset(tmp_path / "x")] == [part for part in expected if part]


def test_every_process_finds_the_model(tmp_path: Path, found: Path) -> None:
    """Where this process searches, in its variables or set by hand."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": ABBREVIATED}))
    words = f"tokenize {tmp_path}/x.jsonl --tokenizer byte --split-sentences --splitter punkt --output"
    assert cli.main([*words.split(), f"{tmp_path}/one"]) == 0 == cli.main([*words.split(), f"{tmp_path}/two", "--workers", "2"])
    assert len(IndexedDataset(tmp_path / "one")) == 3
    for end in (".bin", ".idx"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"two{end}").read_bytes()


@pytest.mark.parametrize(("splitter", "message"), [
    ("punct", "splitter punct: choose punctuation, punkt .English. or punkt:LANGUAGE"),
    ("punkt:klingon", "splitter punkt:klingon: nltk has no punkt_tab for klingon here: python -m nltk.downloader punkt_tab"),
    ("punkt:../x", "splitter punkt:../x: nltk has no punkt_tab for ../x"),
])  # fmt: skip
def test_what_is_missing_is_said_first(tmp_path: Path, found: Path, splitter: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize([tmp_path / "gone.jsonl"], tmp_path / "x", "byte", split_sentences=True, splitter=splitter)
    with pytest.raises(ValueError, match="nothing to cut without split_sentences"):
        tokenize([tmp_path / "gone.jsonl"], tmp_path / "x", "byte", splitter="punkt")


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences.splitter.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize.punkt", None)
    with pytest.raises(ValueError, match=r"splitter punkt needs nltk: pip install 'fmegatron\[data\]', or pip install nltk"):
        sentences.splitter("punkt")
