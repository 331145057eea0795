"""Hugging Face configs of families with experts: what they add to the fields of a dense decoder, and back.

mixtral      every layer; softmax over the chosen
qwen3_moe    layers by step or list; softmax over all, made to sum to one or not
deepseek_v2  latent attention, shared experts, groups by their best score; softmax over all
deepseek_v3  the same with sigmoids, a balance bias, groups by their best two scores; further tokens
gpt_oss      sinks, biases, a clamped swiglu, windows in every other layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fmegatron.models.config import Config
from fmegatron.nn.moe import Moe

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
QUICK = 1.702  # the gain of quick_gelu, which gpt-oss calls swiglu_alpha
# what training alone reads, or how it is computed
TRAINING = ("bias_rate", "switch_loss", "sequence_loss", "global_loss", "global_average", "z_loss", "jitter",
            "router_dtype", "capacity", "drop")  # fmt: skip


# -- in -------------------------------------------------------------------------------------------------------------
def as_dense(c: Mapping[str, Any]) -> dict[str, Any]:
    """The config as a dense decoder's would say it."""
    if not c["model_type"].startswith("deepseek"):
        return dict(c)
    return {
        **c,
        "head_dim": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        "num_key_value_heads": c["num_attention_heads"],
        "partial_rotary_factor": 1.0,
    }


def with_experts(dense: Config, c: Mapping[str, Any]) -> Config:
    """The fields that a family adds to those of its dense decoder."""
    kind = c["model_type"]
    experts = int(c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts") or 0)
    chosen = c["num_experts_per_tok"]
    if kind == "mixtral":
        return replace(dense, moe=Moe(experts, chosen, jitter=c.get("router_jitter_noise", 0.0)))
    if kind == "qwen3_moe":
        step, dense_layers = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or ()
        flags = tuple(i not in dense_layers and (i + 1) % step == 0 for i in range(dense.layers))
        layers: int | tuple[bool, ...] = 1 if all(flags) else flags
        normalize = bool(c.get("norm_topk_prob", False))
        return replace(dense, moe=Moe(experts, chosen, normalize=normalize, mlp=c["moe_intermediate_size"], layers=layers))
    if kind == "gpt_oss":
        moe = Moe(experts, chosen, logit_bias=True)
        clamp: dict[str, Any] = {"activation": "quick_geglu", "glu_limit": float(c.get("swiglu_limit", 7.0)), "glu_offset": 1.0}
        return replace(dense, moe=moe, sink="learned", mlp_bias=True, **clamp)
    ahead = c.get("num_nextn_predict_layers", 0) if kind == "deepseek_v3" else 0
    return replace(dense, **_latent(c), moe=_deepseek(c, experts, chosen), mtp=ahead)


def _latent(c: Mapping[str, Any]) -> dict[str, Any]:
    v3 = c["model_type"] == "deepseek_v3"
    return {
        "kv_lora": c["kv_lora_rank"],
        "q_lora": c.get("q_lora_rank"),
        "rope_hd": c["qk_rope_head_dim"],
        "v_hd": c["v_head_dim"],
        "rope_interleaved": bool(c.get("rope_interleave", True)) if v3 else True,
    }


def _deepseek(c: Mapping[str, Any], experts: int, chosen: int) -> Moe:
    v3 = c["model_type"] == "deepseek_v3"
    grouped = v3 or c.get("topk_method", "greedy") != "greedy"
    groups = {"groups": c["n_group"], "group_top_k": c["topk_group"], "group_best": 2 if v3 else 1} if grouped else {}
    return Moe(
        experts,
        chosen,
        score="sigmoid" if v3 else "softmax",
        normalize=bool(c.get("norm_topk_prob", True)) if v3 else False,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        balance_bias=v3,
        mlp=c["moe_intermediate_size"],
        shared=c["moe_intermediate_size"] * (c.get("n_shared_experts") or 0),
        first_dense=c.get("first_k_dense_replace", 0),
        **groups,
    )


EXPECTED: Mapping[str, Mapping[str, Any]] = {  # settings that have one value here
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v2": {"moe_layer_freq": 1, "norm_topk_prob": False, "attention_bias": False, "mlp_bias": False},
    "deepseek_v3": {"moe_layer_freq": 1, "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "gpt_oss": {"swiglu_alpha": QUICK},
}


# -- out ------------------------------------------------------------------------------------------------------------
def family_with_experts(c: Config) -> str:
    """The family that may hold a model with experts."""
    if c.moe is not None and c.kv_lora is not None:
        return "deepseek_v3" if c.moe.score == "sigmoid" else "deepseek_v2"
    if c.sink == "learned":
        return "gpt_oss"
    return "qwen3_moe" if c.qk_norm == "norm" else "mixtral"


def describe_experts(c: Config, family: str) -> dict[str, Any]:
    """The inverse of `with_experts`: what stands in config.json beside a dense decoder's."""
    m = c.moe
    assert m is not None
    width, shared = m.mlp or c.mlp, {"num_experts_per_tok": m.top_k}
    if family == "mixtral":
        return shared | {"num_local_experts": m.experts, "router_jitter_noise": m.jitter, "intermediate_size": width}
    if family == "gpt_oss":
        clamp: dict[str, Any] = {"swiglu_limit": c.glu_limit, "swiglu_alpha": QUICK, "hidden_act": "silu"}
        if c.rope_scaling is None and c.rope_interpolation == 1.0:
            clamp["rope_scaling"] = {"rope_type": "default"}  # saying nothing is YaRN there
        return shared | clamp | {"num_local_experts": m.experts, "intermediate_size": width}
    shared |= {"moe_intermediate_size": width, "norm_topk_prob": m.normalize}
    if family == "qwen3_moe":
        dense = [i for i in range(c.layers) if not m.at(i)]
        return shared | {"num_experts": m.experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    plain = shared | {
        "n_routed_experts": m.experts,
        "n_shared_experts": m.shared // width,
        "first_k_dense_replace": sum(not m.at(i) for i in range(c.layers)),
        "routed_scaling_factor": m.scale,
        "n_group": m.groups,
        "topk_group": m.group_top_k,
        "kv_lora_rank": c.kv_lora,
        "q_lora_rank": c.q_lora,
        "qk_rope_head_dim": c.rope_hd,
        "qk_nope_head_dim": c.head_dim - c.rope_hd,
        "v_head_dim": c.v_hd or c.head_dim - c.rope_hd,
        "head_dim": c.rope_hd,
        "moe_layer_freq": 1,
    }
    if family == "deepseek_v3":
        more = {"rope_interleave": c.rope_interleaved, "num_nextn_predict_layers": c.mtp}
        return plain | more | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return plain | {"topk_method": "group_limited_greedy" if m.groups > 1 else "greedy"}


def meaning_of(c: Config) -> Moe | None:
    """The experts of a config with defaults written out, and what training alone reads set to one value."""
    m = c.moe
    if m is None:
        return None
    plain = Moe(m.experts, m.top_k)
    fields: dict[str, Any] = {name: getattr(plain, name) for name in TRAINING}
    fields |= {"group_best": m.best} if m.groups > 1 else {"group_top_k": 1, "group_best": None}
    fields |= {"layers": tuple(m.at(i) for i in range(c.layers)), "first_dense": 0, "mlp": m.mlp or c.mlp}
    return replace(m, **fields)


