"""fmegatron: train transformers under any sharding rules. Models are pure functions, parallelism is data.

import fmegatron as fm

mesh = fm.make_mesh(dp=2, tp=4)                          # under torchrun; fm.virtual_mesh(dp=2, tp=4) anywhere
sh = fm.Sharding(mesh, fm.RULES["fsdp_tp_sp"])
model = fm.models.llama3("debug")
tx = fm.optim.chain(fm.optim.clip_by_global_norm(1.0), fm.optim.adamw(3e-4))
state = fm.train.init(model, tx, sh, key=0)
step = fm.train.make_step(model, tx, sh)
for batch in fm.data.batches(corpus, sh, seq=1024, global_batch=32):
    state, metrics = step(state, batch)

A name is imported when it is first used, so that `import fmegatron` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmegatron import config, data, inference, models, nn, optim, plan, random, sharding, testing, train, tree
    from fmegatron.nn.param import Param
    from fmegatron.sharding import (  # type: ignore[no-redef]
        RULES,
        SINGLE,
        Mesh,
        Placement,
        Rules,
        Sharding,
        Size,
        make_mesh,
        shard,
        shard_map,
        spmd,
        thread_mesh,
        unshard,
        virtual_mesh,
    )

MODULES = ("config", "data", "inference", "models", "nn", "optim", "plan", "random", "sharding", "testing", "train", "tree")
NAMES = {
    **dict.fromkeys(("RULES", "SINGLE", "Mesh", "Placement", "Rules", "Sharding", "Size"), "sharding"),
    **dict.fromkeys(("make_mesh", "shard", "shard_map", "spmd", "thread_mesh", "unshard", "virtual_mesh"), "sharding"),
    "Param": "nn.param",
}

__all__ = [
    "RULES", "SINGLE", "Mesh", "Param", "Placement", "Rules", "Sharding", "Size", "config", "data", "inference", "make_mesh",
    "models", "nn", "optim", "plan", "random", "shard", "shard_map", "sharding", "spmd", "testing", "thread_mesh", "train",
    "tree", "unshard", "virtual_mesh",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"fmegatron.{name}")
    if name in NAMES:
        return getattr(import_module(f"fmegatron.{NAMES[name]}"), name)
    raise AttributeError(f"module 'fmegatron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
