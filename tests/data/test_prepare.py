"""`tokenize`: the same file for any number of workers, equal to encoding by hand, and never half a file."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron.data.indexed import IndexedDataset, IndexedWriter
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


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), max_size=3), max_size=5), st.booleans())
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path: Path, texts: list[list[list[int]]], wide: bool) -> None:
    """Its builder, fed as its preprocess_data does it; sentences are given as sequences here."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dtype = np.int32 if wide else np.uint16
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in texts:
        builder.add_document([i for sentence in document for i in sentence], [len(sentence) for sentence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", dtype) as out:
        for document in texts:
            out.add_document(*document)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()
    sequences = [sentence for document in texts for sentence in document]
    assert [tokens.tolist() for tokens in IndexedDataset(tmp_path / "theirs")] == sequences
    if sequences:
        theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == sequences
        assert theirs.document_indices.tolist() == IndexedDataset(tmp_path / "ours").documents.tolist()


def test_several_keys_sentences_and_dicts(tmp_path: Path) -> None:
    rows = [{"a": "One. Two!  Three", "b": ""}, {"a": "", "b": "x"}]
    for output, source in (("o", rows), ("p", [parquet(tmp_path / "x.parquet", rows)])):
        tokenize(source, tmp_path / output, "byte", True, key=("a", "b"), split_sentences=True)
        a, b = (IndexedDataset(tmp_path / f"{output}_{key}_sentence") for key in ("a", "b"))
        assert [bytes(t[t < 256].tolist()) for t in a] == [b"One. ", b"Two!  ", b"Three"]
        assert [t[-1] == 256 for t in a] == [False, False, True]
        assert a.documents.tolist() == [0, 3, 3] and b.documents.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="x.parquet: no column 'c'; there are a, b"):
        tokenize([tmp_path / "x.parquet"], tmp_path / "q", "byte", key="c")


def parquet(path: Path, rows: list[dict[str, str]]) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_compressed_lines(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = jsonl(tmp_path / "x.jsonl", [f"text {i}" for i in range(2000)]).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(plain[:5001]) + zstandard.compress(plain[5001:]))
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        assert tokenize([tmp_path / name], tmp_path / name, "byte").documents == 2000
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "x.jsonl.bin").read_bytes()
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] + b"\x07" * (len(whole) // 2))
        with pytest.raises(ValueError, match=rf"{name}: cannot be read after|{name}:\d+: not"):
            tokenize([tmp_path / name], tmp_path / "damaged", "byte")
        for cut in (1, 9, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:-cut])
            with pytest.raises(ValueError, match=rf"{name}: cannot be read after \d+ bytes of text: .*; copy the file again"):
                tokenize([tmp_path / name], tmp_path / "damaged", "byte")


def test_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed in the third part: the two before are not tokenized again, and the files come out the same."""
    file = jsonl(tmp_path / "x.jsonl", [f"{i} {i + 1}" for i in range(40 * CHUNK)])
    tokenize([file], tmp_path / "whole", "null:9999", True)
    script = """if True:
        import os, sys
        from fmegatron.data import prepare
        def told(counts):
            if counts.documents > 30 * prepare.CHUNK:
                os._exit(9)
        prepare.tokenize([sys.argv[1]], sys.argv[2], "null:9999", True, progress=told, part_bytes=5000)
    """
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", script, str(file), str(out)]).returncode == 9
    assert not (tmp_path / "out.idx").exists() and (tmp_path / "out.parts" / "00001.json").is_file()
    seen: list[Counts] = []
    counts = tokenize([file], out, "null:9999", True, progress=seen.append, part_bytes=5000)
    assert seen[0].documents > 10 * CHUNK and counts.documents == 40 * CHUNK
    for end in (".bin", ".idx"):
        assert (tmp_path / f"out{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert not (tmp_path / "out.parts").exists()


def test_parts_of_another_job_are_not_taken(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", ["1 2"] * 4 * CHUNK)

    def stopped(counts: Counts) -> None:
        if counts.documents > 2 * CHUNK:
            raise KeyboardInterrupt

    for change in (lambda: None, lambda: jsonl(file, ["3 4"] * 4 * CHUNK)):
        with pytest.raises(KeyboardInterrupt):
            tokenize([file], tmp_path / "out", "null:9", progress=stopped, part_bytes=10)
        assert (tmp_path / "out.parts" / "00001.json").is_file()
        change()
        tokenize([file], tmp_path / "out", "null:9", part_bytes=10)
        assert {tuple(t.tolist()) for t in IndexedDataset(tmp_path / "out")} == {tuple(map(int, read(file).split()))}


def read(file: Path) -> str:
    return str(json.loads(file.read_text().splitlines()[0])["text"])


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", ["1 2"])
    with pytest.raises(ValueError, match="another process is writing it"):
        tokenize([file], tmp_path / "out", "byte", progress=lambda counts: void(tokenize([file], tmp_path / "out", "byte")))


def void(value: object) -> None:
    return None


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same error path, at the same calls."""
    file = jsonl(tmp_path / "x.jsonl", ["1" * 9000] * 20)
    tokenize([file], tmp_path / "out", "byte")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match=r"after \d+ documents; nothing is left of them: make room and start again.*\.bin"):
            tokenize([file, file], tmp_path / "out", "byte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert len(IndexedDataset(tmp_path / "out")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "x.jsonl"]
