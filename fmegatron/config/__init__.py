"""What a training run is: plain frozen data, one class a group. `load("quickstart", {...})` reads one from a file.

Every field is a key in TOML (`[training]` `steps = 20`) and on the command line (`--training.steps 20`). The classes
hold no behaviour: what a name means (a preset, a rule, a schedule) is known to the part of the package it belongs to.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fmegatron import toml
from fmegatron.config.batch import BatchSizes
from fmegatron.config.data import Data as Data
from fmegatron.config.data import Streaming as Streaming
from fmegatron.config.faults import Faults, Local
from fmegatron.config.fp8 import Fp8
from fmegatron.config.monitors import Log, Monitors, Profile, Validation
from fmegatron.config.optimizer import Optimizer as Optimizer
from fmegatron.config.precision import Precision
from fmegatron.config.semisync import SemiSync
from fmegatron.toml import ConfigError as ConfigError
from fmegatron.toml import option

SHIPPED = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Run:
    """Where the run lies. The same command with the same dir resumes it."""

    name: str = option("run", "name of the run; a file's own name where the file does not say")
    dir: str | None = option(None, "folder of metrics, checkpoints and pictures; none: runs/NAME")
    fresh: bool = option(False, "start over: delete what the folder holds")
    seed: int = option(0, "of parameters, dropout and the order of the data", at_least=0)
    minutes: float = option(0.0, "save and leave after so long, to go on with the same command; 0: no limit", at_least=0)
    exit_interval: int = option(0, "save and leave at the next step that this divides; 0: none", at_least=0)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.dir or f"runs/{self.name}")


@dataclass(frozen=True)
class Model:
    """The model: a preset, a Hugging Face folder, or your own function."""

    preset: str = option("llama3:quickstart", "family:size, see fmegatron.models.presets")
    hf: str | None = option(None, "start from a Hugging Face folder (its config, weights, tokenizer), not a preset")
    function: str | None = option(None, "your.module:function that returns a model, in place of a preset")
    overrides: dict[str, Any] = option({}, "fields of the preset's config, or arguments of the function")
    loss: str | None = option(None, "your.module:function in place of the model's own loss")
    mup: dict[str, Any] = option({}, "sizes of the base that rates were found on (embed, layers, ...; alpha, attention): muP")


@dataclass(frozen=True)
class Training(BatchSizes, Precision):
    """How long, in what precision, with what memory."""

    steps: int = option(1000, "steps in all; a skipped one counts too", at_least=0)
    global_batch: int = option(32, "samples in a step, over all ranks", at_least=1)
    microbatches: int = option(1, "parts that a step is computed in, one after another", at_least=1)
    remat: str = option("none", "none, full, selective, every-K: computed again; offload-K, POLICY+offload: on the host")
    kernels: Literal["reference", "triton", "auto"] = option("auto", "of norms, activations, loss ...; auto: triton on CUDA")
    compile: bool | None = option(None, "compile the blocks; none: where mesh and machine allow it")
    prefetch: int = option(1, "blocks whose parameters are gathered ahead; 0: least memory, nothing overlaps", at_least=0)
    reshard: str = option("always", "always, never, or first-K: which layers' gathered weights are freed after the forward")
    reduce_dtype: Literal["fp32", "bf16"] | None = option(None, "of gradients between ranks; none: fp32")
    async_tp: int = option(1, "chunks in which tensor-parallel products overlap with what they send; 1: none", at_least=1)
    sum_dtype: Literal["fp32", "bf16"] | None = option(None, "in which ranks' parts are added; none: reduce_dtype")
    check_replicas: int = option(0, "steps between comparisons of the parameters' copies on all ranks; 0: never", at_least=0)
    donate: bool = option(True, "a step reuses the memory of the state before it")
    graphs: bool = option(False, "record the step as a CUDA graph for each shape of a batch, and replay it; see docs/gpu.md")
    deterministic: bool = option(True, "only kernels that give the same bits again")
    collect: int = option(50, "steps between collections of garbage, on all ranks at once; 0: when Python likes", at_least=0)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh's axes. Under torchrun their product is the number of processes."""

    replica: int = option(1, "batch, outermost: see semisync; -1: every process that is left", at_least=-1)
    dp: int = option(1, "batch, and storage where the rules say so; -1: every process that is left", at_least=-1)
    fsdp: int = option(1, "second data axis: storage under hsdp", at_least=1)
    cp: int = option(1, "sequence", at_least=1)
    cpa: int = option(1, "sequence, inside cp: where heads are exchanged in hierarchical attention", at_least=1)
    tp: int = option(1, "heads, mlp, vocabulary", at_least=1)
    ep: int = option(1, "experts", at_least=1)
    pp: int = option(1, "pipeline stages, see pipeline", at_least=1)
    virtual: bool = option(False, "all ranks in this process, by vmap")
    threads: bool = option(False, "with virtual: a thread for each rank, over the calls of a real mesh")

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: size}, outer to inner; axes of size 1 too."""
        return {axis: getattr(self, axis) for axis in ("replica", "pp", "dp", "fsdp", "cp", "cpa", "tp", "ep")}


@dataclass(frozen=True)
class Sharding:
    """How names become placements."""

    rules: str | dict[str, Any] = option("fsdp_tp_sp", "a name in fmegatron.RULES, or a table of its lists")
    reduce: Literal["step", "microbatch"] | None = option(None, "when gradients are reduced; none: as the rules say")
    context: Literal["gather", "ring", "ulysses", "hierarchical"] | None = option(None, "attention over cp; none: the rules'")
    zigzag: bool | None = option(None, "a rank of cp holds a piece of the head of the sequence and of its tail; none: as rules")


@dataclass(frozen=True)
class Pipeline:
    """How stages are scheduled where mesh.pp > 1; training.microbatches are the schedule's."""

    schedule: str = option("1f1b", "see fmegatron.train.pipeline.schedules; or a .csv in TorchTitan's format")
    virtual: int = option(1, "stages on each rank", at_least=1)
    layout: str | None = option(None, "layers of each stage as Et*3|t*4|t*3L; none: as many on each")
    first: int | None = option(None, "layers of the first stage, where it has another number", at_least=0)
    last: int | None = option(None, "layers of the last stage", at_least=0)
    count_embedding: bool = option(False, "the embedding counts as a layer of the first stage")
    count_loss: bool = option(False, "the loss counts as a layer of the last stage")
    remat_microbatches: int | None = option(None, "microbatches to which training.remat applies; none: all", at_least=0)


