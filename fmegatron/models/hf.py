"""Models from and to Hugging Face folders: config.json says what, safetensors hold the weights.

    model, params = from_hf("path/to/Qwen3-0.6B")
    to_hf(model, params, "path/to/mine")

The families are data, in hf_families.py and hf_configs.py; here they are read from left to right and from right to left.
Neither way makes a second copy of the model: slices are read into the shards that want them, and tensors are written one
by one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron import files, tensorfile, tree
from fmegatron.models import layers
from fmegatron.models.gpt import gpt
from fmegatron.models.hf_configs import config_of, describe
from fmegatron.models.hf_entries import Entry, true_sizes
from fmegatron.models.hf_families import ENTRIES, EXTRA, entries_of
from fmegatron.models.hf_files import INDEX, Files, has, json_of
from fmegatron.models.model import Model
from fmegatron.sharding import SINGLE, Sharding
from fmegatron.sharding.chunks import Chunks
from fmegatron.tensorfile import Lazy
from fmegatron.tree import Tree

FILE_BYTES = 5_000_000_000  # most bytes of a file, as transformers has it
Leaf = tuple[torch.dtype, Callable[[], Tensor]]


# -- in -------------------------------------------------------------------------------------------------------------
def from_hf(
    folder: str | Path, sharding: Sharding | None = None, dtype: torch.dtype = torch.float32, *, vocab_pad: int = 1
) -> tuple[Model, Tree]:
    """The model of a folder, and its parameters in `dtype`: whole, or as `sharding` stores them.

    vocab_pad: the vocabulary is padded to a multiple of it, where a mesh does not divide it.
    Each process reads only the slices that its shards hold. Raises a one-line ValueError for a folder without config or
    weights, an architecture or a setting that is not supported, and a tensor that is missing, superfluous or of another
    shape.
    """
    model, _ = model_of(Path(folder), vocab_pad)
    return model, read_params(folder, model, sharding or SINGLE, dtype)


def read_params(
    folder: str | Path, model: Model, sharding: Sharding, dtype: torch.dtype = torch.float32, part: Model | None = None
) -> Tree:
    """The parameters of a folder's model as `sharding` stores them, or of a part of it only, such as a process's stages.

    Raises ValueError as `from_hf` does.
    """
    folder, part = Path(folder), part or model
    _, family = model_of(folder)
    sh = sharding.bind(model.sizes)
    params = layers.zeros(part, sh, dtype)
    here = layers.by_layer(part, sh, params, copies=True)
    with ExitStack() as stack:
        tensors = Files(folder, stack)
        for path in names_by_layer(model):
            fill(path, here.get(path, Chunks((), ())), family, tensors, model)
        left = [name for name in sorted(tensors.unread) if not name.endswith(EXTRA)]
        left = [name for name in left if not (model.config.tied and name == "lm_head.weight")]
    if left:
        raise ValueError(f"{folder}: {len(left)} tensors have no place in this model, the first is {left[0]}")
    return tree.map(lambda x: x.to(sh.mesh.device), params)


def model_of(folder: Path, vocab_pad: int = 1) -> tuple[Model, str]:
    """The model that a folder's config.json describes, and its family."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json here, so this is not a Hugging Face model folder")
    c = json_of(folder / "config.json")
    if c.get("model_type") not in ENTRIES:
        raise ValueError(f"{folder}: model_type {c.get('model_type')!r} is not supported, only {', '.join(ENTRIES)}")
    try:
        config = replace(config_of(c), vocab_pad=vocab_pad)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json lacks {error.args[0]}, which a {c['model_type']} needs") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: config.json is not a {c['model_type']}'s: {error}") from None
    if config.mtp and not has(folder, f"model.layers.{config.layers}.eh_proj.weight"):
        config = replace(config, mtp=0)  # transformers says that there are such modules, and saves none
    return gpt(config), c["model_type"]


def fill(path: str, chunks: Chunks, family: str, tensors: Files, model: Model) -> None:
    """Fill one layer's leaf's boxes from their files."""
    entry, number, part = entry_of(path, family, model)
    sizes, names = true_sizes(model.sizes), names_by_layer(model)[path]
    every, expected = entry.named(number, sizes), entry.shape(sizes)
    for name in every:
        if (found := tensors.shape(name)) != expected:
            raise ValueError(f"{name} has shape {found}, but this config asks for {expected} ({entry.layout})")
        tensors.known(name)
    for offsets, piece in chunks.pieces:
        if not piece.numel():
            continue
        boxes, inner = [(every[0], offsets, piece)], names
        if entry.by_expert:
            boxes, inner = [(every[offsets[0] + i], offsets[1:], x) for i, x in enumerate(piece)], names[1:]
        for name, starts, x in boxes:
            box = {n: (at, at + size) for n, at, size in zip(inner, starts, x.shape, strict=True)}
            x.copy_(entry.cut(partial(tensors.read, name), inner, box, part, sizes))


