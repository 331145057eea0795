"""Recorded steps give what steps give, bit for bit: any order of shapes, states from elsewhere, numbers kept for later.

The backend is a recorder with the manners of CUDA graphs (tests/tape.py): fixed addresses, nothing runs while recording,
Python is not asked again. Bugs of such steps are planted, and seen.
"""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import batches, model
from tape import Recorder

from fmegatron import config, optim, tree
from fmegatron.cli import main
from fmegatron.config import ConfigError
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, virtual_mesh
from fmegatron.sharding.mesh import Mesh
from fmegatron.train import graphs
from fmegatron.train.graphs import Graphed
from fmegatron.train.precision import LossScale, Precision
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step

MODEL = model(layers=1)
SHAPES = ((4, 8), (2, 8), (4, 6))
RATE = optim.cosine(1e-2, steps=9)
TX = {
    "adamw": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(RATE)),
    "muon": optim.muon(1e-2),
    "sgd": optim.sgd(RATE, momentum=0.9),
}


@pytest.fixture(autouse=True, scope="module")
def without_the_operator_of_a_cpu():
    """What reads its numbers on the host, as no step on a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("fmegatron.optim.fuse"), "kernel_of", lambda *_, **__: None)
        yield


def made(tx="adamw", wrap=Graphed, **settings):
    """(state, plain step, recorded step), fp64."""
    precision = settings.pop("precision", Precision())
    state = init(MODEL, TX[tx], SINGLE, 1, dtype=torch.float64, precision=precision)
    settings |= {"precision": precision, "donate": True}
    plain, other = (make_step(MODEL, TX[tx], SINGLE, **settings) for _ in range(2))
    return state, plain, wrap(other, Recorder(), warm_up=1)


def copy(state):
    return tree.map(torch.clone, state)


def equal(a, b):
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def agree(state, plain, recorded, order, limits=None):
    """Whether both give the same, call by call; numbers are looked at after the last call."""
    a, b, found = copy(state), copy(state), []
    for i, which in enumerate(order):
        rows, length = SHAPES[which]
        batch = next(batches(1, rows, length, seed=i))
        given = {} if limits is None else {"loss": limits[i]}
        a, mine = plain(a, batch, given)
        b, theirs = recorded(b, batch, given)
        found.append((mine, theirs))
    return equal(a, b) and all(mine.keys() == theirs.keys() and equal(mine, theirs) for mine, theirs in found)


SETTINGS = {
    "plain": {},
    "microbatches": {"microbatches": 2, "remat": "full"},
    "loss scale": {"precision": Precision(LossScale(window=2)), "count_zeros": True},
    "muon": {"tx": "muon"},
    "sgd": {"tx": "sgd", "skip_norm": 3.0},
}


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
def test_a_recorded_step_is_the_step(how):
    state, plain, recorded = made(**how)
    assert agree(state, plain, recorded, [0, 0, 1, 0, 1, 2, 1, 2, 0])
    assert len(recorded.recordings) == 3 and recorded.backend.warm == 3


@settings(max_examples=8)
@given(order=st.lists(st.integers(0, 2), min_size=3, max_size=7), low=st.lists(st.booleans(), min_size=7, max_size=7))
def test_in_any_order_of_shapes_and_with_other_limits_each_time(order, low):
    """A limit that the loss does not stay below refuses the step: a number of the host, which no recording may remember."""
    assert agree(*made(), order, [0.1 if x else 1e9 for x in low])


def test_each_limit_is_its_own_metric_s():
    """Of two limits one refuses the step if they change places."""
    state, plain, recorded = made()
    batch = next(batches(1, seed=0))
    _, seen = plain(copy(state), batch)
    low, high = sorted(("loss", "grad_norm"), key=lambda name: seen[name].item())
    limits = {low: (seen[low] + seen[high]).item() / 2, high: 1e9}
    a, b = copy(state), copy(state)
    for _ in range(3):
        a, mine = plain(a, batch, limits)
        b, theirs = recorded(b, batch, limits)
        assert not mine["skipped"] and equal(mine, theirs) and equal(a, b)


def test_numbers_of_warm_up_are_the_callers_own():
    """"skipped" is a tensor of the state, and the state becomes the buffers: found by the property above."""
    assert agree(*made(), [0] * 4, [0.1, 0.1, 1e9, 0.1])


def test_what_is_watched_is_recorded_by_itself():
    state, plain, recorded = made()
    a, b = copy(state), copy(state)
    for i in range(6):
        batch, watch = next(batches(1, seed=i)), frozenset({"norms"} if i % 2 else ())
        (a, mine), (b, theirs) = (step(s, batch, watch=watch) for step, s in ((plain, a), (recorded, b)))
        assert mine.keys() == theirs.keys() and equal(mine, theirs)
    assert len(recorded.recordings) == 2 and equal(a, b)


def test_a_state_is_given_away_and_another_one_is_taken():
    state, _, recorded = made()
    batch = list(batches(6))
    early, later, first = copy(state), copy(state), []
    for one in batch:
        before = later
        later, metrics = recorded(later, one)
        first.append(metrics["loss"])
        assert before.step.numel() == 0
        with pytest.raises(ValueError, match="given away"):
            recorded(before, one)
    kept = copy(later)
    for one, loss in zip(batch, first, strict=True):  # back to a checkpoint, after which all is as it was
        early, metrics = recorded(early, one)
        assert torch.equal(metrics["loss"], loss)
    assert equal(early, kept) and len(recorded.recordings) == 1


def test_a_state_of_other_dtypes_begins_anew_and_so_does_the_first_one():
    state, plain, recorded = made("sgd")
    narrow = tree.map(lambda x: x.float() if x.is_floating_point() else x, state)
    batch = next(batches(1, seed=0))
    for start in (state, narrow, state):
        a, b = copy(start), copy(start)
        for _ in range(3):
            (a, mine), (b, theirs) = plain(a, batch), recorded(b, batch)
            assert equal(mine, theirs) and equal(a, b)


def test_leaves_that_change_places_or_share_memory_do_not_mix():
    """A step that swaps two leaves, on a state whose leaves are one tensor at first."""

    def swap(state, batch, *rest):
        p = state.params
        return state._replace(params={"a": p["b"] + 1, "b": p["a"], "c": p["b"]}, step=state.step + 1), {"sum": p["a"].sum()}

    one, zero = torch.arange(3.0), torch.zeros((), dtype=torch.int64)
    state = TrainState(zero, {"a": one, "b": one, "c": one}, (), *(zero.clone() for _ in range(3)))
    recorded, plain = Graphed(swap, Recorder(), warm_up=0), copy(state)
    for _ in range(4):
        (state, mine), (plain, theirs) = recorded(state, {}), swap(plain, {})
        assert equal(state, plain) and equal(mine, theirs)


# -- planted ----------------------------------------------------------------------------------------------------------
class Leaky(Graphed):
    """Hands out the recording's own numbers."""

    def __call__(self, *args, **more):
        state, metrics = super().__call__(*args, **more)
        return state, next(iter(self.recordings.values())).metrics if self.recordings else metrics


