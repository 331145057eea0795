"""`.bin/.idx` to MDS and back: the same bytes, for any documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron import cli
from fmegatron.data import IndexedWriter
from fmegatron.data.mds import MDSWriter
from fmegatron.data.mds.convert import to_indexed, to_mds

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 120), max_size=6), max_size=3), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS, st.sampled_from(["uint8", "int8", "int16", "uint16", "int32", "int64"]), st.booleans())
def test_there_and_back_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str, plain: bool
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    documents = [[[7, *sum(document, [])]] for document in documents] if plain else documents
    with IndexedWriter(folder / "a", dtype) as out:
        for document in documents:
            out.add_document(*document)
    assert to_mds(folder / "a", folder / "mds", compression="zstd", size_limit=300) == len(documents)
    assert to_indexed(folder / "mds", folder / "b") == len(documents)
    for end in (".bin", ".idx"):
        assert (folder / f"a{end}").read_bytes() == (folder / f"b{end}").read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "a", "uint16") as out:
        out.add_documents([[1, 2, 3], [4, 5]])
    a, b, folder = (str(tmp_path / name) for name in ("a", "b", "mds"))
    assert cli.main(["data", "convert", a, "--to", "mds", "--output", folder, "--compression", "gz:3", "--hashes", "sha1"]) == 0
    assert "2 documents" in capsys.readouterr().out and (tmp_path / "mds/shard.00000.mds.gz").is_file()
    assert cli.main(["data", "verify", folder]) == 0
    assert "1 shards, 2 samples, 1 hashes" in capsys.readouterr().out
    assert cli.main(["data", "convert", folder, "--to", "bin", "--output", b]) == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert cli.main(["data", "verify", folder]) == 0
    assert "1 shards, 2 samples, 2 hashes: as the index says" in capsys.readouterr().out
    shard = tmp_path / "mds/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert cli.main(["data", "verify", folder]) == 2
    assert "shard.00000.mds: sha1 is" in capsys.readouterr().err
    assert cli.main(["data", "convert", str(tmp_path / "nope"), "--to", "bin", "--output", b]) == 2
    assert "nope/index.json does not exist" in capsys.readouterr().err


def test_samples_in_packed_shards_are_decoded_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault that unpacks, and that no hash tells."""
    with IndexedWriter(tmp_path / "a", "uint16") as out:
        out.add_documents([[1, 2, 3], [4, 5]])
    folder = tmp_path / "mds"
    to_mds(tmp_path / "a", folder, compression="gz:3", hashes=())
    packed, index = folder / "shard.00000.mds.gz", json.loads((folder / "index.json").read_text())
    raw = bytearray(gzip.decompress(packed.read_bytes()))
    raw[4] ^= 1  # where the first sample begins
    packed.write_bytes(gzip.compress(bytes(raw)))
    index["shards"][0]["zip_data"]["bytes"] = packed.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    assert cli.main(["data", "verify", str(folder)]) == 2
    assert "shard.00000.mds.gz" in capsys.readouterr().err


def test_what_is_no_token_file_is_refused(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "x", {"text": "str", "raw": "bytes"}) as out:
        out.write({"text": "a", "raw": np.arange(3, dtype=np.int32).tobytes()})
    for column, message in [("tokens", "no column 'tokens', choose of raw, text"), ("text", "holds str, not tokens"),
                            ("raw", "name their dtype")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            to_indexed(tmp_path / "x", tmp_path / "y", column)
    assert to_indexed(tmp_path / "x", tmp_path / "y", "raw", "int32") == 1
    with MDSWriter(tmp_path / "z", {"tokens": "ndarray"}) as out:
        for dtype in (np.uint16, np.int32):
            out.write({"tokens": np.arange(3, dtype=dtype)})
    with pytest.raises(ValueError, match="int32, those before it are uint16"):
        to_indexed(tmp_path / "z", tmp_path / "w")
    assert not list(tmp_path.glob(".*"))
