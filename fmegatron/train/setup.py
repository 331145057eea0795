"""From a run's configuration to the values that train: mesh, rules, model, text, optimizer. Each part is one function.

Every mistake in a configuration that only shows here (a rule that does not divide, a file that is not there) is a
ValueError of one line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron import config as configs
from fmegatron import models
from fmegatron.config import ConfigError, RunConfig
from fmegatron.data import tokenizers
from fmegatron.models import Model, hf
from fmegatron.models.model import Node, Values
from fmegatron.nn import losses
from fmegatron.sharding import RULES, Mesh, Rules, Sharding, make_mesh, thread_mesh, virtual_mesh
from fmegatron.sharding.zigzag import check_length
from fmegatron.toml import unheard
from fmegatron.train import together
from fmegatron.train.flops import step_flops
from fmegatron.train.lowbits import lowered
from fmegatron.train.mup import mup_of
from fmegatron.train.optimizers import Schedule as Schedule
from fmegatron.train.optimizers import check_optimizer as check_optimizer
from fmegatron.train.optimizers import optimizer_of as optimizer_of
from fmegatron.train.optimizers import outer_of
from fmegatron.train.optimizers import resumed as resumed
from fmegatron.train.optimizers import schedule_of as schedule_of
from fmegatron.train.pipeline.layout import parse_layout, split_layers
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.saving import DTYPES
from fmegatron.train.semisync import SemiSync
from fmegatron.train.source import Source
from fmegatron.transforms import why_not_compile
from fmegatron.tree import Tree

Say = Callable[[str], None]


# -- mesh and rules -------------------------------------------------------------------------------------------------
def mesh_of(c: configs.Mesh) -> Mesh:
    """The mesh of a run: under torchrun over its processes, else one device; or virtual."""
    sizes: dict[str, Any] = {axis: size for axis, size in c.sizes.items() if size != 1}
    if c.virtual and sizes.pop("pp", 1) > 1 and not sizes:
        return make_mesh()  # one device runs all stages
    if not c.virtual:
        return make_mesh(**sizes)
    if -1 in sizes.values():
        free = next(axis for axis, n in sizes.items() if n == -1)
        raise ConfigError(f"mesh.{free} = -1: a mesh.virtual has as many ranks as you say, give a number")
    return (thread_mesh if c.threads else virtual_mesh)(**(sizes or {"dp": 1}))


@contextmanager
def running(c: configs.Mesh) -> Iterator[Mesh]:
    """The run's mesh; a process group that this starts is ended too."""
    before = dist.is_initialized()
    mesh = mesh_of(c)
    try:
        yield mesh
    finally:
        if dist.is_initialized() and not before:
            dist.destroy_process_group()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only kernels that give the same bits again, for as long as the run lasts."""
    old = torch.get_deterministic_debug_mode()  # the other way to say it imports the compiler, which is seconds
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(old)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def rules_of(c: configs.Sharding) -> Rules:
    """The rules of a run, by name or written out."""
    if isinstance(c.rules, str):
        if c.rules not in RULES:
            raise ConfigError(f"sharding.rules = {c.rules}: no such rules, known are {', '.join(RULES)}")
        rules = RULES[c.rules]
    else:
        lists = {"compute", "storage", "optimizer", "decode", "reduce", "attention", "layers", "zigzag"}
        if unknown := sorted(c.rules.keys() - lists):
            raise ConfigError(f"sharding.rules has no list {unknown[0]}, they are {', '.join(sorted(lists))}")
        rules = Rules(**c.rules)
    zigzag = None if c.zigzag is None else ("cp",) if c.zigzag else ()
    said: dict[str, Any] = {"reduce": c.reduce, "attention": c.context, "zigzag": zigzag}
    return replace(rules, **{key: value for key, value in said.items() if value is not None})


def sharding_of(c: RunConfig, mesh: Mesh) -> Sharding:
    """The rules of a run on its mesh; replicas go apart where semisync says when they meet."""
    return Sharding(mesh, replace(rules_of(c.sharding), apart="replica" if c.semisync.params else None))


def semisync_of(c: RunConfig) -> SemiSync | None:
    """When and how the run's replicas meet; None where they are plain data parallelism. Raises ConfigError."""
    s = c.semisync
    if not s.params:
        changed = [key for key, value in asdict(s).items() if value != getattr(type(s)(), key)]
        if changed:
            raise ConfigError(f"semisync.{changed[0]}: say semisync.params too, the steps between meetings of the parameters")
        return None
    if s.outer is None:
        unheard("semisync", s, ("outer_lr", "outer_arguments"), "semisync.outer")
    periods = list(s.moments.values()) if isinstance(s.moments, dict) else [s.moments]
    if not all(type(period) is int for period in periods):
        raise ConfigError(f"semisync.moments = {s.moments}: periods are whole numbers of steps, 0 for never")
    outer = None if s.outer is None else outer_of(s.outer, s.outer_lr, s.outer_arguments)
    dtype = torch.bfloat16 if s.dtype == "bf16" else None
    try:
        return SemiSync(s.params, s.moments, outer, s.order, s.fragments, s.pattern, s.keep, dtype, s.delay)
    except ValueError as error:
        raise ConfigError(f"semisync: {error}") from None


