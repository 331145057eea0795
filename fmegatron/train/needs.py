"""Settings that do nothing by themselves, and what each needs: a run that sets one without it is refused in one line.

    fp8.history needs recipe delayed         pipeline.first does nothing on a mesh without stages

Where a need is about the size of the mesh, or about text that a run happens not to have, the run goes on and says so: the
same file serves a laptop and a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from fmegatron.config import ConfigError, RunConfig
from fmegatron.toml import format_value
from fmegatron.train.setup import rules_of


@dataclass(frozen=True)
class Need:
    """Keys of one group that do something only where `met`; `words` say what that asks for, as a user would write it."""

    group: str
    keys: str
    words: str
    met: Callable[[RunConfig], Any]
    refused: bool = True


def _files(c: RunConfig) -> bool:
    """Whether the text is token files, named by prefix."""
    d = c.data
    function = ":" in d.source and "://" not in d.source
    return not (d.sft or d.streams) and bool(d.blend or d.mixture or not (function or d.source == "stdlib"))


def _recipes(c: RunConfig) -> set[str]:
    return {str(name) for name in (c.fp8.recipe, *c.fp8.others.values()) if name not in (None, "off")}


def _preset(c: RunConfig) -> bool:
    return not (c.model.hf or c.model.function)


def _sequence_parallel(c: RunConfig) -> bool:
    return any(name == "seq" and "tp" in axes for name, axes in rules_of(c.sharding).lines("compute"))


OF_ALL = frozenset({"offload", "on_resume"})  # keys of [optimizer] that its groups share
OWN_TEXT = "a data.source of token files"
NEEDS = (
    Need("model", "mup", "a model.preset, whose initial values it changes", _preset),
    Need("training", "async_tp", "no mesh.virtual by vmap: add mesh.threads",
         lambda c: not c.mesh.virtual or c.mesh.threads or c.mesh.tp == 1),
    Need("training", "async_tp", "rules that lay seq over tp, such as fsdp_tp_sp", _sequence_parallel),
    Need("training", "async_tp", "mesh.tp above 1", lambda c: c.mesh.tp > 1, False),
    Need("training", "check_replicas reduce_dtype", "more than one rank", lambda c: set(c.mesh.sizes.values()) != {1}, False),
    Need("optimizer", "warmup_init", "optimizer.warmup above 0, or warmup_fraction",
         lambda c: c.optimizer.warmup_fraction if c.optimizer.warmup_fraction is not None else c.optimizer.warmup),
    Need("optimizer", "arguments", "no model.mup, whose optimizer takes none", lambda c: not c.model.mup),
    Need("sharding", "context zigzag", "mesh.cp above 1", lambda c: c.mesh.cp * c.mesh.cpa > 1, False),
    Need("pipeline", "schedule virtual layout first last count_embedding count_loss remat_microbatches", "mesh.pp above 1",
         lambda c: c.mesh.pp > 1, False),
    Need("pipeline", "first last count_embedding count_loss", "no pipeline.layout, which says all stages",
         lambda c: c.pipeline.layout is None),
    Need("pipeline", "remat_microbatches", "a training.remat", lambda c: c.training.remat != "none"),
    Need("checkpoint", "keep_every", "a checkpoint.keep: 0 keeps all", lambda c: c.checkpoint.keep),
    Need("checkpoint", "load", "checkpoint.resume, which it is of", lambda c: c.checkpoint.resume),
    Need("checkpoint", "export_dtype", "checkpoint.last_model_only = true", lambda c: c.checkpoint.last_model_only),
    Need("local", "folder", "local.interval, the steps between its checkpoints", lambda c: c.local.interval),
    Need("profile", "ranks", "profile.steps, the first and the last to trace", lambda c: c.profile.steps),
    Need("fp8", "match first last margin wgrad", "a recipe: fp8.recipe or fp8.others", _recipes),
    Need("fp8", "history algorithm", "recipe delayed", lambda c: "delayed" in _recipes(c)),
    Need("fp8", "block", "recipe blockwise, mxfp8 or nvfp4", lambda c: {"blockwise", "mxfp8", "nvfp4"} & _recipes(c)),
    Need("fp8", "format pow2", "a recipe of 8 bits", lambda c: _recipes(c) - {"nvfp4"}),
    Need("fp8", "gather", "recipe tensorwise, delayed or blockwise",
         lambda c: {"tensorwise", "delayed", "blockwise"} & _recipes(c)),
    Need("data", "blend", "no data.sft and no data.streams: one of the three", lambda c: not (c.data.sft or c.data.streams)),
    Need("data", "valid_blend split eod_mask_loss", OWN_TEXT, lambda c: c.data.kind != "text" or _files(c)),
    Need("data", "order", OWN_TEXT, lambda c: c.data.kind != "text" or _files(c)),
    Need("data", "eod_mask_loss", 'data.order = "megatron"', lambda c: c.data.order == "megatron"),
    Need("data", "streams", "no data.sft: drop one of the two", lambda c: not c.data.sft),
    Need("data", "valid", f"{OWN_TEXT}, or data.sft; of data.streams it is streaming.valid", lambda c: _files(c) or c.data.sft),
    Need("data", "tokenizer", "another text than stdlib's, which brings its own",
         lambda c: c.data.source != "stdlib" or _files(c) or c.data.sft or c.data.streams),
    Need("data", "pad_vocab", "a model.preset", _preset),
    Need("data", "chat pack", "data.sft", lambda c: c.data.sft),
    Need("data", "long", "data.sft or data.step_tokens", lambda c: c.data.sft or c.data.step_tokens),
    Need("data", "step_multiple", "data.step_tokens", lambda c: c.data.step_tokens),
    Need("data", "workers", "data.ahead above 0", lambda c: c.data.ahead),
    Need("data", "arguments", "a data.source or data.sft that is your.module:function",
         lambda c: ":" in c.data.source or ":" in (c.data.sft or "")),
    Need("data", "vocab_size", "data.source = stdlib: the tokenizer that it trains",
         lambda c: c.data.source == "stdlib" and not (c.data.blend or c.data.sft or c.data.streams), False),
    Need("streaming", "*", "data.streams", lambda c: c.data.streams),
    Need("streaming", "shuffle_algo shuffle_block_size", "streaming.shuffle = true", lambda c: c.streaming.shuffle),
)


def unused(c: RunConfig, refused: bool) -> Iterator[str]:
    """A line for each key that is set, to another value than its default, and does nothing: 'KEY = VALUE needs ...'."""
    default = RunConfig()
    for need in NEEDS:
        if need.refused == refused and not need.met(c):
            group = getattr(c, need.group)
            for f in fields(group):
                value = getattr(group, f.name)
                if (need.keys == "*" or f.name in need.keys.split()) and value != getattr(getattr(default, need.group), f.name):
                    yield f"{need.group}.{f.name} = {format_value(value)} does nothing here: it needs {need.words}"


def check_needs(c: RunConfig, say: Callable[[str], None]) -> None:
    """ConfigError where a setting does nothing beside the others; says those for which the mesh or the text has no use."""
    for label, table in c.optimizer.groups.items():
        idle = table.keys() - {"match", "frozen"} if table.get("frozen") else table.keys() & OF_ALL
        if idle:
            why = "this group is frozen" if table.get("frozen") else "it is of all groups together"
            raise ConfigError(f"optimizer.groups.{label}.{min(idle)} does nothing: {why}")
    if c.optimizer.switch and not c.optimizer.switch.keys() - {"at"}:
        raise ConfigError("optimizer.switch does nothing: give what changes then, betas, vs, lr_scale or reset")
    for line in unused(c, refused=True):
        raise ConfigError(line)
    for line in unused(c, refused=False):
        say(line)
