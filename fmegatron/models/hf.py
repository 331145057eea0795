"""Models from Hugging Face folders: config.json says what, safetensors hold the weights.

    model, params = from_hf("path/to/Qwen3-0.6B")

The families are data, in hf_families.py; here they are read.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fmegatron import tree
from fmegatron.models.gpt import gpt
from fmegatron.models.hf_families import EXTRA, FAMILIES, Entry
from fmegatron.models.model import Model
from fmegatron.nn.param import Param
from fmegatron.sharding import Sharding, shard
from fmegatron.sharding.placement import Sizes
from fmegatron.tree import Tree


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
