"""An entry says where one of our leaves lies among tensors of theirs; a Hugging Face family is a table of entries.

    ("model.layers.{}.self_attn.q_proj.weight", "(heads hd) embed", "layers.attn.q")     their name, their layout, our leaf
    ("model.layers.{}.mlp.experts.{}.up_proj.weight", "expert_mlp embed", "layers.mlp.experts.up")    a tensor an expert

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
    """One tensor of theirs, or one an expert: name ({} is the layer, a second {} the expert), layout, and our leaf.

    Several leaves lie along the dim `part`.
    """

    theirs: str
    layout: str
    ours: str

    @property
    def leaves(self) -> list[str]:
        """Our leaves in it, by paths without a layer's number."""
        return self.ours.split()

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor; our leaf has them along its first dim."""
        return self.theirs.count("{}") == 2

    def named(self, layer: int, sizes: Mapping[str, int]) -> list[str]:
        """The names of a layer's tensors."""
        return [self.theirs.format(layer, e) for e in range(sizes["expert"] if self.by_expert else 1)]

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
