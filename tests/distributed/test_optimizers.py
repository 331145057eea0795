"""Muon and Adafactor on four gloo processes do what they do on one device, eager and compiled."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest

from fmegatron.transforms import why_not_compile

RANKS = Path(__file__).with_name("optimizer_ranks.py")


def torchrun(*words):
    said = processes.torchrun(4, RANKS, *words, timeout=500)
    assert [line.split()[0] for line in said.splitlines()] == ["muon", "adafactor"]


@pytest.mark.long
def test_matrices_on_processes():
    torchrun()


@pytest.mark.long
@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_matrices_compiled():
    torchrun("compile")
