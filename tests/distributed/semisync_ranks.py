"""What each of four processes runs: replicas on gloo compute what they compute on a virtual mesh, donated states too."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
import torch.distributed as dist

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, Sharding, make_mesh, shard, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing.invariance import NAMES
from fmegatron.train import checkpoint, saving
from fmegatron.train.semisync import SemiSync
from fmegatron.train.state import init
from fmegatron.train.step import make_step

CASES = [
    ("fsdp", {"replica": 2, "dp": 2}, SemiSync(2, {"mu": 3, "nu": 4}), 1),
    ("tp_sp", {"replica": 2, "tp": 2}, SemiSync(2, outer=optim.sgd(0.7, momentum=0.9, nesterov=True), fragments=2), 1),
    ("tp_sp", {"replica": 2, "tp": 2}, SemiSync(3, outer=optim.sgd(0.7, momentum=0.9, nesterov=True), delay=2), 1),
]
STEPS = 5


def train(mesh, rules, rule, donate, folder=None):
    """(state, loss by step); folder: through a checkpoint in the middle of a period."""
    net = gpt(Config(layers=2, embed=8, heads=2, kv=2, mlp=8, vocab=12))
    sh, tx = Sharding(mesh, replace(RULES[rules], apart="replica")), optim.adam(0.02)
    state = init(net, tx, sh, key=0, dtype=torch.float64, semisync=rule)
    step = make_step(net, tx, sh, semisync=rule, donate=donate)
    losses = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(0, 12, (8, 9), generator=generator)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(8, 8, dtype=torch.float64)}
        state, metrics = step(state, {k: shard(sh, x, NAMES[k]) for k, x in batch.items()})
        losses.append(float(metrics["loss"].flatten()[0]))
        if folder and i == 2:
            path = saving.save(folder, net, sh, state, {})
            fresh = init(net, tx, sh, key=1, dtype=torch.float64, semisync=rule)
            back = saving.load(path, net, sh, fresh)
            same = all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(state), strict=True))
            assert same, "a state is not what was saved"
            state = back
    return state, losses


def held_by(state):
    return tree.leaves((state.params, state.opt_state, state.outer))


def main(folder):
    """Rank 0 compares what all have; the virtual mesh is its alone."""
    torch.set_num_threads(1)
    wrong, seen, late, rank = [], 0, 0, None
    for number, (rules, sizes, rule, donate) in enumerate(CASES):
        mesh, traffic = counted(make_mesh("cpu", **sizes))
        rank = dist.get_rank()
        state, losses = train(mesh, rules, rule, bool(donate), f"{folder}/{number}")
        own = [None] * dist.get_world_size()
        dist.all_gather_object(own, (held_by(state), losses))
        sent = [event.kind for event in traffic.events[rank] if event.axis == "replica" and event.collective == "all_reduce"]
        late += sent.count("issue") - sent.count("wait")  # not waited for in the step that sends
        seen += sum(row.count for row in traffic.rows(rank) if row.axis == "replica" and row.collective == "all_reduce")
        if rank == 0:
            expected, wanted = train(virtual_mesh(**sizes), rules, rule, False)
            for r, (held, said) in enumerate(own):
                worst = max(float((a - b[r]).abs().max()) for a, b in zip(held, held_by(expected), strict=True))
                if worst > 1e-9 or not torch.allclose(torch.tensor(said), torch.tensor(wanted)):
                    wrong.append(f"{rules} rank {r}: {worst}, {said} and {wanted}")
    held = checkpoint.tensors(f"{folder}/0")["params.norm.weight"][0]
    if rank == 0:
        print(json.dumps({"wrong": wrong, "seen": seen, "late": late, "held": held}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
