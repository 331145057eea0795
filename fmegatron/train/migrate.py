"""Megatron-LM's flags and TorchTitan's TOML as our configuration, and what of them has no counterpart here.

    table, unknown = from_megatron(flags_of("--num-layers 24 --hidden-size 1024 ..."))
    table, unknown = from_torchtitan(tomllib.loads(...))

Tables of plain names where the meaning is the same; functions where values are. What differs in meaning though a name
matches is told in docs/migration.md.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmegatron import toml
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models.presets import config as preset
from fmegatron.train import migrate_flags, setup
from fmegatron.train.migrate_flags import Table, put
from fmegatron.train.migrate_titan import from_torchtitan
from fmegatron.train.migrate_words import flags_of, open_of
from fmegatron.train.remat import parse_remat

MODEL = {  # Megatron-LM's flag: a field of models.Config
    "num_layers": "layers", "hidden_size": "embed", "num_attention_heads": "heads", "kv_channels": "hd",
    "ffn_hidden_size": "mlp", "vocab_size": "vocab", "max_position_embeddings": "context",
    "make_vocab_size_divisible_by": "vocab_pad", "rotary_base": "rope_base", "rotary_percent": "rope_fraction",
    "rotary_interleaved": "rope_interleaved", "rotary_seq_len_interpolation_factor": "rope_interpolation",
    "norm_epsilon": "norm_eps", "layernorm_epsilon": "norm_eps", "apply_layernorm_1p": "norm_centred",
    "attention_dropout": "attention_dropout", "hidden_dropout": "hidden_dropout", "init_method_std": "init_std",
    "apply_query_key_layer_scaling": "qk_layer_scaling",
}  # fmt: skip
PRECISION = {  # Megatron-LM's flag: our key, both of the same values
    "loss_scale": "training.loss_scale", "initial_loss_scale": "training.initial_loss_scale",
    "min_loss_scale": "training.min_loss_scale", "loss_scale_window": "training.loss_scale_window",
    "hysteresis": "training.hysteresis", "main_grads_dtype": "training.accumulate_dtype", "exp_avg_dtype": "optimizer.mu_dtype",
    "exp_avg_sq_dtype": "optimizer.nu_dtype", "log_num_zeros_in_grad": "training.count_zeros",
    "fp32_residual_connection": "model.fp32_residual",
}  # fmt: skip
PRECISION_SWITCHES = {  # read by precision_of
    "accumulate_allreduce_grads_in_fp32", "grad_reduce_in_bf16", "store_param_remainders", "no_store_param_remainders",
    "use_precision_aware_optimizer", "main_params_dtype",
}  # fmt: skip
MODEL_SWITCHES = {  # read by model_of
    "num_query_groups", "group_query_attention", "position_embedding_type", "normalization", "swiglu", "squared_relu",
    "add_bias_linear", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
    "no_bias_gelu_fusion", "bias_gelu_fusion", "no_position_embedding", "use_rotary_position_embeddings", "window_size",
    "no_rope_freq", "quick_geglu",
}  # fmt: skip
RUN = {  # Megatron-LM's flag: our key
    "train_iters": "training.steps", "global_batch_size": "training.global_batch", "clip_grad": "training.clip_norm",
    "seq_length": "data.seq", "data_path": "data.source", "split": "data.split", "eod_mask_loss": "data.eod_mask_loss",
    "data_cache_path": "data.cache", "tokenizer_model": "data.tokenizer",
    "reset_position_ids": "data.reset_positions", "reset_attention_mask": "data.document_mask",
    "lr": "optimizer.lr", "min_lr": "optimizer.min_lr", "lr_warmup_iters": "optimizer.warmup",
    "lr_decay_style": "optimizer.schedule", "weight_decay": "optimizer.weight_decay", "adam_eps": "optimizer.eps",
    "sgd_momentum": "optimizer.momentum", "seed": "run.seed", "save": "run.dir", "load": "checkpoint.resume",
    "pretrained_checkpoint": "checkpoint.resume", "save_interval": "checkpoint.interval", "async_save": "checkpoint.background",
    "save_retain_interval": "checkpoint.keep_every", "eval_interval": "validation.interval",
    "eval_iters": "validation.batches", "log_interval": "log.every", "tensor_model_parallel_size": "mesh.tp",
    "context_parallel_size": "mesh.cp", "expert_model_parallel_size": "mesh.ep", "deterministic_mode": "training.deterministic",
}  # fmt: skip
RUN_SWITCHES = {  # read by from_megatron
    "bf16", "fp16", "optimizer", "adam_beta1", "adam_beta2", "lr_decay_iters", "micro_batch_size", "finetune",
    "recompute_granularity", "recompute_activations", "sequence_parallel", "use_distributed_optimizer", "tensorboard_dir",
    "use_torch_fsdp2", "use_megatron_fsdp", "mock_data", "dist_ckpt_strictness", "no_load_optim",
    "lr_wsd_decay_style", "lr_wsd_decay_iters",
}  # fmt: skip
NUMBERS = (*(MODEL.keys() - {"rotary_interleaved", "apply_layernorm_1p", "apply_query_key_layer_scaling"}), "num_query_groups",
           "lr_warmup_iters", "lr_decay_iters", "train_samples", "lr_warmup_samples", "lr_decay_samples", "global_batch_size",
           "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
           "profile_step_start", "profile_step_end", "qk_head_dim", "qk_pos_emb_head_dim")  # fmt: skip
CHECKS: Mapping[str, Callable[[RunConfig], object]] = {  # our key: raises ValueError where its value names nothing
    "optimizer.name": setup.check_optimizer,
    "training.remat": lambda run: parse_remat(run.training.remat),
    "model.preset": lambda run: preset(run.model.preset),
}
# "unexpected" there is what the model asks for and the checkpoint lacks: missing, here
STRICT = {"raise_all": "both", "raise_unexpected": "missing", "assume_ok_unexpected": "missing", "log_unexpected": "none",
          "log_all": "none", "ignore_all": "none", "return_all": "none", "return_unexpected": "none"}  # fmt: skip
DEFAULTS = {  # what Megatron-LM does where a flag is not given, and we do not
    "optimizer.warmup": 0, "checkpoint.interval": 0, "checkpoint.keep": 0, "validation.interval": 1000,
    "validation.batches": 100, "log.every": 100, "run.seed": 1234, "data.document_mask": False, "data.reset_positions": False,
}  # fmt: skip
SILENT = {"use_mcore_models", "transformer_impl", "ckpt_format", "use_flash_attn", "attention_backend", "distributed_backend",
          "no_gradient_accumulation_fusion", "use_cpu_initialization", "overlap_grad_reduce", "overlap_param_gather",
          "tokenizer_type", "num_workers", "no_masked_softmax_fusion", "masked_softmax_fusion", "no_bias_swiglu_fusion",
          "no_bias_dropout_fusion", "no_rope_fusion", "auto_detect_ckpt_format", "use_checkpoint_args",
          "attention_softmax_in_fp32", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}  # fmt: skip


def model_of(args: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """Fields of models.Config for Megatron-LM's arguments, its defaults filled in; and what has no counterpart.

    Raises ConfigError where a flag without a default is not given, and where a number is none.
    """
    need = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not args.get(name)]
    if need:
        raise ConfigError(f"Megatron-LM's flags lack --{need[0].replace('_', '-')}: it has no default")
    for name in NUMBERS:
        if isinstance(args.get(name, 0), bool | str | list):
            said = "no value" if args[name] is True else args[name]
            raise ConfigError(f"Megatron-LM's flag --{name.replace('_', '-')} has {said}: it takes a number")
    fields: Table = {ours: args[theirs] for theirs, ours in MODEL.items() if args.get(theirs) is not None}
    embed, swiglu = args["hidden_size"], bool(args.get("swiglu"))
    fields.setdefault("mlp", int(4 * embed * 2 / 3 / 64) * 64 if swiglu else 4 * embed)
    fields.setdefault("hd", embed // args["num_attention_heads"])
    fields.setdefault("vocab", 50257)
    fields.setdefault("context", args.get("seq_length", 2048))
    named = (("vocab_pad", 128), ("hidden_dropout", 0.1), ("attention_dropout", 0.1), ("rope_base", 10000), ("norm_eps", 1e-5))
    for name, value in named:
        fields.setdefault(name, value)
    grouped = args.get("num_query_groups") if args.get("group_query_attention", True) else None
    fields["kv"] = grouped or args["num_attention_heads"]
    kind = args.get("position_embedding_type", "learned_absolute")
    rotary = kind == "rope" or args.get("use_rotary_position_embeddings")
    fields["positions"] = "rope" if rotary else {"learned_absolute": "learned", "none": "none"}.get(kind, kind)
    norm = args.get("normalization", "LayerNorm")
    fields["norm"] = {"LayerNorm": "layer", "RMSNorm": "rms"}.get(norm)
    fields["tied"] = not args.get("untie_embeddings_and_output_weights", False)
    fused = args.get("bias_gelu_fusion", not args.get("no_bias_gelu_fusion", False))
    bias = bool(args.get("add_bias_linear", not args.get("disable_bias_linear", False)))
    plain = "gelu_tanh" if fused and bias else "gelu"  # its fused kernel is the tanh form
    fields["activation"] = "swiglu" if swiglu else "relu2" if args.get("squared_relu") else plain
    fields |= {"attention_out_bias": bias, "mlp_bias": bias, "attention_bias": bias or bool(args.get("add_qkv_bias"))}
    fields["qk_norm"] = "norm" if args.get("qk_layernorm") else "none"
    unknown = [] if fields["positions"] in ("rope", "learned", "none") else [f"position_embedding_type = {kind}"]
    unknown += [] if fields["norm"] else [f"normalization = {norm}"]
    fields |= {"positions": "rope"} if unknown and kind in unknown[0] else {}
    if fields["positions"] != "rope":  # the preset under it has a base of its own
        fields = {name: x for name, x in fields.items() if not name.startswith("rope_")} | {"rope_base": 10000}
    return {name: x for name, x in fields.items() if x is not None}, unknown


def from_megatron(args: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """Our table for Megatron-LM's flags, and those that have no counterpart (with their values)."""
    fields, unknown = model_of(args)
    table: Table = {"model": {"preset": "llama3:debug", "overrides": fields}}
    for ours, value in DEFAULTS.items():
        put(table, ours, value)
    for theirs, ours in RUN.items():
        if args.get(theirs) is not None:
            put(table, ours, args[theirs])
    unknown += precision_of(args, table)
    for ours, value in migrate_flags.settings(args):
        put(table, ours, value)
    if args.get("load") == args.get("save"):  # goes on with its own, as ours does unasked
        table.get("checkpoint", {}).pop("resume", None)
    if args.get("save_retain_interval"):  # of the others the last alone stays
        put(table, "checkpoint.keep", 1)
    if args.get("data_path") or args.get("mock_data"):
        put(table, "data.order", "megatron")
        table["data"].setdefault("split", "969,30,1")
    if args.get("mock_data"):
        put(table, "data.source", "mock")
    elif isinstance(paths := args.get("data_path"), list):  # weights and prefixes
        del table["data"]["source"]
        table["data"]["blend"] = dict(zip(paths[1::2], paths[::2], strict=False))
    if args.get("tokenizer_type") == "NullTokenizer" and args.get("vocab_size"):
        put(table, "data.tokenizer", f"null:{args['vocab_size']}")
    if args.get("optimizer", "adam") == "sgd":
        table["optimizer"].setdefault("momentum", 0.9)
    elif args.get("optimizer") != "lion":
        put(table, "optimizer.betas", [args.get("adam_beta1", 0.9), args.get("adam_beta2", 0.999)])
    put(table, "optimizer.name", {"adam": "adamw"}.get(args.get("optimizer", "adam"), args.get("optimizer")))
    table["optimizer"].setdefault("weight_decay", 0.01)
    if args.get("micro_batch_size") and not args.get("global_batch_size"):
        unknown.append("global_batch_size, which is micro_batch_size times the data-parallel ranks: say training.global_batch")
    style = args.get("lr_decay_style", "linear").replace("-", "_").lower()
    put(table, "optimizer.schedule", "inverse_sqrt" if style == "inverse_square_root" else style)
    if args.get("lr_decay_iters") is not None:
        put(table, "optimizer.decay_steps", args["lr_decay_iters"] - args.get("lr_warmup_iters", 0))
    if style == "wsd" and args.get("lr_wsd_decay_iters") is not None:
        put(table, "optimizer.decay_steps", args["lr_wsd_decay_iters"])
        put(table, "optimizer.decay_shape", args.get("lr_wsd_decay_style", "exponential"))
    if args.get("recompute_granularity") or args.get("recompute_activations"):
        put(table, "training.remat", args.get("recompute_granularity") or "selective")
    sharded = args.get("use_torch_fsdp2") or args.get("use_megatron_fsdp")
    rules = "fsdp_tp_sp" if sharded else "zero1_tp_sp" if args.get("use_distributed_optimizer") else "tp_sp"
    put(table, "sharding.rules", rules if args.get("sequence_parallel") or sharded else rules.removesuffix("_sp"))
    put(table, "mesh.dp", -1)
    if args.get("finetune") or args.get("no_load_optim"):
        put(table, "checkpoint.load", "params")
    if args.get("dist_ckpt_strictness"):
        put(table, "checkpoint.strict", STRICT.get(args["dist_ckpt_strictness"], "both"))
    put(table, "log.tensorboard", bool(args.get("tensorboard_dir")))
    known = MODEL.keys() | RUN.keys() | PRECISION.keys() | PRECISION_SWITCHES | MODEL_SWITCHES | RUN_SWITCHES | SILENT
    known = known | migrate_flags.READ
    return table, unknown + [f"{name} = {value}" for name, value in args.items() if name not in known]


