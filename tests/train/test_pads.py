"""Leaves whose sizes do not divide over the data axes are padded there: nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import optim
from fmegatron.models import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Rules, Sharding, abstract_mesh, shard, thread_mesh, unshard, virtual_mesh
from fmegatron.sharding.placement import Placement
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.sharding.shard_map import spmd, stack_shards
from fmegatron.testing import assert_trees_all_close
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train import checkpoint, saving
from fmegatron.train.explain import explain
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

C = Config(layers=3, embed=18, heads=3, kv=1, hd=6, mlp=22, vocab=23, qk_norm="norm")
MODEL = gpt(C)
BOTH = Rules(compute=RULES["fsdp"].compute, storage=(("*", "fsdp"),), optimizer=(("*", "dp"),))
CASES = {
    "fsdp": (RULES["fsdp"], {"dp": 4}, virtual_mesh),
    "zero1": (RULES["zero1"], {"dp": 4}, virtual_mesh),
    "zero2": (RULES["zero2"], {"dp": 4}, thread_mesh),
    "hsdp": (RULES["hsdp"], {"dp": 2, "fsdp": 4}, virtual_mesh),
    "two axes": (RULES["fsdp"], {"dp": 2, "fsdp": 4}, thread_mesh),
    "tp": (RULES["fsdp_tp_sp"], {"dp": 4, "tp": 2}, virtual_mesh),
    "both": (BOTH, {"dp": 2, "fsdp": 4}, virtual_mesh),
}
TP = gpt(Config(layers=3, embed=18, heads=6, kv=2, hd=6, mlp=22, vocab=23, vocab_pad=2))


def optimizer(name, model):
    rate = optim.constant(0.05)
    tx = {
        "sgd": lambda: optim.sgd(rate),
        "adamw": lambda: optim.adamw(rate, weight_decay=0.1),
        "muon": lambda: optim.muon(rate, declare=model.declare),
        "adafactor": lambda: optim.adafactor(rate, declare=model.declare),
    }[name]()
    return optim.chain(optim.clip_by_global_norm(0.5), tx)


def trained(model, sh, name, steps=2):
    tx = optimizer(name, model)
    plan = plan_step(model, sh, microbatches=2)
    state = init(model, tx, sh, key=1, dtype=torch.float64)
    step = make_step(model, tx, sh, microbatches=2, count_zeros=True)
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        tokens, labels = (torch.randint(0, 23, (16, 8), generator=generator) for _ in range(2))
        rows = {"tokens": tokens, "labels": labels, "weights": torch.ones(16, 8, dtype=torch.float64)}
        state, metrics = step(state, {key: shard(plan.sh, x, NAMES[key]) for key, x in rows.items()})
    return plan, state, {key: x.flatten()[0] for key, x in metrics.items()}


@pytest.mark.parametrize("case, name", [
    ("fsdp", "muon"), ("zero1", "adafactor"), ("zero2", "muon"), ("hsdp", "adamw"), ("two axes", "adafactor"),
    ("tp", "muon"), ("both", "adamw"),
])  # fmt: skip
def test_pads_change_nothing(case, name):
    rules, sizes, kind = CASES[case]
    model, sh = TP if "tp" in sizes else MODEL, Sharding(kind(**sizes), rules)
    single, expected, wanted = trained(model, SINGLE, name)
    plan, state, metrics = trained(model, sh, name)
    assert any(leaf.optimizer.pads for leaf in plan.leaves.values())
    start = [init(model, optim.sgd(1.0), one.sh, key=1, dtype=torch.float64).params for one in (single, plan)]
    assert_trees_all_close(whole_leaves(plan, start[1], "storage"), whole_leaves(single, start[0], "storage"), 0.0)
    assert_trees_all_close(whole_leaves(plan, state.params, "storage"), whole_leaves(single, expected.params, "storage"), 1e-11)
    assert_trees_all_close(metrics, wanted, 1e-11)


def whole_state(folder, name):
    """A checkpoint's tensors of a state on one device."""
    state = init(MODEL, optimizer(name, MODEL), SINGLE, dtype=torch.float64)
    wanted = saving.items(MODEL, SINGLE, state)
    checkpoint.load(folder, wanted)
    return {key: chunks.pieces[0][1] for key, chunks in wanted.items()}


