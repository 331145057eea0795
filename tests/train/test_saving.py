"""States on any mesh go to disk and come back on any other: bitwise, under keys that know no runs and no mesh."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes import torchrun

from fmegatron import optim, tree
from fmegatron.data.place import placer
from fmegatron.models import Config, gpt
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, make_mesh, thread_mesh, unshard, virtual_mesh
from fmegatron.train import checkpoint, saving
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step

CONFIG = Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=29, vocab_pad=8, context=16)
MODEL = gpt(CONFIG)
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(optim.cosine(1e-2, warmup=2, steps=20)))


def sharding(rules: str, kind=virtual_mesh, **sizes: int) -> Sharding:
    return Sharding(kind(**sizes), RULES[rules]) if sizes else SINGLE


MESHES = {
    "single": lambda: SINGLE,
    "fsdp": lambda: sharding("fsdp", dp=4),
    "tp4": lambda: sharding("tp", tp=4),  # fewer KV heads than ranks
    "all": lambda: sharding("fsdp_tp_sp", dp=2, cp=2, tp=2),
    "zero1": lambda: sharding("zero1", dp=2),
    "threads": lambda: sharding("fsdp_tp", kind=thread_mesh, dp=2, tp=2),
}


def batch(sh: Sharding, seed: int):
    tokens = torch.randint(0, 29, (8, 17), generator=torch.Generator().manual_seed(seed))
    rows = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    place = placer(sh)
    return {key: place(key, x, "batch seq") for key, x in rows.items()}


def run(sh: Sharding, state: TrainState, first: int, steps: int) -> TrainState:
    step = make_step(MODEL, TX, sh)
    for i in range(first, first + steps):
        state, _ = step(state, batch(sh, i))
    return state


def whole(sh: Sharding, state: TrainState, model=MODEL) -> dict[str, torch.Tensor]:
    """Global tensors by unshard, which the code under test does not use."""
    sh = sh.bind(model.sizes)
    leaves = list(plan_leaves(model, sh).values())
    adam = [part for part in state.opt_state if isinstance(part, dict) and "mu" in part][0]
    trees = {"params": (state.params, "storage"), "mu": (adam["mu"], "optimizer"), "nu": (adam["nu"], "optimizer")}
    out = {}
    for name, (values, kind) in trees.items():
        for leaf, x in zip(leaves, tree.leaves(values), strict=True):
            here = sh.bind({"layers": leaf.param.layers}) if leaf.stacked else sh
            out[f"{name}.{leaf.path}"] = unshard(here, x, leaf.param.names, kind)
    out["count"] = adam["count"].flatten()[0]
    return out | {name: getattr(state, name).flatten()[0] for name in saving.COUNTERS}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("source, target", list(pairwise(["single", "all", "fsdp", "tp4", "zero1", "threads", "single"])))
def test_any_mesh_loads_what_another_saved(source, target, tmp_path):
    here, there = MESHES[source](), MESHES[target]()
    state = run(here, init(MODEL, TX, here, key=1), 0, 2)
    saving.save(tmp_path, MODEL, here, state, {"a": 1})
    back = saving.load(tmp_path, MODEL, there, init(MODEL, TX, there, key=2))
    assert equal(whole(here, state), whole(there, back)) == []
    for leaf, x in zip(plan_leaves(MODEL, there.bind(MODEL.sizes)).values(), tree.leaves(back.params), strict=True):
        if leaf.path == "embed.token" and target == "single":
            assert x.shape[0] == 32 and x[29:].abs().sum() == 0  # pads stay zero


@pytest.mark.parametrize("name", ["single", "all", "threads"])
def test_resume_is_bitwise(name, tmp_path):
    sh = MESHES[name]()
    through = run(sh, init(MODEL, TX, sh, key=1), 0, 4)
    half = run(sh, init(MODEL, TX, sh, key=1), 0, 2)
    saving.save(tmp_path, MODEL, sh, half, {})
    resumed = run(sh, saving.load(tmp_path, MODEL, sh, init(MODEL, TX, sh, key=9)), 2, 2)
    pairs = zip(tree.leaves(through), tree.leaves(resumed), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == []


def test_resume_on_another_mesh_is_close(tmp_path):
    sh, other = MESHES["all"](), MESHES["fsdp"]()
    through = whole(sh, run(sh, init(MODEL, TX, sh, key=1), 0, 4))
    saving.save(tmp_path, MODEL, sh, run(sh, init(MODEL, TX, sh, key=1), 0, 2), {})
    resumed = whole(other, run(other, saving.load(tmp_path, MODEL, other, init(MODEL, TX, other)), 2, 2))
    for name, x in through.items():
        torch.testing.assert_close(resumed[name], x, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_keys_know_no_runs(tmp_path):
    saving.save(tmp_path, MODEL, SINGLE, init(MODEL, TX, SINGLE), {})
    keys = checkpoint.tensors(tmp_path)
    assert keys["params.layers.2.attn.q"] == ((16, 4, 4), torch.float32)
    assert keys["params.embed.token"][0] == (29, 16)  # no pads
    mirrored = [key for key in keys if key.startswith("opt.") and key.endswith("mu.layers.2.attn.q")]
    assert len(mirrored) == 1 and keys[mirrored[0]][0] == (16, 4, 4)
    params = saving.load_params(tmp_path, MODEL, SINGLE, torch.float64)
    again = init(MODEL, TX, SINGLE).params
    assert all(torch.equal(a.float(), b) for a, b in zip(tree.leaves(params), tree.leaves(again), strict=True))


@pytest.mark.parametrize("change, said", [
    ({"layers": 4}, "layers.3"), ({"layers": 2}, "layers.2"), ({"embed": 32, "hd": 4}, "has shape"), ({"mlp": 16}, "has shape"),
])
def test_another_model_is_one_line(change, said, tmp_path):
    saving.save(tmp_path, MODEL, SINGLE, init(MODEL, TX, SINGLE), {})
    other = gpt(replace(CONFIG, **change))
    with pytest.raises(ValueError, match=said) as error:
        saving.load(tmp_path, other, SINGLE, init(other, TX, SINGLE))
    assert "\n" not in str(error.value)


def under_torchrun(folder: str) -> None:
    torch.set_num_threads(1)
    sh = Sharding(make_mesh("cpu", tp=2), RULES["tp_sp"])
    state = saving.load(f"{folder}/virtual", MODEL, sh, init(MODEL, TX, sh, key=5))
    saving.save(f"{folder}/gloo", MODEL, sh, state, {})
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    """virtual fsdp -> gloo tp -> single."""
    sh = MESHES["fsdp"]()
    state = run(sh, init(MODEL, TX, sh, key=1), 0, 2)
    saving.save(tmp_path / "virtual", MODEL, sh, state, {})
    torchrun(2, Path(__file__), tmp_path)
    back = saving.load(tmp_path / "gloo", MODEL, SINGLE, init(MODEL, TX, SINGLE))
    assert equal(whole(sh, state), whole(SINGLE, back)) == []


# -- what is loaded, and what is missing ----------------------------------------------------------------------------
def test_strictness_names_keys(tmp_path):
    saving.save(tmp_path, MODEL, SINGLE, init(MODEL, TX, SINGLE, key=1), {})
    longer = gpt(replace(CONFIG, layers=4))
    for strict, message in (("both", "no tensor|lacks params.layers.3"), ("missing", "params.layers.3")):
        with pytest.raises(ValueError, match=message):
            saving.load(tmp_path, longer, SINGLE, init(longer, TX, SINGLE), strict=strict)
    said: list[str] = []
    fresh = init(longer, TX, SINGLE, key=5)
    kept = tree.to_paths(fresh.params)["layers.0.attn.q"][3].clone()
    got = saving.load(tmp_path, longer, SINGLE, fresh, strict="none", say=said.append)
    q = tree.to_paths(got.params)["layers.0.attn.q"]
    source = tree.to_paths(init(MODEL, TX, SINGLE, key=1).params)["layers.0.attn.q"]
    assert torch.equal(q[:3], source) and torch.equal(q[3], kept)
    assert len(said) == 1 and "lacks params.layers.3" in said[0] and "keep their values" in said[0] and "\n" not in said[0]

    params = saving.load_params(tmp_path, longer, SINGLE, start=fresh.params, strict="none", say=said.append)
    q = tree.to_paths(params)["layers.0.attn.q"]
    assert torch.equal(q[:3], source) and torch.equal(q[3], kept) and kept.any()

    shorter, said = gpt(replace(CONFIG, layers=2)), []
    with pytest.raises(ValueError, match="holds .*layers.2.*which this model or optimizer has not"):
        saving.load(tmp_path, shorter, SINGLE, init(shorter, TX, SINGLE), strict="extra")
    saving.load(tmp_path, shorter, SINGLE, init(shorter, TX, SINGLE), strict="missing", say=said.append)
    assert len(said) == 1 and "layers.2" in said[0]


@pytest.mark.parametrize("mesh", ["single", "all"])
def test_parameters_only_in_an_export_dtype(mesh, tmp_path):
    sh = MESHES[mesh]()
    state = init(MODEL, TX, sh, key=1)
    items = saving.params_only(saving.items(MODEL, sh, state), torch.bfloat16)
    checkpoint.save(tmp_path, 7, items, {"holds": "params"})
    held = checkpoint.tensors(tmp_path)
    assert {dtype for _, dtype in held.values()} == {torch.bfloat16} and all(key.startswith("params.") for key in held)
    back = saving.load_params(tmp_path, MODEL, SINGLE)
    exact = tree.map(lambda x: x.bfloat16().float(), init(MODEL, TX, SINGLE, key=1).params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(exact), strict=True))


HOMES = {
    "hsdp": lambda: sharding("hsdp", dp=2, fsdp=2),
    "zero2": lambda: sharding("zero2", dp=4),
    "tp_sp": lambda: sharding("tp_sp", tp=2),
    "cp": lambda: sharding("fsdp", dp=2, cp=2),
    "zero1_tp": lambda: sharding("zero1_tp", dp=2, tp=2),
    "threads": lambda: sharding("fsdp_tp_sp", kind=thread_mesh, dp=2, tp=2),
}


@pytest.mark.parametrize("source", HOMES)
def test_every_home_to_every_other(source, tmp_path):
    """All ordered pairs, with moments that are not zero: only files and placements take part, so no step is run."""
    here = HOMES[source]()
    fresh = init(MODEL, TX, here, key=1)
    state = tree.map(lambda x: x + 1 if x.is_floating_point() else x, fresh)
    saving.save(tmp_path, MODEL, here, state, {})
    first = saving.load(tmp_path, MODEL, SINGLE, init(MODEL, TX, SINGLE, key=2))
    for target in HOMES:
        there = HOMES[target]()
        back = saving.load(tmp_path, MODEL, there, init(MODEL, TX, there, key=2))
        assert equal(whole(SINGLE, first), whole(there, back)) == [], target


EXPERTS = gpt(replace(CONFIG, moe=Moe(experts=4, top_k=2, mlp=8)))


@pytest.mark.parametrize("source", ["ep", "ep and tp", "fsdp"])
def test_experts_on_any_mesh(source, tmp_path):
    """Of a mixture of experts, moments that are not zero: from experts on an axis of their own to all others, bit for bit."""
    homes = {"ep": sharding("fsdp", dp=2, ep=2), "ep and tp": sharding("fsdp_tp_sp", ep=2, tp=2)}
    homes["fsdp"] = sharding("fsdp", dp=4)
    here = homes[source]
    state = tree.map(lambda x: x + 1 if x.is_floating_point() else x, init(EXPERTS, TX, here, key=1))
    saving.save(tmp_path, EXPERTS, here, state, {})
    first = saving.load(tmp_path, EXPERTS, SINGLE, init(EXPERTS, TX, SINGLE, key=2))
    for sh in homes.values():
        back = saving.load(tmp_path, EXPERTS, sh, init(EXPERTS, TX, sh, key=2))
        assert equal(whole(SINGLE, first, EXPERTS), whole(sh, back, EXPERTS)) == []


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
