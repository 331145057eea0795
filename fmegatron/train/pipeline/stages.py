"""Where a pipeline's stages lie: nodes of each stage, what travels between them, and the model that one rank holds.

A rank of a real pipeline holds a model of its own: the declarations that its stages read, stacked layers cut to those it
runs, under their global numbers. So initial values, optimizers and checkpoints need not know of pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fmegatron import tree
from fmegatron.models.model import Model, Node
from fmegatron.sharding import Mesh, Sharding
from fmegatron.sharding.sharding import NO_LAYOUT
from fmegatron.train.pipeline.layout import Layout, Stages, live_values, place_nodes, split_layers
from fmegatron.train.pipeline.schedule import Action, Schedule, sends
from fmegatron.train.remat import Remat

Mark = tuple[int, Action, float, float]  # rank, action, start, end: seconds of this machine's clock


@dataclass(frozen=True)
class Pipeline:
    """How a step is pipelined: a schedule, and the layers of each stage (None: as many on each).

    remat_microbatches: only the first so many microbatches are computed again as the step's remat says; None: all.
    marks: a list in which each computation's rank, action, start and end are left; None: nothing is measured.
    """

    schedule: Schedule
    layout: Layout | None = None
    remat_microbatches: int | None = None
    marks: list[Mark] | None = None


@dataclass(frozen=True)
class Placed:
    """A pipeline over a model, as one process sees it. rank: its place on the axis pp; None where it runs all ranks."""

    pipeline: Pipeline
    whole: Model
    stages: Stages  # of the whole model
    mesh: Mesh
    rank: int | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.pipeline.schedule

    @cached_property
    def live(self) -> tuple[tuple[str, ...], ...]:
        """The names of what each stage hands to the next."""
        return live_values(self.stages)

    @property
    def mine(self) -> list[int]:
        """The stages that this process runs."""
        return list(range(len(self.stages))) if self.rank is None else self.schedule.stages_of(self.rank)

    @cached_property
    def model(self) -> Model:
        """The model that this process holds."""
        return self.whole if self.rank is None else cut_model(self.whole, [self.stages[stage] for stage in self.mine])

    @cached_property
    def nodes(self) -> dict[int, tuple[Node, ...]]:
        """The nodes of this process's stages, as its model has them."""
        chain, out, at = self.model.chain, {}, 0
        for stage in self.mine:
            out[stage] = tuple(chain[at : at + len(self.stages[stage])])
            at += len(self.stages[stage])
        return out

    @cached_property
    def holders(self) -> dict[str, list[int]]:
        """{leaf: ranks} of leaves that several ranks hold, such as a tied table: the first of them owns it."""
        ranks: dict[str, list[int]] = {}
        for rank in range(self.schedule.ranks):
            for path in used_leaves(self.whole, [node for s in self.schedule.stages_of(rank) for node in self.stages[s]]):
                ranks.setdefault(path, []).append(rank)
        shared = {path: found for path, found in ranks.items() if len(found) > 1}
        layers = tree.to_paths(self.whole.declare)
        return {path: found for path, found in shared.items() if layers[path].layers is None}

    @property
    def elsewhere(self) -> frozenset[str]:
        """Leaves that this process holds too, and another rank owns."""
        return frozenset(path for path, ranks in self.holders.items() if self.rank in ranks[1:])

    def every(self, sh: Sharding) -> Sharding:
        """A stage's sharding with the mesh of all stages: what is summed over it is summed over the stages too."""
        return sh if self.rank is None else replace(sh, mesh=self.mesh, layout=NO_LAYOUT)

    def remat(self, policy: Remat, microbatch: int) -> Remat:
        """The policy for one microbatch."""
        first = self.pipeline.remat_microbatches
        return policy if first is None or microbatch < first else replace(policy, every=0)

    def actions(self, forward_only: int | None = None) -> list[tuple[int, Action]]:
        """What this process does, (rank, action), transfers included. forward_only: F alone, of so many microbatches."""
        key = ("actions", forward_only)
        if key not in self.memo:
            every: list[tuple[int, Action]] = []
            for rank, action in self.schedule.order:
                if forward_only is not None and (action.kind != "F" or action.microbatch >= forward_only):
                    continue
                every.append((rank, action))
                pair = sends(self.schedule, action)
                every += [] if pair is None else [(rank, pair[0]), (self.schedule.rank_of[pair[1].stage], pair[1])]
            self.memo[key] = [(rank, action) for rank, action in every if self.rank in (None, rank)]
        return self.memo[key]


