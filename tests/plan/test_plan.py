"""The command: a published run is planned in seconds, a bad mesh is one line, traffic and FLOPs are exact."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from fmegatron import cli, optim
from fmegatron.data.batches import NAMES
from fmegatron.models import Config, gpt, preset
from fmegatron.plan.hardware import HARDWARE, STEP, capped, hardware
from fmegatron.plan.main import plan
from fmegatron.plan.meter import Count
from fmegatron.plan.options import preset_named, request
from fmegatron.plan.seconds import Execution, Machine, per_microbatch, times
from fmegatron.plan.study import flops_of
from fmegatron.sharding import RULES, Sharding, abstract_mesh, shard, virtual_mesh
from fmegatron.sharding.traffic import Row, counted
from fmegatron.train.explain import explain
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)


def planned(name, **table):
    words = {"training": {"remat": "none"}, "data": {"seq": 128}}
    return plan(request(name, {key: {**words.get(key, {}), **value} if isinstance(value, dict) else value
                               for key, value in (words | table).items()}))  # fmt: skip


def test_the_command_plans_thousands_of_ranks_in_seconds(capsys):
    words = "plan gpt-177b --mesh.dp 48 --mesh.tp 8 --mesh.pp 6 --training.global-batch 1152 --hardware h100 --json"
    start = time.process_time()
    assert cli.main([*words.split(), "--training.remat", "none"]) == 0
    assert time.process_time() - start < 20
    said = json.loads(capsys.readouterr().out)
    assert said["ranks"] == 2304 and said["hardware"] == "h100"
    assert said["flops"] == pytest.approx(5.107082e18, rel=1e-6)  # Megatron-LM's own number
    assert 0 < said["mfu_causal"] < said["mfu"] < 1
    assert said["mfu"] == pytest.approx(said["flops_whole_attention"] / said["step_seconds"] / 2304 / 989.4e12)
    assert said["step_seconds"] == pytest.approx(sum(said["seconds"].values()))
    assert said["memory_bytes"] == said["memory"]["peak"] == sum(said["memory"].values()) - said["memory"]["peak"]
    assert said["memory"]["parameters"] == pytest.approx(177.17e9 / 8 / 6 * 4, rel=0.05)


def test_the_table_names_what_the_issue_asks_for(capsys):
    assert cli.main("plan llama3_debug --mesh.dp 2 --mesh.tp 2 --training.global_batch 4 --data.seq 64".split()) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "gradients", "optimizer", "activations", "peak", "FLOP/byte", "ridge", "bubble", "binds",
                 "MFU", "attention whole", "causal attention halved", "all_gather", "tp", "dp"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize("name, found", [
    ("gpt-1.7b", "gpt:1.7b"), ("gpt_462b", "gpt:462b"), ("llama3-8b", "llama3:8b"), ("llama3_405b", "llama3:405b"),
    ("LLAMA3-70B", "llama3:70b"), ("gpt3-175b", "gpt3:175b"), ("qwen3:8b", "qwen3:8b"), ("llama3-9b", None),
    ("llama3_8b.toml", None), ("debug", None),
])  # fmt: skip
def test_presets_are_written_with_dashes_or_underscores(name, found):
    assert preset_named(name) == found


@pytest.mark.parametrize("words, said", [
    ("llama3-70b --mesh.pp 7", "80 layers do not divide over mesh.pp = 7: use pp = 5 or 8"),
    ("llama3-405b --mesh.pp 8", "use pp = 7 or 9, or count embedding and loss as layers with pipeline.count_embedding and"),
    ("llama3-70b --mesh.tp 7 --data.seq 7168", "does not divide over mesh axis 'tp' of 7: use tp=4 or tp=8"),
    ("llama3-70b --mesh.tp 8 --data.seq 8100", "has size 8100, which does not divide over mesh axis 'tp' of 8: use tp=4"),
    ("llama3-70b --mesh.dp 3 --training.global-batch 16", "use 15 or 18"),
    ("llama3-70b --mesh.dp 4 --training.global-batch 16 --training.microbatches 3", "a batch of 15 or 18"),
    ("llama3-70b --mesh.dp 3 --mesh.tp 8 --gpus 64", "the mesh has 24 ranks (dp=3 x tp=8) and gpus = 64: use mesh.dp = 8"),
    ("llama3-70b --mesh.dp -1 --mesh.tp 8 --gpus 60", "ranks of the other axes: use gpus = 56 or 64"),
    ("llama3-70b --mesh.dp -1", "gpus = N"),
    ("llama3-70b --mesh.pp 8 --pipeline.virtual 3 --pipeline.schedule interleaved_1f1b", "10 layers a stage do not divide"),
    ("llama3-70b --mesh.pp 8 --pipeline.schedule 1f2b", "1f2b"),
    ("llama3-70b --mesh.pp 8 --pipeline.schedule dualpipev --pipeline.virtual 2 --training.global-batch 4", "dualpipev"),
    ("llama3-70b --hardware h1000", "hardware = h1000: unknown, known are h100, h200, a100, b200, cpu"),
    ("lama-70b", "lama-70b: neither a file nor a shipped configuration"),
    ("llama3-70b --mesh.xp 2", "there is no mesh.xp"),
])  # fmt: skip
def test_a_bad_mesh_is_one_line_with_the_nearest_choice(words, said, capsys):
    assert cli.main(["plan", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_flops_are_megatrons_by_formula():
    model = preset("gpt:177b")
    half, whole = flops_of(model, 4096, 1152)
    assert half == pytest.approx(5.107082e18, rel=1e-6)
    assert whole - half == 3 * 96 * 2 * 1152 * 4096**2 * 96 * 128
    table = {"16b": (48, 192, 192, 489.1), "177b": (96, 2304, 1152, 432.8)}  # layers of 6, TFLOP/s a device in the README
    for size, (_, ranks, batch, tflops) in table.items():  # its step times follow, and so must its MFU column
        assert tflops / 989.4 == pytest.approx({"16b": 0.49, "177b": 0.44}[size], abs=0.006)
        assert flops_of(preset(f"gpt:{size}"), 4096, batch)[1] / ranks > 0


def test_exchanges_between_experts_are_of_the_tokens_that_are_sent():
    """There and back, forward and backward: each rank's tokens go to top_k experts, evenly, in bf16."""
    overrides = {"layers": 3, "embed": 64, "heads": 4, "kv": 4, "mlp": 32, "vocab": 64}
    training = {"global_batch": 16, "microbatches": 2, "remat": "none", "dtype": "bf16"}
    made = planned("mixtral-8x7b", model={"overrides": overrides}, mesh={"dp": 2, "ep": 4}, training=training)
    [row] = [row for row in made.collectives if row.collective == "all_to_all"]
    tokens = 16 * 128 // 8
    assert row.axis == "ep" and row.count == 4 * 3 * 2 and row.bytes == row.count * tokens // 2 * 2 * 64 * 2


