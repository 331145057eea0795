"""Shards and encodings: byte for byte mosaicml-streaming's, read in both directions; damaged ones end in one ValueError."""

from __future__ import annotations

import json
import resource
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fmegatron.data.mds import Cache, MDSWriter, Place, Shard, encoding
from fmegatron.data.mds.encodings import DTYPE_CODES
from fmegatron.data.mds.index import loads

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARRAYS = st.sampled_from(sorted(DTYPE_CODES)).flatmap(
    lambda name: arrays.arrays(name, arrays.array_shapes(max_dims=4, max_side=5))
)


def scalars(name: str) -> st.SearchStrategy[Any]:
    return arrays.from_dtype(np.dtype(name))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bytes": st.binary(max_size=30),
    "str": st.text(max_size=20),
    "int": st.integers(-(2**63), 2**63 - 1),
    "str_int": st.integers(-(10**40), 10**40),
    "str_float": st.floats(allow_nan=False),
    "str_decimal": st.decimals(allow_nan=False),
    "json": st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)),
    "ndarray": ARRAYS,
    "ndarray:int16": arrays.arrays("int16", arrays.array_shapes(max_dims=3, max_side=4)),
    "ndarray:float32:2,3": arrays.arrays("float32", (2, 3)),
    "uint8": scalars("uint8"),
    "int64": scalars("int64"),
    "uint64": scalars("uint64"),
    "float16": scalars("float16"),
    "float64": scalars("float64"),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(type(a) is type(b) and a == b)


def open_all(folder: Path | str, **options: Any) -> list[dict[str, Any]]:
    place = Place(Path(folder))
    infos = place.read_index(0, None)
    cache = Cache([(place, info) for info in infos], **options)
    samples = [sample for number in range(len(infos)) for sample in cache.shard(number)]
    cache.close()
    return samples


@QUICK
@given(st.fixed_dictionaries(VALUES))
def test_every_encoding_is_mosaics_and_comes_back(mosaic: Any, values: dict[str, Any]) -> None:
    ours = {name: encoding(name).encode(value) for name, value in values.items()}
    assert ours == mosaic.encode(values)
    assert all(same(encoding(name).decode(data), values[name]) for name, data in ours.items())
    assert all(encoding(name).size in (None, len(data)) for name, data in ours.items())


@settings(QUICK, max_examples=300)
@given(st.sampled_from(sorted(VALUES)), st.binary(max_size=40))
def test_any_bytes_decode_or_are_refused(name: str, data: bytes) -> None:
    known = encoding(name)
    try:
        value = known.decode(data)
    except ValueError:
        return
    if name.startswith("ndarray") and value.size:
        assert value.nbytes <= len(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("uint8", 300), ("uint8", -1), ("int16", 2.5), ("int32", "x"), ("float32", 1e60), ("int", 2**63), ("str", b"x"),
     ("bytes", "x"), ("ndarray", np.int64(3)), ("ndarray", np.zeros((0, 2))), ("ndarray:int16", np.zeros(3)), ("uint8", [1]),
     ("ndarray:int16:3", np.zeros(4, "int16")), ("ndarray", np.zeros(3, bool)), ("str_int", "1"), ("str_decimal", 1.5)],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError):
        encoding(name).encode(value)


@pytest.mark.parametrize(
    "name", ["int128", "jpeg", "ndarray:bool", "ndarray:int8:0", "ndarray:int8:2:3", "ndarray:int8:x", "pkl"]
)
def test_unknown_encodings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"encoding '?{name}"):
        encoding(name)


COLUMNS = {"z": "str", "tokens": "ndarray:int32", "n": "int", "x": "float32", "raw": "bytes", "meta": "json"}


def some(count: int) -> list[dict[str, Any]]:
    return [
        {"z": "ä" * i, "tokens": np.arange(i, 2 * i + 1, dtype=np.int32), "n": -i, "x": np.float32(i / 3), "raw": bytes(i % 5),
         "meta": {"i": [i]}} for i in range(count)
    ]  # fmt: skip


