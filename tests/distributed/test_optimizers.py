"""Muon and Adafactor on four gloo processes do what they do on one device, eager and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmegatron.transforms import why_not_compile

RANKS = Path(__file__).with_name("optimizer_ranks.py")


def torchrun(*words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(RANKS), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["muon", "adafactor"]


@pytest.mark.long
def test_matrices_on_processes():
    torchrun()


@pytest.mark.long
@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_matrices_compiled():
    torchrun("compile")
