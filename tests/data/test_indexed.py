"""The bytes of `.bin/.idx`, written by struct here; round trips; and damaged files, which end in one ValueError."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype

Documents = list[list[list[int]]]
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 255), max_size=6), max_size=3), max_size=5)


def by_hand(documents: Documents, code: int = 8, item: str = "H", modes: bytes = b"") -> tuple[bytes, bytes]:
    """(.bin, .idx) of documents of sequences, spelled out from the format's description."""
    sequences = [sequence for document in documents for sequence in document]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    pointers = [sum(map(len, sequences[:i])) * struct.calcsize(item) for i in range(len(sequences))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *pointers)
    index += struct.pack(f"<{len(boundaries)}q", *boundaries) + modes
    return b"".join(struct.pack(f"<{len(s)}{item}", *s) for s in sequences), index


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from([(1, "B"), (3, "h"), (4, "i"), (5, "q"), (6, "d"), (7, "f"), (8, "H")]))
def test_bytes_and_round_trip(documents: Documents, kind: tuple[int, str]) -> None:
    code, item = kind
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "deep", "corpus.v1")
        with IndexedWriter(prefix, np.dtype(item)) as out:
            for document in documents:
                out.add_document(*document)
        written = tuple(Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx"))
        assert written == by_hand(documents, code, item)
        assert len(list(prefix.parent.iterdir())) == 2

        data = IndexedDataset(prefix)
        sequences = [sequence for document in documents for sequence in document]
        assert [tokens.tolist() for tokens in data] == sequences == [t.tolist() for t in data[:]]
        assert data.lengths.tolist() == list(map(len, sequences)) and data.dtype == np.dtype(item)
        for document, start, stop in zip(documents, data.documents, data.documents[1:], strict=False):
            assert [tokens.tolist() for tokens in data[start:stop]] == document
        assert [t.tolist() for t in data[::-2]] == sequences[::-2]
        assert [t.tolist() for t in pickle.loads(pickle.dumps(data))] == sequences


def test_parts_of_a_sequence(tmp_path: Path) -> None:
    write(tmp_path, [[[1, 2, 3, 4]], [[5, 6]]])
    data = IndexedDataset(tmp_path / "x")
    assert data.get(0, 1, 2).tolist() == [2, 3] and data.get(-1, 1).tolist() == [6] and data.get(1, 2).tolist() == []
    with pytest.raises(ValueError, match="tokens 1:5 of sequence 0, which has 4"):
        data.get(0, 1, 4)
    with pytest.raises(IndexError):
        data[2]
    with pytest.raises(ValueError, match="read-only"):
        data[0][0] = 9


def test_modes_of_multimodal_files_are_read(tmp_path: Path) -> None:
    write(tmp_path, [[[1, 2], [3]]], modes=b"\x00\x01")
    modes = IndexedDataset(tmp_path / "x").modes
    assert modes is not None and modes.tolist() == [0, 1]


def test_dtype_rule() -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


@pytest.mark.parametrize("tokens", [[65536], [-1], [0.5], [[1]]])
def test_values_that_do_not_fit_are_refused_and_nothing_appears(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="document 1"), IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_document([1])
        out.add_document(tokens)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path, [[[1, 2]]])
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_document([7])
        raise KeyboardInterrupt
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2] and len(list(tmp_path.iterdir())) == 2


def test_a_kill_between_the_two_names_leaves_no_pair_of_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tokens under an old index of the same size would be read without an error."""
    write(tmp_path, [[[1, 2], [3]]])

    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_document([4, 5, 6])
    with pytest.raises(ValueError, match="x.idx does not exist"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", "at byte 0: expected .*not an index"),
        (9, b"\x02", "version 2"),
        (17, b"\x09", "at byte 17: expected a dtype code of 1 to 8, found 9"),
        (18, b"\x03", "expected 86 bytes for 3 sequences"),
        (37, b"\xff", "at byte 34: expected the length of sequence 0"),
        (50, b"\x01", "at byte 50: expected sequence 1 to start at byte 2 of the .bin, found 1"),
        (58, b"\x01", "boundaries that rise from 0 to 2"),
        (34, b"\x02", "at byte 50: expected sequence 1 to start at byte 4"),
        (38, b"\x09", "x.bin: 6 bytes, but x.idx expects 10 tokens of uint16, 20 bytes: truncated"),
    ],
)
def test_damage_is_named(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write(tmp_path, [[[1], [2, 3]]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[at : at + 1] = value
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "x")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x.idx does not exist; a prefix names two files"):
        IndexedDataset(tmp_path / "x")


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.integers(0, 2**16), st.binary(min_size=1, max_size=8), st.booleans())
def test_fuzzed_index_reads_in_bounds_or_is_refused(documents: Documents, at: int, noise: bytes, cut: bool) -> None:
    """Whatever the index says, every token read lies inside the file, or opening it raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), documents)
        path = Path(folder, "x.idx")
        good = path.read_bytes()
        at %= len(good)
        path.write_bytes(good[:at] if cut else good[:at] + noise + good[at + len(noise) :])
        try:
            data = IndexedDataset(Path(folder, "x"))
        except ValueError as error:
            assert "x.idx" in str(error) or "x.bin" in str(error)
            return
        assert [len(tokens) for tokens in data] == data.lengths.tolist()
        assert not cut
        assert [t.tolist() for t in data] == [s for document in documents for s in document] or data.dtype != np.uint16


def write(folder: Path, documents: Documents, modes: bytes = b"") -> None:
    tokens, index = by_hand(documents, modes=modes)
    (folder / "x.bin").write_bytes(tokens)
    (folder / "x.idx").write_bytes(index)
