"""Sharding: names of dims, rules that place them on a mesh, and the collectives that follow. Knows nothing of models."""

from typing import TYPE_CHECKING

from fmegatron.lazy import submodules
from fmegatron.sharding.mesh import Axis, Mesh, abstract_mesh, make_mesh, thread_mesh, virtual_mesh
from fmegatron.sharding.placement import Placement, Size
from fmegatron.sharding.rules import RULES, Rules
from fmegatron.sharding.shard_map import shard, shard_map, spmd, unshard
from fmegatron.sharding.sharding import SINGLE, Sharding

__all__ = [
    "RULES",
    "SINGLE",
    "Axis",
    "Mesh",
    "Placement",
    "Rules",
    "Sharding",
    "Size",
    "abstract_mesh",
    "make_mesh",
    "shard",
    "shard_map",
    "spmd",
    "thread_mesh",
    "unshard",
    "virtual_mesh",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
