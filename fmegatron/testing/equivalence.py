"""Every legal way to lay a step over a number of ranks, held against one device: values, gradients, training, traffic.

    for way in ways(8): print(way, compare(way))

`make equivalence` runs them all; the tests a sample. Values in fp64, on virtual meshes or threads; a pipeline's stages in one
process.
`expert_ways` are those of models with experts, latent attention and a module that looks ahead. Their losses are those that
are equal on every mesh (per sequence, z); a near-tie in a router may fall otherwise, and is counted in `Result.flips`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fmegatron import optim, tree
from fmegatron.models import Config, Model, gpt
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, thread_mesh, virtual_mesh
from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing.formula import Case, step_traffic
from fmegatron.testing.formula_models import model_traffic
from fmegatron.testing.formula_moe import Traffic as Counts
from fmegatron.testing.invariance import Measured, assert_same, measure, whole_leaves
from fmegatron.train import balance
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step

Form = Literal["auto", "padded", "gather", "ragged"]
CONFIG = Config(layers=2, embed=64, heads=8, kv=2, mlp=96, vocab=64, loss_chunks=2)
FORMS: tuple[Form, ...] = ("padded", "gather", "ragged")
EXPERTS = Moe(experts=8, top_k=2, mlp=16, shared=16, score="sigmoid", balance_bias=True, sequence_loss=0.1, z_loss=0.01)
MODELS = MappingProxyType({
    "dense": CONFIG,
    "experts": replace(CONFIG, layers=2, embed=32, moe=EXPERTS),
    "latent": replace(CONFIG, layers=2, embed=32, kv=None, hd=12, rope_hd=4, v_hd=6, kv_lora=8, q_lora=10, mtp=1, tied=True,
                      moe=replace(EXPERTS, score="softmax", first_dense=1)),
})  # fmt: skip
BATCH = (8, 16)  # samples, tokens
STEPS = 5


@dataclass(frozen=True)
class Way:
    """Rules on a mesh, with microbatches and remat, in `pp` stages that follow a schedule."""

    case: Case
    pp: int = 1
    schedule: str = "none"
    form: Form = "auto"  # how tokens travel to experts

    @property
    def model(self) -> str:
        """ "dense", "experts" or "latent"."""
        return "dense" if self.case.c.moe is None else "experts" if self.case.c.kv_lora is None else "latent"

    @property
    def mesh(self) -> str:
        """ "pp2 dp4"."""
        sizes = {"pp": self.pp, **self.case.sizes} if self.pp > 1 else self.case.sizes
        return " ".join(f"{axis}{size}" for axis, size in sizes.items())

    def __str__(self) -> str:
        more = "" if self.model == "dense" else f" {self.model} {self.form}"
        return f"{self.case.rules} {self.mesh} m={self.case.m} {self.case.remat} {self.schedule}{more}"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the step."""
        if self.pp == 1:
            return {"microbatches": self.case.m, "remat": self.case.remat}
        return {"remat": self.case.remat, "pipeline": Pipeline(make_schedule(self.schedule, self.pp, None, self.case.m))}


@dataclass(frozen=True)
class Result:
    """Errors relative to each tensor's largest entry, the worst tensor's; and whether the traffic is the formula's."""

    loss: float
    gradients: float
    parameters: float  # after five steps of SGD
    traffic: bool
    flips: int = 0  # choices of experts that fell otherwise

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.loss, self.gradients, self.parameters)


