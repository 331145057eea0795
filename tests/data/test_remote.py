"""Token files on S3, an API server on localhost: the same tokens and rows as from the disk, with few requests."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data import Corpus, IndexedDataset, IndexedWriter, Samples
from fmegatron.data.corpus import Megatron
from fmegatron.data.remote import RemoteTokens


@pytest.fixture(scope="module")
def bucket(s3: Callable[[], str]) -> str:
    return s3()


def put(folder: Path, bucket: str) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    for end in (".bin", ".idx"):
        files.put_file(str(folder / f"x{end}"), f"{bucket}/x{end}")


def test_the_same_tokens_and_rows(tmp_path: Path, bucket: str) -> None:
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_documents(rng.integers(0, 257, n) for n in rng.integers(0, 300, 60))
    put(tmp_path, bucket)
    here, there = IndexedDataset(tmp_path / "x"), IndexedDataset(f"{bucket}/x")
    assert [t.tolist() for t in there] == [t.tolist() for t in here] and there.documents.tolist() == here.documents.tolist()
    assert there.get(3, 1, 5).tolist() == here.get(3, 1, 5).tolist()
    assert pickle.loads(pickle.dumps(there))[7].tolist() == here[7].tolist()
    small = RemoteTokens(f"{bucket}/x.bin", here.dtype, len(here.stream), block=64, kept=2)
    places = rng.integers(0, len(here.stream), 100)
    assert np.array_equal(small[places], here.stream[places]) and np.array_equal(small[5:900], here.stream[5:900])
    assert len(small._blocks) == 2
    for number in (0, 5):
        ours, theirs = (Samples(data, 50, 1).row(number) for data in (there, here))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    how = Megatron(40, cache=str(tmp_path / "cache"))
    rows = [Corpus(prefix, "byte", megatron=how).samples(32, 5) for prefix in (str(tmp_path / "x"), f"{bucket}/x")]
    for number in range(40):
        ours, theirs = (part.row(number) for part in rows)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_what_is_wrong_is_named(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(ValueError, match=rf"{bucket}/gone.idx does not exist; a prefix names two files"):
        IndexedDataset(f"{bucket}/gone")
    with IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_document([1, 2, 3])
    (tmp_path / "x.bin").write_bytes(b"\x01")
    put(tmp_path, bucket)
    with pytest.raises(ValueError, match=rf"{bucket}/x.bin: 1 bytes, but x.idx expects 3 tokens"):
        IndexedDataset(f"{bucket}/x")
    with pytest.raises(ValueError, match=r"nope://x/y.idx: .*rotocol"):
        IndexedDataset("nope://x/y")


def test_a_file_that_changes_while_it_is_read_is_an_error_with_its_place(tmp_path: Path, bucket: str) -> None:
    import s3fs

    files, name = s3fs.S3FileSystem(), f"{bucket}/x.bin"
    with IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_documents(np.full(100, n) for n in range(20))
    whole = (tmp_path / "x.bin").read_bytes()
    put(tmp_path, bucket)
    shorter, empty = (lambda: files.pipe_file(name, whole[:1111])), (lambda: files.pipe_file(name, b""))
    for change in (shorter, empty, lambda: files.rm_file(name)):
        files.pipe_file(name, whole)
        stream = RemoteTokens(name, np.dtype("<u2"), 2000, block=200, kept=1)
        assert stream[500:505].tolist() == [5] * 5
        change()
        with pytest.raises(ValueError, match=rf"{name} at byte \d+: .*; copy both files there again") as caught:
            stream[1500:1505]
        assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.sampled_from(["cut", "flip", "more", "other"]), st.integers(0, 7), st.booleans())
def test_a_damaged_remote_pair_is_refused_as_on_the_disk_or_reads_the_same(at: int, how: str, bit: int, index: bool) -> None:
    """Any address that fsspec knows goes the same way: here one in memory. What the disk's reader says, this one says."""
    import fsspec

    files = fsspec.filesystem("memory")
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(f"{folder}/x", np.uint16) as out:
            out.add_documents([n] * n for n in range(1, 8))
        victim = Path(folder, "x.idx" if index else "x.bin")
        data = bytearray(victim.read_bytes())
        at %= len(data)
        other = Path(folder, "x.bin").read_bytes() + b"PK"
        data = {"cut": data[:at], "more": data + data[: at + 1], "other": other}.get(how, data)
        if how == "flip":
            data[at] ^= 1 << bit
        victim.write_bytes(data)
        for end in ("bin", "idx"):
            files.pipe_file(f"/x.{end}", Path(folder, f"x.{end}").read_bytes())
        found = []
        for prefix in (f"{folder}/x", "memory://x"):
            try:
                found.append([text.tolist() for text in IndexedDataset(prefix)])
            except ValueError as error:
                assert "\n" not in str(error) and ("x.idx" in str(error) or "x.bin" in str(error))
                found.append(str(error).replace("memory://", f"{folder}/"))
        assert found[0] == found[1] and (how == "flip" or isinstance(found[0], str))