def writes(keep):
    """`write`, of the values that are kept."""
    real = graphs.write

    def planted(into, values):
        pairs = [(x, y) for x, y in zip(into, values, strict=True) if keep(x, y)]
        real([x for x, _ in pairs], [y for _, y in pairs])

    return planted


def test_planted_numbers_that_the_next_replay_writes_over():
    assert not agree(*made(wrap=Leaky), [0] * 5)


@pytest.mark.parametrize("keep", [
    lambda x, y: isinstance(y, float) or x.dtype != torch.int64 or x.dim() == 0,  # tokens of the batch that was recorded
    lambda x, y: not isinstance(y, float),  # the limit that was recorded, or none
    lambda x, y: x.dim() > 0,  # counters of the state
], ids=["batch", "limits", "state"])  # fmt: skip
def test_planted_inputs_that_are_not_written(monkeypatch, keep):
    monkeypatch.setattr(graphs, "write", writes(keep))
    assert not agree(*made(), [0] * 6, [1e9, 1e9, 1e9, 0.1, 1e9, 1e9])


def test_planted_leaves_that_change_places_in_one_pass(monkeypatch):
    def planted(into, values):
        for x, y in zip(into, values, strict=True):
            x.copy_(y) if isinstance(y, torch.Tensor) else x.fill_(y)

    monkeypatch.setattr(graphs, "write", planted)
    with pytest.raises(AssertionError):
        test_leaves_that_change_places_or_share_memory_do_not_mix()


