"""Megatron-LM's torch_dist checkpoints as models: its names and layouts, read leaf by leaf.

    model, leaves, step = open_model(Path("run/iter_0005000"), "flags.sh")

Layers of one kind lie there in one tensor with a leading dim of layers, else under a name for each. Queries, keys and values
are one tensor by key/value group: [kv, queries of the group + key + value, hd, embed]. Gate and up are one tensor, gate first.
The model's settings come from the flags it was trained with, else from the namespace `args` that it saved, read inertly.
"""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmegatron.models import Config, Model, gpt
from fmegatron.models.hf import Leaf
from fmegatron.models.layers import split_run
from fmegatron.nn.param import Param
from fmegatron.sharding.chunks import whole
from fmegatron.train import checkpoint, migrate
from fmegatron.train.dcp import Dcp, Inert
from fmegatron.train.migrate_words import flags_of
from fmegatron.tree import to_paths

ATTN, MLP = "self_attention.", "mlp."
NAMES = {  # our leaf: theirs (several: first found), how to cut it
    "embed.token": ("embedding.word_embeddings.weight", "as it is"),
    "embed.position": ("embedding.position_embeddings.weight", "as it is"),
    "norm.weight": ("decoder.final_layernorm.weight", "as it is"),
    "norm.bias": ("decoder.final_layernorm.bias", "as it is"),
    "head.weight": ("output_layer.weight", "as it is"),
    "layers.attn_norm.weight": (f"{ATTN}linear_qkv.layer_norm_weight input_layernorm.weight", "as it is"),
    "layers.attn_norm.bias": (f"{ATTN}linear_qkv.layer_norm_bias input_layernorm.bias", "as it is"),
    "layers.mlp_norm.weight": (f"{MLP}linear_fc1.layer_norm_weight pre_mlp_layernorm.weight", "as it is"),
    "layers.mlp_norm.bias": (f"{MLP}linear_fc1.layer_norm_bias pre_mlp_layernorm.bias", "as it is"),
    "layers.attn.q": (f"{ATTN}linear_qkv.weight", "queries"),
    "layers.attn.k": (f"{ATTN}linear_qkv.weight", "keys"),
    "layers.attn.v": (f"{ATTN}linear_qkv.weight", "values"),
    "layers.attn.q_bias": (f"{ATTN}linear_qkv.bias", "queries"),
    "layers.attn.k_bias": (f"{ATTN}linear_qkv.bias", "keys"),
    "layers.attn.v_bias": (f"{ATTN}linear_qkv.bias", "values"),
    "layers.attn.q_norm.weight": (f"{ATTN}q_layernorm.weight", "as it is"),
    "layers.attn.k_norm.weight": (f"{ATTN}k_layernorm.weight", "as it is"),
    "layers.attn.o": (f"{ATTN}linear_proj.weight", "transposed"),
    "layers.attn.o_bias": (f"{ATTN}linear_proj.bias", "as it is"),
    "layers.mlp.gate": (f"{MLP}linear_fc1.weight", "first half"),
    "layers.mlp.gate_bias": (f"{MLP}linear_fc1.bias", "first half"),
    "layers.mlp.up": (f"{MLP}linear_fc1.weight", "last"),
    "layers.mlp.up_bias": (f"{MLP}linear_fc1.bias", "last"),
    "layers.mlp.down": (f"{MLP}linear_fc2.weight", "transposed"),
    "layers.mlp.down_bias": (f"{MLP}linear_fc2.bias", "as it is"),
}


def is_megatron(path: Path) -> bool:
    """Whether a folder is a torch_dist checkpoint, or a run's folder of them."""
    return _iteration(path) is not None


def open_model(path: Path, flags: str | None = None) -> tuple[Model, Mapping[str, Leaf], int]:
    """The model, {"layers.7.attn.q": (dtype, a function that reads it)}, and the iteration.

    flags: a file with Megatron-LM's flags. Raises ValueError in one line where the settings are not known, or the
    checkpoint has not the tensors that they ask for.
    """
    folder = _iteration(path)
    assert folder is not None
    store = Dcp.open(folder)
    args = flags_of(Path(flags).read_text()) if flags else _args(folder)
    if not args:
        raise ValueError(f"{folder}: the checkpoint does not say its model: give Megatron-LM's flags with --config FILE")
    rows = store.tensors["embedding.word_embeddings.weight"].shape[0]
    said, _ = migrate.model_of(args | ({} if args.get("vocab_size") else {"vocab_size": rows}))
    c = Config(**{**said, "vocab": min(rows, said["vocab"])})
    model = gpt(c)
    leaves: dict[str, Leaf] = {}
    for path_, p in to_paths(model.declare).items():
        for number in range(1) if p.layers is None else range(p.layers):
            key, layer, pattern = _layer(path_, p, number)
            name = _theirs(store, pattern, layer)
            leaves[key] = store.tensors[name].dtype, partial(_read, store, name, layer, pattern, c, _shape(p, c, model))
    found = folder.name.removeprefix("iter_")
    return model, leaves, int(found) if found.isdigit() else 0


