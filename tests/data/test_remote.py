"""Token files on S3, an API server on localhost: the same tokens and rows as from the disk, with few requests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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
