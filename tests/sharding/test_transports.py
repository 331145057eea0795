"""What a process group is asked for, by the operators that torch's profiler sees."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.transports import Group


@pytest.fixture
def alone():
    """A gloo group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD.group_name, place=0)
    dist.destroy_process_group()


def test_a_gather_is_not_the_one_that_corrupts_gloos_memory(alone):
    """The threads of torch's gloo share a string, the name of the last operator, without a lock: names of more than 15
    characters lie on the heap and are freed twice (SIGSEGV or abort once in some 100,000 operators). Only
    ALLGATHER_COALESCED, `_c10d_functional.all_gather_into_tensor`, is as long among those that a transport uses."""
    axis, x = Axis("dp", 1, 1, alone), torch.arange(6.0).view(2, 3)
    with torch.profiler.profile() as profile:
        gathered = alone.wait(alone.all_gather(x, axis, torch.tensor(0)))
    assert gathered.equal(x[None])
    names = {event.key for event in profile.key_averages() if event.key.startswith("c10d::")}
    assert names == {"c10d::_allgather_base_"}
