"""TorchTitan's TOML as our configuration, and what of it has no counterpart here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmegatron.config import ConfigError
from fmegatron.train.migrate_flags import Table, put

TITAN = {  # TorchTitan's key: ours
    "training.steps": "training.steps", "training.seq_len": "data.seq", "training.global_batch_size": "training.global_batch",
    "training.max_norm": "training.clip_norm", "training.seed": "run.seed", "debug.seed": "run.seed",
    "training.deterministic": "training.deterministic", "debug.deterministic": "training.deterministic",
    "training.gc_freq": "training.collect",
    "training.dataset_path": "data.source", "optimizer.lr": "optimizer.lr", "optimizer.eps": "optimizer.eps",
    "optimizer.weight_decay": "optimizer.weight_decay", "lr_scheduler.warmup_steps": "optimizer.warmup",
    "parallelism.tensor_parallel_degree": "mesh.tp", "parallelism.context_parallel_degree": "mesh.cp",
    "parallelism.expert_parallel_degree": "mesh.ep", "parallelism.data_parallel_replicate_degree": "mesh.dp",
    "parallelism.data_parallel_shard_degree": "mesh.fsdp", "checkpoint.interval": "checkpoint.interval",
    "checkpoint.keep_latest_k": "checkpoint.keep", "checkpoint.last_save_model_only": "checkpoint.last_model_only",
    "checkpoint.initial_load_path": "checkpoint.resume", "metrics.log_freq": "log.every",
    "metrics.enable_tensorboard": "log.tensorboard", "compile.enable": "training.compile",
    "training.compile": "training.compile", "validation.freq": "validation.interval", "validation.steps": "validation.batches",
    "job.dump_folder": "run.dir", "model.tokenizer_path": "data.tokenizer", "model.hf_assets_path": "data.tokenizer",
    "parallelism.pipeline_parallel_degree": "mesh.pp", "parallelism.pipeline_parallel_schedule_csv": "pipeline.schedule",
    "comm.init_timeout_seconds": "faults.init_timeout", "comm.train_timeout_seconds": "faults.train_timeout",
    "profiling.enable_memory_snapshot": "faults.memory_history",
}  # fmt: skip
DEFAULTS = {  # what TorchTitan does where a key is not given, and we do not
    "optimizer.lr": 8e-4, "optimizer.eps": 1e-8, "optimizer.warmup": 200, "training.steps": 10000, "data.seq": 2048,
    "checkpoint.interval": 500, "checkpoint.keep": 10, "data.document_mask": False, "data.reset_positions": False,
}  # fmt: skip
NUMBERS = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor", "optimizer.lr", "training.steps",
           "parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree")
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FAMILIES = {"deepseek_v3": "deepseek", "gpt_oss": "gpt-oss"}  # those that have another name here
SIZES = {"debugmodel": "debug", "671b": "v3"}
TITAN_SCHEDULES = {"1F1B": "1f1b", "GPipe": "gpipe", "Interleaved1F1B": "interleaved_1f1b", "LoopedBFS": "looped_bfs",
                   "InterleavedZeroBubble": "interleaved_zero_bubble", "ZBVZeroBubble": "zbv", "DualPipeV": "dualpipev"}


def from_torchtitan(given: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """Our table for TorchTitan's TOML, and the keys that have no counterpart (with their values)."""
    flat = {f"{group}.{name}": value for group, held in given.items() if isinstance(held, dict) for name, value in held.items()}
    table: Table = {}
    for key, value in DEFAULTS.items():
        put(table, key, value)
    read = set(TITAN)
    bad = next((name for name in NUMBERS if not isinstance(flat.get(name, 0), int | float)), None)
    if bad is not None:
        raise ConfigError(f"{bad} = {flat[bad]!r}: expected a number")
    for theirs, ours in TITAN.items():
        if theirs in flat:
            put(table, ours, flat[theirs])
    degrees = (("replicate", 1), ("shard", -1))  # with their defaults
    sizes = [flat.get(f"parallelism.data_parallel_{kind}_degree", default) for kind, default in degrees]
    if sizes[1] == -1:  # what is left goes to dp here: FSDP is a rule, not an axis
        table.setdefault("mesh", {}).pop("fsdp", None)
        put(table, "mesh.dp", -1)
    if "model.name" in flat and "model.flavor" in flat:
        family, size = str(flat["model.name"]), str(flat["model.flavor"]).lower()
        put(table, "model.preset", f"{FAMILIES.get(family, family)}:{SIZES.get(size, size)}")
    put(table, "sharding.rules", "hsdp_tp_sp" if sizes[0] > 1 and sizes[1] > 1 else "fsdp_tp_sp")
    if "optimizer.name" in flat:
        put(table, "optimizer.name", str(flat["optimizer.name"]).lower())
    put(table, "optimizer.betas", [flat.get("optimizer.beta1", 0.9), flat.get("optimizer.beta2", 0.95)])
    put(table, "optimizer.weight_decay", flat.get("optimizer.weight_decay", 0.1))
    ratio, shape = flat.get("lr_scheduler.decay_ratio"), flat.get("lr_scheduler.decay_type", "linear")
    shape = {"sqrt": "minus_sqrt"}.get(shape, shape)
    for key, value in (("optimizer.lr", 8e-4), ("optimizer.warmup", 200), ("training.steps", 10000)):  # with their defaults
        group, name = key.split(".")
        if name not in table.get(group, {}):
            put(table, key, value)
    if ratio is None and shape == "minus_sqrt":  # which is a shape of wsd's here
        ratio = 1 - table["optimizer"]["warmup"] / table["training"]["steps"]
    put(table, "optimizer.schedule", "wsd" if ratio is not None else shape)
    if ratio is not None:
        put(table, "optimizer.decay_steps", round(ratio * table["training"]["steps"]))
        put(table, "optimizer.decay_shape", shape)
    floor = flat.get("lr_scheduler.min_lr_factor")
    if floor is not None:
        put(table, "optimizer.min_lr", floor * flat.get("optimizer.lr", 8e-4))
    put(table, "training.dtype", "fp32" if flat.get("training.mixed_precision_param", "bfloat16") == "float32" else "bf16")
    mode = flat.get("activation_checkpoint.mode", "selective")
    put(table, "training.remat", mode)
    if flat.get("checkpoint.async_mode", "disabled") != "disabled":
        put(table, "checkpoint.background", True)
    schedule = flat.get("parallelism.pipeline_parallel_schedule")
    if schedule in TITAN_SCHEDULES:
        put(table, "pipeline.schedule", TITAN_SCHEDULES[schedule])
        read.add("parallelism.pipeline_parallel_schedule")
        if schedule not in ("1F1B", "GPipe"):
            put(table, "pipeline.virtual", 2)  # what torch's schedules have where nothing else is said
    if flat.get("metrics.enable_wandb"):
        put(table, "log.wandb", "torchtitan")  # WANDB_PROJECT's default there
    if "checkpoint.export_dtype" in flat:
        dtype = flat["checkpoint.export_dtype"]
        put(table, "checkpoint.export_dtype", NAMES.get(dtype, dtype))
    if not flat.get("checkpoint.enable", flat.get("checkpoint.enable_checkpoint", False)):
        put(table, "checkpoint.interval", 0)  # ours are saved at the end in any case
    if not flat.get("validation.enable", flat.get("validation.enabled", False)):
        put(table, "validation.interval", 0)
    if flat.get("checkpoint.initial_load_model_only"):
        put(table, "checkpoint.load", "params")
    read |= {"model.name", "model.flavor", "optimizer.name", "optimizer.beta1", "optimizer.beta2", "lr_scheduler.decay_ratio",
             "lr_scheduler.decay_type", "lr_scheduler.min_lr_factor", "training.mixed_precision_param", "checkpoint.async_mode",
             "activation_checkpoint.mode", "checkpoint.export_dtype", "checkpoint.initial_load_model_only", "checkpoint.folder",
             "job.description", "metrics.enable_wandb", "checkpoint.enable", "checkpoint.enable_checkpoint",
             "validation.enable", "validation.enabled"}  # fmt: skip
    unknown = [f"{key} = {value}" for key, value in flat.items() if key not in read]
    if sizes[0] > 1 and sizes[1] == -1:  # hsdp shards over mesh.fsdp, whose size must be said
        key = f"parallelism.data_parallel_replicate_degree = {sizes[0]}"
        unknown.append(f"{key} with a shard degree of -1: mesh.dp shards over all; for replicas say mesh.fsdp and hsdp_tp_sp")
    return table, unknown
