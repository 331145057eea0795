"""Hugging Face configs: how the fields of a config.json map to ours, and back.

    config_of(json.load(file))      a Config                 describe(config)       config.json of the same model

`describe` is held to be the inverse: what it writes is read again, and must give the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from fmegatron.models import hf_moe
from fmegatron.models.config import Config, chosen
from fmegatron.models.hf_rope import describe_rope, rope_fields

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


# -- in -------------------------------------------------------------------------------------------------------------
def refuse(c: Mapping[str, Any], **expected: Any) -> None:
    """Raise ValueError where a setting has a value that our decoder does not know."""
    for name, value in expected.items():
        if c.get(name, value) != value:
            raise ValueError(f"config.json: {name} = {c[name]!r} is not supported, only {value!r}")


def activation(c: Mapping[str, Any], name: str) -> str:
    """Our name of their activation; raises ValueError where there is none."""
    if c[name] not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} = {c[name]!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[c[name]]


def window_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows: their layer_types, or all layers."""
    window, types = c.get("sliding_window"), c.get("layer_types")
    if window is None or not c.get("use_sliding_window", True):
        return {}
    layers = c["num_hidden_layers"]
    if types is None and c["model_type"] == "gemma2":
        types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if types is None and "max_window_layers" in c:
        types = ["full_attention" if i < c["max_window_layers"] else "sliding_attention" for i in range(layers)]
    whole = tuple(kind == "full_attention" for kind in types) if types else (False,) * layers
    return {} if all(whole) else {"window": window, "no_window": whole if any(whole) else 0}


def llama_config(c: Mapping[str, Any]) -> Config:
    """Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma 2: one config but for a few fields."""
    kind = c["model_type"]
    gemma, qwen2 = kind in ("gemma", "gemma2"), kind == "qwen2"
    refuse(c, pretraining_tp=1)
    act = activation(c, "hidden_activation" if gemma and c.get("hidden_activation") else "hidden_act")
    bias = qwen2 or bool(c.get("attention_bias", False))
    fields: dict[str, Any] = rope_fields(c) | window_fields(c)
    if gemma:
        fields |= {"norm_centred": True, "embed_multiplier": math.sqrt(c["hidden_size"])}
    if kind == "gemma2":
        fields |= {"norm_at": "peri", "attention_scale": c["query_pre_attn_scalar"] ** -0.5}
        fields |= {"attention_softcap": c["attn_logit_softcapping"], "logit_softcap": c["final_logit_softcapping"]}
    return Config(
        layers=c["num_hidden_layers"],
        embed=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv=c.get("num_key_value_heads") or c["num_attention_heads"],
        hd=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        mlp=c["intermediate_size"],
        vocab=c["vocab_size"],
        context=c["max_position_embeddings"],
        activation=GATED[act],
        attention_bias=bias,
        attention_out_bias=bias and not qwen2,
        mlp_bias=bool(c.get("mlp_bias", False)),
        qk_norm="norm" if kind in ("qwen3", "qwen3_moe") else "none",
        norm_eps=c["rms_norm_eps"],
        tied=bool(c.get("tie_word_embeddings", gemma)),
        attention_dropout=c.get("attention_dropout", 0.0),
        init_std=c.get("initializer_range", 0.02),
        **fields,
    )


def gpt2_config(c: Mapping[str, Any]) -> Config:
    """GPT-2."""
    refuse(c, scale_attn_weights=True, add_cross_attention=False)
    return Config(
        layers=c["n_layer"],
        embed=c["n_embd"],
        heads=c["n_head"],
        mlp=c.get("n_inner") or 4 * c["n_embd"],
        vocab=c["vocab_size"],
        context=c["n_positions"],
        positions="learned",
        norm="layer",
        norm_eps=c["layer_norm_epsilon"],
        activation=activation(c, "activation_function"),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied=bool(c.get("tie_word_embeddings", True)),
        depth_scaling=bool(c.get("scale_attn_by_inverse_layer_idx", False)),
        embed_dropout=c.get("embd_pdrop", 0.0),
        attention_dropout=c.get("attn_pdrop", 0.0),
        hidden_dropout=c.get("resid_pdrop", 0.0),
        init_std=c.get("initializer_range", 0.02),
    )


def config_of(c: Mapping[str, Any]) -> Config:
    """Our config of a config.json. Raises ValueError naming a setting that is not supported."""
    if c["model_type"] == "gpt2":
        return gpt2_config(c)
    if c["model_type"] not in hf_moe.FAMILIES:
        return llama_config(c)
    refuse(c, **hf_moe.EXPECTED[c["model_type"]])
    return hf_moe.with_experts(llama_config(hf_moe.as_dense(c)), c)


# -- out ------------------------------------------------------------------------------------------------------------
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
TRAINING = (  # what a model computes at inference does not depend on these
    "vocab_pad", "label_smoothing", "z_loss", "loss_chunks", "embed_dropout", "attention_dropout", "hidden_dropout",
    "init_std", "init_scaled", "mtp_weight")  # fmt: skip
SPOKEN = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}  # the first of their names for it
UNGATED = {gated: plain for plain, gated in GATED.items()}