def meshes(ranks: int, axes: tuple[str, ...] = ("dp", "fsdp", "cp", "cpa", "tp")) -> Iterator[dict[str, int]]:
    """Every way to give `ranks` ranks to axes, those of size 1 left out."""
    if not axes:
        if ranks == 1:
            yield {}
        return
    for size in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for rest in meshes(ranks // size, axes[1:]):
            yield ({axes[0]: size} if size > 1 else {}) | rest


def ways(ranks: int) -> list[Way]:
    """Every preset on every mesh whose axes it names, in 1, 2 and 4 stages; microbatches, remat, schedule vary with the case.

    Layers are as few as the stages let: two, or one for each part of a pipeline.
    The axis cpa, heads exchanged inside of cp, is left to the preset that is made for it. 8 heads suffice for 8 ranks.
    """
    found: list[Way] = []
    for name, rules in RULES.items():
        axes = rules.axes if name == "cp_hierarchical" else rules.axes - {"cpa"}
        for pp in (n for n in (1, 2, 4) if ranks % n == 0):
            for sizes in meshes(ranks // pp):
                if sizes.keys() <= axes:
                    found.append(_way(name, sizes, pp, len(found)))
    return found


def expert_ways(ranks: int) -> list[Way]:
    """Every preset on every mesh of dp, ep, cp and tp that spreads experts, in 1 and 2 stages; model and form vary."""
    found: list[Way] = []
    for name, rules in RULES.items():
        for pp in (n for n in (1, 2) if ranks % n == 0):
            for sizes in meshes(ranks // pp, ("dp", "ep", "cp", "tp")):
                if sizes.keys() <= rules.axes and "ep" in sizes:
                    n = len(found)
                    model, form = ("experts", "latent")[n % 2], FORMS[(n // 2 + n // 6) % 3 if pp == 1 else n // 2 % 2]
                    way = _way(name, sizes, pp, n)
                    case = replace(way.case, c=replace(MODELS[model], layers=way.case.c.layers), keeps=form != "ragged")
                    found.append(replace(way, case=case, form=form))
    return found


def _way(name: str, sizes: dict[str, int], pp: int, number: int) -> Way:
    rows = BATCH[0] // (sizes.get("dp", 1) * sizes.get("fsdp", 1) * sizes.get("ep", 1))
    m, remat = min(rows, 1 + number % 2), ("none", "full", "every-2", "selective")[number // 2 % 4]
    schedules = {1: ("none",), 2: ("1f1b", "gpipe", "interleaved_1f1b"), 4: ("1f1b", "gpipe")}[pp]
    schedule = schedules[number % len(schedules)]
    c = replace(CONFIG, layers=max(CONFIG.layers, pp * (1 + (schedule == "interleaved_1f1b"))))
    return Way(Case(name, sizes, c, BATCH, m if pp == 1 else pp, remat, keeps=True), pp, schedule)


def batch(seed: int) -> dict[str, Tensor]:
    """Tokens, labels, weights and documents, the same on every mesh."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, CONFIG.vocab, BATCH, generator=generator) for _ in range(2))
    weights = torch.rand(BATCH, generator=generator, dtype=torch.float64)
    documents = (torch.rand(BATCH, generator=generator) > 0.8).long().cumsum(1)
    return {"tokens": tokens, "labels": labels, "weights": weights, "documents": documents}


@dataclass(frozen=True)
class Reference:
    """The model, what one device computes, and its parameters after the steps."""

    model: Model
    measured: Measured
    trained: dict[str, Tensor]


@cache
def reference(c: Config) -> Reference:
    """One device's values: what every case of a model is held against."""
    model = gpt(c)
    return Reference(model, measure(model, SINGLE, batch(0)), trained(model, SINGLE, {}))


def compare(way: Way) -> Result:
    """Run one way and hold it against one device; AssertionError where an activation differs in more than rounding."""
    case, settings = way.case, way.settings
    one = reference(case.c)
    model, alone = one.model, one.measured
    mesh, traffic = counted(mesh_of(way.form, case.sizes or {"dp": 1}))
    sh = Sharding(mesh, replace(RULES[case.rules], dispatch=way.form))
    here = measure(model, sh, batch(0), expected=alone, **settings)
    assert_same(here, alone, 1e-10)
    after = trained(model, sh, settings)
    traffic.clear()
    one_step(model, sh, settings)
    return Result(
        loss=error({"loss": here.metrics["loss"]}, {"loss": alone.metrics["loss"]}),
        gradients=error(here.grads, alone.grads),
        parameters=error(after, one.trained),
        traffic=sent(way, traffic.counts()) == said(way),
        flips=flips(here.metrics, alone.metrics),
    )


def mesh_of(form: Form, sizes: Mapping[str, int]) -> Mesh:
    """Ranks in this process: a vmap, or threads for exchanges of rows as many as there are, which look at values."""
    return thread_mesh(**sizes) if form == "ragged" else virtual_mesh(**sizes)


def stepped(case: Case, form: Form) -> Counts:
    """{(collective, axis): (count, bytes)} of a case's step."""
    mesh, traffic = counted(mesh_of(form, case.sizes))
    sh = Sharding(mesh, replace(RULES[case.rules], dispatch=form))
    one_step(gpt(case.c), sh, {"microbatches": case.m, "remat": case.remat})
    return traffic.counts()


def sent(way: Way, counts: Counts) -> Counts:
    """Without the bytes of exchanges of rows as many as there are: they follow the load."""
    ragged = way.form == "ragged"
    return {key: (n, 0 if ragged and key[0] == "all_to_all" else size) for key, (n, size) in counts.items()}


def said(way: Way) -> Counts:
    """The closed form of that."""
    case = replace(way.case, count=Counter(), bytes=Counter())
    if way.form == "auto":
        return step_traffic(case)
    return sent(way, model_traffic(case, way.form))


def flips(here: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> int:
    """At least so many choices fell otherwise than on one device: half of what experts' loads differ by."""
    one, several = balance.loads(alone), balance.loads(here)
    return sum(int((several[layer] - load).abs().sum()) // 2 for layer, load in one.items())


def error(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference, in parts of the tensor's largest entry, over all tensors."""
    return max(float((actual[name] - x).abs().max() / x.abs().max().clamp(min=1e-30)) for name, x in wanted.items())


def trained(model: Model, sh: Sharding, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters after a few steps of SGD, whole, fp64."""
    tx = optim.sgd(0.1)
    plan = plan_step(model, sh)
    state, step = init(model, tx, sh, dtype=torch.float64), make_step(model, tx, sh, **settings)
    for seed in range(STEPS):
        state, _ = step(state, {name: shard(plan.sh, x, "batch seq") for name, x in batch(seed).items()})
    return whole_leaves(plan, state.params, "storage")


def one_step(model: Model, sh: Sharding, settings: Mapping[str, Any]) -> None:
    """One fp32 step on a full batch, whose traffic the formula knows."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    full = batch(0) | {"positions": torch.arange(BATCH[1]).expand(BATCH)} | {"sample": torch.arange(BATCH[0])}
    names = tree.map(lambda x: "batch seq" if x.dim() == 2 else "batch", full)
    full["weights"] = full["weights"].float()
    local = {name: shard(sh, x, names[name]) for name, x in full.items()}
    make_step(model, tx, sh, **settings)(init(model, tx, sh), local)
