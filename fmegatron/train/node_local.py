"""Checkpoints on each node's own disk, with copies on other nodes: fast to write, and whole though nodes are lost.

    save_local("/nvme/run", 100, items, meta, nodes=Nodes(node=3, count=8, jump=2, factor=2))

In a run (`[local]`) each rank counts as a node of its own, and its copies lie on ranks of the same number on other nodes.

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
from fmegatron.config import ConfigError, RunConfig
from fmegatron.files import sha256, sync, write_atomically
from fmegatron.sharding.chunks import Chunks, overlap
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


def place_of_run(c: RunConfig) -> tuple[Path, Nodes]:
    """This rank's folder on its node's disk, and which ranks keep copies. Raises ConfigError where copies would coincide."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    folder = Path(c.local.folder or "") / c.run.folder.name / os.environ.get("LOCAL_RANK", "0")
    if c.local.factor == 1:
        return folder, Nodes(rank, world, factor=1)
    try:
        return folder, Nodes(rank, world, c.local.jump * each, c.local.factor)
    except ValueError as error:
        raise ConfigError(f"local.factor, with {each} rank(s) a node: {error}") from None


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
    for source in range(world):  # in one order everywhere, so nobody waits in a circle
        for i in range(1, nodes.factor):
            target = homes.index((homes[source] + i * nodes.jump) % nodes.count)
            _move(temporary / _name(source), source, target, rank, given[_name(source)][0], group)

    def publish() -> None:
        for name, said in given.items():
            path = temporary / name
            if path.is_file() and (path.stat().st_size, sha256(path)) != said:
                raise OSError(f"{path} is not what was sent")
        write_atomically(temporary / manifest.NAME, text)
        sync(temporary)

    together(publish, lambda _: None, group)  # only once every node has all of its share does any of them show it
    replace(temporary, final)
    steps = sorted(folder.glob("step-*"))  # later ones are of a past that was given up: the nodes no longer held all of them
    for old in [path for path in steps if path > final] + [path for path in steps if path <= final][:-2]:
        delete(old)
    return final


@dataclass(frozen=True)
class Found:
    """A step that the nodes hold together: what each rank holds of it, and the manifest's text."""

    step: int
    text: str
    held: tuple[frozenset[str], ...]

    def manifest(self, folder: Path) -> manifest.Manifest:
        """Its manifest, of files in the step's folder."""
        return manifest.loads(step_folder(folder, self.step), self.text)

    def owner(self, name: str) -> int:
        """A rank that holds the file."""
        return next(rank for rank, names in enumerate(self.held) if name in names)


def find_local(folder: Path, *, group: Group = None) -> Found | None:
    """The newest step of which the surviving nodes hold every file whole; None where there is none. Every rank calls this."""
    held = together(lambda: _held(folder), list, group)
    # by text: nodes may hold a step of two attempts, whose files do not go together
    for step, text in sorted({(step, text) for own in held for step, (text, _) in own.items()}, reverse=True):
        files = (own.get(step, ("", set[str]())) for own in held)
        found = Found(step, text, tuple(frozenset(names) if said == text else frozenset() for said, names in files))
        if set(json.loads(text)["files"]) <= frozenset().union(*found.held):
            return found
    return None


def load_local(
    folder: Path, wanted: Mapping[str, Chunks], *, found: Found | None = None, group: Group = None
) -> dict[str, Any] | None:
    """Fill pieces from a step that the surviving nodes hold together (None: the newest); its meta, or None where there is none.

    Nodes whose disks are lost call this with an empty folder. Files that a rank wants something of and its node lacks are sent
    to it, hashed, and kept.
    """
    found = found or find_local(folder, group=group)
    if found is None:
        return None
    rank, store = dist.get_rank(group) if dist.is_initialized() else 0, found.manifest(folder)
    here = store.folder
    here.mkdir(parents=True, exist_ok=True)

    def lacking() -> set[str]:
        checkpoint.check_wanted(here, store, wanted)
        return _files_of(store, wanted) - found.held[rank]

    for target, names in enumerate(together(lacking, list, group)):
        for name in sorted(names):
            _move(here / name, found.owner(name), target, rank, store.files[name][0], group)

    def read() -> None:
        for name in _files_of(store, wanted) - found.held[rank]:
            if sha256(here / name) != store.files[name][1]:
                raise OSError(f"{here / name} is not what was sent")
        write_atomically(here / manifest.NAME, found.text)
        checkpoint.fill(store, wanted)

    together(read, lambda _: None, group)
    return store.meta


def _files_of(store: manifest.Manifest, wanted: Mapping[str, Chunks]) -> set[str]:
    """The files that hold something of the wanted pieces."""
    return {
        name
        for key, chunks in wanted.items()
        for saved, name in store.where[key].items()
        if any(overlap(saved, box) is not None for box in chunks.boxes(key))
    }


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


def _move(path: Path, source: int, target: int, rank: int, size: int, group: Group) -> None:
    """The file of rank `source` to rank `target`; nothing on other ranks."""
    if rank not in (source, target) or source == target:
        return
    with open(path, "rb" if rank == source else "wb") as stream:
        for start in range(0, size, PIECE):
            if rank == source:
                data = torch.frombuffer(bytearray(stream.read(min(PIECE, size - start))), dtype=torch.uint8)
                dist.send(data, group=group, group_dst=target)
            else:
                data = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
                dist.recv(data, group=group, group_src=source)
                stream.write(data.numpy().data)
        if rank == target:
            stream.flush()
            os.fsync(stream.fileno())


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
