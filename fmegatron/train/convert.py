"""From one form of a model on disk to another: our checkpoints, Hugging Face folders, Megatron-LM's torch_dist.

    convert("runs/quickstart", "out", to="hf")            convert("path/to/Qwen3-0.6B", "runs/qwen", to="checkpoint")

Whatever the source is, it is opened as a model and, for each leaf of each layer, a function that reads it: no form is
ever held whole but the one that is written to `checkpoint`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmegatron import config as configs
from fmegatron import files, models, toml
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Config, Model, hf, layers
from fmegatron.models.hf_files import json_of
from fmegatron.nn.moe import experts_of
from fmegatron.nn.rope import scaling_of
from fmegatron.sharding import SINGLE
from fmegatron.sharding.chunks import whole
from fmegatron.train import checkpoint, megatron, saving
from fmegatron.train.manifest import Manifest, Read, Store
from fmegatron.train.remote import is_remote
from fmegatron.train.resume import steps_of
from fmegatron.train.steps import step_of

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class Source:
    """A model on disk. leaves: {"layers.7.attn.q": (dtype, a function that reads it whole)}."""

    model: Model
    leaves: Mapping[str, hf.Leaf]
    step: int = 0
    tokenizer: Path | None = None  # a folder that holds tokenizer.json


def convert(
    source: str,
    target: str,
    to: str,
    *,
    dtype: str | None = None,
    file_bytes: int = hf.FILE_BYTES,
    config: str | None = None,
) -> Path:
    """Write what lies at `source` to the new folder `target`, as "hf" or "checkpoint"; it appears whole or not at all.

    dtype: fp32, bf16, fp16; None: as it is. config: Megatron-LM's flags, where the source is its checkpoint.
    Raises ValueError in one line for a source of no known form, and where the target cannot say what the model is.
    """
    with ExitStack() as stack:
        return _write(open_source(source, stack, config), source, Path(target), to, dtype, file_bytes)


def _write(opened: Source, source: str, folder: Path, to: str, dtype: str | None, file_bytes: int) -> Path:
    cast = saving.DTYPES[dtype] if dtype else None
    if to == "hf":
        beside = [opened.tokenizer / name for name in TOKENIZER] if opened.tokenizer else []
        extra = [file for file in beside if file.is_file()]
        return hf.write_hf(opened.model, opened.leaves, folder, dtype=cast, file_bytes=file_bytes, extra=extra)
    items = {f"params.{path}": whole(read().to(cast or kept)) for path, (kept, read) in opened.leaves.items()}
    plain = asdict(opened.model.config) if is_dataclass(opened.model.config) else None  # type: ignore[arg-type]
    with files.new_folder(folder) as new:
        checkpoint.save(new / "checkpoints", opened.step, items, {"model": plain, "holds": "params", "from": str(source)})
        if opened.tokenizer:
            shutil.copyfile(opened.tokenizer / "tokenizer.json", new / "tokenizer.json")
    return folder


def open_source(source: str, stack: ExitStack, config: str | None = None) -> Source:
    """A run's folder, a checkpoint, a Hugging Face folder, or a Megatron-LM checkpoint; read until `stack` closes."""
    path = Path(source)
    if not (path.exists() or is_remote(source)):
        near = checkpoint.beside(steps_of(str(path.parent)) / path.name) if step_of(path.name) is not None else ""
        raise ConfigError(f"{source}: no such folder{near and f'; {near}'}")
    if (path / "config.json").is_file():
        model, params = models.from_hf(path, dtype=_dtype_of(path))
        read = layers.whole_layers(model, SINGLE.bind(model.sizes), params)
        dtype = _dtype_of(path)
        beside = path if (path / "tokenizer.json").is_file() else None
        return Source(model, {name: (dtype, make) for name, make in read.items()}, tokenizer=beside)
    if megatron.is_megatron(path):
        return Source(*megatron.open_model(path, config))
    found, said = checkpoint.newest_good(steps_of(source))
    for line in said:
        print(line)
    if found is None:
        raise ConfigError(f"{source}: neither a run, a checkpoint, a Hugging Face folder nor a Megatron-LM checkpoint")
    store = checkpoint.place_of(found).open()
    boxes = stack.enter_context(store.reading())  # once: files of a bucket are fetched when the first of their tensors is
    params = [key for key in store.tensors if key.startswith("params.")]
    leaves = {key.removeprefix("params."): (store.tensors[key].dtype, partial(_read, store, boxes, key)) for key in params}
    step = store.step if isinstance(store, Manifest) else step_of(found.name)  # whatever its folder is called
    return Source(model_of(store.meta), leaves, step or 0, tokenizer_of(source, found))


def tokenizer_of(source: str, found: checkpoint.Address) -> Path | None:
    """The folder that holds the tokenizer.json of a checkpoint that was found at `source`: its run's."""
    homes = [Path(source)] if is_remote(found) else [Path(source), Path(found).parent.parent]
    return next((home for home in homes if (home / "tokenizer.json").is_file()), None)


def _read(store: Store, read: Read, key: str) -> Tensor:
    stored = store.tensors[key]
    x = torch.empty(stored.shape, dtype=stored.dtype)
    checkpoint.fill_one(store, read, key, whole(x))
    return x


def _dtype_of(path: Path) -> torch.dtype:
    said = json_of(path / "config.json")
    dtype = getattr(torch, str(said.get("dtype") or said.get("torch_dtype") or "float32").removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def model_of(meta: Mapping[str, Any]) -> Model:
    """The model of a checkpoint's meta."""
    plain = meta.get("model")
    if plain is not None:
        known = {field.name for field in fields(Config)}
        given: dict[str, Any] = {name: plain[name] for name in plain if name in known}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        if given.get("rope_scaling"):
            given["rope_scaling"] = scaling_of(given["rope_scaling"])
        if given.get("moe"):
            given["moe"] = experts_of(given["moe"])
        return models.gpt(Config(**given))
    run = toml.update(RunConfig(), toml.loads(meta["config"]), "the checkpoint's configuration")
    if run.model.function is None:
        raise ConfigError("the checkpoint does not say its model")
    made: Callable[..., Model] = configs.imported(run.model.function)
    return made(**run.model.overrides)
