"""A run's optimizer: its name and keywords, groups of parameters, schedules, and what a resumed run may change of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from fmegatron import config as configs
from fmegatron import optim, toml, tree
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Model
from fmegatron.nn import param
from fmegatron.optim import Transform
from fmegatron.optim.groups import labelled
from fmegatron.train import checkpoint
from fmegatron.train.mup import mup_adamw, scales_of
from fmegatron.train.setup_batch import samples_before, sizes_of
from fmegatron.train.switched import switched

Schedule = Callable[[Tensor], Tensor]
NAMES = ("adamw", "adam", "sgd", "adafactor", "lion", "muon", "decoupled_adamw", "qhadamw", "adopt", "qhadopt",
         "aggmo_adamw", "aggmo_adopt")
KEYWORDS = ("betas", "vs", "eps", "momentum", "weight_decay", "decouple", "clip")
SCHEDULE = ("lr", "schedule", "unit", "warmup", "warmup_fraction", "warmup_init", "decay_steps", "decay_shape", "min_lr",
            "weight_decay", "weight_decay_start", "weight_decay_shape")


def schedule_of(c: RunConfig) -> Schedule:
    """The learning rate by number of applied updates. A run too short for warmup and decay sees their beginning."""
    o = c.optimizer
    samples = o.unit == "samples"
    steps = samples_before(c, c.training.steps) if samples else c.training.steps
    warmup = o.warmup
    if o.warmup_fraction is not None:
        warmup = round(o.warmup_fraction * (steps if o.decay_steps is None else o.decay_steps))
    shape: dict[str, Any] = {"warmup": warmup, "init": o.warmup_init}
    if o.schedule == "constant":
        rate = optim.constant(o.lr, **shape)
    elif o.schedule == "inverse_sqrt":
        end = None if o.decay_steps is None else warmup + o.decay_steps
        rate = optim.inverse_sqrt(o.lr, min=o.min_lr, steps=end, **shape)
    elif o.schedule == "wsd":
        decay = max(steps - warmup, 1) if o.decay_steps is None else max(o.decay_steps, 1)
        rate = optim.wsd(o.lr, steps=max(steps, warmup + decay), decay=decay, shape=o.decay_shape, min=o.min_lr, **shape)
    else:
        end = max(steps, warmup) if o.decay_steps is None else warmup + o.decay_steps
        rate = {"linear": optim.linear, "cosine": optim.cosine}[o.schedule](o.lr, steps=end, min=o.min_lr, **shape)
    rate = optim.by_samples(rate, sizes_of(c).before) if samples else rate
    switch = o.switch
    return optim.scaled(rate, switch["at"], switch["lr_scale"]) if "lr_scale" in switch and "at" in switch else rate


def check_optimizer(c: RunConfig) -> None:
    """ConfigError where the optimizer, its schedule or a keyword is none that we know: before text is read and learned from."""
    schedule_of(c), _keywords(c)


def optimizer_of(c: RunConfig, model: Model, schedule: Schedule | None = None) -> Transform:
    """Clipping, then the optimizer, or one for each group of parameters."""
    schedule = schedule or schedule_of(c)
    tx = _one(c, model, schedule)
    if c.optimizer.groups:
        txs, patterns = {"default": tx}, list[tuple[str, str]]()
        for label, table in c.optimizer.groups.items():
            txs[label], found = _group(c, model, label, table)
            patterns += [(pattern, label) for pattern in found]
        of = labelled([*patterns, ("*", "default")], model.declare, tuple(txs))
        if empty := [label for label in c.optimizer.groups if label not in of.values()]:
            taken = sorted({of[path] for path in of if any(fnmatchcase(path, p) for p, at in patterns if at == empty[0])})
            raise ConfigError(f"optimizer.groups.{empty[0]}: all that it matches is of {', '.join(taken)}, which comes first")
        tx = optim.multi(txs, [*patterns, ("*", "default")])
    t = c.training
    clips = [] if t.clip_norm is None else [optim.clip_by_global_norm(t.clip_norm)]
    clips += [] if t.clip_value is None else [optim.clip_by_value(t.clip_value)]
    tx = optim.chain(*clips, tx) if clips else tx
    return optim.in_host_memory(tx) if _offloads(c) else tx


def _offloads(c: RunConfig) -> bool:
    """Whether the state lies in host memory; ConfigError where something else would read it on the device."""
    uses = {"training.donate = false": not c.training.donate, "mesh.virtual": c.mesh.virtual and not c.mesh.threads,
            "semisync.params": c.semisync.params, "monitors.optimizer": c.monitors.optimizer}  # fmt: skip
    if c.optimizer.offload and (used := [name for name, value in uses.items() if value]):
        raise ConfigError(f"optimizer.offload with {used[0]}: the state is updated in place, in pieces; leave out one of them")
    return c.optimizer.offload


def outer_of(name: str, rate: float, arguments: Mapping[str, Any]) -> Transform:
    """The outer optimizer of semi-synchronous training, by its name in optimizer.name. Raises ConfigError."""
    if name not in NAMES and ":" not in name:
        raise ConfigError(f"semisync.outer = {name}: known are {', '.join(NAMES)}, or your.module:function")
    build = getattr(optim, name) if name in NAMES else configs.imported(name)
    try:
        tx: Transform = build(rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"semisync.outer_arguments: {error}") from None
    return tx


def _group(c: RunConfig, model: Model, label: str, table: Mapping[str, Any]) -> tuple[Transform, list[str]]:
    """The transform of [optimizer.groups.LABEL], and the patterns of its leaves; what it does not say is the optimizer's."""
    place = f"optimizer.groups.{label}"
    own = {key: value for key, value in table.items() if key not in ("match", "frozen")}
    match = table.get("match", ())
    patterns = [match] if isinstance(match, str) else list(match)
    if label == "default" or not patterns:
        raise ConfigError(f"{place}: a group has a name other than default, and match = [patterns of paths]")
    paths = list(tree.to_paths(model.declare))
    if lost := [p for p in patterns if not any(fnmatchcase(path, p) for path in paths)]:
        raise ConfigError(f"{place}.match: {lost[0]!r} fits no parameter; the first are {', '.join(paths[:3])}")
    if table.get("frozen"):
        if own:
            raise ConfigError(f"{place}.{next(iter(own))} with frozen = true: what is frozen takes no steps, drop one of them")
        return optim.freeze(), patterns
    if "groups" in own:
        raise ConfigError(f"{place}.groups: a group has no groups")
    inner = replace(c, optimizer=toml.update(replace(c.optimizer, groups={}), own, place))
    return _one(inner, model, schedule_of(inner)), patterns


