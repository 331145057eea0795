"""Hugging Face families as data: how a config's fields map to ours, and an entry for each tensor of theirs.

    ("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "layers.attn.q")     their name, their layout, our leaf

The layout names the dims of their tensor; our leaf's declaration names the same dims in our order. Read from left to
right an entry imports, from right to left it exports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fmegatron.models.config import Config
from fmegatron.nn.rope import Llama3Scaling


class Entry(NamedTuple):
    """One tensor of theirs: name ({} is the layer), layout, and our leaf; several leaves lie along the dim `part`."""

    theirs: str
    layout: str
    ours: str


# Entries whose leaf a model does not declare (biases, q_norm, an untied head) are left out for it.
LLAMA = (
    Entry("model.embed_tokens.weight", "vocab embed", "embed.token"),
    Entry("model.layers.{}.input_layernorm.weight", "embed", "layers.attn_norm.weight"),
    Entry("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "layers.attn.q"),
    Entry("model.layers.{}.self_attn.k_proj.weight", "(kv hd) embed", "layers.attn.k"),
    Entry("model.layers.{}.self_attn.v_proj.weight", "(kv hd) embed", "layers.attn.v"),
    Entry("model.layers.{}.self_attn.o_proj.weight", "embed (heads hd)", "layers.attn.o"),
    Entry("model.layers.{}.self_attn.q_proj.bias", "(heads hd)", "layers.attn.q_bias"),
    Entry("model.layers.{}.self_attn.k_proj.bias", "(kv hd)", "layers.attn.k_bias"),
    Entry("model.layers.{}.self_attn.v_proj.bias", "(kv hd)", "layers.attn.v_bias"),
    Entry("model.layers.{}.self_attn.o_proj.bias", "embed", "layers.attn.o_bias"),
    Entry("model.layers.{}.self_attn.q_norm.weight", "hd", "layers.attn.q_norm.weight"),
    Entry("model.layers.{}.self_attn.k_norm.weight", "hd", "layers.attn.k_norm.weight"),
    Entry("model.layers.{}.post_attention_layernorm.weight", "embed", "layers.mlp_norm.weight"),
    Entry("model.layers.{}.mlp.gate_proj.weight", "mlp embed", "layers.mlp.gate"),
    Entry("model.layers.{}.mlp.up_proj.weight", "mlp embed", "layers.mlp.up"),
    Entry("model.layers.{}.mlp.down_proj.weight", "embed mlp", "layers.mlp.down"),
    Entry("model.layers.{}.mlp.gate_proj.bias", "mlp", "layers.mlp.gate_bias"),
    Entry("model.layers.{}.mlp.up_proj.bias", "mlp", "layers.mlp.up_bias"),
    Entry("model.layers.{}.mlp.down_proj.bias", "embed", "layers.mlp.down_bias"),
    Entry("model.norm.weight", "embed", "norm.weight"),
    Entry("lm_head.weight", "vocab embed", "head.weight"),
)
GEMMA2 = (
    *(entry for entry in LLAMA if "layernorm" not in entry.theirs),
    Entry("model.layers.{}.input_layernorm.weight", "embed", "layers.attn_norm.weight"),
    Entry("model.layers.{}.post_attention_layernorm.weight", "embed", "layers.attn_out_norm.weight"),
    Entry("model.layers.{}.pre_feedforward_layernorm.weight", "embed", "layers.mlp_norm.weight"),
    Entry("model.layers.{}.post_feedforward_layernorm.weight", "embed", "layers.mlp_out_norm.weight"),
)
GPT2 = (
    Entry("transformer.wte.weight", "vocab embed", "embed.token"),
    Entry("transformer.wpe.weight", "position embed", "embed.position"),
    Entry("transformer.h.{}.ln_1.weight", "embed", "layers.attn_norm.weight"),
    Entry("transformer.h.{}.ln_1.bias", "embed", "layers.attn_norm.bias"),
    Entry("transformer.h.{}.attn.c_attn.weight", "embed (part heads hd)", "layers.attn.q layers.attn.k layers.attn.v"),
    Entry(
        "transformer.h.{}.attn.c_attn.bias",
        "(part heads hd)",
        "layers.attn.q_bias layers.attn.k_bias layers.attn.v_bias",
    ),
    Entry("transformer.h.{}.attn.c_proj.weight", "(heads hd) embed", "layers.attn.o"),
    Entry("transformer.h.{}.attn.c_proj.bias", "embed", "layers.attn.o_bias"),
    Entry("transformer.h.{}.ln_2.weight", "embed", "layers.mlp_norm.weight"),
    Entry("transformer.h.{}.ln_2.bias", "embed", "layers.mlp_norm.bias"),
    Entry("transformer.h.{}.mlp.c_fc.weight", "embed mlp", "layers.mlp.up"),
    Entry("transformer.h.{}.mlp.c_fc.bias", "mlp", "layers.mlp.up_bias"),
    Entry("transformer.h.{}.mlp.c_proj.weight", "mlp embed", "layers.mlp.down"),
    Entry("transformer.h.{}.mlp.c_proj.bias", "embed", "layers.mlp.down_bias"),
    Entry("transformer.ln_f.weight", "embed", "norm.weight"),
    Entry("transformer.ln_f.bias", "embed", "norm.bias"),
    Entry("lm_head.weight", "vocab embed", "head.weight"),
)
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


# -- configs --------------------------------------------------------------------------------------------------------
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


def rope_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, in the form of transformers 5 (rope_parameters) or before (rope_theta, rope_scaling)."""
    given = c.get("rope_parameters") or {}
    scaling = given or c.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields: dict[str, Any] = {"rope_base": float(given.get("rope_theta", c.get("rope_theta", 10000.0)))}
    fields["rope_fraction"] = float(given.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)))
    if kind == "linear":
        return fields | {"rope_interpolation": float(scaling["factor"])}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, context = (scaling[name] for name in names)
        return fields | {"rope_scaling": Llama3Scaling(float(factor), float(low), float(high), int(context))}
    if kind != "default":
        raise ValueError(f"config.json: rope_type = {kind!r} is not supported, only default, linear and llama3")
    return fields


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


def llama(c: Mapping[str, Any]) -> Config:
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
        qk_norm="norm" if kind == "qwen3" else "none",
        norm_eps=c["rms_norm_eps"],
        tied=bool(c.get("tie_word_embeddings", gemma)),
        attention_dropout=c.get("attention_dropout", 0.0),
        init_std=c.get("initializer_range", 0.02),
        **fields,
    )


def gpt2(c: Mapping[str, Any]) -> Config:
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


FAMILIES = {
    "gpt2": (gpt2, GPT2),
    "llama": (llama, LLAMA),
    "mistral": (llama, LLAMA),
    "qwen2": (llama, LLAMA),
    "qwen3": (llama, LLAMA),
    "gemma": (llama, LLAMA),
    "gemma2": (llama, GEMMA2),
}
EXTRA = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers that old files carry
