"""From a step's metrics to a record: read while the next step runs, in one copy; goodput, the optimizer's numbers, layers."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron import toml
from fmegatron.config import RunConfig
from fmegatron.sharding import Mesh
from fmegatron.train.book import Book, Past, Reading, Taken, over_layers
from fmegatron.train.clock import Clock
from fmegatron.train.optimizers import numbers_of

TAKEN = Taken(2, 16)


class Kept:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def book(kept, **more):
    settings = {"seq": 8, "flops": 5e5, "precision": "fp32"}
    settings |= {"numbers": {"lr": lambda count: 0.1 * count}}
    return Book([kept], Mesh("single"), **{**settings, **more})


def numbers(loss, skipped=0):
    found = {"loss": loss, "grad_norm": 1.0, "skipped": skipped}
    return {name: torch.tensor(x) for name, x in found.items()} | {"wide": torch.ones(3, 3)}


def test_a_record_is_written_while_the_next_step_runs():
    kept, order = Kept(), []
    one = book(kept, late=True)
    for step in (1, 2, 3):
        order.append(("run", step))
        before = len(kept.records)
        one.add(step, TAKEN, numbers(float(step)))
        order += [("read", r["step"]) for r in kept.records[before:]]
    one.add(4, TAKEN, numbers(4.0), more=lambda: {"heldout_loss": 2.0})  # what is measured now goes with this step
    one.write()
    assert order == [("run", 1), ("run", 2), ("read", 1), ("run", 3), ("read", 2)]
    assert [r["step"] for r in kept.records] == [1, 2, 3, 4] and kept.records[-1]["heldout_loss"] == 2.0
    soon = Kept()
    book(soon, late=False).add(1, TAKEN, numbers(1.0))  # on a CPU a step is over when it returns
    assert len(soon.records) == 1 and "wide" not in soon.records[0]


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_however_many_numbers_are_read_at_once():
    with Waits() as waits:
        values = Reading({f"n{i}": torch.tensor(float(i)) for i in range(50)}).values()
    assert waits.count == 0 and values == {f"n{i}": float(i) for i in range(50)}


def test_ranks_are_no_vector_and_of_a_vector_its_imbalance_is_told():
    load = torch.tensor([1.0, 5.0, 0.0])
    assert Reading({"loss": torch.tensor(7), "load": load}).values() == {"loss": 7.0, "load/imbalance": 2.5}
    ranks = {"loss": torch.tensor([7, 7]), "load": torch.stack((load, load)), "wide": torch.ones(2, 3, 3)}
    assert Reading(ranks, stacked=True).values() == {"loss": 7.0, "load/imbalance": 2.5}


def test_goodput_is_the_time_of_steps_that_count():
    kept = Kept()
    one = book(kept, past=Past(useful=2.0, skipped=1, started=time.time() - 10.0))
    for step, skipped in ((7, 1), (8, 2), (9, 2)):
        time.sleep(0.01)
        one.add(step, TAKEN, numbers(1.0, skipped))
    one.restart("checkpoint")
    one.add(10, TAKEN, numbers(1.0, 2))
    useful = 2.0
    for record, counts in zip(kept.records, (True, False, True, True), strict=True):
        useful += record["seconds"] if counts else 0.0
        assert record["goodput"] == pytest.approx(useful / 10.0, rel=0.05)
    assert "time/checkpoint" in kept.records[-1] and "time/checkpoint" not in kept.records[-2]


def test_parts_of_a_step_add_up():
    clock = Clock("cpu")
    for part in ("data", "forward_backward", "optimizer"):
        time.sleep(0.01)
        clock.mark(part)
    parts = clock.seconds()
    assert list(parts) == ["data", "forward_backward", "optimizer"] and all(0.009 < x < 0.2 for x in parts.values())
    kept = Kept()
    book(kept).add(1, TAKEN, numbers(1.0), clock)
    assert {f"time/{part}": x for part, x in parts.items()}.items() <= kept.records[0].items()


def test_perplexity_and_unigram():
    kept = Kept()
    book(kept).add(1, TAKEN, numbers(9.0) | {"ce": torch.tensor(math.log(20.0)), "unigram": torch.tensor(5.0)})
    record = kept.records[0]
    assert record["perplexity"] == pytest.approx(20.0) and record["loss"] == 9.0 and "unigram" not in record
    assert record["unigram_normalised_loss"] == pytest.approx(math.log(20.0) - 5.0) and record["unigram_loss"] == 5.0


def test_numbers_of_groups_follow_their_schedules_and_switches():
    table = {"training": {"steps": 20}, "optimizer": {
        "name": "qhadamw", "lr": 1e-2, "schedule": "constant", "warmup": 4, "vs": [0.7], "betas": [0.9, 0.99],
        "switch": {"at": 10, "betas": [0.999, 0.99], "vs": [0.98], "lr_scale": 4.0},
        "groups": {"table": {"match": ["embed.*"], "lr": 5e-3, "switch": {}}, "still": {"match": ["norm.*"], "frozen": True}}}}
    found = numbers_of(toml.update(RunConfig(), table, "test"))
    assert set(found) == {f"{name}{label}" for name in ("lr", "beta1", "beta2", "v1") for label in ("", "/table")}

    def at(count):
        return {name: round(float(fn(torch.tensor(count))), 9) for name, fn in found.items()}

    def both(**values):
        return values | {f"{name}/table": x for name, x in values.items()}

    assert at(9) == both(beta1=0.9, beta2=0.99, v1=0.7) | {"lr": 0.01, "lr/table": 0.005}
    assert at(10) == both(beta1=0.999, beta2=0.99, v1=0.98) | {"lr": 0.04, "lr/table": 0.02}
    assert at(0)["lr"] < 0.01


def test_over_layers():
    values = {f"activations/{i:02d}.h/kurtosis": float(x) for i, x in enumerate((1, 2, 9))}
    values |= {"attention/01.max_logit": 3.0, "attention/02.max_logit": math.inf, "optimizer/l2_norm/mu/layers.0.attn.q": 1.0}
    assert over_layers(values) == {
        "activations/kurtosis/average": 4.0, "activations/kurtosis/median": 2.0, "activations/kurtosis/min": 1.0,
        "activations/kurtosis/max": 9.0, **{f"attention/max_logit/{way}": 3.0 for way in ("average", "median", "min", "max")}}
