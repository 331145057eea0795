"""Rows, blends and splits against megatron-core's own data sets, built from the same files."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmegatron.data.blend import Blend, gpt_blend
from fmegatron.data.gpt import GptOptions, GptSamples, Mock, split_bounds
from fmegatron.data.indexed import IndexedDataset, IndexedWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets import blended_megatron_dataset_config as splitting
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.utils import Split

EOD = 0
KEYS = (("tokens", "tokens"), ("labels", "labels"), ("positions", "position_ids"), ("weights", "loss_mask"))


def write(prefix: Path, lengths: list[int], seed: int = 0) -> IndexedDataset:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as out:
        out.add_documents(np.append(rng.integers(0, 9, max(n - 1, 0)), [EOD] * min(n, 1)).astype(int) for n in lengths)
    return IndexedDataset(prefix)


def config(folder: str, o: GptOptions, **more: Any) -> Any:
    tokenizer = SimpleNamespace(vocab_size=50, eod=EOD, unique_identifiers={"class": "x"})
    return theirs.GPTDatasetConfig(
        random_seed=o.seed, sequence_length=o.seq, path_to_cache=f"{folder}/cache", tokenizer=tokenizer,
        reset_position_ids=o.reset_positions, reset_attention_mask=True, eod_mask_loss=o.eod_mask_loss,
        add_extra_token_to_sequence=o.extra_token, drop_last_partial_validation_sequence=o.drop_last, **more)  # fmt: skip


def check_rows(ours: Any, oracle: Any) -> None:
    assert len(ours) == len(oracle)
    for number in range(len(ours)):
        row, item = ours.row(number), oracle[number]
        for mine, other in KEYS:
            assert np.array_equal(row[mine], item[other].numpy()), mine
            assert row[mine].dtype == item[other].numpy().dtype
        documents = row["documents"]
        mask = (documents[:, None] != documents) | (np.arange(len(documents))[:, None] < np.arange(len(documents)))
        assert np.array_equal(mask, item["attention_mask"][0].numpy())


OPTIONS = st.builds(GptOptions, st.integers(2, 20), st.integers(0, 99), *[st.booleans()] * 4)
LENGTHS = st.lists(st.integers(1, 30), min_size=2, max_size=12)


@settings(max_examples=40)
@given(LENGTHS, OPTIONS, st.integers(1, 40))
@pytest.mark.filterwarnings("ignore")
def test_rows_are_megatrons(lengths: list[int], o: GptOptions, samples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder, "x"), lengths)
        chosen = np.arange(len(lengths) // 2, len(lengths), dtype=np.int32)
        c = config(folder, o, split="1", blend=([f"{folder}/x"], None))
        low = theirs.GPTDataset.build_low_level_dataset(f"{folder}/x", c)
        kind = Split.train if o.drop_last else Split.valid
        oracle = theirs.GPTDataset(low, f"{folder}/x", chosen, samples if o.drop_last else None, kind, c)
        if len(oracle):
            check_rows(GptSamples(data, o, chosen, samples if o.drop_last else None, eod=EOD, cache=f"{folder}/own"), oracle)


@pytest.mark.parametrize("weights", [[0.3, 0.7, 2.0], [1, 1, 1], None])
@pytest.mark.parametrize("per_split", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_blends_are_megatrons(
    tmp_path: Path, weights: list[float] | None, per_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)  # it asks without a process group
    o = GptOptions(8, 3)
    data = {str(tmp_path / name): write(tmp_path / name, [5, 9, 30, 2, 17] * 8, i) for i, name in enumerate("abc")}
    blend = (list(data), weights)
    how: dict[str, Any] = dict(blend_per_split=[blend, None, None]) if per_split else dict(blend=blend, split="80,20,0")
    sizes = [70, 10, 0]
    oracle = BlendedMegatronDatasetBuilder(theirs.GPTDataset, sizes, lambda: True, config(str(tmp_path), o, **how)).build()

    def make(split: int) -> Any:
        def one(prefix: str, samples: int | None) -> GptSamples:
            bounds = (0, 40) if per_split else split_bounds("80,20,0", 40)[split]
            assert bounds
            return GptSamples(data[prefix], o, np.arange(*bounds), samples, eod=EOD, cache=tmp_path / "own")

        given_weights = dict.fromkeys(data) if weights is None else dict(zip(data, weights, strict=True))
        return gpt_blend(given_weights, sizes[split], one, cache=tmp_path / "own")

    for split in (0,) if per_split else (0, 1):
        check_rows(make(split), oracle[split])
        check_rows(make(split), oracle[split])  # from the cache


def test_mock_is_megatrons() -> None:
    tokenizer = SimpleNamespace(vocab_size=50, eod=49)
    oracle, ours = theirs.MockGPTLowLevelDataset(tokenizer), Mock(50, 49)
    assert np.array_equal(ours.lengths, oracle.sequence_lengths)
    for i in (0, 5, 99_999):
        assert np.array_equal(ours.get(i), oracle[i]) and np.array_equal(ours.get(i, 1, 3), oracle.get(i, 1, 3))


@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 1000), st.floats(0, 1)), min_size=1, max_size=3), st.integers(0, 10**7))
def test_splits_are_megatrons(weights: list[float], size: int) -> None:
    text = ",".join(f"{weight:.4f}" for weight in weights)
    if not sum(float(word) for word in text.split(",")):
        with pytest.raises(ValueError, match="all weights are 0"):
            split_bounds(text, size)
        return
    matrix = splitting.convert_split_vector_to_split_matrix(splitting.parse_and_normalize_split(text))
    oracle = [None if pair is None else tuple(int(round(end * float(size))) for end in pair) for pair in matrix]
    assert split_bounds(text, size) == oracle


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "1,-1", "1,,2", "..", "0,0"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(ValueError, match="split"):
        split_bounds(split, 10)


def test_boundaries_of_sequences_where_there_is_no_eod(tmp_path: Path) -> None:
    lengths = [3, 1, 4, 9, 2]
    with IndexedWriter(tmp_path / "x", np.uint16) as out:
        out.add_documents(np.full(n, i) for i, n in enumerate(lengths))
    rows = GptSamples(IndexedDataset(tmp_path / "x"), GptOptions(5, 1, reset_positions=True))
    for number in range(len(rows)):
        row = rows.row(number)
        changes = np.flatnonzero(np.diff(row["tokens"])) + 1
        assert np.array_equal(np.flatnonzero(np.diff(row["documents"])) + 1, changes)
        assert np.array_equal(np.flatnonzero(row["positions"] == 0), np.append([0], changes))


def test_mistakes(tmp_path: Path) -> None:
    data = write(tmp_path / "x", [30, 30])
    rows = GptSamples(data, GptOptions(5, 1), samples=20, vocab_size=5)
    with pytest.raises(ValueError, match=r"x: ids .* in sequences .* the vocabulary ends at 4"):
        [rows.row(i) for i in range(len(rows))]
    with pytest.raises(ValueError, match="row 22 of 22|row 23 of 23"):
        rows.row(len(rows))
    with pytest.raises(ValueError, match="no sequence in this split"):
        GptSamples(data, GptOptions(5, 1), np.arange(0))
    with pytest.raises(ValueError, match="all above 0"):
        gpt_blend({"a": 0.0, "b": 1.0}, 5, lambda name, size: rows)
    with pytest.raises(ValueError, match="the blend asks for"):
        gpt_blend({"a": 1.0, "b": 1.0}, 500, lambda name, size: rows)


def test_a_blend_without_end_is_the_same_from_anywhere(tmp_path: Path) -> None:
    class Named:
        def __init__(self, name: int) -> None:
            self.name = name

        def row(self, number: int) -> Any:
            return {"tokens": np.array([self.name, number])}

    blend, other = (Blend([Named(0), Named(1)], [1, 3]) for _ in range(2))
    late = other.row(5000)["tokens"].tolist()
    rows = [blend.row(n)["tokens"].tolist() for n in range(5001)]
    assert rows[-1] == late
    assert abs(sum(name for name, _ in rows) / 5001 - 0.75) < 1e-3
