"""Checkpoints on each node's own disk, with copies on other nodes: fast to write, and whole though nodes are lost.

    save_local("/nvme/run", 100, items, meta, nodes=Nodes(node=3, count=8, jump=2, factor=2))

A rank writes its pieces to its own node's folder and sends the file to `factor - 1` others: nodes `node + jump`,
`node + 2 jump`, and so on, of `count`. After a loss the nodes tell each other what they hold; the newest step of which every
file is held somewhere, whole by its hash, is fetched from where it is and read like any checkpoint.

    node 0: rank 0, rank 2      node 1: rank 1, rank 3      node 2: rank 2, rank 0      node 3: rank 3, rank 1      (jump 2)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fmegatron import tensorfile
from fmegatron.files import sha256, sync, write_atomically
from fmegatron.sharding.chunks import Chunks
from fmegatron.train import checkpoint, manifest
from fmegatron.train.steps import clean, delete, replace, step_folder
from fmegatron.train.together import Group, together


@dataclass(frozen=True)
class Nodes:
    """Which node this rank is on, how many there are, and where copies go. Raises ValueError where copies would coincide."""

    node: int
    count: int
    jump: int = 1
    factor: int = 2

    def __post_init__(self) -> None:
        homes = {(self.node + i * self.jump) % self.count for i in range(self.factor)}
        if len(homes) < self.factor:
            most = len({i * self.jump % self.count for i in range(self.count)})
            raise ValueError(
                f"replicas: factor = {self.factor} with jump = {self.jump} on {self.count} nodes: copies would share a node, "
                f"factor can be at most {most}"
            )

    def keeps(self, other: int) -> bool:
        """Whether this node keeps what a rank on node `other` writes."""
        return self.node in {(other + i * self.jump) % self.count for i in range(self.factor)}


def save_local(
    folder: Path, step: int, items: Mapping[str, Chunks], meta: Mapping[str, Any], nodes: Nodes, *, group: Group = None
) -> Path:
    """Write a step to this node's `folder`, with copies of what other nodes give it; keeps this step and the one before.

    Every rank of `group` (gloo) calls this, one process a node's folder.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    final = step_folder(folder, step)
    temporary = final.with_name(f".tmp-{final.name}")
    plan = checkpoint.plan_of(items, _name(rank))

    def write() -> tuple[Any, Any, int]:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        temporary.mkdir()
        own = checkpoint.own_tensors(items)
        digest = tensorfile.write(temporary / _name(rank), own)
        return plan, ((temporary / _name(rank)).stat().st_size, digest), nodes.node

    def merge(written: list[tuple[Any, Any, int]]) -> tuple[str, dict[str, tuple[int, str]], list[int]]:
        given = {_name(i): said for i, (_, said, _) in enumerate(written)}
        text = manifest.dumps(step, meta, checkpoint.merge([part for part, *_ in written]), given)
        return text, given, [node for *_, node in written]

    text, given, homes = together(write, merge, group)
    for source in range(world):
        _send(temporary / _name(source), source, rank, nodes.keeps(homes[source]), given[_name(source)][0], group)

    def publish() -> None:
        for name, said in given.items():
            path = temporary / name
            if path.is_file() and (path.stat().st_size, sha256(path)) != said:
                raise OSError(f"{path} is not what was sent")
        write_atomically(temporary / manifest.NAME, text)
        sync(temporary)

    together(publish, lambda _: None, group)  # only once every node has all of its share does any of them show it
    replace(temporary, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        delete(old)
    return final


def load_local(
    folder: Path, wanted: Mapping[str, Chunks], *, group: Group = None
) -> dict[str, Any] | None:
    """Fill pieces from the newest step that the surviving nodes hold together; its meta, or None where there is none.

    Nodes whose disks are lost call this with an empty folder. Files that a node lacks are sent to it and kept.
    """
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    held = together(lambda: _held(folder), list, group)
    steps = sorted({step for own in held for step in own}, reverse=True)
    for step in steps:
        text = next(own[step][0] for own in held if step in own)
        files = list(json.loads(text)["files"])
        owner = {name: next((i for i, own in enumerate(held) if name in own.get(step, ("", set()))[1]), None) for name in files}
        if any(found is None for found in owner.values()):
            continue
        target = step_folder(folder, step)
        target.mkdir(parents=True, exist_ok=True)
        for name, source in owner.items():
            assert source is not None
            size = json.loads(text)["files"][name]["bytes"]
            _send(target / name, source, rank, name not in held[rank].get(step, ("", set()))[1], size, group)
        write_atomically(target / manifest.NAME, text)
        return checkpoint.load(target, wanted, group=group)
    return None


def _held(folder: Path) -> dict[int, tuple[str, set[str]]]:
    """{step: (the manifest, files that are here and whole)}."""
    found = {}
    for path in folder.glob("step-*"):
        try:
            store = manifest.loads(path, (path / manifest.NAME).read_text())
        except (OSError, ValueError):
            continue
        bad = " ".join(store.damage())
        found[store.step] = (path / manifest.NAME).read_text(), {name for name in store.files if name not in bad}
    return found


PIECE = 1 << 26  # bytes sent at a time


def _send(path: Path, source: int, rank: int, keep: bool, size: int, group: Group) -> None:
    """The file of rank `source` to every rank that keeps it; all take part, in the same order."""
    if not dist.is_initialized():
        return
    writing = keep and rank != source
    with open(path if writing or rank == source else os.devnull, "wb" if writing else "rb") as stream:
        for start in range(0, size, PIECE):
            length = min(PIECE, size - start)
            data = torch.empty(length, dtype=torch.uint8)
            if rank == source:
                data = torch.frombuffer(bytearray(stream.read(length)), dtype=torch.uint8)
            dist.broadcast(data, group=group, group_src=source)
            if writing:
                stream.write(data.numpy().data)
        if writing:
            stream.flush()
            os.fsync(stream.fileno())


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
