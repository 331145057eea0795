"""Checkpoints: global tensors by name, saved from any pieces of them, loaded into any others.

    save("run/checkpoints", 100, {"params.layers.7.attn.q": Chunks((512, 512), pieces)}, meta={...}, keep=3)
    meta = load("run/checkpoints", {"params.layers.7.attn.q": Chunks((512, 512), other_pieces)})     # fills the pieces

A checkpoint knows no mesh and no rules: only each tensor's true shape and the boxes it was written in. So every mesh
reads what any other wrote. On disk:

    run/checkpoints/latest                      the name of the last good step; replaced by one rename
    run/checkpoints/step-00000100/              appears by one rename, complete or not at all
        manifest.json                           boxes, hashes and the caller's `meta`, see manifest.py
        rank-00000.safetensors                  what that rank gave: any reader of safetensors opens it

Names that start with a dot are unfinished business of a save that was killed; the next save clears it away.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fmegatron.sharding.chunks import Chunks, check_tiling, inside, overlap, whole
from fmegatron.train import manifest
from fmegatron.train.dcp import Stored
from fmegatron.train.manifest import Store, box_name
from fmegatron.train.remote import Bucket, Url, is_remote
from fmegatron.train.steps import AnyPath, Local, step_folder, step_of
from fmegatron.train.together import Group, is_first, on_first, share, together

__all__ = ["Chunks", "damage", "find", "latest", "load", "newest_good", "read_meta", "save", "step_folder", "tensors", "whole"]


Address = Path | Url


# -- save -----------------------------------------------------------------------------------------------------------
def save(
    folder: AnyPath,
    step: int,
    items: Mapping[str, Chunks],
    meta: Mapping[str, Any],
    *,
    keep: int = 0,
    keep_every: int = 0,
    group: Group = None,
) -> Address:
    """Write the checkpoint of one step, make it the latest, then delete the oldest but `keep` (0: none).

    keep_every: steps that it divides are never deleted (0: no such steps). With torch.distributed initialised every rank
    of `group` calls this; ranks may hold different keys. `meta` is JSON.
    A kill at any moment leaves the last good checkpoint. An error is raised on every rank; ValueError where shapes,
    dtypes or the tiling of the pieces are at fault. Checkpoints of later steps (of a run that was taken up again from
    an earlier one) are neither counted nor deleted.
    """
    place = place_of(folder)
    name = f"rank-{share(group).start or 0:05d}.safetensors"

    def prepare(plans: list[Plan]) -> None:
        stored = merge(plans)
        manifest.dumps(step, meta, stored, {})  # meta that is no JSON is found before anything is written
        place.prepare(step)

    def write() -> tuple[Plan, tuple[str, int, str] | None]:
        own = own_tensors(items)
        return plan, ((name, *place.write(step, name, own)) if own else None)

    def publish(written: list[tuple[Plan, tuple[str, int, str] | None]]) -> None:
        files = {given[0]: given[1:] for _, given in written if given is not None}
        text = manifest.dumps(step, meta, merge([part for part, _ in written]), files)
        place.publish(step, text, keep, keep_every)

    plan: Plan = {}

    def plan_own() -> Plan:
        plan.update(plan_of(items, name))
        return plan

    together(plan_own, prepare, group)
    try:
        together(write, publish, group)
    except BaseException:
        if is_first(group):
            place.discard(step)
        raise
    return place.address(step)


Plan = dict[str, tuple[tuple[int, ...], set[torch.dtype], list[Any], str]]  # key: shape, dtypes, boxes, file


def own_tensors(items: Mapping[str, Chunks]) -> dict[str, torch.Tensor]:
    """What this rank's file holds: each piece by its name in the file."""
    return {
        box_name(key, tuple(chunks.shape), box): piece
        for key, chunks in items.items()
        for box, (_, piece) in zip(chunks.boxes(key), chunks.pieces, strict=True)
        if piece.numel()
    }


