"""Which fault is which: every way through the table of rerun.py, and the states that come of it, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from runs import curve, digest, same_run, train

from fmegatron import optim, tree
from fmegatron.config.faults import Faults
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import SINGLE
from fmegatron.toml import ConfigError
from fmegatron.train.faults.exits import BAD_RESULT, ELSEWHERE, Halt
from fmegatron.train.faults.inject import injected, parse
from fmegatron.train.faults.rerun import judged
from fmegatron.train.faults.watch import Suspect, Watch, from_json
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
MODEL = gpt(Config(layers=1, embed=8, heads=2, kv=2, mlp=8, vocab=11, context=8))
TX = optim.adamw(optim.constant(0.1))
STEP = make_step(MODEL, TX, SINGLE, donate=True)
RERUN = Faults(rerun=True)


def plain(state, batch, limits, number, attempt):
    return STEP(state, batch, limits)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 11, (4, 8), generator=generator) for _ in range(2))
    return {"tokens": tokens, "labels": labels, "weights": torch.ones(4, 8)}


def bits(state):
    return [x.clone() for x in tree.leaves(state)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


NEW = Watch()


def judge(*faults, c=RERUN, watch=NEW, devices=("a/0",), number=5):
    run = injected(plain, parse(faults), rank=0, devices=devices)
    return judged(run, init(MODEL, TX, SINGLE), batch(), watch, c, number, devices=devices)


GOOD = bits(STEP(init(MODEL, TX, SINGLE), batch())[0])
SKIPPED = bits(STEP(init(MODEL, TX, SINGLE), batch(), {"loss": -1.0})[0])
BEFORE = bits(init(MODEL, TX, SINGLE))


@pytest.mark.parametrize("faults, c, then, result, said", [
    ([], RERUN, "go", GOOD, ""),
    (["transient:4"], RERUN, "go", GOOD, ""),  # another step
    (["transient:5"], RERUN, "go", GOOD, "step 5: loss = nan (limit inf); run again: loss = 2.4"),
    (["transient:5"], Faults(rerun=True, on_fault="stop"), "stop", GOOD, "a transient fault of a/0"),
    (["correct:5"], RERUN, "go", SKIPPED, "run again: the same: the batch is left out"),
    (["persistent:5:a/0"], RERUN, "go", SKIPPED, "run again: the same: the batch is left out"),
    (["persistent:5:b/0"], RERUN, "go", GOOD, ""),
    (["correct:5"], Faults(rerun=True, on_bad="stop"), "stop", SKIPPED, "the same: stops"),
    (["correct:5"], Faults(rerun=True, on_bad="rollback"), "rollback", SKIPPED, "goes back to the last checkpoint"),
    (["correct:5"], Faults(rerun=True, on_bad="rollback", rollbacks=0), "stop", SKIPPED, "after 0 rollbacks: stops"),
    (["persistent:5:a/0"], Faults(rerun=True, elsewhere=True), "elsewhere", BEFORE, "to be run on other devices than a/0"),
    (["silent:5"], Faults(recheck=5), "go", GOOD, "computed twice, loss = 2.4"),
    (["silent:5"], Faults(recheck=5, on_fault="stop"), "stop", GOOD, "a transient fault of a/0"),
    (["silent:5"], Faults(recheck=4), "go", GOOD, ""),
    (["silent:5"], Faults(recheck=5, tolerance=1e-3), "go", GOOD, ""),
])
def test_each_fault_is_told_from_the_others(faults, c, then, result, said):
    out = judge(*faults, c=c)
    assert out.then == then and same(bits(out.state), result)
    assert said in out.said and bool(said) == bool(out.said) and "\n" not in out.said


def test_on_other_devices():
    """Refused twice on a/0; then there again, then on b/0: accepted, or refused as well."""
    c = Faults(rerun=True, elsewhere=True)
    first = judge("persistent:5:a/0", c=c)
    assert first.watch.suspect == Suspect(5, ("a/0",), "step 5: loss = nan (limit inf); run again: the same")
    kept = from_json(first.watch.as_json())
    assert kept == first.watch
    assert judge("persistent:5:a/0", c=c, watch=kept).then == "elsewhere"
    there = judge("persistent:5:a/0", c=c, watch=kept, devices=("b/0",))
    assert there.then == "go" and same(bits(there.state), GOOD) and there.watch.suspect is None
    assert "run again: the same; on b/0: loss = 2.4" in there.said and there.said.endswith("a persistent fault of a/0")
    correct = judge("correct:5", c=c, watch=kept, devices=("b/0",))
    assert correct.then == "go" and same(bits(correct.state), SKIPPED) and correct.watch.suspect is None
    assert "on other devices too: the result is correct: the batch is left out" in correct.said


def test_ranks_that_disagree():
    """Only another rank refuses: what this one has done already cannot be taken back."""
    out = judged(plain, init(MODEL, TX, SINGLE), batch(), Watch(), RERUN, 5, any_rank=lambda flag: True)
    assert out.then == "stop" and "only some ranks refuse" in out.said


def test_spikes_are_measured_by_the_first_samples():
    c = Faults(rerun=True, spike={"loss": 3.0, "grad_norm": 2.0}, spike_samples=2)
    watch = Watch()
    for loss, norm in ((4.0, 0.5), (-5.0, 0.25)):
        assert watch.limits(c) == {"loss": math.inf, "grad_norm": math.inf}
        watch = watch.saw({"loss": loss, "grad_norm": norm}, c)
    assert watch.limits(c) == {"loss": 15.0, "grad_norm": 1.0} and watch.saw({"loss": 9.0, "grad_norm": 9.0}, c) == watch
    assert watch.limits(Faults(rerun=True, spike={"loss": 3.0}, spike_samples=2), overflows=True) == {"loss": 15.0}
    out = judge(c=Faults(rerun=True, spike={"loss": 1.1}, spike_samples=1), watch=Watch({"loss": 1.0}, 1))
    assert "loss = 2.4" in out.said and "(limit 1.1)" in out.said and same(bits(out.state), SKIPPED)


def test_ranges_left_out():
    watch = Watch().without(8, 12).without(20, 24).without(12, 14)
    assert watch.skip == ((8, 14), (20, 24)) and watch.without(13, 21).skip == ((8, 24),)
    assert from_json(None) == Watch() and from_json(watch.as_json()) == watch


def test_a_transient_fault_changes_no_bit_of_the_run(tmp_path, capsys):
    train(tmp_path / "plain", faults={"rerun": True})
    train(tmp_path / "hit", faults={"rerun": True, "recheck": 5, "inject": ["transient:4", "transient:9", "silent:10"]})
    same_run(tmp_path / "plain", tmp_path / "hit")
    said = capsys.readouterr().out
    assert said.count("a transient fault of") == 3


def test_bad_data_is_left_out_and_a_run_taken_up_leaves_it_out_too(tmp_path):
    data = {"source": "runs:Words", "arguments": {"nan": [17]}}  # of the fifth batch
    train(tmp_path / "whole", data=data, faults={"rerun": True})
    records = curve(tmp_path / "whole")
    assert [r["skipped"] for r in records] == [0] * 4 + [1] * 8 and records[4]["loss"] is None
    for steps in (4, 5, 12):
        train(tmp_path / "parts", data=data, faults={"rerun": True}, training={"steps": steps})
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_rollback_leaves_batches_out_and_the_checkpoint_knows(tmp_path, capsys):
    """Samples 12 to 19 are left out, by a rollback past the fifth batch or from the start: the same run from there on."""
    bad, good = {"arguments": {"nan": [17]}}, {"skip": ["12:20"]}
    c = {"rerun": True, "on_bad": "rollback", "rollback_batches": 2}
    train(tmp_path / "back", data=bad, faults=c, training={"steps": 7})
    assert "samples 12:20 are left out" in capsys.readouterr().out
    assert digest(tmp_path / "back")["watch"]["skip"] == [[12, 20]] and digest(tmp_path / "back")["watch"]["rollbacks"] == 1
    train(tmp_path / "back", data=bad, faults=c, training={"steps": 12})  # taken up again
    train(tmp_path / "named", data=good)
    assert curve(tmp_path / "back") == curve(tmp_path / "named")
    assert digest(tmp_path / "back")["files"] == digest(tmp_path / "named")["files"]


def test_rollback_counts_batches_that_grow(tmp_path, capsys):
    """Batches of 2 until sample 10, then of 4: the bad one is 10 to 13, the one before it 8 and 9."""
    grows = {"training": {"batch_sizes": "0:2 10:4"}}
    c = {"rerun": True, "on_bad": "rollback", "rollback_batches": 2}
    train(tmp_path / "back", data={"arguments": {"nan": [11]}}, faults=c, **grows)
    assert "samples 8:14 are left out" in capsys.readouterr().out
    train(tmp_path / "named", data={"skip": ["8:14"]}, **grows)
    assert curve(tmp_path / "back") == curve(tmp_path / "named")


def test_rollback_before_any_checkpoint_and_twice(tmp_path):
    data = {"arguments": {"nan": [5, 30]}}
    train(tmp_path / "back", data=data, faults={"rerun": True, "on_bad": "rollback"})
    train(tmp_path / "named", data={"skip": ["4:8", "28:32"]})
    assert curve(tmp_path / "back") == curve(tmp_path / "named")
    with pytest.raises(Halt) as end:
        train(tmp_path / "once", data=data, faults={"rerun": True, "on_bad": "rollback", "rollbacks": 1})
    assert end.value.code == BAD_RESULT and "after 1 rollbacks: stops" in end.value.why


def test_exit_codes_and_a_restart_on_another_device(tmp_path, capsys):
    c = {"rerun": True, "elsewhere": True, "inject": ["persistent:5:old/0"], "device": "old"}
    train(tmp_path / "plain", faults={"rerun": True})
    for device in ("old", "old"):
        with pytest.raises(Halt) as end:
            train(tmp_path / "run", faults=c | {"device": device})
        assert end.value.code == ELSEWHERE
    assert digest(tmp_path / "run")["step"] == "step-00000004"
    train(tmp_path / "run", faults=c | {"device": "new"})
    assert "a persistent fault of old/0" in capsys.readouterr().out
    same_run(tmp_path / "plain", tmp_path / "run")
    with pytest.raises(Halt) as end:
        train(tmp_path / "stop", faults={"rerun": True, "on_bad": "stop", "inject": ["correct:5"]})
    assert end.value.code == BAD_RESULT and digest(tmp_path / "stop")["step"] == "step-00000003"


def test_a_spiking_loss_is_caught(tmp_path, capsys):
    """Rows of another language, after the model has learned its own."""
    data = {"arguments": {"strange": [*range(28, 32)]}}
    c = {"rerun": True, "spike": {"loss": 1.2}, "spike_samples": 4}
    train(tmp_path / "run", data=data, faults=c, optimizer={"lr": 0.05})
    said = capsys.readouterr().out
    assert "step 8: loss = " in said and "the batch is left out" in said
    assert [r["skipped"] for r in curve(tmp_path / "run")] == [0] * 7 + [1] * 5


@pytest.mark.parametrize("groups, said", [
    ({"faults": {"inject": ["nope:1:1"]}}, "faults.inject = nope:1:1: expected KIND:STEP:RANK"),
    ({"faults": {"inject": ["persistent:5"], "rerun": True}}, "faults.inject = persistent:5"),
    ({"faults": {"rerun": True}, "training": {"deterministic": False}}, "set training.deterministic, or a faults.tolerance"),
    ({"faults": {"elsewhere": True}}, "need faults.rerun = true"),
    ({"faults": {"rerun": True, "spike": {"loss": 0.5}}}, "expected metric = factor, each above 1"),
    ({"faults": {"rerun": True, "spike": {"los": 5}}}, "faults.spike.los: a step has no number of that name"),
    ({"faults": {"on_bad": "rollback"}}, 'on_bad = "rollback" does nothing without faults.rerun = true'),
    ({"faults": {"rerun": True, "rollback_batches": 3}}, "does nothing without faults.on_bad = rollback"),
    ({"faults": {"straggler_ratio": 2.0}}, "does nothing without faults.stragglers"),
    ({"faults": {"inject": ["silent:2"]}}, "it is found by faults.recheck"),
    ({"faults": {"inject": ["kill:0:0"]}}, "STEP counted from 1"),
    ({"faults": {"inject": ["hang:2:7"]}}, "processes are 0 to 0"),
    ({"local": {"interval": 2}}, "does nothing without local.folder"),
])
def test_mistakes(groups, said, tmp_path):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        train(tmp_path / "run", **groups)
