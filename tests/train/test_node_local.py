"""Steps on nodes' own disks (a folder a node): copies lie where jump and factor say, and any loss they cover is made good."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fmegatron.train import node_local
from fmegatron.train.checkpoint import Chunks, whole
from fmegatron.train.node_local import Nodes, find_local, load_local, save_local

RANKS = 4


def full(step: int) -> torch.Tensor:
    return torch.arange(8.0 * 3).reshape(8, 3) + 100 * step


def _rank(rank: int, port: int, root: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    here = Path(root) / f"node-{rank}"
    nodes = Nodes(rank, RANKS, jump=2, factor=2)
    for step in (1, 2, 3):
        items = {"w": Chunks((8, 3), (((2 * rank, 0), full(step)[2 * rank : 2 * rank + 2]),))}
        if rank == 0:
            items["n"] = whole(torch.tensor(step))
        save_local(here, step, items, {"s": step}, nodes)
    held = {path.name: sorted(file.name for file in path.glob("rank-*")) for path in here.iterdir()}
    own = sorted(f"rank-{i:05d}.safetensors" for i in (rank, (rank - 2) % RANKS))
    assert held == {"step-00000002": own, "step-00000003": own}, held

    def back() -> int | None:
        w, n = torch.zeros(8, 3), torch.tensor(0)  # another layout: all of it on every rank
        meta = load_local(here, {"w": whole(w), "n": whole(n)})
        if meta is None:
            return None
        assert torch.equal(w, full(int(n))) and meta == {"s": int(n)}
        return int(n)

    def lose(*lost: int) -> None:
        dist.barrier()
        if rank in lost:
            shutil.rmtree(here)
        dist.barrier()

    lose(0, 1)
    assert back() == 3  # 2 and 3 hold all of it
    lose(2)
    assert back() == 3  # what was fetched is a copy too
    file = here / "step-00000003" / "rank-00001.safetensors"
    dist.barrier()
    if file.is_file():  # flipped wherever it lies: only the step before is whole
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    answer = back()
    assert answer is None or answer == 2, answer
    lose(0, 1, 2, 3)
    assert back() is None
    kept = here.with_name(f"kept-{rank}")
    for attempt in (7, 8):  # of one step: nodes 0 and 2 know the first, 1 and 3 the second, and these hold no whole step
        piece = full(attempt)[2 * rank : 2 * rank + 2]
        items = {"w": Chunks((8, 3), (((2 * rank, 0), piece),))} | ({"n": whole(torch.tensor(attempt))} if rank == 0 else {})
        save_local(here, 5, items, {"s": attempt}, nodes)
        if attempt == 7:
            shutil.copytree(here, kept)
    dist.barrier()
    if rank in (0, 2):
        shutil.rmtree(here)
        shutil.move(kept, here)
    dist.barrier()
    assert back() is None
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_nodes_are_lost_and_made_good(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, str(tmp_path)), nprocs=RANKS, start_method="fork")  # imports are done: quick


@pytest.mark.parametrize("count, jump, factor, most", [(4, 2, 3, 2), (4, 4, 2, 1), (2, 1, 3, 2), (1, 1, 2, 1)])
def test_copies_that_would_share_a_node_are_refused(count, jump, factor, most):
    with pytest.raises(ValueError, match=f"factor can be at most {most}"):
        Nodes(0, count, jump, factor)


def test_one_process_alone(tmp_path):
    save_local(tmp_path, 4, {"w": whole(full(4))}, {"s": 4}, Nodes(0, 1, factor=1))
    w = torch.zeros(8, 3)
    assert load_local(tmp_path, {"w": whole(w)}) == {"s": 4} and torch.equal(w, full(4))
    for step in (7, 8):
        save_local(tmp_path, step, {"w": whole(full(step))}, {"s": step}, Nodes(0, 1, factor=1))
        os.truncate(tmp_path / f"step-0000000{step}/rank-00000.safetensors", 99)
    save_local(tmp_path, 5, {"w": whole(full(5))}, {"s": 5}, Nodes(0, 1, factor=1))  # taken up from before what was lost
    assert load_local(tmp_path, {"w": whole(w)}) == {"s": 5} and torch.equal(w, full(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_what_arrives_is_hashed(tmp_path, monkeypatch):
    """Of a node that lost its disk, from another that has all; and what a node itself has just written."""
    save_local(tmp_path / "there", 4, {"w": whole(full(4))}, {"s": 4}, Nodes(0, 1, factor=1))
    there = find_local(tmp_path / "there")
    lost = replace(there, held=(frozenset(), *there.held))
    plain = node_local.tensorfile.write

    def flipped(path, data):
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    for bit in (0, 1):
        def move(path, *_, bit=bit):
            data = (tmp_path / "there/step-00000004" / path.name).read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ bit]))

        monkeypatch.setattr(node_local, "_move", move)
        w = torch.zeros(8, 3)
        if bit:
            with pytest.raises(OSError, match="rank-00000.safetensors is not what was sent"):
                load_local(tmp_path / "here-1", {"w": whole(w)}, found=lost)
        else:
            assert load_local(tmp_path / "here-0", {"w": whole(w)}, found=lost) == {"s": 4} and torch.equal(w, full(4))

    def torn(path, tensors):
        digest = plain(path, tensors)
        flipped(path, path.read_bytes())
        return digest

    monkeypatch.setattr(node_local.tensorfile, "write", torn)
    with pytest.raises(OSError, match="is not what was sent"):
        save_local(tmp_path / "there", 5, {"w": whole(full(5))}, {"s": 5}, Nodes(0, 1, factor=1))
    assert find_local(tmp_path / "there").step == 4
