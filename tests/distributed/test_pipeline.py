"""Four real processes on gloo, each with its own stages, compute what one device computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, str(RANKS), *cases], capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert [json.loads(line)["case"] for line in done.stdout.splitlines() if line.startswith("{")] == cases


def test_stages_on_processes():
    torchrun(CASES, 300)


@pytest.mark.long
def test_more_stages_on_processes():
    torchrun(MORE, 900)
