"""What a step will do, before anything runs: each leaf's placements and bytes, and each collective with count and bytes.

    print(explain(llama3("70b"), Sharding(abstract_mesh(dp=64, tp=8), RULES["fsdp_tp_sp"]), batch=(512, 8192)))

Nothing is derived here. The very step runs as rank 0 of an abstract mesh, on meta tensors, over transports that report;
a kind of block runs once, and what it sent is remembered. So a mesh of thousands of ranks takes seconds and no memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmegatron import config as configs
from fmegatron import models, tree
from fmegatron.config import RunConfig
from fmegatron.data.batches import NAMES
from fmegatron.models import Model
from fmegatron.models.hf import model_of
from fmegatron.optim import Transform
from fmegatron.sharding import Sharding, abstract_mesh
from fmegatron.sharding.traffic import Event, Traffic, counted
from fmegatron.train import setup
from fmegatron.train.explain_meetings import explain_meetings
from fmegatron.train.explanation import Explanation, LeafRow, Staged
from fmegatron.train.leaves import Leaf
from fmegatron.train.lowgather import EIGHT
from fmegatron.train.pipeline.stages import Pipeline, place_pipeline, with_stages
from fmegatron.train.planned import Plan
from fmegatron.train.rehearsal import Rehearsal, local_shape, rehearse
from fmegatron.train.weights import gathered_low, node_leaves
from fmegatron.transforms import AUTOGRAD, Autograd, Block, Derivative
from fmegatron.tree import Tree


def explain(
    model: Model,
    sharding: Sharding,
    *,
    batch: tuple[int, int],
    microbatches: int = 1,
    remat: str = "none",
    dtype: torch.dtype | None = None,
    tx: Transform | None = None,
    fields: Mapping[str, str] = NAMES,
    prefetch: int = 1,
    **settings: Any,
) -> Explanation:
    """Explain one train step; the sharding's mesh may be of any kind and size, only its sizes matter.

    batch: samples in a step over all ranks, tokens in a sample. dtype: of the computation; None is the parameters', fp32.
    tx: the optimizer; None is AdamW. fields: {key of the batch: its names}, int64 but for weights. settings: others of
    `plan_step`.
    Raises ValueError in one line, with the nearest legal choice, where a leaf or the batch does not divide.
    """
    mesh, traffic = counted(abstract_mesh(**sharding.mesh.sizes))
    sh = replace(sharding, mesh=mesh)
    settings |= {"microbatches": microbatches, "remat": remat, "dtype": dtype, "prefetch": prefetch}
    practice = rehearse(model, sh, Remembered(traffic), batch=batch, tx=tx, fields=fields, **settings)
    return _explanation(practice, traffic, batch, remat, dtype)


def explain_stages(
    model: Model,
    sharding: Sharding,
    pipeline: Pipeline,
    tx_of: Callable[[Model], Transform],
    *,
    batch: tuple[int, int],
    remat: str = "none",
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Staged:
    """Explain one train step on a mesh with an axis pp, for each of its ranks: the leaves and the traffic of its stages.

    tx_of: the optimizer of a model's stages. The others: see `explain`. One rehearsal of all stages in one process tells what
    they hand on; then each rank's own step runs without the others. Raises ValueError where a schedule splits backwards.
    """
    schedule = pipeline.schedule
    if schedule.splits:
        raise ValueError(f"explain: schedule {schedule.name} splits backwards, which a rehearsal cannot: use 1f1b")
    settings |= {"batch": batch, "remat": remat, "dtype": dtype, "pipeline": pipeline}
    flat = {axis: n for axis, n in sharding.mesh.sizes.items() if axis != "pp"}
    mesh, traffic = counted(abstract_mesh(**flat))
    whole = rehearse(model, replace(sharding, mesh=mesh), Remembered(traffic), tx=tx_of(model), **settings)
    whole.step()
    assert whole.plan.placed is not None
    known, found = {key: whole.plan.placed.memo[key] for key in ("specs", "taps")}, []
    for rank in range(schedule.ranks):
        mesh, traffic = counted(abstract_mesh(**sharding.mesh.sizes))
        mesh = replace(mesh, rank=rank * mesh["pp"].stride)
        own = place_pipeline(pipeline, model, mesh).model
        here = rehearse(model, replace(sharding, mesh=mesh), Remembered(traffic), tx=tx_of(own), **settings)
        assert here.plan.placed is not None
        here.plan.placed.memo.update(known)
        found.append(_explanation(here, traffic, batch, remat, dtype))
    stages = tuple(tuple(schedule.stages_of(rank)) for rank in range(schedule.ranks))
    return Staged(schedule.name, stages, tuple(found))


def _explanation(
    practice: Rehearsal, traffic: Traffic, batch: tuple[int, int], remat: str, dtype: torch.dtype | None
) -> Explanation:
    """What a rehearsed step holds and sends."""
    plan = practice.plan
    assert isinstance(plan.microbatches, int), "one size of batch is explained"
    traffic.clear()
    practice.step()
    leaves = _explain_leaves(plan, practice.opt_state, dtype or torch.float32)
    return Explanation(
        mesh=traffic.sizes,
        rules=plan.sh.rules.name,
        batch=batch,
        microbatches=plan.microbatches,
        remat=remat,
        parameters=plan.model.count(),
        leaves=leaves,
        collectives=tuple(traffic.rows()),
        meetings=explain_meetings(practice, traffic),
        per_rank=_totals(plan, leaves, practice) | _outer(practice.state.outer),
    )


def _outer(state: Tree) -> dict[str, int]:
    """Bytes of an outer optimizer's state, where replicas have one."""
    return {"outer": sum(x.nbytes for x in tree.leaves(state))} if state else {}