PACKED = [None, "zstd", "zstd:7", "gz", "gz:1", "br:3", "bz2:2", "snappy"]
HASHES = [(), ("sha1",), ("md5", "sha256", "xxh3_128", "xxh64"), ("blake2b", "sha3_512", "xxh32")]


@pytest.mark.parametrize(("compression", "hashes"), [(packed, HASHES[i % 4]) for i, packed in enumerate(PACKED)])
def test_both_read_what_the_other_wrote(mosaic: Any, tmp_path: Path, compression: str | None, hashes: tuple[str, ...]) -> None:
    samples = some(40)
    mosaic.write(str(tmp_path / "theirs"), COLUMNS, samples, compression=compression, hashes=list(hashes), size_limit=900)
    with MDSWriter(tmp_path / "ours", COLUMNS, compression=compression, hashes=hashes, size_limit=900) as out:
        for sample in samples:
            out.write(sample)
    theirs, ours = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("theirs", "ours"))
    assert len(ours["shards"]) == len(theirs["shards"]) > 3
    for mine, other in zip(ours["shards"], theirs["shards"], strict=True):
        assert mine["raw_data"] == other["raw_data"] and mine.keys() == other.keys()  # hashes too: the same bytes
        assert {**mine, "zip_data": 0} == {**other, "zip_data": 0}
    if compression is None:
        for path in (tmp_path / "theirs").iterdir():
            assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()
    for read in (open_all(tmp_path / "theirs"), mosaic.read(str(tmp_path / "ours"))):
        assert len(read) == 40
        assert all(same(got[key], sample[key]) for got, sample in zip(read, samples, strict=True) for key in COLUMNS)


def test_pickles_are_read_where_allowed(mosaic: Any, tmp_path: Path) -> None:
    mosaic.write(str(tmp_path / "x"), {"a": "pkl"}, [{"a": {1, 2}}])
    with pytest.raises(ValueError, match="shard.00000.mds: column 'a': encoding pkl runs code .*allow_unsafe_types"):
        open_all(tmp_path / "x")
    assert open_all(tmp_path / "x", allow_unsafe=True) == [{"a": {1, 2}}]


# -- damage -----------------------------------------------------------------------------------------------------------
def write(folder: Path, count: int = 12, **options: Any) -> None:
    with MDSWriter(folder, {"a": "str", "n": "uint16"}, **{"size_limit": 400, **options}) as out:
        for i in range(count):
            out.write({"a": "x" * i, "n": i})


@settings(QUICK, max_examples=300)
@given(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_fuzzed_shard_is_refused_or_its_samples_lie_in_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes, cut: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    path = folder / "shard.00000.mds"
    if not folder.exists():
        write(folder)
        path.rename(folder / "good")
    (info, *_) = Place(folder).read_index(0, None)
    good = (folder / "good").read_bytes()
    at %= len(good)
    path.write_bytes(good[:at] if cut else (good[:at] + noise + good[at + len(noise) :])[: len(good)])
    try:
        read = list(Shard(path, info))
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert not cut and len(read) == info.samples
    assert all(isinstance(sample["a"], str) and isinstance(sample["n"], np.uint16) for sample in read)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_fuzzed_index_reads_or_is_refused(at: int, noise: bytes, cut: bool) -> None:
    good = TEXT
    at %= len(good)
    try:
        shards = loads(good[:at] if cut else good[:at] + noise + good[at + len(noise) :], "folder/index.json")
    except ValueError as error:
        assert str(error).startswith("folder/index.json") and "\n" not in str(error)
        return
    assert not cut
    for shard in shards:
        assert shard.samples >= 1 and "/" not in shard.raw_data.basename


def _text() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), compression="gz", hashes=("sha1",))
        return Path(folder, "index.json").read_bytes()


TEXT = _text()