TINY = Config(layers=3, embed=32, heads=4, kv=2, mlp=48, vocab=64)


@pytest.mark.parametrize("rules, sizes, m", [
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}, 4), ("zero1_tp", {"dp": 2, "tp": 2}, 3), ("ddp", {"dp": 4}, 1),
    ("fsdp", {"dp": 2, "cp": 2}, 2),
])  # fmt: skip
def test_traffic_of_any_number_of_microbatches_is_exact(rules, sizes, m):
    """Against a real step of m microbatches; a virtual mesh keeps what it gathered, so remat makes it gather as others do."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    rows, seq = 4 * m, 16
    mesh, traffic = counted(virtual_mesh(**sizes))
    sh = Sharding(mesh, RULES[rules])
    state, step = init(gpt(TINY), tx, sh), make_step(gpt(TINY), tx, sh, microbatches=m, remat="full")
    values = dict.fromkeys(NAMES, torch.zeros(rows, seq, dtype=torch.int64))
    values |= {"weights": torch.ones(rows, seq), "sample": torch.arange(rows)}
    data = {key: shard(sh, values[key], names) for key, names in NAMES.items()}
    traffic.clear()
    step(state, data)
    said = [explain(gpt(TINY), Sharding(abstract_mesh(**sizes), RULES[rules]), tx=tx, batch=(4 * k, seq), microbatches=k,
                    remat="full").collectives for k in (1, 2)]  # fmt: skip
    found = {(row.collective, row.axis): row for row in times(*per_microbatch(*said), m)}
    real = {(row.collective, row.axis): row for row in traffic.rows()}
    for key, row in real.items():  # the last norm alone is gathered once, not twice, where nothing can be freed
        assert abs(found[key].bytes - row.bytes) <= m * TINY.embed * 4, key
        if rules in ("zero1_tp", "ddp"):
            assert found[key] == row
    assert found.keys() == real.keys()


@pytest.mark.long
def test_meetings_of_replicas_are_counted_in_their_periods():
    """DES-LOC on the mean sends P (1/32 + 1/96 + 1/192), where plain data parallelism sends P in every step."""
    run = {"mesh": {"replica": 2, "tp": 2}, "training": {"global_batch": 4}, "data": {"seq": 64}}
    plain = planned("llama3_debug", **run)
    apart = planned("llama3_debug", **run, semisync={"params": 32, "moments": {"mu": 96, "nu": 192}})
    held = apart.memory["parameters"]
    assert [(met.what, met.every, met.bytes) for met in apart.meetings] == [("params", 32, held), ("mu", 96, held),
                                                                          ("nu", 192, held)]  # fmt: skip
    assert apart.axes["replica"].bytes == held // 32 + held // 96 + held // 192
    assert plain.axes["replica"].bytes >= held and plain.axes["replica"].wire > 20 * apart.axes["replica"].wire
    assert apart.axes["tp"].bytes == plain.axes["tp"].bytes and apart.step_seconds < plain.step_seconds
    assert apart.flops == plain.flops and apart.rank_flops == pytest.approx(plain.rank_flops, rel=1e-3)
    sgd = {"params": 8, "outer": "sgd", "outer_arguments": {"momentum": 0.9}, "fragments": 2}
    diloco, late = (planned("llama3_debug", **run, semisync=sgd | more) for more in ({}, {"delay": 2}))
    assert late.memory["outer"] - diloco.memory["outer"] == pytest.approx(held, abs=64)  # what is on its way
    assert late.seconds["meetings of replicas"] < diloco.seconds["meetings of replicas"]
    assert late.axes["replica"].bytes == diloco.axes["replica"].bytes == held // 8


def test_links_by_where_an_axis_lies():
    h100 = hardware("h100")
    assert h100.link(1, 8) == ("inside", 450e9)
    assert h100.link(8, 64) == ("across", 50e9)  # one adapter for each group
    assert h100.link(1, 64) == ("across", 400e9)  # a group has all eight adapters of its node
    assert h100.link(4, 16) == ("across", 100e9)
    assert all(device.memory < 1e12 and device.flops["bf16"] > 0 for device in HARDWARE.values())


def test_less_power_slows_the_clock_by_its_cube_root_and_nothing_else():
    h100 = hardware("h100")
    slow = capped(h100, 500)
    clock = slow.flops["bf16"] / h100.flops["bf16"]
    assert 0.3 * 700 + 0.7 * 700 * clock**3 == pytest.approx(500)  # static, and f V^2 with V as f
    assert slow.flops["fp8"] / h100.flops["fp8"] == pytest.approx(clock) and slow.bandwidth == h100.bandwidth
    assert capped(h100, 700).flops == pytest.approx(h100.flops) and hardware("H100@500") == slow
    with pytest.raises(ValueError, match="as in h100@700"):
        hardware("h100@half")
    for watts in (200, 701):
        with pytest.raises(ValueError, match="h100 has 700 W, of which 210 W are static"):
            capped(h100, watts)


@pytest.mark.parametrize("axis, how, hidden", [
    ("dp", Execution(), (2.0, 0.0)), ("dp", Execution(prefetch=False), (0.0, 0.0)), ("dp", Execution(overlap=True), (2.0, 2.0)),
    ("dp", Execution(overlap=True, stages=4), (2.0, 8.0)), ("tp", Execution(overlap=True), (0.0, 0.0)),
    ("tp", Execution(async_tp=True), (2.0, 0.0)), ("pp", Execution(overlap=True), (0.0, 0.0)),
    ("pp", Execution(overlap=True, stages=4), (2.0, 0.0)), ("pp", Execution(stages=4), (0.0, 0.0)),
])  # fmt: skip
def test_what_hides_traffic(axis, how, hidden):
    """3 s a microbatch and 9 s once, beside microbatches of 2 s."""
    machine = Machine(hardware("h100"), STEP, how, {axis: (1, 8)}, "bf16")
    micro, once = hidden
    assert machine.exposed(axis, (3.0, 9.0), 2.0, 5, 3.0) == pytest.approx((3 - micro) * 5 + (9 - once))


def test_fp8_halves_what_tp_gathers_and_attention_has_a_peak_of_its_own():
    row = Row("all_gather", "tp", 1, 0, 360_000_000_000)
    places = {"tp": (1, 8), "dp": (8, 8)}
    wide, narrow = (Machine(hardware("h100"), STEP, Execution(fp8=fp8), places, "bf16") for fp8 in (False, True))
    assert wide.send(row) == pytest.approx(1.0, abs=1e-4) and narrow.send(row) == pytest.approx(0.5, abs=1e-4)
    assert narrow.send(replace(row, collective="reduce_scatter")) == wide.send(row)
    assert narrow.send(replace(row, axis="dp")) == pytest.approx(wide.send(replace(row, axis="dp")))
    work = Count(matmul=989.4e12, attention=989.4e12)
    took = wide.compute(work, Count(), Count())
    assert took["products"] == pytest.approx(1 / STEP.flops) and took["attention"] == pytest.approx(1 / 0.35)


@pytest.mark.long
def test_more_of_a_resource_never_slows_a_step():
    words = {"model": {"overrides": {"layers": 3, "vocab": 64}}, "mesh": {"dp": 2, "tp": 2}}
    base, again = (planned("llama3-debug", **words, training={"remat": remat, "global_batch": 8}) for remat in ("none", "full"))
    fast = planned("llama3-debug", **words, training={"remat": "none", "global_batch": 8}, hardware="b200")
    assert fast.step_seconds < base.step_seconds < again.step_seconds
    assert again.memory_bytes < base.memory_bytes
    assert again.flops == base.flops and again.rank_flops > base.rank_flops


@pytest.mark.long
def test_a_pipeline_holds_its_stage_and_what_is_under_way():
    def at(stages, **more):
        overrides = {"layers": 4, "vocab": 64}
        return planned("llama3-debug", model={"overrides": overrides}, mesh={"pp": stages},
                       training={"remat": "none", "global_batch": 8, "microbatches": 8}, **more)  # fmt: skip

    one, two = at(1), at(2)
    assert one.memory["parameters"] > 1.9 * two.memory["parameters"] * 0.98
    assert one.bubble == 0 and two.bubble == pytest.approx(1 / 8)
    assert at(2, pipeline={"schedule": "gpipe"}).memory_bytes > two.memory_bytes
    halved = at(2, pipeline={"schedule": "interleaved_1f1b", "virtual": 2})
    assert halved.bubble == pytest.approx(two.bubble / 2)


@pytest.mark.long
def test_a_layout_says_which_rank_is_fullest():
    shared = {"model": {"overrides": {"layers": 4, "vocab": 64}}, "mesh": {"pp": 2},
              "training": {"remat": "none", "global_batch": 4, "microbatches": 4}}  # fmt: skip
    even, uneven = planned("llama3-debug", **shared), planned("llama3-debug", **shared, pipeline={"layout": "Et|tttL"})
    assert 1.2 < uneven.memory["parameters"] / even.memory["parameters"] < 1.5  # three layers and the head, not two
    assert uneven.step_seconds > even.step_seconds
    with pytest.raises(ValueError, match="pipeline: layout"):
        planned("llama3-debug", **shared, pipeline={"layout": "Ett|tttL"})