def on_first(mesh: Mesh, fn: Callable[[], Any]) -> Any:
    """`fn()`, on the first process before the others, which find on disk what it made; where it fails all raise its error."""
    if mesh.rank is None:
        return fn()
    made: list[Any] = []
    together.on_first(lambda: made.append(fn()))
    return made[0] if made else fn()


# -- model ----------------------------------------------------------------------------------------------------------
def model_of(c: RunConfig, source: Source) -> Model:
    """The run's model."""
    vocab = source.corpus.vocab_size if source.corpus is not None else None
    if c.model.hf:
        if c.model.overrides:
            raise ConfigError("model.overrides: a model.hf is what its folder says, drop one of the two")
        model, _ = hf.model_of(Path(c.model.hf))
    elif c.model.function:
        model = configs.imported(c.model.function)(**c.model.overrides)
        if not isinstance(model, Model):
            raise ConfigError(f"model.function = {c.model.function}: returned {type(model).__name__}, not a Model")
    else:
        padded = tokenizers.padded_vocab(vocab, c.data.pad_vocab) if vocab else None
        sizes = {"vocab": padded} if c.data.source == "stdlib" or c.data.pad_vocab > 1 else {}
        model = models.preset(c.model.preset, **(sizes | c.model.overrides))
        model = mup_of(c, model)[0] if c.model.mup else model
    if c.data.kind != "text" and isinstance(model.config, models.Config):
        said = f"data.kind = {c.data.kind}: this decoder predicts the next token and does not take such rows"
        raise ConfigError(f'{said}: name a model.function of your own, or data.kind = "text"')
    known = model.sizes.get("vocab")
    if vocab is not None and known is not None and vocab > (size := known if isinstance(known, int) else known.n):
        raise ConfigError(f"the tokenizer has {vocab} tokens and the model {size}: set model.overrides.vocab = {vocab}")
    if getattr(model.config, "positions", "") == "learned" and c.data.seq > model.config.context:
        raise ConfigError(f"data.seq = {c.data.seq}: the model has {model.config.context} learned positions")
    return lowered(c, with_loss(model, c.model.loss) if c.model.loss else model)


def params_of(c: RunConfig, model: Model, own: Model, sh: Sharding) -> Tree:
    """Parameters to start from, of the stages `own` of a model, as `sh` stores them (None: drawn from the seed)."""
    return hf.read_params(c.model.hf, model, sh, part=own) if c.model.hf else None