def precision_of(args: Mapping[str, Any], table: Table) -> list[str]:
    """Put what Megatron-LM's flags say of precision into our table; what has no counterpart.

    Its gradients are added up and reduced in fp32 unless grad_reduce_in_bf16 makes both bf16. Its precision-aware optimizer
    keeps parameters as bf16 and 16 bits more unless told otherwise; without it, moments are fp32.
    """
    aware, bf16 = bool(args.get("use_precision_aware_optimizer")), bool(args.get("bf16"))
    put(table, "training.dtype", "fp16" if args.get("fp16") else "bf16" if bf16 else "fp32")
    for theirs, ours in PRECISION.items():
        if args.get(theirs) is None or (not aware and theirs.endswith("_dtype")):
            continue
        put(table, ours, f"{args[theirs]:g}" if theirs == "loss_scale" else args[theirs])
    if args.get("grad_reduce_in_bf16"):
        put(table, "training.accumulate_dtype", "bf16")
        put(table, "training.reduce_dtype", "bf16")
    whole = args.get("no_store_param_remainders") or args.get("store_param_remainders") is False
    if aware and bf16 and not whole:
        put(table, "training.param_dtype", "bf16")
    main = args.get("main_params_dtype", "fp32")
    return [] if main == "fp32" else [f"main_params_dtype = {main}"]


