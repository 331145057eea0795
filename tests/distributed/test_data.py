"""Four real processes: of those that hold the same rows one reads, and all get the very bits that each would have read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import torchrun

RANKS = Path(__file__).with_name("data_ranks.py")
READERS = {"tp=4": [0], "dp=2 tp=2": [0, 2], "cp=2 tp=2": [0], "pp=2 dp=2": [0, 1], "dp=4": [0, 1, 2, 3]}
ROW = 16 * (4 * 8 + 4) + 8  # bytes


@pytest.fixture(scope="module")
def facts(functions) -> list[dict]:
    """What each rank says of each mesh."""
    return json.loads(torchrun(4, RANKS, functions, timeout=120).splitlines()[-1])


@pytest.mark.parametrize("mesh", READERS)
def test_one_of_the_ranks_that_hold_the_same_rows_reads_and_all_get_them(facts, mesh):
    of_rank = [fact[mesh] for fact in facts]
    assert all(fact["equal"] for fact in of_rank)
    for rank, fact in enumerate(of_rank):
        if rank in READERS[mesh]:
            assert fact["opened"] and set(fact["alone"]) <= set(fact["read"])
            assert fact["bytes"] == ROW * len(fact["read"]) <= ROW * 5 * 8 // len(READERS[mesh])  # 3 steps, and 2 ahead
        else:  # not a row, not a byte, not even the file
            assert (fact["read"], fact["bytes"], fact["opened"]) == ([], 0, 0)
            assert len(fact["alone"]) == 24 // len(READERS[mesh])


@pytest.mark.parametrize("mesh", READERS)
def test_a_reader_that_fails_fails_on_all_that_wait_for_it(facts, mesh):
    said = [fact[mesh]["said"] for fact in facts]
    group = next(rank for rank, text in enumerate(said) if text == "file: sample 9 is damaged")
    others = [rank for rank, text in enumerate(said) if text and rank != group]
    assert group in READERS[mesh] and len(others) == 4 // len(READERS[mesh]) - 1
    assert {said[rank] for rank in others} <= {"the rank that reads for this one: file: sample 9 is damaged"}
