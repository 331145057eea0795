"""Checkpoints of replicas that go apart: each one's own tensors, bit for bit, and any other number of replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.testing import assert_trees_all_close, assert_trees_all_equal
from fmegatron.testing.invariance import NAMES
from fmegatron.train import checkpoint, saving
from fmegatron.train.meeting import make_average
from fmegatron.train.semisync import SemiSync
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
DESLOC = SemiSync(2, {"mu": 3, "nu": 4})
DILOCO = SemiSync(4, outer=optim.adam(0.1), fragments=2)
DELAYED = SemiSync(4, outer=optim.adam(0.1), fragments=2, delay=2, dtype=torch.bfloat16)
LOCAL = SemiSync(2, 2, order="after")
TX = optim.adam(0.02)


def model():
    return gpt(Config(layers=2, embed=8, heads=2, kv=1, mlp=8, vocab=12, vocab_pad=8))


def sharding(rules="ddp", **sizes):
    return Sharding(virtual_mesh(**sizes), replace(RULES[rules], apart="replica"))


def start(sh, rule):
    return init(model(), TX, sh, key=0, semisync=rule)


def go(sh, rule, state, steps):
    step = make_step(model(), TX, sh, semisync=rule)
    first = saving.steps_so_far(state)
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(0, 12, (8, 7), generator=generator)
        given = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(8, 6)}
        state, _ = step(state, {k: shard(sh, x, NAMES[k]) for k, x in given.items()})
    return state


def save(folder, sh, state):
    return saving.save(folder, model(), sh, state, {})


def load(path, sh, rule, said=None):
    return saving.load(path, model(), sh, start(sh, rule), say=said.append if said is not None else print)


def replica(state, r, ranks=1):
    return tree.map(lambda x: x[r * ranks : (r + 1) * ranks], (state.params, state.opt_state))


@pytest.mark.parametrize("rule", [DESLOC, DILOCO, DELAYED], ids=["desloc", "diloco", "delayed"])
def test_resume_is_bitwise_in_the_middle_of_a_period(tmp_path, rule):
    sh = sharding("fsdp_tp_sp", replica=2, dp=2)
    middle = go(sh, rule, start(sh, rule), 3)
    found = load(save(tmp_path, sh, middle), sh, rule)
    assert_trees_all_equal(found, middle)
    assert_trees_all_equal(go(sh, rule, found, 3), go(sh, rule, middle, 3))
    held = checkpoint.tensors(tmp_path)
    assert held["params.layers.1.attn.q"][0] == (2, 8, 2, 4) and held["opt.0.mu.layers.1.attn.q"][0] == (2, 8, 2, 4)
    assert held["step"][0] == (2,) and held["key"][0] == () and held["consumed"][0] == ()
    if rule is DELAYED:  # in the middle of the way
        assert held["outer.sent.layers.1.attn.q"] == ((8, 2, 4), torch.bfloat16) and held["outer.waits.0"][0] == ()
        assert sorted(int(x[0]) for x in middle.outer["waits"].values()) == [0, 1]
    if rule is DILOCO:
        assert held["outer.params.layers.1.attn.q"][0] == (8, 2, 4) and held["outer.state.1.1.count"][0] == ()


def test_a_replica_moves_to_another_mesh_of_its_own(tmp_path):
    sh, other = sharding("fsdp_tp_sp", replica=2, dp=2), sharding("zero2_tp", replica=2, tp=2)
    state = go(sh, DILOCO, start(sh, DILOCO), 3)
    moved = load(save(tmp_path / "a", sh, state), other, DILOCO)
    back = load(save(tmp_path / "b", other, moved), sh, DILOCO)
    assert_trees_all_equal(back, state)
    assert_trees_all_close(go(other, DILOCO, moved, 2).consumed, go(sh, DILOCO, state, 2).consumed, 0)


def test_at_a_meeting_any_number_of_replicas_goes_on(tmp_path):
    two, said = sharding(replica=2), []
    state = go(two, LOCAL, start(two, LOCAL), 4)
    assert_trees_all_equal(replica(state, 0), replica(state, 1))
    path = save(tmp_path, two, state)
    for count in (1, 3, 4):
        sh = sharding(replica=count)
        found = load(path, sh, LOCAL, said)
        for r in range(count):
            assert_trees_all_equal(replica(found, r), replica(state, 0))  # all were equal: nothing is lost
    assert said[0].endswith("is of 2 replicas, here are 1: each goes on from their mean") and len(said) == 3
    four = sharding(replica=4)
    assert saving.steps_so_far(go(four, LOCAL, load(path, four, LOCAL), 2)) == 6


@pytest.mark.parametrize("rule", [DESLOC, DILOCO], ids=["desloc", "diloco"])
def test_elsewhere_they_go_on_from_the_mean_and_one_is_taken_back_later(tmp_path, rule):
    two, one = sharding(replica=2), sharding(replica=1)
    state = go(two, rule, start(two, rule), 3)
    alone = load(save(tmp_path, two, state), one, rule)
    mean = tree.map(lambda x: x.float().mean(0, keepdim=True).to(x.dtype), (state.params, state.opt_state))
    assert_trees_all_close((alone.params, alone.opt_state), mean, 1e-6)
    assert_trees_all_equal(alone.outer, tree.map(lambda x: x[:1], state.outer))
    alone = go(one, rule, alone, 1)
    assert checkpoint.tensors(save(tmp_path, one, alone))["params.norm.weight"][0] == (8,)
    both = load(tmp_path, two, rule)
    for r in range(2):
        assert_trees_all_equal(replica(both, r), replica(alone, 0))
    assert saving.steps_so_far(go(two, rule, both, 2)) == 6


def test_who_knows_of_no_replicas_reads_the_mean(tmp_path):
    two = sharding(replica=2)
    state = go(two, DESLOC, start(two, DESLOC), 3)
    params = saving.load_params(save(tmp_path, two, state), model(), SINGLE, say=lambda line: None)
    mean = make_average(model(), two)(state.params)
    assert_trees_all_close(params, tree.map(lambda x: x[0], mean), 1e-6)
    assert not torch.equal(state.params["norm"]["weight"][0], state.params["norm"]["weight"][1])
    data_parallel = Sharding(virtual_mesh(replica=2), RULES["ddp"])  # and plain data parallelism goes on from it
    plain = saving.load(tmp_path, model(), data_parallel, init(model(), TX, data_parallel, key=1), say=lambda line: None)
    assert_trees_all_close(plain.params, mean, 1e-6)