def convert_config(path: str) -> tuple[str, list[str]]:
    """(our TOML, lines for what has no counterpart) of a file of Megatron-LM's flags, or TorchTitan's TOML."""
    left = []
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".toml"):
            table, unknown = from_torchtitan(tomllib.loads(text))
        else:
            args = flags_of(text)
            opened = open_of(args)
            left = [f"{name} = {value}: the file does not set it" for name, value in opened.items()]
            table, unknown = from_megatron({name: value for name, value in args.items() if name not in opened})
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    run = RunConfig()
    for key, value in _leaves(table):
        try:
            run = toml.update(run, _nested(key, value), path)
        except ConfigError as error:  # a value that ours cannot take is told, not lost
            left.append(str(error).removeprefix(f"{path}: "))
    for key, check in CHECKS.items():
        try:
            check(run)
        except (ValueError, TypeError) as error:
            group, name = key.split(".")
            left.append(str(error))
            run = toml.update(run, {group: {name: getattr(getattr(RunConfig(), group), name)}}, path)
    return toml.dumps(run), unknown + left


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        deeper = isinstance(value, dict) and name != "overrides"
        found += _leaves(value, f"{prefix}{name}.") if deeper else [(prefix + name, value)]
    return found


def _nested(key: str, value: Any) -> Table:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def main(words: Sequence[str]) -> None:
    """Print our TOML for a file of theirs, or write it; each setting without a counterpart is a line on stderr."""
    if len(words) not in (1, 2):
        raise ConfigError(f"convert config: expected FLAGS|TOML [NEW.toml], got {' '.join(words) or 'nothing'}")
    if not Path(words[0]).is_file():
        raise ConfigError(f"{words[0]}: no such file")
    if len(words) == 2 and Path(words[1]).exists():
        raise ConfigError(f"{words[1]} exists: name a new file, or delete it first")
    text, unknown = convert_config(words[0])
    for line in unknown:
        print(f"no counterpart: {line}", file=sys.stderr)
    if len(words) == 2:
        Path(words[1]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