def numbers_of(c: RunConfig) -> dict[str, Schedule]:
    """{name: its value by the number of applied updates} of what schedules and switches change: lr, beta1, beta2, v1, ... and
    those of a group as lr/GROUP, ...; of the optimizer's default where nothing is given."""
    out: dict[str, Schedule] = {}
    for label, table in (("", {}), *c.optimizer.groups.items()):
        if table.get("frozen"):
            continue
        own = {key: value for key, value in table.items() if key not in ("match", "frozen")}
        inner = c if not label else replace(c, optimizer=toml.update(replace(c.optimizer, groups={}), own, label))
        _, takes, given = _keywords(inner)
        found: dict[str, Any] = {"lr": schedule_of(inner)}
        for key, short in (("betas", "beta"), ("vs", "v")):
            values = given.get(key, takes[key].default if key in takes else ())
            found |= {f"{short}{i}": x for i, x in enumerate(values if isinstance(values, tuple) else (), 1)}
        out |= {f"{name}/{label}" if label else name: x if callable(x) else _always(x) for name, x in found.items()}
    return out


def _always(x: float) -> Schedule:
    return lambda count: torch.full_like(count, x, dtype=torch.float64)


def _keywords(c: RunConfig) -> tuple[Callable[..., Transform], Mapping[str, inspect.Parameter], dict[str, Any]]:
    """What builds the named optimizer, what that takes, and what the run gives it; ConfigError names what it does not take."""
    o = c.optimizer
    if o.name not in NAMES and ":" not in o.name:
        raise ConfigError(f"optimizer.name = {o.name}: known are {', '.join(NAMES)}, or your.module:function")
    build = getattr(optim, o.name) if o.name in NAMES else configs.imported(o.name)
    takes = inspect.signature(build).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    given = {key: getattr(o, key) for key in KEYWORDS if getattr(o, key) is not None}
    for key in given:
        if key not in takes and not free:
            has = [name for name in takes if name in KEYWORDS]
            raise ConfigError(f"optimizer.{key} = {getattr(o, key)}: {o.name} has no {key}, it has {', '.join(has) or 'none'}")
    if o.weight_decay_start is not None:
        if o.weight_decay is None:
            raise ConfigError("optimizer.weight_decay_start: say optimizer.weight_decay, the value at the end")
        samples = o.unit == "samples"
        steps = samples_before(c, c.training.steps) if samples else c.training.steps
        decay = optim.increment(o.weight_decay_start, o.weight_decay, steps=steps, shape=o.weight_decay_shape)
        given["weight_decay"] = optim.by_samples(decay, sizes_of(c).before) if samples else decay
    if "clip" in given:
        given["clip"] = _clip(given["clip"])
    return build, takes, given | switched(o, given, takes)


