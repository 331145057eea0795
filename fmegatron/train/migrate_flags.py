"""Megatron-LM's flags that say a thing together: experts, latent attention, stages, schedules in samples, fp8, faults.

    for key, value in settings(args): ...          our keys, "model.NAME" for a field of models.Config
    READ                                           the flags that are read here

What has a meaning of its own there is told in docs/migration.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Args = Mapping[str, Any]
Table = dict[str, Any]
Setting = tuple[str, Any]
PLAIN = {  # Megatron-LM's flag: our key
    "pipeline_model_parallel_size": "mesh.pp", "pipeline_model_parallel_layout": "pipeline.layout",
    "exit_duration_in_mins": "run.minutes", "exit_interval": "run.exit_interval", "wandb_exp_name": "run.name",
    "wandb_project": "log.wandb", "full_validation": "validation.full", "rampup_batch_size": "training.rampup_batch",
    "lr_warmup_fraction": "optimizer.warmup_fraction", "lr_warmup_init": "optimizer.warmup_init",
    "start_weight_decay": "optimizer.weight_decay_start", "end_weight_decay": "optimizer.weight_decay",
    "weight_decay_incr_style": "optimizer.weight_decay_shape", "muon_momentum": "optimizer.momentum",
    "non_persistent_save_interval": "local.interval", "non_persistent_local_ckpt_dir": "local.folder",
    "mtp_num_layers": "model.mtp", "mtp_loss_scaling_factor": "model.mtp_weight", "fp8_format": "fp8.format",
    "fp8_margin": "fp8.margin", "fp8_amax_history_len": "fp8.history", "fp8_amax_compute_algo": "fp8.algorithm",
}  # fmt: skip
EXPERTS = {  # Megatron-LM's flag: a field of nn.moe.Moe
    "num_experts": "experts", "moe_router_topk": "top_k", "moe_ffn_hidden_size": "mlp", "moe_latent_size": "latent",
    "moe_shared_expert_intermediate_size": "shared", "moe_shared_expert_gate": "shared_gate", "moe_layer_freq": "layers",
    "moe_router_score_function": "score", "moe_router_topk_scaling_factor": "scale", "moe_router_num_groups": "groups",
    "moe_router_group_topk": "group_top_k", "moe_router_enable_expert_bias": "balance_bias",
    "moe_router_bias_update_rate": "bias_rate", "moe_z_loss_coeff": "z_loss", "moe_input_jitter_eps": "jitter",
    "moe_router_dtype": "router_dtype", "moe_router_force_load_balancing": "forced", "moe_expert_capacity_factor": "capacity",
    "moe_token_drop_policy": "drop",
}  # fmt: skip
BALANCE = {"aux_loss": "switch_loss", "seq_aux_loss": "sequence_loss", "global_aux_loss": "global_loss"}
SWITCHES = {  # read by the functions below
    "moe_router_pre_softmax", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "multi_latent_attention", "kv_lora_rank",
    "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank", "train_samples", "lr_warmup_samples", "lr_decay_samples", "lr_wsd_decay_samples",
    "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "fp8_recipe", "rerun_mode", "replication",
    "replication_jump", "replication_factor", "non_persistent_ckpt_type", "profile", "profile_step_start", "profile_step_end",
    "profile_ranks", "log_params_norm", "manual_gc", "manual_gc_interval",
}  # fmt: skip
SILENT = {  # how it is done there, or what is always done here
    "moe_grouped_gemm", "moe_token_dispatcher_type", "moe_permute_fusion", "moe_router_fusion", "moe_per_layer_logging",
    "use_pytorch_profiler", "log_throughput", "log_memory_to_tensorboard", "log_validation_ppl_to_tensorboard",
    "exit_signal_handler", "no_save_rng", "no_load_rng", "no_manual_gc_eval",
}  # fmt: skip
READ = frozenset(PLAIN.keys() | EXPERTS.keys() | SWITCHES | SILENT)


def put(table: Table, key: str, value: Any) -> None:
    """Set a key of our table; "model.NAME" is a field of models.Config, but for the preset's name."""
    group, name = key.split(".")
    found = table.setdefault(group, {})
    (found.setdefault("overrides", {}) if group == "model" and name != "preset" else found)[name] = value


