"""The closed forms of docs/communication.md against what is sent: by explain, by every kind of mesh, and by gloo.

Run as a script under torchrun this file is the program whose collectives torch counts.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import torchrun

from fmegatron import optim
from fmegatron.config import load
from fmegatron.data.batches import NAMES
from fmegatron.models import Config, gpt, llama3
from fmegatron.sharding import RULES, Sharding, abstract_mesh, make_mesh, shard, thread_mesh, virtual_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing.formula import Case, step_traffic
from fmegatron.train import explain as module
from fmegatron.train.explain import explain
from fmegatron.train.state import init
from fmegatron.train.step import make_step

C = Config(layers=3, embed=32, heads=4, kv=2, mlp=48, vocab=64, loss_chunks=2)
B, S = 8, 16
ODD = Config(layers=3, embed=18, heads=3, kv=1, mlp=10, vocab=21)  # no size divides by 4


def formula(rules, sizes, m=1, remat="none", keeps=False, c=C, batch=(B, S)):
    """What a step of this file's model and batch sends."""
    return step_traffic(Case(rules, sizes, c, batch, m, remat, keeps))


CASES = [
    ("ddp", {"dp": 4}),
    ("ddp", {"dp": 2, "cp": 2}),
    ("zero1", {"dp": 4}),
    ("zero1", {"dp": 2, "cp": 2}),
    ("zero2", {"dp": 4}),
    ("fsdp", {"dp": 4}),
    ("fsdp", {"dp": 2, "fsdp": 2}),
    ("fsdp", {"dp": 2, "cp": 2}),
    ("hsdp", {"dp": 2, "fsdp": 2}),
    ("tp", {"tp": 2}),
    ("tp", {"tp": 4}),  # two key/value heads on four ranks
    ("tp_sp", {"tp": 4}),
    ("tp_sp", {"dp": 2, "tp": 2}),
    ("fsdp_tp", {"dp": 2, "tp": 2}),
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}),
    ("zero2_tp_sp", {"dp": 2, "tp": 2}),
    ("cp_ring", {"cp": 4}),
    ("cp_ring", {"cp": 2, "tp": 2}),
    ("cp_ulysses", {"cp": 2, "tp": 2}),  # one key/value head on two ranks: gathered
    ("cp_ulysses", {"dp": 2, "cp": 2}),
    ("cp_hierarchical", {"cp": 2, "cpa": 2}),
    ("tp", {"cp": 2, "tp": 4}),  # two on four: each rank takes the one that it reads before it gathers
]
PADDED = [  # ranks that do not divide the sizes; 40 have more than a norm has elements: it is whole along fsdp
    ("fsdp", {"dp": 3}),
    ("zero1", {"dp": 5}),
    ("zero2", {"cp": 3}),
    ("fsdp", {"fsdp": 3, "cp": 2}),
    ("fsdp", {"dp": 2, "fsdp": 3}),
    ("hsdp", {"dp": 2, "fsdp": 3}),
    ("fsdp_tp", {"dp": 3, "tp": 2}),
    ("zero1_tp_sp", {"dp": 5, "tp": 4}),
    ("fsdp", {"dp": 5, "fsdp": 8}),
]
BIG = [
    ("fsdp_tp_sp", {"dp": 2, "cp": 2, "tp": 2}),
    ("zero1_tp", {"dp": 2, "cp": 2, "tp": 2}),
    ("hsdp_tp_sp", {"dp": 2, "fsdp": 2, "tp": 2}),
]
SETTINGS = [{}, {"m": 2, "remat": "full"}, {"m": 2}, {"remat": "every-2"}, {"remat": "selective"}]
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))


def sent(explanation):
    return {(row.collective, row.axis): (row.count, row.bytes) for row in explanation.collectives}


def a_batch(sh, rows=B, length=S):
    tokens = torch.arange(rows * length).reshape(rows, length) % 16
    values = dict.fromkeys(NAMES, tokens) | {"weights": torch.ones(rows, length), "sample": torch.arange(rows)}
    return {key: shard(sh, values[key], names) for key, names in NAMES.items()}


def run_step(mesh, rules, m=1, remat="none", c=C, batch=(B, S)):
    """One real step; the mesh's traffic is forgotten before it."""
    sh, model = Sharding(mesh, RULES[rules]), gpt(c)
    state = init(model, TX, sh)
    step = make_step(model, TX, sh, microbatches=m, remat=remat)
    data = a_batch(sh, *batch)
    return lambda: step(state, data)


@pytest.mark.parametrize("rules, sizes, setting", [
    (*case, SETTINGS[k]) for i, case in enumerate(CASES + BIG) for k in sorted({1, i % len(SETTINGS)})
], ids=str)  # fmt: skip
def test_explain_equals_the_closed_form(rules, sizes, setting):
    m, remat = setting.get("m", 1), setting.get("remat", "none")
    found = explain(gpt(C), Sharding(abstract_mesh(**sizes), RULES[rules]), batch=(B, S), microbatches=m, remat=remat, tx=TX)
    assert sent(found) == formula(rules, sizes, m=m, remat=remat)