def _one(c: RunConfig, model: Model, schedule: Schedule) -> Transform:
    """The named optimizer with the keywords that were given."""
    o = c.optimizer
    build, takes, given = _keywords(c)
    if c.model.mup:
        if o.name != "adamw" or o.groups:
            raise ConfigError(f"model.mup with optimizer.name = {o.name}: its scales are of adamw, without groups")
        found = {key: value for key, value in given.items() if key in ("betas", "eps", "weight_decay", "decouple")}
        return optim.in_formats(mup_adamw(scales_of(c, model), schedule, **found), o.mu_dtype, o.nu_dtype)
    ours = {"mask": lambda: param.decay_mask(model.declare), "declare": lambda: model.declare}
    given |= {key: make() for key, make in ours.items() if key in takes and o.name in NAMES}
    arguments = dict(o.arguments)
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(arguments["dtype"], arguments["dtype"])
    if o.name in NAMES and (strange := [key for key in arguments if key not in takes]):
        legal = ", ".join(key for key in takes if key not in ("learning_rate", *KEYWORDS, *ours))
        raise ConfigError(f"optimizer.arguments.{strange[0]}: {o.name} has no {strange[0]}, it has {legal or 'no others'}")
    try:
        tx: Transform = build(schedule, **{**given, **arguments})
    except TypeError as error:
        raise ConfigError(f"optimizer.arguments: {error}") from None
    try:
        return optim.in_formats(tx, o.mu_dtype, o.nu_dtype)
    except ValueError as error:
        raise ConfigError(f"optimizer.name = {o.name}: {error}") from None


def _clip(text: str) -> Any:
    """optimizer.clip: a number, t**0.25, or off."""
    if text in ("off", "t**0.25"):
        return None if text == "off" else optim.fourth_root
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"optimizer.clip = {text}: a number, t**0.25, or off") from None


def resumed(c: RunConfig) -> RunConfig:
    """The run with the schedule that optimizer.on_resume asks for, where there is a checkpoint to go on from."""
    if c.run.fresh or c.optimizer.on_resume == "override":
        return c
    found, _ = checkpoint.newest_good(c.checkpoints, verify=False)
    if found is None and c.checkpoint.resume and c.checkpoint.load == "state":
        found, _ = checkpoint.newest_good(c.checkpoint.resume, verify=False)
    return follow(c, checkpoint.read_meta(found).get("config")) if found is not None else c


def follow(c: RunConfig, saved: str | None) -> RunConfig:
    """The run with the schedule that its checkpoint's configuration (TOML) asks for, by optimizer.on_resume:

    override: the run's own. restore: the checkpoint's. match: ConfigError where they differ.
    """
    policy = c.optimizer.on_resume
    if saved is None or policy == "override":
        return c
    old = toml.loads(saved, {}).get("optimizer", {})
    before = toml.update(configs.Optimizer(), {k: v for k, v in old.items() if k in {f.name for f in fields(c.optimizer)}}, "")
    if policy == "restore":
        return replace(c, optimizer=replace(c.optimizer, **{key: getattr(before, key) for key in SCHEDULE}))
    for key in SCHEDULE:
        if getattr(before, key) != getattr(c.optimizer, key):
            raise ConfigError(f"optimizer.{key} = {getattr(c.optimizer, key)}, the checkpoint's is {getattr(before, key)}: "
                              "say optimizer.on_resume = override or restore")
    return c