def names_by_layer(model: Model) -> dict[str, tuple[str, ...]]:
    """{path with the global layer's number: names of its dims}."""
    return {
        key: tuple(p.names.removeprefix("layers ").split())
        for path, p in tree.to_paths(model.declare).items()
        for key in layers.layer_paths(path, p)
    }


def entry_of(path: str, family: str, model: Model) -> tuple[Entry, int, int]:
    """The entry that holds a leaf, the layer's number (0 outside of layers), and which part of its tensor the leaf is."""
    number, pattern = 0, path
    if any(part.isdigit() for part in path.split(".")):
        before, number, after = layers.split_run(path)
        pattern, number = f"{before}.{after}", number + (model.config.layers if before == "mtp" else 0)
    table = entries_of(family, true_sizes(model.sizes))
    entry = next((entry for entry in reversed(table) if pattern in entry.leaves), None)
    if entry is None:
        raise ValueError(f"{path} has no counterpart in a Hugging Face model of family {family}")
    return entry, number, entry.leaves.index(pattern)


# -- out ------------------------------------------------------------------------------------------------------------
def to_hf(
    model: Model,
    params: Tree,
    folder: str | Path,
    sharding: Sharding | None = None,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write parameters (whole, or as `sharding` stores them) as a folder that transformers loads: the inverse of `from_hf`.

    dtype: of the files; None keeps the parameters'. file_bytes: most bytes of a file; several files have an index.
    The folder appears whole or not at all. Every process of a mesh calls this; the first writes. Raises ValueError where
    the folder exists and is not empty, and where no Hugging Face family has the model's settings, naming one that is amiss.
    """
    sh = (sharding or SINGLE).bind(model.sizes)
    kept = tree.leaves(params)[0].dtype
    whole = {path: (kept, make) for path, make in layers.whole_layers(model, sh, params).items()}
    return write_hf(model, whole, folder, dtype=dtype, file_bytes=file_bytes, first=sh.mesh.rank in (None, 0))


def write_hf(
    model: Model,
    leaves: Mapping[str, Leaf],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    first: bool = True,
    extra: Sequence[Path] = (),
) -> Path:
    """`to_hf` from anywhere: leaves are {"layers.7.attn.q": (dtype, a function that gives it whole)}; extra: files to copy."""
    folder = Path(folder)
    plain = describe(model.config)
    theirs = their_tensors(model, leaves, plain["model_type"], dtype)
    parts = split(theirs, file_bytes)
    if not first:  # unsharding is a collective: the others make each tensor too, in the same order
        for part in parts.values():
            for name in tensorfile.order(part):
                part[name].make()
        dist.barrier()
        return folder
    plain["dtype"] = plain["torch_dtype"] = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
    with files.new_folder(folder) as new:
        for name, part in parts.items():
            tensorfile.write(new / name, part)
        if len(parts) > 1:
            total = sum(x.nbytes for x in theirs.values())
            where = {tensor: name for name, part in parts.items() for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (new / INDEX).write_text(json.dumps(index, indent=2))
        (new / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
        for file in extra:
            shutil.copyfile(file, new / file.name)
    if dist.is_initialized():
        dist.barrier()
    return folder


def their_tensors(
    model: Model, leaves: Mapping[str, Leaf], family: str, dtype: torch.dtype | None
) -> dict[str, Lazy]:
    """{their name: the tensor, made on demand}, in the model's order."""
    sizes, names = true_sizes(model.sizes), names_by_layer(model)
    members: dict[str, list[str]] = {}
    found: dict[str, tuple[Entry, int]] = {}
    for path in names:
        entry, number, part = entry_of(path, family, model)
        for expert, name in enumerate(entry.named(number, sizes)):
            found[name] = entry, expert
            members.setdefault(name, [""] * len(entry.leaves))[part] = path
    of_experts = lru_cache(maxsize=3)(lambda path: leaves[path][1]())  # a layer's three, while its experts are written

    def tensor(name: str) -> Lazy:
        (entry, expert), paths = found[name], members[name]
        assert all(paths), f"{name}: a part of it is no leaf of this model"
        kept = dtype or leaves[paths[0]][0]

        def make() -> Tensor:
            if entry.by_expert:
                whole, dims = [of_experts(path)[expert] for path in paths], [names[path][1:] for path in paths]
            else:
                whole, dims = [leaves[path][1]() for path in paths], [names[path] for path in paths]
            return entry.join(whole, dims, sizes).to(kept)

        return Lazy(tuple(entry.shape(sizes)), kept, make)

    return {name: tensor(name) for name in members}


def split(tensors: Mapping[str, Lazy], file_bytes: int) -> dict[str, dict[str, Lazy]]:
    """{file name: its tensors}, each file filled up to `file_bytes`."""
    parts: list[dict[str, Lazy]] = [{}]
    size = 0
    for name, x in tensors.items():
        if parts[-1] and size + x.nbytes > file_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = x
        size += x.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}