def with_loss(model: Model, target: str) -> Model:
    """The model with `target` in place of its own loss: fn(sh, logits, labels, weights) -> this rank's part of the sum.

    logits [batch, loss_seq, vocab], labels and weights [batch, loss_seq] are local; the term is the mean over weights.
    """
    if model.output is None or model.config is None:
        raise ConfigError(f"model.loss = {target}: this model has no logits; put the loss in its chain")
    if any(node.mtp for node in model.chain):
        raise ConfigError(f"model.loss = {target}: it is of the next token only, set model.overrides.mtp = 0")
    fn, head = configs.imported(target), model.config.head
    replaced = {name for node in model.chain if "out" in node.reads for name in node.writes}

    def node(sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
        logits = losses.logits(sh, head, v["out"], p["table"])
        return {"loss.custom": fn(sh, logits, v["out.labels"], v["out.weights"])}

    def counts(sh: Sharding, values: Values) -> dict[str, Tensor]:
        kept = {name: x for name, x in model.counts_of(sh, values).items() if f"loss.{name}" not in replaced}
        return {"custom": sh.total(values["weights"], "batch seq")} | kept

    def swap(old: Node) -> Node:
        own = "out" in old.reads and any(name.startswith("loss.") for name in old.writes)
        return replace(old, fn=node, writes=("loss.custom",)) if own else old

    return replace(model, chain=tuple(swap(old) for old in model.chain), counts_of=counts)


def flops_of(model: Model, seq: int, batch: int, causal: bool = True) -> float:
    """Model FLOPs of a step, by `step_flops`; of a model without a config that says its sizes, 6 a parameter and token."""
    c = model.config
    if not isinstance(c, models.Config):
        return 6.0 * model.count() * seq * batch
    return step_flops(c, seq, batch, causal)


def pipeline_of(c: RunConfig, model: Model) -> Pipeline | None:
    """The run's pipeline, None on a mesh without stages. Raises ConfigError."""
    p, ranks = c.pipeline, c.mesh.pp
    if ranks == 1:
        return None
    for label, table in c.optimizer.groups.items() if not c.mesh.virtual else ():
        match = table.get("match", ())
        if any(mark.isdigit() for mark in "".join(match)):
            raise ConfigError(f"optimizer.groups.{label}.match = {match}: stages renumber layers, write * for numbers")
    layers, predicted = sum(node.is_layer for node in model.chain), sum(node.mtp for node in model.chain)
    try:
        schedule = make_schedule(p.schedule, ranks, p.virtual, c.training.microbatches)
        if p.layout is not None:
            layout = parse_layout(p.layout).check(layers, schedule.stages, predicted)
        else:
            counts = {"count_embedding": p.count_embedding, "count_loss": p.count_loss}
            layout = split_layers(layers, schedule.stages, first=p.first, last=p.last, predicted=predicted, **counts)
    except ValueError as error:
        raise ConfigError(f"pipeline: {error}") from None
    return Pipeline(schedule, layout, p.remat_microbatches)


# -- how it runs ----------------------------------------------------------------------------------------------------
def compiles(c: RunConfig, say: Say, pipeline: Pipeline | None = None) -> bool:
    """Whether blocks are compiled: as the run says, or where mesh, machine and pipeline allow it."""
    if c.training.compile is not None or c.mesh.virtual:
        return bool(c.training.compile)
    splits = pipeline is not None and pipeline.schedule.splits
    missing = f"pipeline.schedule {c.pipeline.schedule} splits backwards" if splits else why_not_compile()
    if missing is not None:
        say(f"runs eager: {missing}")
    return missing is None


def check_batch(c: RunConfig, shards: int) -> None:
    """ConfigError where the batch does not divide over ranks and microbatches."""
    t = c.training
    if t.global_batch % (shards * t.microbatches):
        unit = math.lcm(shards * t.microbatches)
        near = [n for n in (t.global_batch // unit * unit, -(-t.global_batch // unit) * unit) if n]
        raise ConfigError(
            f"training.global_batch = {t.global_batch} does not divide over {shards} data-parallel ranks and "
            f"{t.microbatches} microbatches: use {' or '.join(map(str, near))}"
        )


def check_sequence(c: RunConfig, sh: Sharding) -> None:
    """ValueError where the sequence does not divide over its ranks, or into the chunks of a zigzag."""
    lengths = {"data.seq": c.data.seq} | ({} if c.data.step_tokens is None else {"data.step_multiple": c.data.step_multiple})
    for key, length in lengths.items():
        check_length(length, sh.zigzag)
        bound = sh.bind({"seq": length, "loss_seq": length})
        for names in ("batch seq", "batch loss_seq"):
            bound.placement(names, leaf=key)


def check_layers(c: RunConfig, sh: Sharding) -> None:
    """ValueError where a preset's layers make no such stages, or its heads do not divide: known before any text is read."""
    if c.model.hf or c.model.function:
        return
    model = models.preset(c.model.preset, **c.model.overrides)
    pipeline_of(c, model)
    if "heads" in model.sizes:
        sh.bind({"heads": model.sizes["heads"]}).placement("heads", leaf="attention")


def dtype_of(c: RunConfig) -> torch.dtype | None:
    """The dtype of the computation; None is that of the parameters."""
    return DTYPES[c.training.dtype] if c.training.dtype != "fp32" else None


def data_axes_of(c: RunConfig) -> dict[str, Any]:
    """Settings of `plan_step` about what travels over the data axes, and when, and what computes."""
    t = c.training
    if t.sum_dtype is not None and t.reduce_dtype is None:
        raise ConfigError(f"training.sum_dtype = {t.sum_dtype} needs a training.reduce_dtype: without, all is fp32")
    chosen = {"reduce_dtype": t.reduce_dtype, "sum_dtype": t.sum_dtype}
    dtypes = {name: DTYPES[dtype] for name, dtype in chosen.items() if dtype}
    return {"reshard": t.reshard, "async_tp": t.async_tp, "kernels": t.kernels} | dtypes
