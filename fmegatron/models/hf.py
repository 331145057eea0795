"""Models from Hugging Face folders: config.json says what, safetensors hold the weights.

    model, params = from_hf("path/to/Qwen3-0.6B")

A family is data: how its config's fields map to ours, and a list of entries, one for each of its tensors:

    ("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "attn.q")     their name, their layout, our leaf

The layout names the dims of their tensor; our leaf's declaration names the same dims in our order. Read from left to
right an entry imports, from right to left it exports.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fmegatron import tree
from fmegatron.models.config import Config
from fmegatron.models.gpt import gpt
from fmegatron.models.model import Model
from fmegatron.nn.param import Param
from fmegatron.nn.rope import Llama3Scaling
from fmegatron.sharding import Sharding, shard
from fmegatron.sharding.placement import Sizes
from fmegatron.tree import Tree


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


# -- weights --------------------------------------------------------------------------------------------------------
def from_hf(folder: str | Path, sharding: Sharding | None = None, dtype: torch.dtype = torch.float32) -> tuple[Model, Tree]:
    """The model of a folder, and its parameters in `dtype`: whole, or as `sharding` stores them.

    Reads one tensor at a time. Raises a one-line ValueError for a folder without config or weights, an architecture or
    a setting that is not supported, and a tensor that is missing, superfluous or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json here, so this is not a Hugging Face model folder")
    c = json.loads((folder / "config.json").read_text())
    if c.get("model_type") not in FAMILIES:
        raise ValueError(f"{folder}: model_type {c.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
    configure, entries = FAMILIES[c["model_type"]]
    model = gpt(configure(c))
    with ExitStack() as stack:
        tensors = Files(folder, stack)
        params = convert(model, entries, tensors, sharding, dtype)
        left = [name for name in sorted(tensors.unread) if not name.endswith(EXTRA)]
        left = [name for name in left if not (model.config.tied and name == "lm_head.weight")]
    if left:
        raise ValueError(f"{folder}: {len(left)} tensors have no place in this model, the first is {left[0]}")
    return model, params


class Files:
    """The tensors of a folder by name, read when asked for; remembers which were not."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: no {missing[0]} here; weights are read from safetensors files only")
        opened = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in files]
        self.folder, self.where = folder, {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        self.unread = set(self.where)

    def __getitem__(self, name: str) -> Tensor:
        name = name if name in self.where else name.removeprefix("transformer.")  # GPT-2's own files have no prefix
        if name not in self.where:
            raise ValueError(f"{self.folder}: tensor {name} is missing from the weights")
        self.unread.discard(name)
        return self.where[name].get_tensor(name)


def convert(model: Model, entries: tuple[Entry, ...], tensors: Files, sharding: Sharding | None, dtype: torch.dtype) -> Tree:
    """Parameters of `model` from their tensors by its family's entries, leaf by leaf."""
    place = sharding.bind(model.sizes) if sharding is not None else None
    leaf_of = {ours: (entry, i) for entry in entries for i, ours in enumerate(entry.ours.split())}
    pieces: dict[str, Tensor] = {}

    def leaf(path: str, p: Param) -> Tensor:
        run = next((part for part in path.split(".") if part.isdigit()), None) if p.layers is not None else None
        entry, part = leaf_of[path if run is None else path.replace(f".{run}.", ".", 1)]
        names = p.names.removeprefix("layers ")
        made = []
        for number in range(1) if run is None else range(int(run), int(run) + (p.layers or 0)):
            name = entry.theirs.format(number)
            x = pieces.pop(f"{name} {part}", None)
            if x is None:
                several = read(entry, name, tensors[name], names, model.sizes)
                pieces.update({f"{name} {i}": y for i, y in enumerate(several)})
                x = pieces.pop(f"{name} {part}")
            x = x.to(dtype)
            made.append(x if place is None else shard(place, x, names, "storage", path))
        if place is None:
            made = [pad(x, p.shape(model.sizes)[-x.dim() :]) for x in made]
        stacked = place is not None and place.mesh.stacked
        return made[0].contiguous() if run is None else torch.stack(made, 1 if stacked else 0)

    return tree.map_with_path(leaf, model.declare)


def read(entry: Entry, name: str, x: Tensor, names: str, sizes: Sizes) -> list[Tensor]:
    """Our leaves, with dims `names`, in one of their tensors; raises ValueError where its shape is another."""
    parts = entry.ours.split()
    true = {n: s if isinstance(s, int) else s.n for n, s in sizes.items()} | {"part": len(parts)}
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", entry.layout)]
    flat = [n for group in groups for n in group]
    expected = [math.prod(true[n] for n in group) for group in groups]
    if list(x.shape) != expected:
        raise ValueError(f"{name} has shape {list(x.shape)}, but this config asks for {expected} ({entry.layout})")
    x = x.reshape([true[n] for n in flat])
    same = {"kv": "heads"} if "part" in flat else {}  # what lies in one tensor has as many heads
    wanted = (["part"] if "part" in flat else []) + [same.get(n, n) for n in names.split()]
    x = x.permute([flat.index(n) for n in wanted])
    return list(x.unbind(0)) if "part" in flat else [x]


def pad(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros at the end of each dim, up to `shape`."""
    ends = [n for have, want in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, want - have)]
    return torch.nn.functional.pad(x, ends) if any(ends) else x