# -- an engine that remembers ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Remembered(Autograd):
    """Autograd on meta tensors that runs each kind of block once: a block of that kind again sends the same again."""

    traffic: Traffic
    memo: dict[Any, tuple[Any, list[Event]]] = field(default_factory=dict, compare=False)

    def vjp(self, fn: Block, wrt: Tree, rest: Tree, kind: Hashable = None) -> Derivative:
        """As Autograd's; the values are shapes."""
        both: Tree = (wrt, rest)
        values, spec = tree.flatten(both)
        key = (kind, spec, tuple((x.shape, x.dtype) for x in values))

        def differentiate() -> Derivative:
            return AUTOGRAD.vjp(fn, wrt, rest)

        def pullback(cotangents: Mapping[str, Tensor]) -> Tree:
            def pull() -> Tree:
                (_, _, back), _ = self.watch(differentiate)
                return self.watch(lambda: back(cotangents))

            return self.again((key, *sorted(cotangents)), pull)

        out, moving, _ = self.again(key, lambda: self.watch(differentiate))
        return out, moving, pullback

    def watch(self, run: Callable[[], Any]) -> tuple[Any, list[Event]]:
        """What a function returns and what it sends, taken out of the record."""
        start = len(self.traffic.events.get(0, []))
        return run(), self.traffic.cut(0, start)

    def again(self, key: Any, run: Callable[[], tuple[Any, list[Event]]]) -> Any:
        """The result for a key, run once; what it sent is sent every time."""
        if key not in self.memo:
            self.memo[key] = run()
        result, events = self.memo[key]
        self.traffic.add(0, events)
        return result


# -- leaves ---------------------------------------------------------------------------------------------------------
def _explain_leaves(plan: Plan, opt_state: Tree, dtype: torch.dtype) -> tuple[LeafRow, ...]:
    state: dict[str, int] = dict.fromkeys(plan.leaves, 0)
    for path, x in tree.to_paths(opt_state).items():
        owner = max((name for name in plan.leaves if f".{path}".endswith(f".{name}")), key=len, default=None)
        if owner is not None:
            state[owner] += _bytes(x)
    rows = []
    low = gathered_low(plan.sh, plan.model.chain, plan.leaves)
    for path, leaf in plan.leaves.items():
        gradient = leaf.optimizer if plan.sh.rules.reduce == "microbatch" else leaf.compute
        local = [math.prod(local_shape(plan.sh, leaf, place)) for place in (leaf.compute, leaf.storage, gradient)]
        sh = plan.sh if leaf.param.layers is None else plan.sh.bind({"layers": leaf.param.layers})
        rows.append(
            LeafRow(
                path=path,
                names=leaf.param.names,
                shape=leaf.param.true_shape(plan.model.sizes),
                padded=tuple(sh.size(name) for name in leaf.compute.names),
                compute=str(leaf.compute),
                storage=str(leaf.storage),
                optimizer=str(leaf.optimizer),
                compute_bytes=local[0] * (1 if EIGHT in low.get(path, ()) else dtype.itemsize),
                storage_bytes=local[1] * torch.float32.itemsize,
                optimizer_bytes=state[path],
                gradient_bytes=local[2] * torch.float32.itemsize,
                notes=_notes(sh, leaf) + low.get(path, ()),
            )
        )
    return tuple(rows)