@pytest.mark.parametrize("kind", [virtual_mesh, thread_mesh], ids=["virtual", "threads"])
@pytest.mark.parametrize("rules, sizes, setting", [(*case, SETTINGS[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_a_real_step_sends_the_closed_form(kind, rules, sizes, setting):
    mesh, traffic = counted(kind(**sizes))
    step = run_step(mesh, rules, **setting)
    traffic.clear()
    step()
    expected = formula(rules, sizes, keeps=kind is virtual_mesh, **setting)
    assert len(traffic.events) == (1 if kind is virtual_mesh else mesh.size)
    for rank in traffic.events:
        assert traffic.counts(rank) == expected


@pytest.mark.parametrize("rules, sizes", PADDED, ids=str)
def test_pads_travel_as_the_closed_form_says(rules, sizes):
    batch = (30, 24) if sizes.get("fsdp") != 8 else (40, 24)
    setting = {"m": 1, "remat": "full", "batch": batch}
    found = explain(gpt(C), Sharding(abstract_mesh(**sizes), RULES[rules]), batch=batch, remat="full", tx=TX)
    assert any("+" in leaf.storage + leaf.optimizer for leaf in found.leaves)
    assert sent(found) == formula(rules, sizes, **setting)
    if math.prod(sizes.values()) <= 6:
        mesh, traffic = counted(virtual_mesh(**sizes))
        step = run_step(mesh, rules, **setting)
        traffic.clear()
        step()
        assert traffic.counts() == formula(rules, sizes, keeps=True, **setting)


def test_swapping_rules_changes_what_the_form_says_and_nothing_else():
    layers = {n: gpt(Config(**{**vars(C), "layers": n})) for n in (3, 4)}

    def per_layer(rules, sizes):
        few, more = (sent(explain(layers[n], Sharding(abstract_mesh(**sizes), RULES[rules]), batch=(B, S))) for n in (3, 4))
        return {key: more[key][0] - few[key][0] for key in more if more[key][0] != few[key][0]}

    assert per_layer("tp", {"tp": 2}) == {("all_reduce", "tp"): 4}
    assert per_layer("tp_sp", {"tp": 2}) == {("all_gather", "tp"): 4, ("reduce_scatter", "tp"): 4}
    assert per_layer("fsdp", {"dp": 2}) == {("all_gather", "dp"): 2, ("reduce_scatter", "dp"): 1}
    assert per_layer("zero2", {"dp": 2}) == {("reduce_scatter", "dp"): 1}
    assert per_layer("zero1", {"dp": 2}) == per_layer("ddp", {"dp": 2}) == {}
    assert per_layer("fsdp_tp_sp", {"dp": 2, "tp": 2}) == {
        ("all_gather", "tp"): 4, ("reduce_scatter", "tp"): 4, ("all_gather", "dp"): 2, ("reduce_scatter", "dp"): 1,
    }  # fmt: skip


# -- torch's own count, on real processes ------------------------------------------------------------------------------
def under_torchrun(folder):
    """Each case on 4 gloo processes: counts by CommDebugMode, bytes by axis by a dispatch mode of this file."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.utils._python_dispatch import TorchDispatchMode

    names = {"all_reduce": "all_reduce", "gather_blocks": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}

    class Bytes(TorchDispatchMode):
        def __init__(self, axes):
            super().__init__()
            self.axes, self.seen = axes, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            packet = func.overloadpacket
            if packet.__name__ in names:
                x = args[0]  # a gather's is what all have
                self.seen.append((names[packet.__name__], self.axes[args[-1]], x.numel() * x.element_size()))
            return out

    results = []
    cases = [CASES[i] for i in (0, 4, 7, 10, 14)] + [("fsdp", {"dp": 4}), ("zero1", {"dp": 2, "cp": 2})]
    for i, (rules, sizes) in enumerate(cases):
        mesh = make_mesh(**sizes)
        step = run_step(mesh, rules, **SETTINGS[i % 2], c=ODD if i >= 5 else C)
        with Bytes({axis.transport.name: axis.name for axis in mesh.axes}) as mode, (torch_own := CommDebugMode()):
            torch_own.comm_registry.add(torch.ops.fmegatron.gather_blocks)  # of which it does not know
            step()
        counts = {names[str(op).split(".")[-1]]: n for op, n in torch_own.get_comm_counts().items()}
        results.append([rules, sizes, SETTINGS[i % 2], counts, mode.seen])
    with open(os.path.join(folder, f"{dist.get_rank()}.json"), "w") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


def test_torch_counts_the_same_on_gloo_processes(tmp_path):
    torchrun(4, Path(__file__), tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3] and len(ranks[0]) == 7
    for i, (rules, sizes, setting, by_torch, seen) in enumerate(ranks[0]):
        expected = formula(rules, sizes, **setting, c=ODD if i >= 5 else C)
        total, bytes_ = Counter(), Counter()
        for name, axis, n in seen:
            total[name, axis] += 1
            bytes_[name, axis] += n
        assert {key: (total[key], bytes_[key]) for key in total} == expected, (rules, sizes)
        per_name = Counter()
        for (name, _), (n, _) in expected.items():
            per_name[name] += n
        assert by_torch == per_name, (rules, sizes)


# -- leaves, large models, the command ---------------------------------------------------------------------------------
def test_leaves_show_placements_pads_and_skipped_rules():
    model = gpt(Config(**{**vars(C), "vocab": 50, "vocab_pad": 8, "layers": 2}))
    found = explain(model, Sharding(abstract_mesh(dp=2, tp=4), RULES["fsdp_tp"]), batch=(B, S), dtype=torch.bfloat16)
    leaves = {leaf.path: leaf for leaf in found.leaves}
    k, table = leaves["layers.0.attn.k"], leaves["embed.token"]
    assert k.notes == ("kv of 2 does not divide over tp=4: whole on each of its ranks",)
    assert (table.shape, table.padded) == ((50, 32), (56, 32)) and table.notes == ("vocab is padded from 50 to 56",)
    assert (table.compute, table.storage) == ("vocab:tp embed", "vocab:tp embed:dp")
    assert (table.compute_bytes, table.storage_bytes, table.optimizer_bytes) == (14 * 32 * 2, 14 * 16 * 4, 2 * 14 * 16 * 4)
    assert found.parameters == model.count()
    assert found.per_rank["parameters"] == sum(leaf.storage_bytes for leaf in found.leaves)
    text = str(found)
    assert "50>56 32" in text and "kv of 2 does not divide" in text and "all_reduce" in text
    again = json.loads(found.json())
    assert {"mesh", "leaves", "collectives", "per_rank"} <= again.keys()
    assert set(again["collectives"][0]) == {"collective", "axis", "count", "bytes", "wire"}


def test_bytes_at_rest_are_those_of_a_real_state():
    mesh = virtual_mesh(dp=2, tp=2)
    sh = Sharding(mesh, RULES["zero2_tp_sp"])
    state = init(gpt(C), TX, sh)
    found = explain(gpt(C), sh, batch=(B, S), tx=TX)

    def held(values):
        return sum(x.numel() * x.element_size() for x in torch.utils._pytree.tree_leaves(values)) // mesh.size

    from fmegatron import tree

    assert found.per_rank["parameters"] == held(tree.leaves(state.params))
    assert found.per_rank["optimizer"] == held(tree.leaves(state.opt_state))


def test_a_large_model_on_thousands_of_ranks_takes_seconds():
    start = time.process_time()
    sh = Sharding(abstract_mesh(dp=512, tp=8), RULES["fsdp_tp_sp"])
    found = explain(llama3("70b"), sh, batch=(2048, 8192), microbatches=4, remat="full", dtype=torch.bfloat16)
    assert time.process_time() - start < 20
    assert found.parameters == 70_553_706_496
    c = llama3("70b").config
    assert sent(found)["all_gather", "dp"] == (4 * (2 * 80 + 4), sent(found)["all_gather", "dp"][1])
    assert sent(found)["reduce_scatter", "tp"] == (4 * (6 * 80 + 2), 4 * (6 * 80 + 2) * 8192 * c.embed * 2)


@pytest.mark.parametrize("table, word", [
    ({"mesh": {"tp": 3}, "data": {"seq": 33}}, "use tp=2 or tp=4"),
    ({"mesh": {"dp": 3}}, "use dp=2 or dp=4"),
    ({"mesh": {"dp": 2}, "training": {"microbatches": 8}}, "use one of [1, 2, 4]"),
    ({"mesh": {"tp": 2}, "sharding": {"rules": "fsdp"}}, "named by no rule"),
    ({"sharding": {"rules": "tps"}}, "no such rules"),
])  # fmt: skip
def test_a_bad_mesh_ends_in_one_line_with_the_nearest_choice(table, word):
    with pytest.raises(ValueError) as error:
        module.main(load("debug", table))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_the_command_prints_tables_or_json(capsys):
    run = load("debug", {"mesh": {"dp": 64, "tp": 2}, "training": {"global_batch": 128}})
    module.main(run)
    assert "reduce_scatter" in capsys.readouterr().out
    module.main(run, json=True)
    assert json.loads(capsys.readouterr().out)["mesh"] == {"dp": 64, "tp": 2}


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