@settings(max_examples=60, deadline=None)
@given(st.none() | st.integers() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=2), st.data())
def test_an_index_with_any_value_anywhere_reads_or_is_refused(value: Any, data: st.DataObject) -> None:
    table = json.loads(TEXT)
    inner = table["shards"][0]
    part, key = data.draw(st.sampled_from([(part, key) for part in (inner, inner["raw_data"]) for key in part]))
    part[key] = value
    try:
        shards = loads(json.dumps(table).encode(), "index.json")
        [shard.columns() for shard in shards]
    except ValueError:
        return


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\x09", "at byte 0: expected 12 samples as in the index, found 9"),
        (8, b"\x01\x00", "at byte 8: expected an offset from"),
        (4, b"\x08\x00", "at byte 4: expected the first sample behind byte 56, found 8"),
        (53, b"\xff", "at byte 52: expected the last sample to end with the file"),
        (-17, b"\x09", "expected 15 bytes of sample 11 as its columns say, there are 17"),
        (-13, b"\xff", "sample 11, column 'a' at byte .*: not a str"),
    ],
)
def test_damage_is_named(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write(tmp_path, size_limit=None)
    path = tmp_path / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[at : at + len(value) or None] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_all(tmp_path)


def test_what_is_missing_or_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index.json does not exist"):
        open_all(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="index.json exists: write to a new folder"):
        write(tmp_path)
    path = tmp_path / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard.00000.mds: .* bytes, the index says .*truncated"):
        open_all(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="shard.00000.mds does not exist"):
        open_all(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 2')
    with pytest.raises(ValueError, match="index.json at byte 13: not JSON"):
        open_all(tmp_path)


@pytest.mark.parametrize("compression", ["gz", "zstd", "br", "bz2", "snappy"])
def test_a_damaged_packed_shard_is_refused_without_a_hash_too(tmp_path: Path, compression: str) -> None:
    write(tmp_path, compression=compression)
    (packed,) = tmp_path.glob("shard.00000.mds.*")
    good = packed.read_bytes()
    packed.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="truncated"):
        open_all(tmp_path)
    packed.write_bytes(b"\xff" * len(good))
    with pytest.raises(ValueError, match=f"shard.00000.mds.{compression}: damaged {compression} data"):
        open_all(tmp_path)
    assert not (tmp_path / "shard.00000.mds").exists()


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    write(tmp_path, compression="snappy", hashes=("sha1", "xxh64"))
    packed = tmp_path / "shard.00000.mds.snappy"
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    packed.write_bytes(data)
    with pytest.raises(ValueError, match="snappy: xxh64 is .*, the index says .*: damaged"):
        open_all(tmp_path)
    with pytest.raises(ValueError, match="has no md5 of it, but sha1, xxh64"):
        open_all(tmp_path, hash="md5")


def test_samples_that_do_not_fit_and_interrupted_writers(tmp_path: Path) -> None:
    big = "sample 1, column 'n': 70000 is no uint16"
    with pytest.raises(ValueError, match=big), MDSWriter(tmp_path, {"n": "uint16"}) as out:
        out.write({"n": 1})
        out.write({"n": 70000})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="sample 0 has columns m; they are n"), MDSWriter(tmp_path, {"n": "uint16"}) as out:
        out.write({"m": 1})
    for options, message in [({"compression": "zip"}, "known are br"), ({"hashes": ["crc"]}, "known are"),
                             ({"compression": "gz:11"}, "gz.:0-9"), ({"size_limit": 2**32}, "1 to 4294967295")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MDSWriter(tmp_path, {"n": "int"}, **options)


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match="shard.00000.mds: File too large while writing .* bytes: free space"):
            with MDSWriter(tmp_path, {"a": "bytes"}, size_limit=20_000) as out:
                for _ in range(100):
                    out.write({"a": bytes(900)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_of_no_samples(mosaic: Any, tmp_path: Path) -> None:
    with MDSWriter(tmp_path, {"a": "str"}):
        pass
    assert open_all(tmp_path) == []
    with pytest.raises(RuntimeError, match="no samples"):
        mosaic.read(str(tmp_path))


def test_decimals_keep_their_digits() -> None:
    known = encoding("str_decimal")
    assert str(known.decode(known.encode(Decimal("1.10")))) == "1.10"