def plan_of(items: Mapping[str, Chunks], name: str) -> Plan:
    """What this rank writes: shapes, dtypes and boxes, and its file's name."""
    return {
        key: (
            tuple(chunks.shape),
            {piece.dtype for _, piece in chunks.pieces},
            [box for box in chunks.boxes(key) if math.prod(box[1])],
            name,
        )
        for key, chunks in items.items()
    }


def merge(plans: list[Plan]) -> dict[str, tuple[Stored, list[str]]]:
    """What all ranks write together; ValueError unless their boxes tile every tensor."""
    merged = {}
    for key in dict.fromkeys(key for plan in plans for key in plan):
        held = [plan[key] for plan in plans if key in plan]
        shapes, dtypes = {shape for shape, *_ in held}, set[torch.dtype]().union(*(dtypes for _, dtypes, *_ in held))
        if len(shapes) > 1 or len(dtypes) > 1:
            raise ValueError(f"{key}: pieces disagree: shapes {sorted(shapes)}, dtypes {sorted(map(str, dtypes))}")
        boxes = [(box, name) for *_, own, name in held for box in own]
        stored = Stored(shapes.pop(), min(dtypes, key=str, default=torch.float32), tuple(box for box, _ in boxes))
        check_tiling(key, stored.shape, stored.boxes)
        merged[key] = stored, [name for _, name in boxes]
    return merged


# -- load -----------------------------------------------------------------------------------------------------------
def load(path: AnyPath, wanted: Mapping[str, Chunks], *, verify: bool = True, group: Group = None) -> dict[str, Any]:
    """Fill the wanted pieces in place, from one step's folder or the newest good one of a folder of steps; its `meta`.

    verify: hash every file first, each rank a share of them. A floating dtype becomes the wanted piece's. ValueError
    before anything is filled: no checkpoint, a damaged one, a key that it has not, another global shape, a dtype of
    another kind. A damaged step of a folder of steps is warned of. With torch.distributed initialised every rank calls this.
    """
    found, said = newest_good(path, verify=verify, group=group)
    for line in said:
        warnings.warn(line, stacklevel=2)
    if found is None:
        raise ValueError(none_in(path))
    store = place_of(found).open()
    together(lambda: check_wanted(found, store, wanted), lambda _: None, group)
    together(lambda: fill(store, wanted), lambda _: None, group)
    return store.meta


def newest_good(path: AnyPath, *, verify: bool = True, group: Group = None) -> tuple[Address | None, list[str]]:
    """The newest checkpoint in a folder whose files are what was written, and a line for each one that is not.

    The step that `latest` names comes first, then those before it, then those after. A step's own folder is taken as it
    is: ValueError where it is damaged, as where all are. None where there are no steps.
    """
    place = place_of(path)
    own = on_first(place.is_checkpoint, group)
    candidates: list[Any] = [place.address()] if own else on_first(place.candidates, group)
    said: list[str] = []
    for candidate in candidates:
        bad = damage(candidate, verify=verify, group=group)
        if not bad:
            return candidate, said
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        said.append(f"checkpoint {candidate} is damaged: {bad[0]}{more}")
        if own:
            raise ValueError(said[0])
    if said:
        others = f"; so are {len(said) - 1} more, and there is no good one" if len(said) > 1 else "; there is no other"
        raise ValueError(said[0] + others)
    return None, []


def damage(folder: AnyPath, *, verify: bool = True, group: Group = None) -> list[str]:
    """What is wrong with one step's checkpoint, a line each; files are hashed where `verify`, each rank a share."""

    def own() -> list[str]:
        try:
            store = place_of(folder).open()
        except (ValueError, OSError) as error:
            return [str(error).removeprefix(f"{Path(folder)}: ").removeprefix(f"{folder} is damaged: ")]
        return store.damage(share(group)) if verify else []

    return together(own, lambda lists: list(dict.fromkeys(line for lines in lists for line in lines)), group)


def check_wanted(path: AnyPath, store: Store, wanted: Mapping[str, Chunks]) -> None:
    """ValueError, naming the first, where wanted tensors are not there, or of another shape or kind of dtype."""
    problems = [problem for key, chunks in wanted.items() if (problem := _problem(store, key, chunks))]
    if problems:
        more = f" (and {len(problems) - 1} more of {len(wanted)} tensors)" if len(problems) > 1 else ""
        raise ValueError(f"checkpoint {path}: {problems[0]}{more}")


