"""A rank that hangs, lags, or runs out of memory is named; every process ends with its code, and leaves what it knew."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch
from runs import curve, joined, ranks, same_run, start, train

from fmegatron.sharding import Mesh
from fmegatron.sharding.mesh import Axis
from fmegatron.train.faults.exits import HUNG
from fmegatron.train.faults.launches import KEPT, Launches, noted
from fmegatron.train.faults.memory import out_of_memory, tensors
from fmegatron.train.faults.stragglers import describe


def test_a_rank_that_hangs_is_named_with_the_collective_that_waits_for_it(tmp_path):
    faults = {"heartbeat": 0.2, "train_timeout": 3.0, "init_timeout": 100.0, "inject": ["hang:5:1"]}
    assert joined(ranks(tmp_path / "run", faults=faults)) == [HUNG, HUNG]
    said = (tmp_path / "run.log").read_text()
    heart = tmp_path / "run/heartbeat"
    states = [json.loads((heart / f"rank-0000{i}.json").read_text()) for i in range(2)]
    assert [state["step"] for state in states] == [5, 5] and states[1]["collectives"] < states[0]["collectives"]
    waits = states[0]["waits_for"]
    assert "over dp of" in waits and states[1]["waits_for"] is None
    assert f"step of step 5 takes longer than 3 s; it waits for {waits}; behind are rank 1 (step of step 5)" in said
    assert "it waits for no collective of the mesh" in said
    stacks = [(heart / f"rank-0000{i}.hang.txt").read_text() for i in range(2)]
    assert "in _strike" in stacks[1] and "transports.py" in stacks[0] and "in _strike" not in stacks[0]
    assert waits in stacks[0].split("last collectives")[1]
    assert joined(ranks(tmp_path / "run", faults=faults | {"inject": []})) == [0, 0]  # taken up at its last checkpoint
    assert joined(ranks(tmp_path / "whole", faults={})) == [0, 0]
    same_run(tmp_path / "run", tmp_path / "whole")  # to watch changes no bit
    assert not list(heart.glob("*.txt"))


def test_set_up_has_a_limit_and_says_who_never_came(tmp_path):
    faults, where = {"heartbeat": 0.2, "init_timeout": 2.0}, {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where |= {"MASTER_PORT": str(free.getsockname()[1]), "RANK": "0"}
    assert joined([start(tmp_path / "run", where, mesh={"dp": 2}, faults=faults)]) == [HUNG]  # rank 1 is never started
    said = (tmp_path / "run.log").read_text()
    assert "set-up of step 0 takes longer than 2 s; it waits for no collective of the mesh; nothing is known of rank 1" in said
    assert "_start_group" in (tmp_path / "run/heartbeat/rank-00000.hang.txt").read_text()


def test_a_slow_rank_is_named(tmp_path):
    faults = {"stragglers": 5, "inject": ["slow:2:1"]}
    assert joined(ranks(tmp_path / "run", faults=faults)) == [0, 0]
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if line.startswith("stragglers of")]
    assert [line.split(":")[0] for line in lines] == ["stragglers of steps 2 to 6", "stragglers of steps 7 to 11"]
    assert all(": rank 1 (" in line and "own time" in line and "rank 0" not in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "run/stragglers.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [6, 11]
    fast, slow = records[1]["own_seconds"]
    assert slow - fast > 0.1


def test_who_is_slow():
    names = ("a/0", "a/1", "b/0", "b/1")
    assert describe([1.0, 1.1, 1.0, 1.0], [0.1] * 4, names, 1.2, 20, 10) == ""
    said = describe([1.0, 1.5, 1.0, 2.0], [0.1, 0.1, 0.9, 0.1], names, 1.2, 20, 10)
    assert said == (
        "stragglers of steps 11 to 20: rank 3 (b/1): own time 2.0000 s a step, 2.00 times the median; "
        "rank 1 (a/1): own time 1.5000 s a step, 1.50 times the median; "
        "rank 2 (b/0): wait for data 0.9000 s a step, 9.00 times the median"
    )
    assert describe([1.0] * 4, [0.001, 0.001, 0.003, 0.001], names, 1.2, 20, 10) == ""  # next to nothing


def test_memory_that_runs_out_leaves_a_report(tmp_path):
    with pytest.raises(RuntimeError, match="can't allocate memory|not enough memory") as error:
        train(tmp_path / "run", faults={"inject": ["memory:3:0"]})
    report = (tmp_path / "run/oom-rank-00000.txt").read_text()
    assert "rank 0: out of memory; what it held:" in error.value.__notes__[0]
    assert report.splitlines()[0] == str(error.value).splitlines()[0] and "resident memory of the process" in report
    assert " x float32 [32, 16] on cpu" in report  # the embedding
    train(tmp_path / "run", faults={})
    assert len(curve(tmp_path / "run")) == 12


def test_what_is_no_lack_of_memory():
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError())


def test_views_of_one_memory_count_once():
    before = tensors()
    held = torch.ones(12345, 7)
    rows = [held[i] for i in range(50)]
    assert any("1 x float32 [12345, 7] on cpu" in line for line in tensors())
    assert not any("[12345, 7]" in line for line in before) and len(rows) == 50


class Peer:
    """A transport of one rank, slow to answer."""

    background = True

    def all_reduce(self, x, axis, rank, op):
        return x * 1

    def wait(self, x):
        time.sleep(0.02)
        return x


def test_launches_are_noted_and_waits_timed():
    axis = Axis("dp", 2, 1, Peer())
    launches = Launches()
    mesh = noted(Mesh("device", (axis,), rank=0), launches)
    via, x = mesh.axes[0].transport, torch.ones(3, 4)
    first, second = (via.all_reduce(x, axis, torch.tensor(0), "sum") for _ in range(2))
    via.wait(second)
    via.wait(first)
    assert launches.count == 2 and launches.waiting is None and 0.04 <= launches.take_stalled() < 2
    assert launches.take_stalled() == 0
    assert str(launches.last[-1]) == "all_reduce over dp of [3, 4] float32 (the 2th collective)"
    for _ in range(20):
        via.all_reduce(x, axis, torch.tensor(0), "sum")
    assert len(launches.last) == KEPT and launches.last[-1].number == 22
    assert noted(Mesh("single"), launches) == Mesh("single")