@dataclass(frozen=True)
class Checkpoint:
    """When the state is written, and what is kept."""

    interval: int = option(200, "steps between checkpoints; 0: only at the end", at_least=0)
    keep: int = option(2, "checkpoints kept, newest first; 0: all", at_least=0)
    keep_every: int = option(0, "steps that it divides are kept whatever keep says; 0: none", at_least=0)
    background: bool = option(False, "write while training goes on, from a copy of the state on the host")
    folder: str | None = option(None, "where they go, s3://bucket/run too; none: checkpoints/ in the run's folder")
    resume: str | None = option(None, "a checkpoint, or a folder of them, to start from where the run has none of its own")
    load: Literal["state", "params"] = option("state", "of resume: all, or the parameters alone, for fine-tuning")
    strict: Literal["both", "missing", "extra", "none"] = option("both", "tensors missing or extra: which is an error")
    verify: bool = option(True, "hash every file before it is loaded")
    last_model_only: bool = option(False, "the last checkpoint holds parameters only, in export_dtype")
    export_dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "of last_model_only")


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    streaming: Streaming = Streaming()
    training: Training = Training()
    fp8: Fp8 = Fp8()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    sharding: Sharding = Sharding()
    pipeline: Pipeline = Pipeline()
    semisync: SemiSync = SemiSync()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()
    faults: Faults = Faults()
    monitors: Monitors = Monitors()
    profile: Profile = Profile()
    local: Local = Local()

    @property
    def checkpoints(self) -> str | Path:
        """The folder of the run's checkpoints, or the address of a bucket."""
        return self.checkpoint.folder or self.run.folder / "checkpoints"

    def __post_init__(self) -> None:
        batch, parts = self.training.global_batch, self.training.microbatches
        if batch % parts:
            near = " or ".join(str(n) for n in (batch // parts * parts, -(-batch // parts) * parts) if n)
            fewer = max(n for n in range(1, parts + 1) if batch % n == 0)
            said = f"training.global_batch = {batch} does not divide into training.microbatches = {parts}"
            raise ValueError(f"{said}: use {fewer} microbatches, or a batch of {near}")
        if self.mesh.dp == 0:
            raise ValueError("mesh.dp = 0: use 1 or more, or -1 for every process that is left")
        if self.training.compile and self.mesh.virtual:
            raise ValueError("training.compile = true: a mesh.virtual runs eager, drop one of the two")
        if self.mesh.threads and not self.mesh.virtual:
            raise ValueError("mesh.threads = true needs mesh.virtual = true")
        if self.profile.steps and self.profile.steps[1] > self.training.steps:
            said = f"profile.steps = {list(self.profile.steps)}: the run has {self.training.steps} steps"
            raise ValueError(f"{said}, so the last to trace is at most that")
        if self.model.hf and self.model.function:
            raise ValueError("model.hf and model.function are both set: a run has one model")


def load(name: str | Path, table: toml.Table | None = None) -> RunConfig:
    """The run in a TOML file, or in a shipped one by name (`quickstart`), with `table` (nested keys) laid over it."""
    path = find(name)
    start = RunConfig(run=Run(name=path.stem))
    return toml.update(toml.update(start, toml.read(path), str(name)), table or {}, "command line")


def find(name: str | Path) -> Path:
    """The file itself, or the shipped configuration of that name."""
    path, shipped = Path(name), SHIPPED / f"{name}.toml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
    raise ConfigError(f"{name}: neither a file nor a shipped configuration ({names})")


def imported(target: str) -> Callable[..., Any]:
    """The function that `package.module:name` names."""
    shape = f"an import path is package.module:function, seen from {os.getcwd()}"
    module, colon, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{target}: {error} ({shape})") from None
    if not callable(function):
        raise ConfigError(f"{target}: not a function ({shape})")
    return function