def settings(args: Args) -> Iterator[Setting]:
    """Our keys and values, for those of the flags that are given."""
    yield from ((ours, args[theirs]) for theirs, ours in PLAIN.items() if args.get(theirs) is not None)
    for part in (experts, latent, stages, samples, fp8, faults):
        yield from part(args)


def experts(args: Args) -> Iterator[Setting]:
    """The block of experts; weights are normalised unless the softmax comes before the choice."""
    if not args.get("num_experts"):
        return
    moe = {ours: args[theirs] for theirs, ours in EXPERTS.items() if args.get(theirs) is not None}
    if args.get("moe_router_pre_softmax"):
        moe["normalize"] = False
    kind = args.get("moe_router_load_balancing_type", "aux_loss")
    if kind == "sinkhorn":
        moe["sinkhorn"] = True
    elif kind in BALANCE:
        moe[BALANCE[kind]] = args.get("moe_aux_loss_coeff", 0.0)
    yield "model.moe", moe


def latent(args: Args) -> Iterator[Setting]:
    """Multi-latent attention, with its defaults there; a head's features are those that turn and those that do not."""
    if not args.get("multi_latent_attention"):
        return
    turned = args.get("qk_pos_emb_head_dim", 64)
    yield from {"model.kv_lora": args.get("kv_lora_rank", 32), "model.q_lora": args.get("q_lora_rank"), "model.kv": None,
                "model.hd": args.get("qk_head_dim", 128) + turned, "model.rope_hd": turned,
                "model.v_hd": args.get("v_head_dim", 128)}.items()


def stages(args: Args) -> Iterator[Setting]:
    """Several stages on a rank are the interleaved schedule."""
    each, virtual = args.get("num_layers_per_virtual_pipeline_stage"), args.get("num_virtual_stages_per_pipeline_rank")
    if each:
        virtual = args["num_layers"] // (args.get("pipeline_model_parallel_size", 1) * each)
    if virtual and virtual > 1:
        yield from (("pipeline.schedule", "interleaved_1f1b"), ("pipeline.virtual", virtual))


def samples(args: Args) -> Iterator[Setting]:
    """A run and schedules that are counted in samples; what a resumed run keeps of them."""
    if args.get("train_samples"):
        warm, decay = args.get("lr_warmup_samples", 0), args.get("lr_decay_samples")
        yield from (("optimizer.unit", "samples"), ("optimizer.warmup", warm))
        if args.get("global_batch_size"):
            yield "training.steps", args["train_samples"] // args["global_batch_size"]
        if decay is not None:
            yield "optimizer.decay_steps", decay - warm
        if args.get("lr_wsd_decay_samples") is not None:
            yield "optimizer.decay_steps", args["lr_wsd_decay_samples"]
    if args.get("override_opt_param_scheduler"):
        yield "optimizer.on_resume", "override"
    elif args.get("use_checkpoint_opt_param_scheduler"):
        yield "optimizer.on_resume", "restore"


def fp8(args: Args) -> Iterator[Setting]:
    """The recipe, of which delayed is the default there."""
    if args.get("fp8_format"):
        yield "fp8.recipe", args.get("fp8_recipe", "delayed")


def faults(args: Args) -> Iterator[Setting]:
    """Steps run again, copies on other nodes' disks (one copy without --replication), traces, norms at each step, garbage."""
    if args.get("rerun_mode", "disabled") != "disabled":
        yield "faults.rerun", args["rerun_mode"] == "validate_results" or args["rerun_mode"]
    if args.get("non_persistent_ckpt_type") == "local" or args.get("replication"):
        yield "local.factor", args.get("replication_factor", 2) if args.get("replication") else 1
        if args.get("replication_jump"):
            yield "local.jump", args["replication_jump"]
    if args.get("profile"):  # its steps are counted from 0
        yield "profile.steps", [args.get("profile_step_start", 10) + 1, args.get("profile_step_end", 12)]
        ranks = args.get("profile_ranks", [0])
        yield "profile.ranks", ranks if isinstance(ranks, list) else [ranks]
    if args.get("log_params_norm"):
        yield "monitors.norms", 1
    if args.get("manual_gc") and args.get("manual_gc_interval"):  # without one it never collects there
        yield "training.collect", args["manual_gc_interval"]
