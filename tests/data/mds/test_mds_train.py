"""`fmegatron train` from streams: resumed in the middle, on another number of ranks; and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmegatron import cli, config
from fmegatron.data.mds import MDSWriter, Stream, Streams
from fmegatron.data.mds.rows import PackedStreams, TokenRows
from fmegatron.train.source import source_of

STREAMS = """
[data]
tokenizer = "byte"
seq = 16
streams = [{{remote = "{far}/web", local = "near/web", proportion = 3.0, group = "web"}},
           {{remote = "{far}/code", local = "near/code", proportion = 1, group = "code"}}]

[streaming]
valid = [{{local = "{far}/web"}}]
num_canonical_nodes = 2
shuffle_block_size = 20
replica_groups = ["web", "code"]

[model]
preset = "llama3:debug"
overrides = {{layers = 1, embed = 16, heads = 2, kv = 2, mlp = 24, vocab = 264, context = 64}}

[training]
steps = 4
global_batch = 8
compile = false

[validation]
interval = 2
batches = 2

[log]
prompt = ""
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in ("web", "code"):
        with MDSWriter(tmp_path / "far" / name, {"tokens": "ndarray:uint16"}, size_limit=900, compression="zstd") as out:
            for _ in range(30):
                out.write({"tokens": rng.integers(0, 257, int(rng.integers(9, 18))).astype(np.uint16)})
    (tmp_path / "run.toml").write_text(STREAMS.format(far=tmp_path / "far"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_streams_goes_on_at_another_number_of_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = ["train", "run.toml", "--run.dir", "whole"], ["train", "run.toml", "--run.dir", "parts"]
    assert cli.main(whole) == 0, capsys.readouterr().err
    assert cli.main([*parts, "--training.steps", "2", "--optimizer.schedule", "constant"]) == 0
    half = losses(folder / "parts")
    assert cli.main([*parts, "--mesh.virtual", "true", "--mesh.dp", "4"]) == 0
    assert losses(folder / "parts")[:2] == half
    assert losses(folder / "whole") == pytest.approx(losses(folder / "parts"), rel=2e-2)  # the schedules differ
    records = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    assert any("heldout_loss" in record for record in records)
    said = config.load(folder / "whole/config.toml")
    assert said.data.streams[0]["proportion"] == 3.0 and said.streaming.replica_groups == ("web", "code")


def test_packed_samples_share_rows_of_one_shard_and_no_document(folder: Path) -> None:
    streams, seq = Streams([Stream("near/web", "far/web"), Stream("near/code", "far/code")]), 48
    rows, packed = TokenRows(streams, seq), PackedStreams(TokenRows(streams, seq, reset_positions=True), "cache")
    starts = np.cumsum([0, *np.concatenate(streams.sizes)])
    whole = [rows.tokens(number) for number in range(len(streams))]
    seen: list[int] = []
    for number in range(len(packed)):
        row, samples = packed.row(number), packed._samples(number).tolist()
        assert len(set(np.searchsorted(starts, samples, side="right").tolist())) == 1  # of one shard
        for document, sample in enumerate(samples):
            here = row["documents"] == document
            assert row["tokens"][here].tolist() == whole[sample][:-1].tolist()
            assert row["labels"][here].tolist() == whole[sample][1:].tolist()
            assert row["positions"][here].tolist() == list(range(int(here.sum()))) and row["weights"][here].all()
        assert not row["weights"][row["documents"] >= len(samples)].any() and row["weights"].sum() <= seq
        seen += samples
    assert sorted(seen) == list(range(len(streams))) and len(packed) < 0.6 * len(streams)
    assert not packed.row(len(packed))["weights"].any()
    assert [sizes.sum() for sizes in packed.sizes] == [part.sizes.sum() for part in packed.parts("all")]
    assert sum(sizes.sum() for sizes in packed.sizes) == len(packed)


def test_a_packed_run_reads_every_row_once_an_epoch_and_goes_on_bitwise(folder: Path) -> None:
    options = ["--streaming.pack", "true", "--data.seq", "48", "--data.streams", '[{local = "far/web"}]',
               "--streaming.replica_groups", "[]", "--optimizer.schedule", "constant"]  # fmt: skip
    for steps, out in ((2, "parts"), (4, "parts"), (4, "whole")):
        assert cli.main(["train", "run.toml", "--run.dir", out, "--training.steps", str(steps), *options]) == 0
    assert losses(folder / "parts") == losses(folder / "whole")
    table = {"streaming": {"pack": True, "replica_groups": []}, "data": {"seq": 48, "streams": [{"local": "far/web"}]}}
    rows = source_of(config.load("run.toml", table), print).rows
    count = rows._deals["all"].per_epoch
    first = [rows.row(number)["tokens"].tobytes() for number in range(count)]
    again = [rows.row(number)["tokens"].tobytes() for number in range(count, 2 * count)]
    assert sorted(first) == sorted(again) and first != again and len(set(first)) == len(rows._source) < 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"streams": [{"locals": "x"}]}}, "stream 0 has no locals, its keys are local, remote"),
        ({"data": {"streams": [{"remote": "x"}]}}, "stream 0 has no local: the folder"),
        ({"data": {"streams": [{"local": "x", "repeat": 1, "choose": 2}]}}, "stream 0: repeat and choose are both set"),
        ({"data": {"streams": [{"local": "x", "proportion": "much"}]}}, "stream 0: proportion = much: expected a number"),
        ({"data": {"streams": [{"local": "s3://x/y"}]}}, "the URL goes into remote"),
        ({"data": {"streams": [{"local": "nowhere"}]}}, "nowhere/index.json does not exist"),
        ({"data": {"tokenizer": "none"}}, "name the data.tokenizer that made the tokens"),
        ({"data": {"tokenizer": "null:100"}}, "the vocabulary ends at 100|the vocabulary ends at 99"),
        ({"data": {"seq": 8}}, "tokens for a row of seq 8: use a seq of"),
        ({"streaming": {"cache_limit": 10}}, "cache_limit 10: at least"),
        ({"streaming": {"replica_groups": ["web", "code", "web"]}}, "batch of 8 does not divide over 3 groups: use 6"),
        ({"streaming": {"validate_hash": "sha1"}}, "has no sha1 of it, but no hash"),
    ],
)
def test_mistakes_are_one_line(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        source_of(config.load("run.toml", change), print).rows.row(0)
    assert "\n" not in str(caught.value)