# -- refused ----------------------------------------------------------------------------------------------------------
def test_a_step_that_reads_values_is_refused_and_the_state_stays():
    experts = model(moe=Moe(4, 2, mlp=8), vocab_pad=1, vocab=24)
    tx = optim.adamw(1e-3)
    state, said = init(experts, tx, SINGLE), []
    recorded = Graphed(make_step(experts, tx, SINGLE, donate=True), Recorder(), warm_up=1, say=said.append)
    state, _ = recorded(state, next(batches(1)))
    before = copy(state)
    with pytest.raises(ValueError, match=r"^this step cannot be recorded as a graph \(training.graphs\): .*tolist$"):
        recorded(state, next(batches(1)))
    assert equal(state, before) and not said


def test_memory_is_reported():
    state, _, recorded = made()
    said = []
    recorded.say = said.append
    for one in batches(3):
        state, _ = recorded(state, one)
    assert len(said) == 1 and "number 1" in said[0] and recorded.backend.pool_bytes() > sum(
        x.numel() * x.element_size() for x in tree.leaves(state.params))  # fmt: skip


GPU = Mesh("single", device="cuda")
REFUSED = {
    "a cpu": (SINGLE.mesh, {}, "this run is on cpu"),
    "a virtual mesh": (virtual_mesh(dp=2), {}, "drop mesh.virtual"),
    "a pipeline": (GPU, {"mesh": {"pp": 2}}, "mesh.pp = 1"),
    "replicas that meet": (GPU, {"semisync": {"params": 4}}, "semisync.params"),
    "activations on the host": (GPU, {"training": {"remat": "full+offload"}}, "use none, full or selective"),
    "a state that is kept": (GPU, {"training": {"donate": False}}, "set training.donate = true"),
}


@pytest.mark.parametrize("mesh, table, why", REFUSED.values(), ids=REFUSED)
def test_what_the_host_decides_is_refused_in_one_line(mesh, table, why):
    table = {**table, "training": {"graphs": True, **table.get("training", {})}}
    c, rules = config.load("quickstart", table), RULES["fsdp_tp_sp"]
    with pytest.raises(ConfigError, match=why) as error:
        graphs.check(c, Sharding(mesh, rules))
    assert "\n" not in str(error.value)
    off = replace(c, training=replace(c.training, graphs=False))
    graphs.check(off, Sharding(mesh, rules))


def test_experts_are_refused_where_rows_have_no_fixed_number():
    c = config.load("quickstart", {"training": {"graphs": True}})
    with pytest.raises(ConfigError, match="dispatch = padded"):
        graphs.check(c, Sharding(GPU, replace(RULES["fsdp_tp_sp"], dispatch="ragged")))
    graphs.check(c, Sharding(GPU, RULES["fsdp_tp_sp"]))
    graphs.check_model(c, MODEL, compiled=False)
    experts = model(moe=Moe(4, 2, mlp=8))
    graphs.check_model(c, experts, compiled=True)
    with pytest.raises(ConfigError, match="set training.compile = true"):
        graphs.check_model(c, experts, compiled=False)


def test_train_on_a_cpu_refuses_graphs_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--training.graphs", "true"]) != 0
    said = capsys.readouterr().err.strip()
    assert "training.graphs = true: graphs are CUDA's, and this run is on cpu" in said and "\n" not in said
