"""Hugging Face families as data: an entry for each tensor of theirs.

    ("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "layers.attn.q")     their name, their layout, our leaf

The layout names the dims of their tensor; our leaf's declaration names the same dims in our order. Read from left to
right an entry imports, from right to left it exports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmegatron.sharding.placement import Sizes

Ranges = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: name ({} is the layer), layout, and our leaf; several leaves lie along the dim `part`."""

    theirs: str
    layout: str
    ours: str

    @property
    def leaves(self) -> list[str]:
        """Our leaves in it, by paths without a layer's number."""
        return self.ours.split()

    @property
    def groups(self) -> list[list[str]]:
        """The names in each of their dims."""
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", self.layout)]

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """The shape of their tensor."""
        sizes = {**sizes, "part": len(self.leaves)}
        return [math.prod(sizes[name] for name in group) for group in self.groups]

    def cut(
        self,
        read: Callable[[tuple[slice, ...]], Tensor],
        names: Sequence[str],
        box: Ranges,
        part: int,
        sizes: Mapping[str, int],
    ) -> Tensor:
        """A box of our leaf number `part`, in our order of dims: `read(slices)` gives a box of their tensor.

        Their dim (heads hd) is cut to the box's heads before it is read, then to its part of hd.
        """
        sizes = {**sizes, "part": len(self.leaves)}
        want = {self._theirs(name): box[name] for name in names} | {"part": (part, part + 1)}
        slices, shape, cuts = [], [], []
        for group in self.groups:
            start, inner, cutting = 0, math.prod(sizes[name] for name in group), True
            length = inner
            for name in group:
                low, high = want[name]
                inner //= sizes[name]
                if cutting:  # dims of one index, then one range: together one stretch of their dim
                    start, length = start + low * inner, (high - low) * inner
                    cutting = high - low == 1
                    shape.append(high - low)
                    cuts.append(slice(None))
                else:
                    shape.append(sizes[name])
                    cuts.append(slice(low, high))
            slices.append(slice(start, start + length))
        flat = [name for group in self.groups for name in group]
        x = read(tuple(slices)).reshape(shape)[tuple(cuts)]
        if "part" in flat:
            x = x.select(flat.index("part"), 0)
            flat.remove("part")
        return x.permute([flat.index(self._theirs(name)) for name in names])

    def join(self, parts: Sequence[Tensor], names: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Tensor:
        """Their tensor from our leaves, whole and without pads: the inverse of `cut`."""
        flat = [name for group in self.groups for name in group]
        inner = [name for name in flat if name != "part"]
        ordered = [
            x.permute([[self._theirs(name) for name in own].index(name) for name in inner])
            for x, own in zip(parts, names, strict=True)
        ]
        x = torch.stack(ordered, flat.index("part")) if "part" in flat else ordered[0]
        return x.reshape(self.shape(sizes))

    def _theirs(self, name: str) -> str:
        """What lies in one tensor has as many heads: keys' and values' are then called heads too."""
        return "heads" if name == "kv" and "part" in self.layout else name


def true_sizes(sizes: Sizes) -> dict[str, int]:
    """Named sizes without pads."""
    return {name: size if isinstance(size, int) else size.n for name, size in sizes.items()}


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
ENTRIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
}
EXTRA = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers that old files carry