def _problem(store: Store, key: str, chunks: Chunks) -> str | None:
    stored = store.tensors.get(key)
    if stored is None:
        near = difflib.get_close_matches(key, store.tensors, n=1)
        return f'no tensor "{key}" of shape {tuple(chunks.shape)}' + (f'; nearest is "{near[0]}"' if near else "")
    if stored.shape != tuple(chunks.shape):
        return f'"{key}" has shape {stored.shape}, wanted is {tuple(chunks.shape)}'
    for _, piece in chunks.pieces:
        if piece.dtype != stored.dtype and not (piece.is_floating_point() and stored.dtype.is_floating_point):
            shapes = f"of shape {stored.shape} has dtype {stored.dtype}, wanted is {tuple(chunks.shape)}"
            return f'"{key}" {shapes} {piece.dtype}; only floating dtypes are converted'
    return None


def fill(store: Store, wanted: Mapping[str, Chunks]) -> None:
    """Fill pieces from the boxes that a store holds of them."""
    with store.reading() as read:
        for key, chunks in wanted.items():
            fill_one(store, read, key, chunks)


def fill_one(store: Store, read: manifest.Read, key: str, chunks: Chunks) -> None:
    """Fill one tensor's pieces; `read` is what `store.reading` gives."""
    filled = 0
    here = [(box, piece.detach()) for box, (_, piece) in zip(chunks.boxes(key), chunks.pieces, strict=True)]
    for saved in store.tensors[key].boxes:
        for box, piece in here:
            common = overlap(saved, box)
            if common is not None:
                piece[inside(common, box[0])].copy_(read(key, saved, common))
                filled += math.prod(common[1])
    assert filled == sum(piece.numel() for _, piece in chunks.pieces), f"{key}: the saved boxes leave holes"


def tensors(path: AnyPath) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{key: (global shape, dtype)} of a checkpoint, without reading its data."""
    return {key: (stored.shape, stored.dtype) for key, stored in place_of(find(path)).open().tensors.items()}


def read_meta(path: AnyPath) -> dict[str, Any]:
    """The `meta` that was given to `save`."""
    return place_of(find(path)).open().meta


# -- places ---------------------------------------------------------------------------------------------------------
def place_of(path: AnyPath) -> Local | Bucket:
    """A folder, or an address in object storage."""
    return Bucket(Url(path)) if is_remote(path) else Local(Path(path))


def find(path: AnyPath) -> Any:
    """`path` if it is one step's folder, else the latest in it, unverified; ValueError if there is none."""
    place = place_of(path)
    found = place.address() if place.is_checkpoint() else latest(path)
    if found is None:
        raise ValueError(none_in(path))
    return found


def none_in(path: AnyPath) -> str:
    """The line that says that no checkpoint is there, and which is near."""
    near = beside(path)
    return f"no checkpoint in {path}: {near or f'it holds neither {manifest.NAME} nor folders step-*/{manifest.NAME}'}"


def beside(path: AnyPath) -> str:
    """Words that name the checkpoints nearest to a step that is not there, before and after it; "" where there are none."""
    place = place_of(path).address()
    wanted = step_of(place.name)
    if wanted is None:
        return ""
    steps: list[Any] = list(place_of(place.parent).candidates())
    found = {n: one.name for one in steps if (n := step_of(one.name)) is not None and place_of(one).is_checkpoint()}
    before, after = sorted(n for n in found if n <= wanted), sorted(n for n in found if n > wanted)
    near = before[-1:] if wanted in found else before[-1:] + after[:1]  # of its own number where its name lacks zeros
    return f"beside it the nearest is {' or '.join(found[n] for n in near)}" if near else ""


def latest(folder: AnyPath) -> Any:
    """The folder of the last checkpoint, unverified: the one that the marker names, else the highest step; None if none."""
    candidates: list[Any] = list(place_of(folder).candidates())
    return next((found for found in candidates if place_of(found).is_checkpoint()), None)