def family_of(c: Config) -> str:
    """The Hugging Face family that may hold a model; `describe` checks that it does."""
    if c.moe is not None:
        return hf_moe.family_with_experts(c)
    if c.norm == "layer" or c.positions == "learned":
        return "gpt2"
    if c.norm_centred:
        return "gemma2" if c.norm_at == "peri" else "gemma"
    if c.qk_norm == "norm":
        return "qwen3"
    if c.attention_bias and not c.attention_out_bias:
        return "qwen2"
    return "mistral" if c.window is not None else "llama"


def describe(c: Any) -> dict[str, Any]:
    """The config.json of a model, in the form that transformers 4 and 5 both read.

    Raises ValueError, naming the family and the setting, where no config.json of it gives the same model.
    """
    if not isinstance(c, Config):
        raise ValueError("a model of your own has no config that a Hugging Face family knows")
    family = family_of(c)
    plain = describe_gpt2(c) if family == "gpt2" else describe_llama(c, family)
    plain |= hf_moe.describe_experts(c, family) if c.moe is not None else {}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    plain = {"architectures": [ARCHITECTURES[family]], "model_type": family} | plain | ends
    for name, a, b in _differences(_meaning(c), _meaning(config_of(plain))):
        raise ValueError(f"{name} = {a!r} has no counterpart in a Hugging Face {family}: its config can only say {b!r}")
    return plain


def _differences(ours: Any, back: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, ours, theirs) of fields of two dataclasses that are not the same."""
    for field in fields(ours):
        a, b, name = getattr(ours, field.name), getattr(back, field.name), prefix + field.name
        if is_dataclass(a) and type(a) is type(b):
            yield from _differences(a, b, f"{name}.")
        elif a != b and not (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12)):
            yield name, a, b


def _meaning(c: Config) -> Config:
    """The config with defaults written out, windows by layer, and what only training reads set to one value."""
    reset = {field.name: field.default for field in fields(Config) if field.name in TRAINING}
    windows = tuple(c.window is None or chosen(c.no_window, i) for i in range(c.layers))
    return replace(
        c,
        kv=c.heads if c.kv is None else c.kv,
        hd=c.head_dim,
        attention_scale=c.scale,
        window=None if all(windows) else c.window,
        no_window=windows,
        no_rope=tuple(chosen(c.no_rope, i) for i in range(c.layers)),
        v_hd=None if c.latent is None else c.latent.v_hd,
        moe=hf_moe.meaning_of(c),
        # a dense width that no layer has
        mlp=c.mlp if c.moe is None or not all(c.moe.at(i) for i in range(c.layers)) else 0,
        **reset,  # type: ignore[arg-type]
    )


def describe_llama(c: Config, family: str) -> dict[str, Any]:
    """The inverse of `llama_config`."""
    act = "silu" if family == "gpt_oss" else SPOKEN.get(UNGATED.get(c.activation, ""), "")
    if c.activation == "geglu_tanh" and family.startswith("gemma"):
        act = "gelu_pytorch_tanh"
    if not act:
        raise ValueError(f"activation = {c.activation!r} has no counterpart in a Hugging Face {family}")
    plain: dict[str, Any] = {
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads if c.kv is None else c.kv,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        "vocab_size": c.vocab,
        "max_position_embeddings": c.context,
        "hidden_act": act,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
    } | describe_rope(c)
    if family != "qwen2":
        plain["attention_bias"] = c.attention_bias
    if family == "llama":
        plain["mlp_bias"] = c.mlp_bias
    if family.startswith("gemma"):
        plain["hidden_activation"] = act
    if family == "gemma2":
        scale = c.scale
        plain["query_pre_attn_scalar"] = round(scale**-2) if math.isclose(scale**-2, round(scale**-2)) else scale**-2
        plain |= {"attn_logit_softcapping": c.attention_softcap, "final_logit_softcapping": c.logit_softcap}
    if family != "llama":
        plain["sliding_window"] = c.window
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        plain["use_sliding_window"] = c.window is not None
    if c.window is not None and family != "mistral":
        whole = [chosen(c.no_window, i) for i in range(c.layers)]
        plain["layer_types"] = ["full_attention" if full else "sliding_attention" for full in whole]
    return plain


def describe_gpt2(c: Config) -> dict[str, Any]:
    """The inverse of `gpt2_config`."""
    if c.activation not in SPOKEN:
        raise ValueError(f"activation = {c.activation!r} has no counterpart in a Hugging Face gpt2")
    return {
        "n_layer": c.layers,
        "n_embd": c.embed,
        "n_head": c.heads,
        "n_inner": c.mlp,
        "vocab_size": c.vocab,
        "n_positions": c.context,
        "n_ctx": c.context,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": SPOKEN[c.activation],
        "tie_word_embeddings": c.tied,
        "scale_attn_by_inverse_layer_idx": c.depth_scaling,
        "embd_pdrop": c.embed_dropout,
        "attn_pdrop": c.attention_dropout,
        "resid_pdrop": c.hidden_dropout,
        "initializer_range": c.init_std,
    }
