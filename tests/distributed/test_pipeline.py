"""Four real processes on gloo, each with its own stages, compute what one device computes."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest

RANKS = Path(__file__).with_name("pipeline_ranks.py")
CASES = [
    "1f1b ddp pp=4",
    "zbv fsdp dp=2 pp=2 m=6",
    "dualpipev tp pp=2 tp=2 remat=full",
    "interleaved_1f1b zero1 dp=2 pp=2 reshard=never",
]
MORE = [
    "gpipe ddp pp=4 m=5 layout=E|tt|t|tL",
    "looped_bfs tp_sp cp=2 pp=2",
    "zb_h1 ddp pp=4 m=8 layout=E|tt|tt|L",
    "interleaved_zero_bubble fsdp dp=2 pp=2 remat=every-2",
    "zbv ddp pp=2 dp=2 m=8",
    "dualpipev zero1 dp=2 pp=2 m=5",
    "1f1b fsdp_tp_sp pp=2 tp=2 m=2 compile=1",
]


def torchrun(cases, timeout):
    """Run cases on processes of their own; AssertionError with the output where one of them dies."""
    said = processes.torchrun(4, RANKS, *cases, timeout=timeout)
    assert [json.loads(line)["case"] for line in said.splitlines() if line.startswith("{")] == cases


def test_stages_on_processes():
    torchrun(CASES, 300)


@pytest.mark.long
def test_more_stages_on_processes():
    torchrun(MORE, 900)
