"""Published models by name: `llama3("8b")`, `preset("llama3:8b", context=4096)`. Plain data, one line a model.

Any field of `Config` can be overridden. Sizes and counts are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fmegatron.models import presets_moe
from fmegatron.models.config import Config, idle
from fmegatron.models.gpt import gpt
from fmegatron.models.model import Model
from fmegatron.nn.moe import experts_of
from fmegatron.nn.rope import Llama3Scaling, scaling_of

Fields = dict[str, Any]


def _dims(layers: int, embed: int, heads: int, kv: int, mlp: int, **more: Any) -> Fields:
    return {"layers": layers, "embed": embed, "heads": heads, "kv": kv, "mlp": mlp, **more}


SCALED = {"context": 131072, "rope_scaling": Llama3Scaling()}
SCALED32 = {"context": 131072, "rope_scaling": Llama3Scaling(factor=32.0)}

# arXiv 2407.21783; 1b and 3b are Llama 3.2, 405b is Llama 3.1; 8b and 70b are Llama 3, their 3.1 successors have "3.1-"
LLAMA3: dict[str, Fields] = {
    "debug": _dims(2, 64, 4, 2, 192, vocab=512, context=512),
    "quickstart": _dims(6, 256, 8, 4, 704, vocab=4096, context=1024, tied=True),
    "1b": _dims(16, 2048, 32, 8, 8192, hd=64, tied=True, **SCALED32),
    "3b": _dims(28, 3072, 24, 8, 8192, hd=128, tied=True, **SCALED32),
    "8b": _dims(32, 4096, 32, 8, 14336),
    "70b": _dims(80, 8192, 64, 8, 28672),
    "3.1-8b": _dims(32, 4096, 32, 8, 14336, **SCALED),
    "3.1-70b": _dims(80, 8192, 64, 8, 28672, **SCALED),
    "405b": _dims(126, 16384, 128, 8, 53248, **SCALED),
}
LLAMA3_BASE: Fields = {"vocab": 128256, "context": 8192, "rope_base": 500000.0}

# arXiv 2307.09288
LLAMA2: dict[str, Fields] = {
    "7b": _dims(32, 4096, 32, 32, 11008),
    "13b": _dims(40, 5120, 40, 40, 13824),
    "70b": _dims(80, 8192, 64, 8, 28672),
}
LLAMA2_BASE: Fields = {"vocab": 32000, "context": 4096}

# Radford et al. 2019
GPT2: dict[str, Fields] = {
    "124m": _dims(12, 768, 12, 12, 3072),
    "355m": _dims(24, 1024, 16, 16, 4096),
    "774m": _dims(36, 1280, 20, 20, 5120),
    "1.5b": _dims(48, 1600, 25, 25, 6400),
}
GPT2_BASE: Fields = {
    "vocab": 50257,
    "context": 1024,
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu_tanh",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tied": True,
}

# The scaling table of Megatron-LM's README, H100: heads of 128 features, a vocabulary of 131072, sequences of 4096
GPT: dict[str, Fields] = {
    "1.7b": _dims(24, 2048, 16, 16, 8192),
    "7.1b": _dims(30, 4096, 32, 32, 16384),
    "16b": _dims(32, 6144, 48, 48, 24576),
    "32b": _dims(48, 7168, 56, 56, 28672),
    "70b": _dims(84, 8192, 64, 64, 32768),
    "119b": _dims(92, 10240, 80, 80, 40960),
    "177b": _dims(96, 12288, 96, 96, 49152),
    "314b": _dims(96, 16384, 128, 128, 65536),
    "462b": _dims(112, 18432, 144, 144, 73728),
}
GPT_BASE: Fields = {"vocab": 131072, "context": 4096, "norm": "layer", "activation": "gelu_tanh"}

# arXiv 2005.14165
GPT3: dict[str, Fields] = {"175b": _dims(96, 12288, 96, 96, 49152)}
GPT3_BASE: Fields = GPT2_BASE | {"context": 2048, "vocab_pad": 128}

# arXiv 2412.15115
QWEN25: dict[str, Fields] = {
    "0.5b": _dims(24, 896, 14, 2, 4864, vocab=151936, tied=True),
    "1.5b": _dims(28, 1536, 12, 2, 8960, vocab=151936, tied=True),
    "3b": _dims(36, 2048, 16, 2, 11008, vocab=151936, tied=True),
    "7b": _dims(28, 3584, 28, 4, 18944),
    "14b": _dims(48, 5120, 40, 8, 13824),
    "32b": _dims(64, 5120, 40, 8, 27648),
    "72b": _dims(80, 8192, 64, 8, 29568),
}
QWEN25_BASE: Fields = {
    "vocab": 152064,
    "context": 32768,
    "rope_base": 1000000.0,
    "norm_eps": 1e-6,
    "attention_bias": True,
}

# arXiv 2407.10671; the sizes that Qwen 2.5 did not change, and the 7b and 72b of Qwen 2
QWEN2: dict[str, Fields] = {size: QWEN25[size] for size in ("0.5b", "1.5b", "7b", "72b")}

# arXiv 2505.09388
QWEN3: dict[str, Fields] = {
    "0.6b": _dims(28, 1024, 16, 8, 3072, tied=True),
    "1.7b": _dims(28, 2048, 16, 8, 6144, tied=True),
    "4b": _dims(36, 2560, 32, 8, 9728, tied=True),
    "8b": _dims(36, 4096, 32, 8, 12288),
    "14b": _dims(40, 5120, 40, 8, 17408),
    "32b": _dims(64, 5120, 64, 8, 25600),
}
QWEN3_BASE: Fields = {
    "vocab": 151936,
    "context": 40960,
    "hd": 128,
    "rope_base": 1000000.0,
    "norm_eps": 1e-6,
    "qk_norm": "norm",
}

# arXiv 2310.06825; v0.1 has the window
MISTRAL: dict[str, Fields] = {"7b": _dims(32, 4096, 32, 8, 14336)}
MISTRAL_BASE: Fields = {"vocab": 32000, "context": 32768, "window": 4096}

# arXiv 2403.08295
GEMMA: dict[str, Fields] = {
    "2b": _dims(18, 2048, 8, 1, 16384, embed_multiplier=math.sqrt(2048)),
    "7b": _dims(28, 3072, 16, 16, 24576, embed_multiplier=math.sqrt(3072)),
}
GEMMA_BASE: Fields = {
    "vocab": 256000,
    "context": 8192,
    "hd": 256,
    "activation": "geglu_tanh",
    "norm_eps": 1e-6,
    "norm_centred": True,
    "tied": True,
}

# arXiv 2408.00118
GEMMA2: dict[str, Fields] = {
    "2b": _dims(26, 2304, 8, 4, 9216, embed_multiplier=math.sqrt(2304)),
    "9b": _dims(42, 3584, 16, 8, 14336, embed_multiplier=math.sqrt(3584)),
    "27b": _dims(46, 4608, 32, 16, 36864, hd=128, attention_scale=144**-0.5, embed_multiplier=math.sqrt(4608)),
}
GEMMA2_BASE: Fields = GEMMA_BASE | {
    "norm_at": "peri",
    "window": 4096,
    "no_window": 2,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}

FAMILIES: dict[str, tuple[Fields, dict[str, Fields]]] = {
    "llama2": (LLAMA2_BASE, LLAMA2),
    "llama3": (LLAMA3_BASE, LLAMA3),
    "gpt": (GPT_BASE, GPT),
    "gpt2": (GPT2_BASE, GPT2),
    "gpt3": (GPT3_BASE, GPT3),
    "qwen2": (QWEN25_BASE, QWEN2),
    "qwen2.5": (QWEN25_BASE, QWEN25),
    "qwen3": (QWEN3_BASE, QWEN3 | presets_moe.QWEN3),
    "mistral": (MISTRAL_BASE, MISTRAL),
    "gemma": (GEMMA_BASE, GEMMA),
    "gemma2": (GEMMA2_BASE, GEMMA2),
    "mixtral": (presets_moe.MIXTRAL_BASE, presets_moe.MIXTRAL),
    "deepseek": (presets_moe.DEEPSEEK_BASE, presets_moe.DEEPSEEK),
    "gpt-oss": (presets_moe.GPT_OSS_BASE, presets_moe.GPT_OSS),
}


def config(name: str, **overrides: Any) -> Config:
    """The config of "family:size", with fields overridden. Raises ValueError naming the known ones."""
    family, _, size = name.partition(":")
    if family not in FAMILIES:
        raise ValueError(f"model preset {name!r}: unknown family {family!r}, known are {', '.join(FAMILIES)}")
    base, sizes = FAMILIES[family]
    if size not in sizes:
        raise ValueError(f"model preset {name!r}: {family} has the sizes {', '.join(sizes)}")
    unknown = [field for field in overrides if field not in Config.__dataclass_fields__]
    if unknown:
        raise ValueError(f"model has no setting {unknown[0]!r}, known are {', '.join(Config.__dataclass_fields__)}")
    plain: Fields = {field: tuple(value) if isinstance(value, list) else value for field, value in overrides.items()}
    words = [f.name for f in dataclasses.fields(Config) if isinstance(f.default, str)]
    plain |= {field: "none" for field in words if field in plain and plain[field] is None}  # TOML's none, of which there is one
    scaling = overrides.get("rope_scaling")
    if isinstance(scaling, Mapping):
        plain["rope_scaling"] = scaling_of(scaling)
    published = {**base, **sizes[size]}
    if isinstance(overrides.get("moe"), Mapping):
        plain["moe"] = experts_of(overrides["moe"], published.get("moe"))
    own = {**published, **plain}
    lost = idle(own).keys() - plain.keys()  # what was published of that which an override turns off
    return Config(**{field: value for field, value in own.items() if field not in lost})


def preset(name: str, **overrides: Any) -> Model:
    """The model of "family:size"."""
    return gpt(config(name, **overrides))


def llama2(size: str, **overrides: Any) -> Model:
    """Llama 2: 7b, 13b, 70b."""
    return preset(f"llama2:{size}", **overrides)


def llama3(size: str, **overrides: Any) -> Model:
    """Llama 3 to 3.2: debug, quickstart, 1b, 3b, 8b, 70b, 3.1-8b, 3.1-70b, 405b."""
    return preset(f"llama3:{size}", **overrides)


def gpt2(size: str, **overrides: Any) -> Model:
    """GPT-2: 124m, 355m, 774m, 1.5b."""
    return preset(f"gpt2:{size}", **overrides)


def qwen2(size: str, **overrides: Any) -> Model:
    """Qwen 2: 0.5b, 1.5b, 7b, 72b."""
    return preset(f"qwen2:{size}", **overrides)


def qwen3(size: str, **overrides: Any) -> Model:
    """Qwen 3: dense 0.6b to 32b; with experts 30b-a3b, 235b-a22b."""
    return preset(f"qwen3:{size}", **overrides)


def mistral(size: str = "7b", **overrides: Any) -> Model:
    """Mistral 7B v0.1."""
    return preset(f"mistral:{size}", **overrides)


def gemma(size: str, **overrides: Any) -> Model:
    """Gemma: 2b, 7b."""
    return preset(f"gemma:{size}", **overrides)


def gemma2(size: str, **overrides: Any) -> Model:
    """Gemma 2: 2b, 9b, 27b."""
    return preset(f"gemma2:{size}", **overrides)


def mixtral(size: str, **overrides: Any) -> Model:
    """Mixtral: 8x7b, 8x22b."""
    return preset(f"mixtral:{size}", **overrides)


def deepseek(size: str, **overrides: Any) -> Model:
    """DeepSeek: v2-lite, v3."""
    return preset(f"deepseek:{size}", **overrides)


def gpt_oss(size: str, **overrides: Any) -> Model:
    """gpt-oss: 20b, 120b."""
    return preset(f"gpt-oss:{size}", **overrides)