@pytest.mark.parametrize("case, name", [("fsdp", "adamw"), ("both", "adafactor")])
def test_checkpoints_hold_true_shapes_and_load_anywhere(case, name, tmp_path):
    rules, sizes, kind = CASES[case]
    sh = Sharding(kind(**sizes), rules)
    _, state, _ = trained(MODEL, sh, name, steps=1)
    saving.save(tmp_path / "first", MODEL, sh, state, {})
    saved = whole_state(tmp_path / "first", name)
    for i, there in enumerate((sh, Sharding(virtual_mesh(dp=3), RULES["fsdp"]))):
        fresh = init(MODEL, optimizer(name, MODEL), there, key=7, dtype=torch.float64)
        saving.save(tmp_path / str(i), MODEL, there, saving.load(tmp_path / "first", MODEL, there, fresh), {})
        again = whole_state(tmp_path / str(i), name)
        assert again.keys() == saved.keys() and all(torch.equal(again[key], x) for key, x in saved.items())


@pytest.mark.parametrize("ranks", [4, 5, 7])
def test_traffic_and_what_explain_says(ranks):
    """A leaf travels with its pads: of the largest dim that divides, else of the largest, padded."""
    found = explain(MODEL, Sharding(abstract_mesh(dp=ranks), RULES["zero1"]), batch=(ranks, 8))
    elements = 0
    for leaf in found.leaves:
        dims = [n for name, n in zip(leaf.names.split(), leaf.shape, strict=True) if name != "layers"]
        best = max((n for n in dims if n % ranks == 0), default=None)
        most = max(dims)
        sharded = best is not None or most >= ranks
        padded = most if best is not None or most < ranks else -(-most // ranks) * ranks
        elements += math.prod(leaf.shape) // most * padded * sharded
        said = [note for note in leaf.notes if "pads over dp in optimizer" in note]
        assert bool(said) == (padded != most), leaf.path
    sent = {(row.collective, row.axis): row.bytes for row in found.collectives}
    assert sent["all_gather", "dp"] == sent["reduce_scatter", "dp"] == 4 * elements


SIZES = st.integers(1, 13)


@given(SIZES, SIZES, st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 1)]), st.data())
def test_relayout_between_any_padded_placements(rows, columns, mesh_sizes, data):
    """Against whole tensors: values, pads of zeros, and the transpose."""
    mesh = virtual_mesh(dp=mesh_sizes[0], fsdp=mesh_sizes[1])

    def placement():
        free, axes = ["dp", "fsdp"], [(), ()]
        for axis in data.draw(st.permutations(free)):
            dim = data.draw(st.sampled_from([0, 1, None]))
            if dim is not None:
                axes[dim] = (*axes[dim], axis)
        shards = [max(1, math.prod(mesh[axis].size for axis in own)) for own in axes]
        pads = tuple(-n % ranks + ranks * data.draw(st.integers(0, 1)) if own else 0
                     for n, ranks, own in zip((rows, columns), shards, axes, strict=True))  # fmt: skip
        return Placement(("rows", "columns"), tuple(axes), pads=pads)

    def padded(x, place):
        return torch.nn.functional.pad(x, (0, place.pad(1), 0, place.pad(0)))

    x = torch.randn(rows, columns, dtype=torch.float64)
    source, target = placement(), placement()
    ops = plan_relayout(mesh, source, target)
    sh = Sharding(mesh, RULES["fsdp"])
    here, there = stack_shards(mesh, padded(x, source), source), stack_shards(mesh, padded(x, target), target)
    move = spmd(sh, lambda inner, local: run(local, inner.rank, ops))
    assert torch.equal(move(here), there)
    probe = torch.randn_like(there)
    _, back = torch.func.vjp(move, here)
    noise = torch.randn_like(here)
    torch.testing.assert_close((move(noise) * probe).sum(), (noise * back(probe)[0]).sum(), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([{"dp": 4}, {"dp": 3, "fsdp": 2}, {"dp": 2, "fsdp": 5}]))
def test_shard_and_unshard_know_pads(rows, columns, sizes):
    for kind in (virtual_mesh, abstract_mesh):
        sh = Sharding(kind(**sizes), RULES["fsdp"]).bind({"a": rows, "b": columns})
        place = sh.placement("a b", "storage")
        shards = [math.prod(sizes[axis] for axis in axes) for axes in place.axes]
        for n, pad, ranks in zip((rows, columns), place.pads or (0, 0), shards, strict=True):
            assert (n + pad) % ranks == 0 and 0 <= pad < ranks <= max(n, 1) * 2
    sh = Sharding(virtual_mesh(**sizes), RULES["fsdp"]).bind({"a": rows, "b": columns})
    x = torch.randn(rows, columns)
    assert torch.equal(unshard(sh, shard(sh, x, "a b", "storage"), "a b", "storage"), x)
