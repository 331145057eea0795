"""A search lists legal meshes that fit, the fastest first; where none fits it says so in one line."""

from __future__ import annotations

import pytest

from fmegatron.config import ConfigError
from fmegatron.plan import search
from fmegatron.plan.main import plan
from fmegatron.plan.options import request

TABLE = {"search": 2, "training": {"global_batch": 8, "microbatches": 1, "remat": "none"}, "data": {"seq": 64}}


def test_all_that_is_listed_is_legal_and_sorted():
    found = search.best(request("llama3-debug", TABLE), plan, 8)
    assert len(found) == 4 and all(made.ranks == 2 and made.fits for made in found)
    speeds = [made.tokens_per_second_per_rank for made in found]
    assert speeds == sorted(speeds, reverse=True)
    assert search.to_text(found).count("\n") == len(found)


def test_memory_that_is_too_small_is_one_line():
    with pytest.raises(ConfigError, match="search = 1: no mesh is legal and fits: the smallest needs 0.0 GB a rank"):
        search.best(request("llama3-debug", TABLE | {"search": 1, "memory": 0.0001}), plan, 8)
