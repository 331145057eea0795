"""Checkpoints: global tensors by name, saved from any pieces of them, loaded into any others.

    save("run/checkpoints", 100, {"params.layers.7.attn.q": Chunks((512, 512), pieces)}, meta={...}, keep=3)
    meta = load("run/checkpoints", {"params.layers.7.attn.q": Chunks((512, 512), other_pieces)})     # fills the pieces

A checkpoint knows no mesh and no rules: only each tensor's true shape and the boxes it was written in. So every mesh
reads what any other wrote. On disk (`torch.distributed.checkpoint` files beside one of ours):

    run/checkpoints/latest                  the name of the last good step; replaced by one rename
    run/checkpoints/step-00000100/          appears by one rename, complete or not at all
        .metadata, __<rank>_0.distcp        torch's: boxes and bytes. `.metadata` is a pickle: load only files you trust
        meta.json                           ours: the step and the caller's `meta`

Names that start with a dot are unfinished business of a save that was killed; the next save clears it away.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fmegatron.files import sync, write_atomically
from fmegatron.sharding.chunks import Chunks, whole
from fmegatron.train.chunks import ChunkLoadPlanner, ChunkSavePlanner

__all__ = ["Chunks", "find", "latest", "load", "read_meta", "save", "step_folder", "tensors", "whole"]

T = TypeVar("T")
AnyPath = str | os.PathLike[str]
Group = dist.ProcessGroup | None


def save(
    folder: AnyPath,
    step: int,
    items: Mapping[str, Chunks],
    meta: Mapping[str, Any],
    *,
    keep: int = 0,
    group: Group = None,
) -> Path:
    """Write the checkpoint of one step, make it the latest, then delete the oldest but `keep` (0: none).

    With torch.distributed initialised every rank of `group` calls this; ranks may hold different keys. `meta` is JSON.
    A kill at any moment leaves the last good checkpoint. An error is raised on every rank; ValueError where shapes,
    dtypes or the tiling of the pieces are at fault. Checkpoints of later steps (of a run that was taken up again from
    an earlier one) are neither counted nor deleted.
    """
    final = step_folder(folder, step)
    root, temporary = final.parent, final.with_name(f".tmp-{final.name}")

    def prepare() -> None:
        text = json.dumps({"format": 1, "step": step, "meta": dict(meta)}, indent=1, allow_nan=False)
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        temporary.mkdir()
        write_atomically(temporary / "meta.json", text)

    def publish() -> None:
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        _replace(temporary, final)
        write_atomically(root / "latest", final.name + "\n")
        done = [path for path in _steps(root) if path.name <= final.name]
        for path in done[:-keep] if keep else []:
            _delete(path)

    _on_first(prepare, group)
    try:
        with _errors():
            state_dict_saver.save(
                dict(items),
                storage_writer=FileSystemWriter(temporary),
                planner=ChunkSavePlanner(),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        _on_first(publish, group)
    except BaseException:
        if not dist.is_initialized() or dist.get_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: AnyPath, wanted: Mapping[str, Chunks], *, group: Group = None) -> dict[str, Any]:
    """Fill the wanted pieces in place, from one step's folder or the latest of a folder of steps; return its `meta`.

    A floating dtype becomes the wanted piece's. ValueError before anything is filled: no checkpoint, a key that it has
    not, another global shape, a dtype of another kind. With torch.distributed initialised every rank calls this.
    """

    def open_() -> tuple[str, dict[str, Any]]:
        found = find(path)
        return str(found), read_meta(found)

    found, meta = _on_first(open_, group)
    with _errors():
        state_dict_loader.load(
            dict(wanted),
            storage_reader=FileSystemReader(found),
            planner=ChunkLoadPlanner(found),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    return meta


def tensors(path: AnyPath) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{key: (global shape, dtype)} of a checkpoint, without reading its data."""
    stored = FileSystemReader(find(path)).read_metadata().state_dict_metadata
    return {
        key: (tuple(tensor.size), tensor.properties.dtype)
        for key, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def read_meta(path: AnyPath) -> dict[str, Any]:
    """The `meta` that was given to `save`."""
    meta: dict[str, Any] = json.loads((find(path) / "meta.json").read_text(encoding="utf-8"))["meta"]
    return meta


def find(path: AnyPath) -> Path:
    """`path` if it is one step's folder, else the latest in it; ValueError if there is none."""
    root = Path(path)
    found = root if (root / "meta.json").is_file() else latest(root)
    if found is None:
        raise ValueError(f"no checkpoint in {root}: it holds neither meta.json nor folders step-*/meta.json")
    return found


def latest(folder: AnyPath) -> Path | None:
    """The folder of the last good checkpoint: the one that the marker names, else the highest step; None if none."""
    root = Path(folder)
    marker = root / "latest"
    if marker.is_file():
        named = root / marker.read_text(encoding="utf-8").strip()
        for path in (named, _aside(named)):
            if (path / "meta.json").is_file():
                return path
    steps = _steps(root) or sorted(path for path in root.glob(".old-step-*") if (path / "meta.json").is_file())
    return steps[-1] if steps else None


def step_folder(folder: AnyPath, step: int) -> Path:
    """Where the checkpoint of a step lies. Names sort as steps do."""
    return Path(folder) / f"step-{step:08d}"


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if (path / "meta.json").is_file())


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")


def _replace(temporary: Path, final: Path) -> None:
    if final.exists():  # a folder cannot be renamed onto a full one; killed between the renames, `latest` looks aside
        os.rename(final, _aside(final))
    os.rename(temporary, final)
    sync(final.parent)
    shutil.rmtree(_aside(final), ignore_errors=True)


def _delete(path: Path) -> None:
    doomed = path.with_name(f".tmp-{path.name}")  # a half-deleted folder never has a step's name
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _clean(root: Path) -> None:
    for old in root.glob(".old-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, final)
    for unfinished in root.glob(".tmp-*"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink()


def _on_first(fn: Callable[[], T], group: Group) -> T:
    """Run `fn` on the first rank alone; every rank returns its value or raises its error. Also a barrier."""
    if not dist.is_initialized():
        return fn()
    answer: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer = [(fn(), None)]
        except BaseException as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, group=group, group_src=0)
    value, failure = answer[0]
    if failure is not None:
        raise failure
    return value


@contextmanager
def _errors() -> Iterator[None]:
    """torch gathers the ranks' errors into one exception and raises it on all: raise the first of them as itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as gathered:
            error, _ = next(iter(gathered.failures.values()))
            raise error from gathered
