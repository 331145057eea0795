"""What each process runs: some steps of Muon and Adafactor on a mesh, whose parameters rank 0 compares with one device's."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from fmegatron import optim
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, make_mesh, shard
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step


def train(net, tx, sh, steps=3, **settings):
    """Whole parameters after some steps in fp64."""
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 21, (8, 8), generator=g) for _ in range(2))
    batch = {"tokens": tokens, "labels": labels, "weights": torch.rand(8, 8, generator=g, dtype=torch.float64)}
    plan = plan_step(net, sh, **settings)
    state, step = init(net, tx, sh, key=0, dtype=torch.float64), make_step(net, tx, sh, **settings)
    for _ in range(steps):
        state, _ = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch.items()})
    return whole_leaves(plan, state.params, "storage")


def main(compile: bool) -> None:
    """Every optimizer under FSDP and tensor parallelism."""
    torch.set_num_threads(1)
    net = gpt(Config(layers=2, embed=16, heads=4, kv=2, mlp=16, vocab=21, vocab_pad=8))
    sh = Sharding(make_mesh("cpu", dp=2, tp=2), RULES["fsdp_tp_sp"])
    for name, tx in (
        ("muon", optim.muon(2e-2, declare=net.declare)),
        ("adafactor", optim.adafactor(2e-2, weight_decay=0.1, declare=net.declare)),
    ):
        tx = optim.chain(optim.clip_by_global_norm(1.0), tx)
        expected, got = train(net, tx, SINGLE), train(net, tx, sh, compile=compile)
        worst = max(float((got[path] - x).abs().max()) for path, x in expected.items())
        if dist.get_rank() == 0:
            print(f"{name} {worst:.3e}", flush=True)
        assert worst < 1e-10, f"{name}: {worst}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:] == ["compile"])
