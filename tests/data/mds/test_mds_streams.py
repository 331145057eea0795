"""Epochs of several streams beside a real StreamingDataset; fetching, caching and evicting; rows at any number of ranks."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron.data.batches import batch_at, batches
from fmegatron.data.mds import MDSWriter, Order, Stream, StreamRows, Streams, Weight, epoch_order, group_of
from fmegatron.data.mds.cache import _files, _locked
from fmegatron.data.mds.remote import download

SEQ = 7


def write(folder: Path | str, count: int, start: int = 0, **options: Any) -> None:
    """Samples of 8 tokens: sample i is start + i, eight times, with an end of document (9) in the middle."""
    with MDSWriter(folder, {"tokens": "ndarray:int32", "n": "int"}, **{"size_limit": 500, **options}) as out:
        for i in range(count):
            tokens = np.full(8, start + i, np.int32)
            tokens[3] = 9
            out.write({"tokens": tokens, "n": start + i})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("streams")
    for name, (start, count) in {"a": (100, 37), "b": (200, 20), "c": (300, 51)}.items():
        write(root / name, count, start)
    return [root / name for name in "abc"]


# -- epochs -----------------------------------------------------------------------------------------------------------
WEIGHTS = st.one_of(
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3).map(lambda x: [{"proportion": p} for p in x]),
    st.lists(st.sampled_from([{"repeat": 0.5}, {"repeat": 2.5}, {"choose": 13}, {"choose": 70}, {}]), min_size=3, max_size=3),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WEIGHTS, st.data())
def test_epochs_are_mosaics(mosaic: Any, folders: list[Path], weights: list[dict[str, Any]], data: st.DataObject) -> None:
    """Global batch by global batch the same samples, on one machine and on several, in every method of batching."""
    draw = data.draw
    relative = "proportion" in weights[0] or not any(weights)
    options = {
        "shuffle_seed": draw(st.integers(0, 1000)), "shuffle": draw(st.booleans()), "shuffle_block_size": 64,
        "shuffle_algo": draw(st.sampled_from(["py1e", "py1s", "py1br", "py2s", "naive"])), "num_canonical_nodes": 4,
        "epoch_size": None,
        "sampling_method": draw(st.sampled_from(["balanced", "fixed"])),
        "sampling_granularity": draw(st.integers(1, 5)),
        "batching_method": draw(st.sampled_from(["random", "stratified", "per_stream"])),
    }  # fmt: skip
    epoch_size = draw(st.sampled_from([None, 90, 200]))
    machines, ranks, epoch = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.integers(0, 2))
    workers, batch = 2, 4
    options["epoch_size"] = epoch_size if relative else None
    whole = machines * ranks * batch
    world = {"num_nodes": machines, "ranks_per_node": ranks, "workers_per_rank": workers, "num_ranks": machines * ranks}
    streams = [{"local": str(folder), **weight} for folder, weight in zip(folders, weights, strict=True)]
    try:
        theirs = mosaic.epochs(streams, world, epoch, 0, batch_size=batch, **options)
    except RuntimeError as error:
        theirs = error
    ours = Streams([Stream(str(folder), weight=Weight(**w)) for folder, w in zip(folders, weights, strict=True)])
    ours.cache.close()
    try:
        order = epoch_order(Order(**options), ours.parts("all"), epoch, whole)
    except ValueError as error:
        assert isinstance(theirs, RuntimeError), error
        return
    assert not isinstance(theirs, RuntimeError), theirs
    steps = theirs.transpose(3, 2, 0, 1, 4).reshape(-1, whole)
    assert len(order) >= (len(steps) - workers) * whole
    for step in range(len(order) // whole):
        assert sorted(order[step * whole : (step + 1) * whole].tolist()) == sorted(steps[step].tolist())


@pytest.mark.parametrize(("epoch", "algo"), [(0, "py1e"), (1, "py1s")])
def test_device_batches_of_one_stream_are_mosaics_of_one_rank(mosaic: Any, folders: list[Path], epoch: int, algo: str) -> None:
    options = {"shuffle_seed": 5, "shuffle_algo": algo, "shuffle_block_size": 64, "num_canonical_nodes": 4, "shuffle": True,
               "batching_method": "device_per_stream"}  # fmt: skip
    world = {"num_nodes": 1, "ranks_per_node": 1, "workers_per_rank": 2, "num_ranks": 1}
    theirs = mosaic.epochs([{"local": str(folder)} for folder in folders], world, epoch, 0, batch_size=4, **options)
    theirs = theirs.transpose(3, 2, 0, 1, 4).reshape(-1, 4)
    streams = Streams([Stream(str(folder)) for folder in folders])
    streams.cache.close()
    order = epoch_order(Order(**options, device_batch=4), streams.parts("all"), epoch, 8)  # two device batches a step
    assert len(order) > 80 and order.tolist() == theirs[: len(order) // 4].reshape(-1).tolist()
    with pytest.raises(ValueError, match="device_batch 3 does not divide a batch of 8"):
        epoch_order(Order(**options, device_batch=3), streams.parts("all"), epoch, 8)
    with pytest.raises(ValueError, match="go together"):
        Order(device_batch=3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([Weight(proportion=1.0), Weight()], "stream 1 has no proportion"),
        ([Weight(proportion=0.0), Weight(proportion=0.0)], "all proportions are zero"),
        ([Weight(choose=0), Weight(repeat=0.0)], "no sample"),
    ],
)
def test_weights_that_do_not_go_together(folders: list[Path], weights: list[Weight], message: str) -> None:
    streams = Streams([Stream(str(folder), weight=w) for folder, w in zip(folders, weights, strict=False)])
    with pytest.raises(ValueError, match=message):
        StreamRows(streams, Order(), SEQ, 4)
    with pytest.raises(ValueError, match="proportion and choose are both set"):
        Weight(proportion=1.0, choose=2)
    with pytest.raises(ValueError, match="epoch_size = 5 needs proportions"):
        StreamRows(Streams([Stream(str(folders[0]), weight=Weight(repeat=2.0))]), Order(epoch_size=5), SEQ, 4)


# -- elsewhere --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_s3_there_and_back(s3: Callable[[], str], tmp_path: Path, compression: str | None) -> None:
    place = f"{s3()}/deep"
    write(f"{place}/train", 60, compression=compression, hashes=("xxh64",))
    streams = Streams([Stream(str(tmp_path / "x"), place, "train")])
    assert not list((tmp_path / "x/train").glob("*.mds"))
    assert [sample["n"] for sample in streams] == list(range(60))
    names = sorted(path.name for path in (tmp_path / "x/train").iterdir() if not path.name.endswith(".lock"))
    assert names == ["index.json", *(f"shard.{i:05}.mds" for i in range(len(streams.cache.shards)))]
    streams.cache.close()
    with pytest.raises(OSError, match="s3://.*/nowhere/index.json: .*check the address"):
        Streams([Stream(str(tmp_path / "y"), f"{place}/nowhere")])
    assert not (tmp_path / "y/index.json").exists()


def far(tmp_path: Path, count: int = 80, **options: Any) -> Stream:
    write(tmp_path / "far", count, **options)
    return Stream(str(tmp_path / "near"), str(tmp_path / "far"))


def used(folder: Path) -> int:
    with _locked(folder / ".cache.lock"):  # names do not change meanwhile
        return sum(stat.st_size for name, stat in _files(folder).items() if name != "index.json")


@pytest.mark.parametrize("compression", [None, "gz"])
def test_the_cache_stays_under_its_limit_and_reads_on(tmp_path: Path, compression: str | None) -> None:
    stream = far(tmp_path, compression=compression, hashes=("sha1",))
    (largest,) = {max(info.space for _, info in Streams([stream]).cache.shards)}
    streams = Streams([stream], limit=3 * largest, threads=2)
    rng = np.random.default_rng(0)
    for number in rng.permutation(80).tolist():
        streams.ahead(rng.integers(0, 80, 5).tolist())
        assert streams[number]["n"] == number
        assert used(tmp_path / "near") <= 3 * largest
    streams.cache.close()
    assert len(list((tmp_path / "near").glob("*.mds"))) < len(streams.cache.shards)
    with pytest.raises(ValueError, match=f"cache_limit {largest}: at least {2 * largest} bytes"):
        Streams([stream], limit=largest)


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    stream = far(tmp_path)
    size = max(info.space for _, info in Streams([stream]).cache.shards)
    streams = Streams([stream], limit=3 * size, opened=1)
    for number in (0, 1, 0, 2, 0, 3):  # shard 0 is used again and again
        streams.cache.shard(number)
    here = sorted(path.name for path in (tmp_path / "near").glob("*.mds"))
    assert "shard.00000.mds" in here and "shard.00003.mds" in here and "shard.00001.mds" not in here
    streams.cache.close()


def test_shards_of_the_next_steps_come_before_they_are_asked_for(tmp_path: Path) -> None:
    streams = Streams([far(tmp_path)])
    rows = StreamRows(streams, Order(shuffle=False, num_canonical_nodes=1), SEQ, 4, predownload=40)
    batch_at(rows, 0, 4)
    batch_at(rows, 4, 4)  # from here on it knows its rows
    for thread in [t for t in threading.enumerate() if t.name.startswith("mds-fetch")]:
        assert thread.is_alive()
    streams.cache.close()
    assert len(list((tmp_path / "near").glob("*.mds"))) > len(set((np.arange(8) // streams.sizes[0][0]).tolist()))


def test_damage_on_the_way_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    stream = far(tmp_path, hashes=("sha1",))
    path = tmp_path / "far/shard.00001.mds"
    good = path.read_bytes()
    first = len(Streams([stream]).cache.shard(0))
    path.write_bytes(good[:-1] + b"\xff")
    with pytest.raises(ValueError, match="far/shard.00001.mds: sha1 is .*, the index says .*: damaged"):
        Streams([stream])[first]
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="far/shard.00001.mds: .* bytes, the index says .*: truncated"):
        Streams([stream])[first]
    path.unlink()
    with pytest.raises(OSError, match="far/shard.00001.mds: .*check the address"):
        Streams([stream])[first]
    assert not [path for path in (tmp_path / "near").iterdir() if "00001" in path.name and "lock" not in path.name]
    path.write_bytes(good)
    assert Streams([stream])[first]["n"] == first


def test_an_error_that_passes_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "x").write_text("here")
    calls = []

    def flaky(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) < 3:
            raise OSError("reset by peer")
        shutil.copyfile(*args)

    monkeypatch.setattr(LocalFileSystem, "get_file", flaky)
    download(str(tmp_path / "x"), tmp_path / "y", retries=2)
    assert (tmp_path / "y").read_text() == "here" and len(calls) == 3
    calls.clear()
    with pytest.raises(OSError, match="x: reset by peer: tried 2 times"):
        download(str(tmp_path / "x"), tmp_path / "y", retries=1)


def test_many_readers_of_one_folder_fetch_a_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmegatron.data.mds import remote

    stream, fetched = far(tmp_path), []
    real = remote.download

    def counting(source: str, *rest: Any, **more: Any) -> None:
        fetched.append(source)
        time.sleep(0.01)
        real(source, *rest, **more)

    monkeypatch.setattr(remote, "download", counting)
    readers = [Streams([stream]) for _ in range(4)]
    threads = [threading.Thread(target=lambda reader=reader: [reader[i] for i in range(80)]) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = [source for source in fetched if source.endswith(".mds")]
    assert len(shards) == len(set(shards)) == len(readers[0].cache.shards)


# -- rows -------------------------------------------------------------------------------------------------------------
def test_rows_are_samples_with_labels_documents_and_padding(tmp_path: Path) -> None:
    write(tmp_path, 3, 20)
    rows = StreamRows(Streams([Stream(str(tmp_path))]), Order(shuffle=False), 9, 3, eod=9, reset_positions=True, vocab_size=30)
    row = rows.row(1)
    assert row["tokens"].tolist() == [21, 21, 21, 9, 21, 21, 21, 0, 0]
    assert row["labels"].tolist() == [21, 21, 9, 21, 21, 21, 21, 0, 0]
    assert row["documents"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2] and row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert row["weights"].tolist() == [1] * 7 + [0] * 2 and row["sample"] == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), st.sampled_from(["random", "stratified"]))
def test_ranks_and_resumes_change_no_sample(folders: list[Path], step: int, ranks: int, ahead: int, how: str) -> None:
    """Any number of ranks, from any step, sees the batch that one rank without a past sees."""
    streams = Streams([Stream(str(folder)) for folder in folders])

    def rows() -> StreamRows:
        return StreamRows(streams, Order(batching_method=how, num_canonical_nodes=4, shuffle_block_size=50), SEQ, 12)

    share = 12 // ranks
    parts = [
        batches(rows(), 12, 12 * step, rows=range(rank * share, (rank + 1) * share), ahead=ahead) for rank in range(ranks)
    ]
    for later in range(3):
        whole, read = batch_at(rows(), 12 * (step + later), 12), [next(part) for part in parts]
        assert all(torch.equal(whole[key], torch.cat([part[key] for part in read])) for key in whole)
    for part in parts:
        part.close()
    streams.cache.close()


def test_every_sample_once_an_epoch(folders: list[Path]) -> None:
    streams = Streams([Stream(str(folder)) for folder in folders])
    rows = StreamRows(streams, Order(shuffle_block_size=40), SEQ, 12)
    for epoch in range(3):
        seen = [int(rows.row(108 * epoch + i)["tokens"][0]) for i in range(108)]
        assert sorted(seen) == [*range(100, 137), *range(200, 220), *range(300, 351)]
    streams.cache.close()


def test_ranks_read_their_own_canonical_nodes_shards(folders: list[Path]) -> None:
    """Two ranks of a file of 2 canonical nodes share at most the shard that the cut between the nodes goes through."""
    streams = Streams([Stream(str(folders[2]))])
    rows = StreamRows(streams, Order(num_canonical_nodes=2), SEQ, 10)
    size = int(streams.sizes[0][0])
    halves = [{int(i) // size for step in range(5) for i in rows.ids(step)[half]} for half in (slice(0, 5), slice(5, 10))]
    assert len(halves[0] & halves[1]) <= 1 < len(halves[0])
    streams.cache.close()


def test_replica_groups_read_their_own_streams(folders: list[Path]) -> None:
    a, b, c = (str(folder) for folder in folders)
    streams = Streams([Stream(a, group="web"), Stream(b, group="code"), Stream(c, group="web")])
    slots = ("web", "code", "web", "web")
    rows = StreamRows(streams, Order(), SEQ, 16, slots=slots)
    seen: list[int] = []
    for step in range(15):
        first = batch_at(rows, 16 * step, 16)["tokens"][:, 0].tolist()
        assert {n // 100 for n in first[4:8]} == {2}
        assert {n // 100 for n in first[:4] + first[8:]} <= {1, 3}
        seen += [n for n in first if n // 100 != 2]
    web = [*range(100, 137), *range(300, 351)]
    assert sorted(seen[:88]) == web and sorted(seen[88:176]) == web  # its three slots share an epoch, no sample twice
    for replicas in (4, 8):
        groups = [group_of(replica, replicas, slots) for replica in range(replicas)]
        assert groups == [slots[replica * 4 // replicas] for replica in range(replicas)]
    with pytest.raises(ValueError, match="replicas are a multiple of the slots"):
        group_of(0, 6, slots)
    with pytest.raises(ValueError, match="groups web, but the streams' are web, code"):
        StreamRows(streams, Order(), SEQ, 16, slots=("web",))
    with pytest.raises(ValueError, match="batch of 18 does not divide over 4 groups: use 16"):
        StreamRows(streams, Order(), SEQ, 18, slots=slots)
    streams.cache.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 6}, "8 tokens for a row of seq 6: use a seq of 7"),
        ({"vocab_size": 50}, "shard.0000..mds: sample .*: ids 9..1.., the vocabulary ends at 49"),
        ({"column": "text"}, "no column 'text', choose of n, tokens"),
        ({"column": "n"}, "column 'n' holds int, not tokens"),
    ],
)
def test_samples_that_are_no_rows(folders: list[Path], options: dict[str, Any], message: str) -> None:
    streams = Streams([Stream(str(folders[0]))])
    with pytest.raises(ValueError, match=message):
        StreamRows(streams, Order(), **{"seq": SEQ, "global_batch": 4, **options}).row(0)
    streams.cache.close()


def test_tokens_as_bytes(tmp_path: Path) -> None:
    with MDSWriter(tmp_path, {"tokens": "bytes"}) as out:
        out.write({"tokens": np.arange(5, dtype=np.int64).tobytes()})
    streams = Streams([Stream(str(tmp_path))])
    assert StreamRows(streams, Order(), 4, 1, dtype="int64").row(0)["labels"].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="holds bytes, not tokens: name their dtype"):
        StreamRows(streams, Order(), 4, 1).row(0)
    streams.cache.close()
