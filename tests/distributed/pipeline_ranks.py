"""What each of the processes runs: `torchrun pipeline_ranks.py 'SCHEDULE RULES AXIS=N... [SETTING=VALUE...]' ...`.

Every rank holds its stages only. Loss, norm, gradients and parameters after 3 steps of SGD are compared with one device.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from fmegatron import optim
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, make_mesh, shard
from fmegatron.testing import assert_trees_all_close
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.evaluate import make_evaluate
from fmegatron.train.pipeline.layout import parse_layout
from fmegatron.train.pipeline.measure import gather, together
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.pipeline.timeline import measured
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

LEARN = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(optim.constant(0.3)))


def batch(seed, rows=16, length=8):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 21, (rows, length), generator=generator) for _ in range(2))
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights}


def train(net, sh, settings, steps=3):
    """(plan, first parameters, state after some steps, metrics of the last)."""
    plan = plan_step(net, sh, **settings)
    state = first = init(plan.model, LEARN, plan.sh, key=0, dtype=torch.float64)
    step = make_step(net, LEARN, sh, **settings)
    for seed in range(steps):
        state, metrics = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch(seed).items()})
    return plan, first.params, state, metrics


def of_my_stages(plan, whole):
    """What a whole model's leaves are on this rank's stages: its layers under their numbers."""
    out = {}
    for path, leaf in plan.leaves.items():
        parts = path.split(".")
        if leaf.stacked:
            first = int(parts[1])
            out[path] = whole[".".join([parts[0], "0", *parts[2:]])][first : first + leaf.param.layers]
        else:
            out[path] = whole[path]
    return out


def run(case):
    name, rules, *words = case.split()
    given = {k: int(v) if v.isdigit() else v for k, v in (word.split("=") for word in words)}
    sizes = {k: given.pop(k) for k in ("dp", "pp", "cp", "tp") if k in given}
    layout = given.pop("layout", None)
    net = gpt(Config(layers=4, embed=16, heads=4, kv=2, mlp=12, vocab=21, vocab_pad=8, tied=True, z_loss=1e-3))
    schedule = make_schedule(name, sizes["pp"], None, given.pop("m", 4))
    marks = []
    pipeline = Pipeline(schedule, parse_layout(layout) if layout else None, marks=marks)
    sh = Sharding(make_mesh("cpu", **sizes), RULES[rules])
    plan, start, state, metrics = train(net, sh, {"pipeline": pipeline, **given})
    single, whole_start, expected, expected_metrics = train(net, SINGLE, {})
    before, after = (whole_leaves(single, params, "storage") for params in (whole_start, expected.params))
    assert_trees_all_close(whole_leaves(plan, start, "storage"), of_my_stages(plan, before), 0.0)
    assert_trees_all_close(whole_leaves(plan, state.params, "storage"), of_my_stages(plan, after), 1e-12)
    assert_trees_all_close(metrics, expected_metrics, 1e-12)
    bars = measured(name, marks[-len(schedule.actions[plan.placed.rank]) :])
    assert tuple(bar.action for bar in bars.bars) == schedule.actions[plan.placed.rank]
    marks.clear()
    together()
    make_step(net, LEARN, sh, pipeline=pipeline, **given)(state, {k: shard(plan.sh, x, NAMES[k]) for k, x in batch(8).items()})
    if sizes["pp"] == dist.get_world_size():
        timeline = gather("processes", marks, 0.0)  # one machine, one clock
        assert tuple(tuple(bar.action for bar in timeline.row(rank)) for rank in range(timeline.ranks)) == schedule.actions
        ends = {bar.action: bar.end for bar in timeline.bars}
        assert all(ends[need] <= bar.start for bar in timeline.bars for need in schedule.needs(bar.action))
    held_out = batch(9)
    got = make_evaluate(net, sh, pipeline=pipeline)(state.params, {k: shard(plan.sh, x, NAMES[k]) for k, x in held_out.items()})
    assert_trees_all_close(got, make_evaluate(net, SINGLE)(expected.params, held_out), 1e-12)


def main(cases):
    """Run the cases in turn; a rank that fails leaves at once, for the others wait for it."""
    torch.set_num_threads(1)
    for case in cases:
        run(case)
        dist.barrier()
        if dist.get_rank() == 0:
            print(json.dumps({"case": case, "wrong": []}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