def _notes(sh: Sharding, leaf: Leaf) -> tuple[str, ...]:
    """What one may not expect of a leaf: pads, and rules that were skipped."""
    notes = []
    for name in leaf.compute.names:
        if sh.size(name) != sh.true_size(name):
            notes.append(f"{name} is padded from {sh.true_size(name)} to {sh.size(name)}")
    for kind, place in (("compute", leaf.compute), ("storage", leaf.storage), ("optimizer", leaf.optimizer)):
        for name, axes, pad in zip(place.names, place.axes, place.pads, strict=False):
            if pad:
                notes.append(f"{name} of {sh.size(name)} has {pad} pads over {'·'.join(axes)} in {kind}")
        for name, axes in sh.rules.lines(kind):  # type: ignore[arg-type]
            for text in axes:
                axis, n = text.rstrip("?"), sh.mesh.sizes.get(text.rstrip("?"), 1)
                if n == 1 or axis in place.placed:
                    continue
                if text.endswith("?") and name in place.names:
                    notes.append(f"{name} of {sh.true_size(name)} does not divide over {axis}={n}: whole on each of its ranks")
                elif name == "*" and kind != "compute":
                    notes.append(f"no dim divides over {axis}={n}: whole on each of its ranks in {kind}")
    return tuple(dict.fromkeys(notes))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _totals(plan: Plan, leaves: Sequence[LeafRow], practice: Rehearsal) -> dict[str, int]:
    by_path = {row.path: row for row in leaves}
    gathered = [
        sum(
            by_path[leaf.path].compute_bytes // (leaf.param.layers or 1)
            for leaf in node_leaves(node, plan.leaves).values()
            if leaf.gather
        )
        for node in plan.model.chain
    ]
    kept = sum(n for n, node in zip(gathered, plan.model.chain, strict=True) if not plan.reshard.frees(node))
    gathered = [n for n, node in zip(gathered, plan.model.chain, strict=True) if plan.reshard.frees(node)]
    window = plan.prefetch + 1
    optimizer = sum(_bytes(x) for x in tree.leaves(practice.opt_state))
    return {
        "parameters": sum(row.storage_bytes for row in leaves),
        "gradients": sum(row.gradient_bytes for row in leaves),
        "optimizer": optimizer,
        **({"of it in host memory": optimizer} if practice.host else {}),
        "gathered": kept + max((sum(gathered[i : i + window]) for i in range(len(gathered))), default=0),
    }


# -- the command ----------------------------------------------------------------------------------------------------
def main(config: RunConfig, json: bool = False) -> None:
    """`fmegatron explain`: print the explanation of a run's step. The mesh may be larger than this machine."""
    sizes = {axis: n for axis, n in config.mesh.sizes.items() if n != 1}
    if -1 in sizes.values():
        others = math.prod(n for n in sizes.values() if n != -1)
        free = next(axis for axis, n in sizes.items() if n == -1)
        sizes[free] = max(1, int(os.environ.get("WORLD_SIZE", "1")) // others)
    model = model_from(config)
    fields = {key: names for key, names in NAMES.items() if key != "documents" or config.data.document_mask}
    t, sh = config.training, setup.sharding_of(config, abstract_mesh(**sizes))
    shared: dict[str, Any] = {
        "batch": (t.global_batch, config.data.seq),
        "remat": t.remat,
        "dtype": setup.dtype_of(config),
        "fields": fields,
        "prefetch": t.prefetch,
        "semisync": setup.semisync_of(config),
    } | setup.data_axes_of(config)

    def tx_of(own: Model) -> Transform:
        return setup.optimizer_of(config, with_stages(model, own), setup.schedule_of(config))

    explanation: Explanation | Staged
    if (pipeline := setup.pipeline_of(config, model)) is None:
        explanation = explain(model, sh, tx=tx_of(model), microbatches=t.microbatches, **shared)
    else:
        explanation = explain_stages(model, sh, pipeline, tx_of, **shared)
    print(explanation.json() if json else explanation)


def model_from(config: RunConfig) -> Model:
    """The run's model, without its weights and without its text. Raises ConfigError."""
    c = config.model
    if c.hf is not None:
        model, _ = model_of(Path(c.hf))
    elif c.function is not None:
        model = configs.imported(c.function)(**c.overrides)
    else:
        vocab = {"vocab": config.data.vocab_size} if config.data.source == "stdlib" else {}
        model = models.preset(c.preset, **(vocab | c.overrides))
    return setup.with_loss(model, c.loss) if c.loss else model
