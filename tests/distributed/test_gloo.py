"""Four real processes on gloo compute what one device computes: every preset eager, and compiled."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
import torch
from torch._subclasses import FakeTensorMode

from fmegatron.sharding import RULES
from fmegatron.transforms import why_not_compile

RANKS = Path(__file__).with_name("ranks.py")
EAGER = [  # every way to store and every way to compute
    "ddp dp=4",
    "fsdp dp=4",
    "fsdp dp=2 fsdp=2 microbatches=2 remat=full",
    "fsdp dp=4 odd=1 microbatches=2 remat=full",
    "zero1 dp=2 cp=2 odd=1",
    "hsdp dp=2 fsdp=2",
    "zero1 dp=4 microbatches=2",
    "zero2 dp=2 cp=2 microbatches=2",
    "tp tp=4",
    "tp_sp tp=4 remat=selective",
    "tp_sp cp=2 tp=2",
    "cp_ring cp=4",
    "cp_ulysses cp=2 tp=2",
    "cp_hierarchical cp=2 cpa=2 remat=full",
    "tp_sp tp=4 async_tp=2",
    "fsdp_tp_sp dp=2 tp=2 microbatches=2 remat=full",
    "zero1_tp dp=2 tp=2 prefetch=0",
    "fsdp_tp_sp ep=2 tp=2 experts=1 microbatches=2 remat=full",
]
COMPILED = {4: "fsdp_tp_sp dp=2 tp=2 compile=1 layers=1", 2: "fsdp dp=2 compile=1 remat=full layers=1"}
MORE = [
    "fsdp_tp_sp dp=2 tp=2 compile=1 remat=full",
    "tp tp=4 compile=1",
    "fsdp dp=4 compile=1 remat=full",
    "tp_sp cp=2 tp=2 compile=1",
    "tp_sp tp=4 compile=1 async_tp=2",
    "zero2_tp_sp dp=2 tp=2 compile=1",
]


def torchrun(cases, timeout, count=4):
    """Run cases on processes of their own; AssertionError with the output where one of them dies."""
    said = processes.torchrun(count, RANKS, *cases, timeout=timeout)
    reports = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [report["case"] for report in reports] == cases
    wrong = [f"{report['case']}: {line}" for report in reports for line in report["wrong"]]
    assert not wrong, "\n".join(wrong)


def test_presets_eager():
    torchrun(EAGER, 300)


def why_not_fp64():
    """Why attention of fp64 is not compiled here; ranks.py compares in fp64."""
    with FakeTensorMode():
        x = torch.ones(1, 1, 2, 4, dtype=torch.float64)
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)
    return None if lse.dtype == x.dtype else "this torch (2.11) takes the logsumexp of fp64 attention on a CPU for fp32"


WHY_NOT = why_not_compile() or why_not_fp64()
compiles = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@compiles
def test_compiled():
    for count, case in COMPILED.items():
        torchrun([case], 500, count)


@pytest.mark.long
@compiles
@pytest.mark.parametrize("case", MORE)
def test_more_compiled(case):
    torchrun([case], 900)


@pytest.mark.long
@compiles
def test_a_ring_compiled():
    torchrun(["cp_ring cp=2 compile=1 layers=1", "cp_ring cp=2 compile=1"], 500, count=2)


@pytest.mark.long
def test_every_preset_on_three_meshes():
    meshes = ({"dp": 4}, {"dp": 2, "tp": 2}, {"cp": 2, "tp": 2})
    words = {" ".join(f"{axis}={n}" for axis, n in sizes.items()): sizes.keys() for sizes in meshes}
    torchrun([f"{name} {word}" for name, rules in RULES.items() for word, axes in words.items() if axes <= rules.axes], 900)
