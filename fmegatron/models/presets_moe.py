"""Published models with experts, as plain data: the sizes of their files and, where reports name them, their balance losses."""

from __future__ import annotations

from typing import Any

from fmegatron.nn.moe import Moe
from fmegatron.nn.rope import Yarn

Fields = dict[str, Any]


def _dims(layers: int, embed: int, heads: int, kv: int | None, mlp: int, moe: Moe, **more: Any) -> Fields:
    return {"layers": layers, "embed": embed, "heads": heads, "kv": kv, "mlp": mlp, "moe": moe, **more}


# arXiv 2401.04088; 8x22b by its files
_MIXTRAL = Moe(8, 2, switch_loss=1e-2)
MIXTRAL: dict[str, Fields] = {
    "8x7b": _dims(32, 4096, 32, 8, 14336, _MIXTRAL),
    "8x22b": _dims(56, 6144, 48, 8, 16384, _MIXTRAL, context=65536),
}
MIXTRAL_BASE: Fields = {"vocab": 32000, "context": 32768, "rope_base": 1000000.0}

# arXiv 2505.09388: the balance of the global batch
QWEN3: dict[str, Fields] = {
    "30b-a3b": _dims(48, 2048, 32, 4, 6144, Moe(128, 8, mlp=768, global_loss=1e-3)),
    "235b-a22b": _dims(94, 4096, 64, 4, 12288, Moe(128, 8, mlp=1536, global_loss=1e-3)),
}

# arXiv 2405.04434 and 2412.19437
_V2_LITE = Moe(64, 6, normalize=False, mlp=1408, shared=2816, first_dense=1, sequence_loss=1e-3)
_V3 = Moe(
    256,
    8,
    score="sigmoid",
    scale=2.5,
    groups=8,
    group_top_k=4,
    group_best=2,
    balance_bias=True,
    mlp=2048,
    shared=2048,
    first_dense=3,
    sequence_loss=1e-4,
)
DEEPSEEK: dict[str, Fields] = {
    "v2-lite": _dims(27, 2048, 16, None, 10944, _V2_LITE, vocab=102400, rope_scaling=Yarn(mscale=0.707, mscale_all=0.707)),
    "v3": _dims(61, 7168, 128, None, 18432, _V3, vocab=129280, mtp=1, q_lora=1536, rope_scaling=Yarn(mscale=1, mscale_all=1)),
}
DEEPSEEK_BASE: Fields = {
    "context": 163840,
    "hd": 192,
    "rope_hd": 64,
    "v_hd": 128,
    "kv_lora": 512,
    "rope_interleaved": True,
    "norm_eps": 1e-6,
}

# arXiv 2508.10925
GPT_OSS: dict[str, Fields] = {
    "20b": _dims(24, 2880, 64, 8, 2880, Moe(32, 4, logit_bias=True)),
    "120b": _dims(36, 2880, 64, 8, 2880, Moe(128, 4, logit_bias=True)),
}
GPT_OSS_BASE: Fields = {
    "vocab": 201088,
    "context": 131072,
    "hd": 64,
    "rope_base": 150000.0,
    "rope_scaling": Yarn(factor=32.0, truncate=False),
    "window": 128,
    "no_window": 2,
    "sink": "learned",
    "attention_bias": True,
    "attention_out_bias": True,
    "activation": "quick_geglu",
    "glu_limit": 7.0,
    "glu_offset": 1.0,
    "mlp_bias": True,
}
