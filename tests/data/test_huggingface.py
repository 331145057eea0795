"""Data sets of Hugging Face's `datasets` as a source: of tokens, of conversations, whole in memory or streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fmegatron import cli
from fmegatron.data import Conversations, Counts, IndexedDataset, tokenize

TEXTS = [f"text {i}: {'é' * (i % 7)}" for i in range(500)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, with its cache in a folder of its own and no network."""
    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The texts in two files, so that a stream has shards."""
    folder = tmp_path_factory.mktemp("jsonl")
    for part in range(2):
        rows = [{"text": text, "other": part} for text in TEXTS[part * 250 : part * 250 + 250]]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in sorted(folder.iterdir())]


def opened(hub: Any, files: list[str], cache: Path, how: str) -> Any:
    return hub.load_dataset("json", data_files=files, split="train", cache_dir=str(cache), streaming=how == "streamed")


@pytest.mark.parametrize("how", ["mapped", "streamed"])
def test_tokens_are_those_of_the_files_and_an_interrupted_job_goes_on(
    hub: Any, files: list[str], tmp_path: Path, how: str
) -> None:
    tokenize(files, tmp_path / "whole", "byte", True)
    data = opened(hub, files, tmp_path / "hf", how)
    assert hasattr(data, "__len__") == (how == "mapped")

    def stopped(counts: Counts) -> None:
        if counts.documents >= 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(data, tmp_path / "out", "byte", True, progress=stopped, part_bytes=900)
    parts = len(list((tmp_path / "out.parts").glob("0*.json")))
    with pytest.raises(ValueError, match=r"the first \d+ documents are not those that .*out.parts was made of: remove"):
        tokenize(data.map(lambda row: {"text": row["text"] + "!"}), tmp_path / "out", "byte", True, part_bytes=900)
    seen: list[Counts] = []
    last = tokenize(opened(hub, files, tmp_path / "hf", how), tmp_path / "out", "byte", True, 1, seen.append, part_bytes=900)
    assert parts > 2 and seen[0].documents > 128 and last.documents == len(TEXTS)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"out{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()


def test_the_command_takes_a_function_that_returns_one(
    hub: Any, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts_of_mine.py").write_text(
        f"import datasets\n\ndef train():\n    return datasets.load_dataset('json', data_files={files!r}, split='train',\n"
        f"                                 cache_dir={str(tmp_path / 'hf')!r}, streaming=True)\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main("tokenize texts_of_mine:train --output learned --vocab-size 300".split()) == 0
    data = IndexedDataset("learned")
    assert len(data.documents) - 1 == len(TEXTS) and Path("learned.tokenizer.json").is_file()
    for words, said in (("texts_of_mine:gone", "has no attribute 'gone'"), ("texts_of_mine:train x.txt", "name it alone"),
                        ("texts_of_mine:train --key body", "document 1: no 'body' in it")):  # fmt: skip
        assert cli.main(["tokenize", *words.split(), "--tokenizer", "byte"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("how", ["mapped", "streamed"])
def test_conversations(hub: Any, tmp_path: Path, how: str) -> None:
    """The same rows as from the file itself, for any number of epochs, from any point."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "completion": text[::-1]}) + "\n" for text in TEXTS[:30]))
    data = opened(hub, [str(path)], tmp_path / "hf", how)
    ours, file = [Conversations(source, "byte", "plain", tmp_path / name).samples(64, 3)
                  for name, source in (("a", data), ("b", str(path)))]  # fmt: skip
    for number in (0, 1, 7, 41, 5):
        mine, other = ours.row(number), file.row(number)
        assert all((mine[key] == other[key]).all() for key in other)
    with pytest.raises(ValueError, match="an iterator can be read once: give a list or a data set"):
        Conversations(iter(data), "byte", "plain", tmp_path / "c").samples(64, 3)