def _shape(p: Param, c: Config, model: Model) -> tuple[int, ...]:
    return p.true_shape(model.sizes)[0 if p.layers is None else 1 :]


def _layer(path: str, p: Param, number: int) -> tuple[str, int | None, str]:
    """(our path with the layer's number, the number, our path without one)."""
    if p.layers is None:
        return path, None, path
    before, run, after = split_run(path)
    return f"{before}.{run + number}.{after}", run + number, f"{before}.{after}"


def _theirs(store: Dcp, pattern: str, layer: int | None) -> str:
    names = NAMES[pattern][0].split() if pattern in NAMES else []
    if layer is not None:
        names = [f"decoder.layers.{part}{name}" for name in names for part in ("", f"{layer}.")]
    found = next((name for name in names if name in store.tensors), None)
    if found is None:
        wanted = " or ".join(names[:2]) or "for it"
        raise ValueError(f"{store.folder}: {pattern} is asked for, and there is no {wanted}: do the flags fit the model?")
    return found


def _read(store: Dcp, name: str, layer: int | None, pattern: str, c: Config, shape: tuple[int, ...]) -> Tensor:
    """One layer's leaf, in our layout."""
    stored = store.tensors[name]
    stacked = layer is not None and f"layers.{layer}." not in name
    size = stored.shape[1:] if stacked else stored.shape
    x = torch.empty((1, *size) if stacked else size, dtype=stored.dtype)
    chunks = whole(x)
    if stacked:
        chunks = checkpoint.Chunks(stored.shape, (((layer or 0, *(0 for _ in size)), x),))
    checkpoint.fill(store, {name: chunks})
    y = cut(NAMES[pattern][1], x[0] if stacked else x, c)
    if pattern in ("embed.token", "head.weight"):
        y = y[: c.vocab]  # they store their padding
    if y.numel() != torch.Size(shape).numel():
        raise ValueError(f"{store.folder}: {name} has shape {tuple(size)}, which is no {pattern} of shape {shape}")
    return y.reshape(shape)


def cut(how: str, x: Tensor, c: Config) -> Tensor:
    """Our leaf in one of their tensors, [out, in] or [out]; ours are [in, out], with heads as dims of their own."""
    kv, hd = c.kv or c.heads, c.head_dim
    if how in ("queries", "keys", "values"):
        each = c.heads // kv
        grouped = x.reshape(kv, each + 2, hd, *x.shape[1:])
        x = {"queries": grouped[:, :each], "keys": grouped[:, each], "values": grouped[:, each + 1]}[how]
        x = x.reshape(-1, hd, *x.shape[3 if how == "queries" else 2 :])
        return x.permute(2, 0, 1) if x.dim() == 3 else x
    if how == "first half":
        x = x[: c.mlp]
    if how == "last":
        x = x[-c.mlp :]
    return x if how == "as it is" else x.T if x.dim() == 2 else x


# -- what the folder says of itself ---------------------------------------------------------------------------------
def _iteration(path: Path) -> Path | None:
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        said = tracker.read_text().strip()
        path = path / (f"iter_{int(said):07d}" if said.isdigit() else said)
    file = path / "metadata.json"
    if not file.is_file() or not (path / ".metadata").is_file():
        return None
    return path if json.loads(file.read_text()).get("sharded_backend") == "torch_dist" else None


class _Common(pickle.Unpickler):
    """Reads the namespace of arguments; everything else is inert."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        known = {("argparse", "Namespace"): argparse.Namespace, ("collections", "OrderedDict"): collections.OrderedDict}
        return known.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        return Inert()


def _args(folder: Path) -> dict[str, Any]:
    """The plain settings among the arguments in common.pt; {} where there are none."""
    try:
        with zipfile.ZipFile(folder / "common.pt") as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                held = _Common(stream).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, StopIteration):
        return {}
    args = held.get("args") if isinstance(held, dict) else None
    plain = vars(args) if isinstance(args, argparse.Namespace) else {}
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str | None)}
