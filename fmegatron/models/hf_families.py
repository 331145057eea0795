"""Hugging Face families as data: an entry for each tensor of theirs.

Entries whose leaf a model does not declare (biases, q_norm, an untied head, experts) are left out for it; of two entries with
one leaf the later counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fmegatron.models.hf_entries import Entry

Table = tuple[Entry, ...]

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
MIXTRAL = (
    *LLAMA,
    Entry("model.layers.{}.block_sparse_moe.gate.weight", "router_expert embed", "layers.mlp.router.weight"),
    Entry("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", "expert_mlp embed", "layers.mlp.experts.gate"),
    Entry("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", "expert_mlp embed", "layers.mlp.experts.up"),
    Entry("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", "embed expert_mlp", "layers.mlp.experts.down"),
)
QWEN3_MOE = (
    *LLAMA,
    Entry("model.layers.{}.mlp.gate.weight", "router_expert embed", "layers.mlp.router.weight"),
    Entry("model.layers.{}.mlp.experts.{}.gate_proj.weight", "expert_mlp embed", "layers.mlp.experts.gate"),
    Entry("model.layers.{}.mlp.experts.{}.up_proj.weight", "expert_mlp embed", "layers.mlp.experts.up"),
    Entry("model.layers.{}.mlp.experts.{}.down_proj.weight", "embed expert_mlp", "layers.mlp.experts.down"),
)
LATENT = (
    *QWEN3_MOE,
    Entry("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "layers.attn.q_up"),
    Entry("model.layers.{}.self_attn.kv_a_proj_with_mqa.weight", "kv_down embed", "layers.attn.kv_down"),
    Entry("model.layers.{}.self_attn.kv_a_layernorm.weight", "kv_lora", "layers.attn.kv_norm.weight"),
    Entry("model.layers.{}.self_attn.kv_b_proj.weight", "(heads kv_up) kv_lora", "layers.attn.kv_up"),
    Entry("model.layers.{}.self_attn.o_proj.weight", "embed (heads v_hd)", "layers.attn.o"),
    Entry("model.layers.{}.mlp.gate.e_score_correction_bias", "router_expert", "layers.mlp.router.balance"),
    Entry("model.layers.{}.mlp.shared_experts.gate_proj.weight", "shared_mlp embed", "layers.mlp.shared.gate"),
    Entry("model.layers.{}.mlp.shared_experts.up_proj.weight", "shared_mlp embed", "layers.mlp.shared.up"),
    Entry("model.layers.{}.mlp.shared_experts.down_proj.weight", "embed shared_mlp", "layers.mlp.shared.down"),
)
LATENT_QUERIES = (
    *LATENT,
    Entry("model.layers.{}.self_attn.q_a_proj.weight", "q_lora embed", "layers.attn.q_down"),
    Entry("model.layers.{}.self_attn.q_a_layernorm.weight", "q_lora", "layers.attn.q_norm.weight"),
    Entry("model.layers.{}.self_attn.q_b_proj.weight", "(heads hd) q_lora", "layers.attn.q_up"),
)
GPT_OSS = (
    *LLAMA,
    Entry("model.layers.{}.self_attn.sinks", "heads", "layers.attn.sink"),
    Entry("model.layers.{}.mlp.router.weight", "router_expert embed", "layers.mlp.router.weight"),
    Entry("model.layers.{}.mlp.router.bias", "router_expert", "layers.mlp.router.bias"),
    Entry(
        "model.layers.{}.mlp.experts.gate_up_proj",
        "expert embed (expert_mlp part)",
        "layers.mlp.experts.gate layers.mlp.experts.up",
    ),
    Entry(
        "model.layers.{}.mlp.experts.gate_up_proj_bias",
        "expert (expert_mlp part)",
        "layers.mlp.experts.gate_bias layers.mlp.experts.up_bias",
    ),
    Entry("model.layers.{}.mlp.experts.down_proj", "expert expert_mlp embed", "layers.mlp.experts.down"),
    Entry("model.layers.{}.mlp.experts.down_proj_bias", "expert embed", "layers.mlp.experts.down_bias"),
)
# Modules that predict further tokens are numbered after the layers; the published files repeat table and head in each.
JOINS = (
    Entry("model.layers.{}.enorm.weight", "embed", "mtp.token_norm.weight"),
    Entry("model.layers.{}.hnorm.weight", "embed", "mtp.h_norm.weight"),
    Entry("model.layers.{}.eh_proj.weight", "embed joined", "mtp.proj"),
    Entry("model.layers.{}.shared_head.norm.weight", "embed", "mtp.norm.weight"),
)


def ahead(table: Table) -> Table:
    """A table with the modules that look ahead: each has a layer like the others."""
    layers = [entry for entry in table if entry.ours.startswith("layers.")]
    return (*table, *JOINS, *(replace(entry, ours=entry.ours.replace("layers.", "mtp.layer.")) for entry in layers))


def entries_of(family: str, sizes: Mapping[str, int]) -> Table:
    """The table of a family's model."""
    table = LATENT_QUERIES if family.startswith("deepseek") and "q_lora" in sizes else ENTRIES[family]
    return ahead(table) if "joined" in sizes else table


ENTRIES: Mapping[str, Table] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": GPT_OSS,
}
# What files carry beside: buffers of old ones, and the copies of table and head
EXTRA = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", ".embed_tokens.weight", ".shared_head.head.weight")
