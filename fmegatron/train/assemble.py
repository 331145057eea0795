"""The parts of a run, made once from its configuration: mesh and rules, model, text, optimizer, the step, the evaluation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from fmegatron import toml, tree
from fmegatron.config import Checkpoint, ConfigError, Run, RunConfig
from fmegatron.config.faults import Local
from fmegatron.config.monitors import Log, Profile, Validation
from fmegatron.data.place import reading, shards_of
from fmegatron.data.share import Share, share_of
from fmegatron.models import Model
from fmegatron.programs import Programs
from fmegatron.sharding import Mesh, Sharding
from fmegatron.train import checkpoint, graphs, setup, setup_batch, setup_precision
from fmegatron.train.evaluate import make_evaluate
from fmegatron.train.facts import environment
from fmegatron.train.meeting import make_average
from fmegatron.train.needs import check_needs
from fmegatron.train.node_local import place_of_run
from fmegatron.train.pipeline.stages import Placed, place_pipeline, with_stages, without_pp
from fmegatron.train.replicas import make_check
from fmegatron.train.resume import Resume
from fmegatron.train.source import Source, sets, source_of, tokenizer_file
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step
from fmegatron.train.unigram import unigram_of
from fmegatron.tree import Tree

OURS = ("config.toml", "metrics.jsonl", "tokenizer.json", "loss.png", "sample.txt", "checkpoints", "tensorboard", "experts.png",
        "heartbeat", "stragglers.jsonl", "run.json", "report.html", "traces", "wandb", "wandb-id")  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The parts of a run: values and functions."""

    config: RunConfig
    folder: Path
    first: bool  # whether this process writes and speaks
    say: setup.Say
    sh: Sharding
    source: Source
    share: Share | None  # who reads batches for whom; None: each process its own
    model: Model
    own: Model  # what of the model this process holds: all of it, or its stages
    own_sh: Sharding  # how that lies: the mesh without its axis pp
    placed: Placed | None
    start: Callable[[], tuple[TrainState, dict[str, Any]]]  # and what its checkpoint says
    plain: Any  # the model's config as JSON gives it back
    step: Callable[..., Any]
    compiled: bool
    evaluate: Callable[..., Any]
    average: Callable[[Any], Any]  # parameters of replicas that go apart -> their mean
    check: Callable[[Any], None]
    schedule: setup.Schedule

    @property
    def checkpoints(self) -> str | Path:
        """The folder of checkpoints, or the address of a bucket."""
        return self.config.checkpoints

    @property
    def reading(self) -> dict[str, Any]:
        """How this process gets batches: which rows, who reads them, and where they go."""
        drop = () if self.config.data.document_mask else ("documents",)
        return reading(self.sh, self.share) | {"drop": drop}

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        meta = {"config": toml.dumps(self.config), "tokenizer": tokenizer_file(self.source)}
        return meta | {"model": self.plain}

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says: plain data."""
        mesh, c = self.sh.mesh, self.config
        model = {"name": c.model.hf or c.model.function or c.model.preset, "parameters": self.model.count()}
        how = {"kind": mesh.kind, "axes": mesh.sizes, "rules": self.sh.rules.name, "compiled": self.compiled}
        flops = setup.flops_of(self.model, c.data.seq, c.training.global_batch)
        return {"model": model, "mesh": how, "flops_per_step": flops, "environment": environment(mesh.device)}

    def describe(self) -> str:
        """What will run, in one line."""
        c, mesh = self.config, self.sh.mesh
        name = c.model.hf or c.model.function or c.model.preset
        axes = " ".join(f"{axis.name}={axis.size}" for axis in mesh.axes if axis.size > 1) or "one device"
        how = f"{mesh.kind} mesh {axes}, rules {self.sh.rules.name}" if mesh.size > 1 else axes
        precision = f"{c.training.dtype}, {'compiled' if self.compiled else 'eager'}"
        return f"{name}: {self.model.count() / 1e6:.2f}M parameters; {how} ({mesh.device}), {precision}; {self.folder}"


def assemble(c: RunConfig, mesh: Mesh) -> Parts:
    """All of a run but its state. Raises ValueError (one line) for what cannot be done."""
    first = mesh.rank in (None, 0)
    say: setup.Say = (lambda text: print(text, flush=True)) if first else (lambda text: None)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # a worker that is started again goes on
        c = replace(c, run=replace(c.run, fresh=False))
    folder = c.run.folder
    sh, semisync = setup.sharding_of(c, mesh), setup.semisync_of(c)
    setup.check_batch(c, shards_of(sh))
    setup.check_sequence(c, sh)
    setup.check_layers(c, sh)
    setup.check_optimizer(c)
    check_needs(c, say)
    graphs.check(c, sh)
    share = share_of(sh)
    source = setup.on_first(mesh, lambda: source_of(c, say, reads=share is None or share.reads))
    model, term_weights = unigram_of(c, source, setup.model_of(c, source))
    if not (sets(c, source) or source.has_held_out) and c.validation != Validation():
        say("no held-out text, so nothing is validated: data.valid or data.split name some")
    pipeline = setup.pipeline_of(c, model)
    placed = None if pipeline is None else place_pipeline(pipeline, model, mesh)
    own, own_sh = (model, sh) if placed is None else (placed.model, without_pp(sh))
    c = setup.resumed(c)
    schedule = setup.schedule_of(c)
    tx = setup.optimizer_of(c, with_stages(model, own), schedule)
    setup_precision.check_moments(c, own, own_sh)
    params = setup.params_of(c, model, own, own_sh)
    t = c.training
    dtype, compiled = setup.dtype_of(c), setup.compiles(c, say, pipeline)
    graphs.check_model(c, model, compiled)
    step: Callable[..., Any] = make_step(
        model,
        tx,
        sh,
        microbatches=setup_batch.parts_of(c, shards_of(sh)),
        remat=t.remat,
        compile=compiled,
        programs=programs_of(c, model, mesh, term_weights) if compiled else None,
        dtype=dtype,
        prefetch=t.prefetch,
        term_weights=term_weights,
        **setup.data_axes_of(c),
        **setup_precision.gradient_settings_of(c),
        pipeline=pipeline,
        semisync=semisync,
        donate=t.donate and mesh.kind != "virtual",
    )
    step = graphs.Graphed(step, graphs.CudaGraphs(), say=say) if t.graphs else step
    setup.on_first(mesh, lambda: _prepare(c, folder, source) if first else None)
    local = place_of_run(c)[0] if c.local.folder else None
    if local is not None and c.run.fresh:
        shutil.rmtree(local, ignore_errors=True)
    plain = _json(asdict(model.config)) if is_dataclass(model.config) else None  # type: ignore[arg-type]

    def start(given: Tree) -> TrainState:
        kept: dict[str, Any] = {"precision": setup_precision.precision_of(c), "semisync": semisync}
        return init(own, tx, own_sh, c.run.seed, params if given is None else given, **kept)

    return Parts(
        config=replace(c, run=replace(c.run, fresh=False)),
        folder=folder,
        first=first,
        say=say,
        sh=sh,
        source=source,
        share=share,
        model=model,
        own=own,
        own_sh=own_sh,
        placed=placed,
        start=Resume(c.checkpoint, c.checkpoints, own, own_sh, start, plain, say, local),
        plain=plain,
        step=step,
        compiled=compiled,
        evaluate=make_evaluate(model, sh, dtype=dtype, prefetch=t.prefetch, pipeline=pipeline),
        average=make_average(own, own_sh),
        check=make_check(own, own_sh, placed),
        schedule=schedule,
    )


def programs_of(c: RunConfig, model: Model, mesh: Mesh, term_weights: Mapping[str, float] | None) -> Programs | None:
    """Where the run's compiled graphs are kept for its next start; None where functions of the user's say what is in them."""
    tables: tree.Tree = [asdict(c.optimizer), asdict(c.semisync)]
    if c.model.function or c.model.loss or any(isinstance(word, str) and ":" in word for word in tree.leaves(tables)):
        return None
    c = replace(c, run=Run(), checkpoint=Checkpoint(), log=Log(), profile=Profile(), local=Local())  # which no block sees
    return Programs.of(c, model.config, mesh, term_weights)


def _prepare(c: RunConfig, folder: Path, source: Source) -> None:
    """The run's folder, with its tokenizer; emptied of a run's files where it starts over."""
    there = checkpoint.latest(c.checkpoint.folder) if c.run.fresh and c.checkpoint.folder else None
    if there is not None:
        raise ConfigError(f"run.fresh: {c.checkpoint.folder} holds checkpoints, up to {there.name}: delete them, or name "
                          "another checkpoint.folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in OURS if c.run.fresh else ():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    tokenizer = Path(tokenizer_file(source) or "")
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _json(value: Any) -> Any:
    """Plain data as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