def place_pipeline(pipeline: Pipeline, model: Model, mesh: Mesh) -> Placed:
    """A pipeline over a model on a mesh: of processes if it has an axis pp, else all ranks in this one.

    Raises ValueError in one line where ranks, stages and layers do not fit.
    """
    schedule = pipeline.schedule
    layers = sum(node.is_layer for node in model.chain)
    layout = pipeline.layout or split_layers(layers, schedule.stages, predicted=sum(node.mtp for node in model.chain))
    rank, ranks = None, mesh.sizes.get("pp", 1)
    if ranks > 1:
        if mesh.stacked:
            raise ValueError("a virtual mesh has no axis pp: leave it out, and a pipeline runs all its ranks in this process")
        if ranks != schedule.ranks:
            raise ValueError(f"schedule {schedule.name} is for {schedule.ranks} ranks, and the mesh has pp={ranks}")
        rank = mesh.coordinates(mesh.rank or 0)["pp"]
    placed = Placed(pipeline, model, place_nodes(model.chain, layout), mesh, rank)
    if rank is not None:
        _check_layers(placed)
    return placed


def _check_layers(placed: Placed) -> None:
    """ValueError where a stacked layer's parameters are read on two ranks."""
    seen: dict[tuple[str, int], int] = {}
    for rank in range(placed.schedule.ranks):
        nodes = [node for stage in placed.schedule.stages_of(rank) for node in placed.stages[stage]]
        for path, layers in used_leaves(placed.whole, nodes).items():
            for layer in layers:
                if seen.setdefault((path, layer), rank) != rank:
                    raise ValueError(f"{path}: layer {layer} is used on ranks {seen[path, layer]} and {rank}: lay it on one")


def without_pp(sh: Sharding) -> Sharding:
    """The sharding of one stage: the mesh without its axis pp. Ranks keep their numbers."""
    axes = tuple(axis for axis in sh.mesh.axes if axis.name != "pp")
    if len(axes) == len(sh.mesh.axes):
        return sh
    return replace(sh, mesh=replace(sh.mesh, axes=axes), layout=NO_LAYOUT)


# -- the model of some stages -----------------------------------------------------------------------------------------
def used_leaves(model: Model, nodes: Iterable[Node]) -> dict[str, set[int]]:
    """{leaf that nodes read: which of its layers}; none where it is not stacked."""
    used: dict[str, set[int]] = {}
    for path, param in tree.to_paths(model.declare).items():
        for node in nodes:
            if any(path == start or path.startswith(start + ".") for _, start in node.params):
                layers = used.setdefault(path, set())
                if param.layers is not None:
                    assert node.layer is not None
                    layers.add(node.layer)
    return used


def cut_model(model: Model, stages: Iterable[Iterable[Node]]) -> Model:
    """The model with the nodes of some stages only, and with the leaves that they read."""
    nodes = [node for stage in stages for node in stage]
    declared = tree.to_paths(model.declare)
    leaves: dict[str, Any] = {}
    starts: dict[tuple[str, int], int] = {}  # of a stacked leaf's layer: the first layer of its new run
    for path, layers in used_leaves(model, nodes).items():
        if declared[path].layers is None:
            leaves[path] = declared[path]
            continue
        for run in _runs(layers):
            leaves[_renumber(path, run.start)] = replace(declared[path], layers=len(run))
            starts |= {(path, layer): run.start for layer in run}
    def move(node: Node) -> Node:
        if node.layer is None:
            return node
        own = {path: starts[path, node.layer] for path, layer in starts if layer == node.layer}
        params, first = [], 0
        for name, start in node.params:
            more = next((n for path, n in own.items() if path == start or path.startswith(start + ".")), None)
            params.append((name, start if more is None else _renumber(start, more)))
            first = first if more is None else more
        return replace(node, params=tuple(params), layer=node.layer - first)

    return replace(model, declare=tree.from_paths(leaves), chain=tuple(move(node) for node in nodes))


def with_stages(model: Model, own: Model) -> Model:
    """The model with its stages' leaves beside its own: declarations by either's paths."""
    return replace(model, declare=tree.from_paths({**tree.to_paths(model.declare), **tree.to_paths(own.declare)}))


def _runs(layers: set[int]) -> list[range]:
    """Neighbouring numbers together: {0, 1, 4} -> 0..1, 4..4."""
    found: list[range] = []
    for layer in sorted(layers):
        if found and found[-1].stop == layer:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def _renumber(path: str, more: int) -> str:
    """The path of the run that starts `more` layers later: ("layers.4.attn.q", 2) -> "layers.6.attn.q"."""
    parts = path.split(".")
    at = [i for i, part in enumerate(parts) if part.isdigit()]
    if at:
        parts[at[-1]] = str(int(parts[at[-1]]) + more)
    return ".".join(parts)
