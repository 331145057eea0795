"""The doctor finds nothing wrong where nothing is, and each planted fault: a wrong world, collectives that lie.

Run as a script under torchrun this file is a doctor whose reduce_scatter lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import processes
import pytest
import torch

from fmegatron.config import Mesh
from fmegatron.plan import doctor
from fmegatron.plan.config import DoctorConfig
from fmegatron.sharding import RULES, Sharding, spmd, thread_mesh
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.transports import Group, Threads


def examined(mesh):
    """What every rank of a thread mesh says of each axis."""
    said = {}

    def on_rank(sh):
        found = [check(axis, sh.rank) for axis in mesh.axes for check in doctor.CHECKS]
        said[int(sh.rank)] = [fault for fault in found if fault]
        return torch.zeros(())

    spmd(Sharding(mesh, RULES["fsdp_tp"]), on_rank)()
    return said


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2, "tp": 3}, {"dp": 3, "cp": 2}], ids=str)
def test_true_collectives_are_found_right(sizes):
    assert not any(examined(thread_mesh(**sizes)).values())


class Late(Threads):
    def all_reduce(self, x, axis, rank, op):
        return super().all_reduce(x, axis, rank, op) + (0 if int(rank) else 1e-9)


class Swapped(Threads):
    def all_gather(self, x, axis, rank):
        return super().all_gather(x, axis, rank).flip(0)


class Doubled(Threads):
    def reduce_scatter(self, blocks, axis, rank):
        return 2 * super().reduce_scatter(blocks, axis, rank)


class Home(Threads):
    def permute(self, x, axis, rank, source):
        return x.clone()


class Own(Threads):
    def all_to_all(self, blocks, axis, rank):
        super().all_to_all(blocks, axis, rank)
        return blocks.clone()


@pytest.mark.parametrize("lying, word", [
    (Late, "psum gives"), (Swapped, "all_gather gives"), (Doubled, "the backward of all_gather gives"),
    (Doubled, "reduce_scatter gives"),
    (Home, "permute gives"), (Own, "all_to_all gives"),
])  # fmt: skip
def test_a_collective_that_lies_is_named(lying, word):
    mesh = thread_mesh(dp=2, tp=2)
    liar = with_transports(mesh, {"dp": mesh["dp"].transport, "tp": lying(mesh["tp"].transport.hub)})
    said = examined(liar)
    assert any(word in fault for faults in said.values() for fault in faults)


@pytest.mark.parametrize("env, mesh, said", [
    ({"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Mesh(tp=2), "start 2 processes"),
    ({"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Mesh(dp=2, tp=2), "set mesh.dp = 4"),
    ({"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Mesh(dp=-1, tp=4), "start 4 processes"),
    ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Mesh(dp=4), "RANK = 4 is not below"),
    ({"RANK": "0", "WORLD_SIZE": "4"}, Mesh(dp=4), "not MASTER_ADDR, MASTER_PORT"),
    ({}, Mesh(tp=2), "WORLD_SIZE is 1"),
])  # fmt: skip
def test_a_launcher_that_does_not_fit_is_said_before_anything_waits(env, mesh, said):
    wrong = [finding.line for finding in doctor.launcher(env, mesh) if finding.wrong]
    assert wrong and said in wrong[0]
    assert not any(finding.wrong for finding in doctor.launcher({}, Mesh()))


def test_one_process_is_well(monkeypatch, capsys):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    doctor.main(DoctorConfig())
    out = capsys.readouterr().out
    assert out.endswith("all is well\n") and "torch" in out and "CPUs" in out
    with pytest.raises(ValueError, match=r"doctor: 1 fault\(s\), the first: the mesh \(tp=2\)"):
        doctor.main(DoctorConfig(mesh=Mesh(tp=2)))


def test_two_gloo_processes():
    said = processes.torchrun(2, processes.COMMAND, "doctor", "--mesh.tp", "2")
    assert "tp of 2 ranks: 5 collectives and their transposes are right" in said
    assert "latency" in said and "GB/s" in said and said.strip().endswith("all is well")


@pytest.mark.long
def test_two_gloo_processes_of_which_one_lies():
    done = processes.run(2, Path(__file__))
    assert any("ValueError: doctor: 1 fault(s), the first: tp of 2 ranks: the backward of all_gather gives" in process.stderr
               for process in done)
    assert all(process.returncode != 0 and "all is well" not in process.stdout for process in done)


def test_a_process_that_never_comes_is_one_line():
    [done] = processes.run(1, processes.COMMAND, "doctor", "--timeout", "2", environment={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fmegatron: doctor: 1 fault(s), the first: 2 processes should work together")


@dataclass(frozen=True)
class Lying(Group):
    def reduce_scatter(self, blocks, axis, rank):
        return super().reduce_scatter(blocks * (1 + int(rank)) if int(rank) == 1 else blocks, axis, rank)



if __name__ == "__main__":
    honest = doctor.setup.mesh_of

    def dishonest(config):
        mesh = honest(config)
        axes = {axis.name: Lying(axis.transport.name, axis.transport.place) for axis in mesh.axes}
        return replace(with_transports(mesh, axes))

    doctor.setup.mesh_of = dishonest
    doctor.main(DoctorConfig(mesh=Mesh(tp=2)))
