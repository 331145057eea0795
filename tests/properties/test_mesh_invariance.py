"""Random meshes, rules, configs and batches on virtual meshes compute what one device computes; and each kind is drawn.

A case compares initial parameters, every activation, the loss, every gradient and the gradient norm: 1e-10 in fp64, 1e-5
in fp32, relative to each value's largest entry.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings

from fmegatron.sharding import RULES
from fmegatron.testing import assert_mesh_invariant
from fmegatron.testing.strategies import cases

torch.set_num_threads(1)
LONG = settings.default.max_examples >= 200
KINDS = {  # what is drawn: how, and how often at least in a long run
    **{name: {"rules": name} for name in RULES},
    "own": {"rules": "own"},
    "size-1 axis": {"idle": True},
    "padding": {"pad": True},
    "kv < tp": {"rules": "fsdp_tp_sp", "few_kv": True},
    "dropout": {"dropout": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_mesh_invariant(kind):
    counts = Counter()
    many = {"own": 60}.get(kind, 12) if LONG else {"own": 8, "dropout": 3}.get(kind, 2)

    @settings(max_examples=many)
    @given(cases(**KINDS[kind]))
    def check(case):
        assert_mesh_invariant(case.model, case.batch, [case.sharding()], dtype=case.dtype, **case.settings)
        counts.update(case.features | ({"dropout"} if case.model.dropout else set()))

    check()
    assert counts[kind] >= (10 if LONG else 1), counts
