"""`explain` on a mesh with stages: each rank's leaves, and what it sends, by closed forms."""

from __future__ import annotations

import pytest

from fmegatron import cli, optim
from fmegatron.models import Config, gpt
from fmegatron.sharding import RULES, Sharding, abstract_mesh
from fmegatron.train.explain import explain, explain_stages
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline

ROWS, SEQ, M, DP = 16, 8, 4, 2
STREAM = ROWS // DP // M * SEQ * 16 * 4  # bytes of the residual stream of a microbatch
IDS = ROWS // DP // M * SEQ * 8  # of what its tokens' attention may see, which goes along, forward only


def staged(schedule, ranks, virtual=None, tied=False, rules="zero1", **sizes):
    model = gpt(Config(layers=4, embed=16, heads=4, kv=2, mlp=24, vocab=32, tied=tied, positions="none"))
    sh = Sharding(abstract_mesh(pp=ranks, **sizes), RULES[rules])
    pipeline = Pipeline(make_schedule(schedule, ranks, virtual, M))
    return model, explain_stages(model, sh, pipeline, lambda own: optim.adamw(1e-3), batch=(ROWS, SEQ))


def sent(one, collective, axis):
    return next((row for row in one.collectives if (row.collective, row.axis) == (collective, axis)), None)


@pytest.mark.parametrize("schedule, ranks, virtual", [("1f1b", 4, None), ("interleaved_1f1b", 2, 2)])
def test_leaves_and_traffic_of_each_rank(schedule, ranks, virtual):
    model, found = staged(schedule, ranks, virtual, dp=DP)
    stages = ranks * (virtual or 1)
    assert sum(one.parameters for one in found.ranks) == model.count()
    for numbers, one in zip(found.stages, found.ranks, strict=True):
        runs = [(int(leaf.path.split(".")[1]), leaf.shape[0]) for leaf in one.leaves if leaf.path.endswith("attn.q")]
        layers = {first + i for first, length in runs for i in range(length)}
        assert layers == {n for stage in numbers for n in range(stage * 4 // stages, (stage + 1) * 4 // stages)}
        assert ("embed.token" in {leaf.path for leaf in one.leaves}) == (0 in numbers)
        assert sent(one, "reduce_scatter", "dp").bytes == sent(one, "all_gather", "dp").bytes == 4 * one.parameters
        forward, back = len(numbers) - (stages - 1 in numbers), len(numbers) - (0 in numbers)
        assert sent(one, "permute", "pp").bytes == M * (forward * (STREAM + IDS) + back * STREAM)


def test_a_tied_table_is_exchanged_once_a_step():
    _, plain = staged("1f1b", 2, dp=DP)
    _, tied = staged("1f1b", 2, tied=True, dp=DP)
    for a, b in zip(plain.ranks, tied.ranks, strict=True):
        assert sent(b, "permute", "pp").bytes - sent(a, "permute", "pp").bytes == 32 * 16 * 4 // DP  # its optimizer's shard


def test_a_stage_does_in_its_layers_what_one_device_does():
    model, found = staged("gpipe", 2, rules="tp_sp", tp=2)
    sh = Sharding(abstract_mesh(tp=2), RULES["tp_sp"])
    alone = explain(model, sh, tx=optim.adamw(1e-3), batch=(ROWS, SEQ), microbatches=M)
    for name in ("all_gather", "reduce_scatter"):
        assert sum(sent(one, name, "tp").bytes for one in found.ranks) == sent(alone, name, "tp").bytes


def test_the_command(capsys):
    words = "explain debug --mesh.pp 2 --mesh.dp 2 --training.microbatches 2 --sharding.rules zero1"
    assert cli.main(words.split()) == 0
    text = capsys.readouterr().out
    assert "-- rank 0 of pp, stage 0 of 1f1b --" in text and "-- rank 1 of pp, stage 1 of 1f1b --" in text
    assert cli.main([*words.split(), "--pipeline.schedule", "zb_h1"]) == 2
    assert "schedule zb_h1 splits backwards, which a rehearsal cannot: use 1f1b" in capsys.readouterr().err
