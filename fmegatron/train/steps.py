"""The folders of a run's checkpoints: which there are, which comes first, and how one takes another's place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fmegatron.files import sync
from fmegatron.train.manifest import NAME, is_checkpoint

AnyPath = str | os.PathLike[str]


def step_folder(folder: AnyPath, step: int) -> Path:
    """Where the checkpoint of a step lies. Names sort as steps do."""
    return Path(folder) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a folder: the inverse of `step_folder`."""
    return int(path.name.removeprefix("step-"))


def find(path: AnyPath) -> Path:
    """`path` if it is one step's folder, else the latest in it, unverified; ValueError if there is none."""
    root = Path(path)
    found = root if is_checkpoint(root) else latest(root)
    if found is None:
        raise ValueError(f"no checkpoint in {root}: it holds neither {NAME} nor folders step-*/{NAME}")
    return found


def latest(folder: AnyPath) -> Path | None:
    """The folder of the last checkpoint, unverified: the one that the marker names, else the highest step; None if none."""
    return next(filter(is_checkpoint, candidates(Path(folder))), None)


def candidates(root: Path) -> list[Path]:
    """Folders of steps, best first: the one that the marker names, then earlier ones, then later ones, then those put aside.

    Some may be damaged, and hold no checkpoint.
    """
    steps = sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)
    asides = sorted((path for path in root.glob(".old-step-*") if is_checkpoint(path)), reverse=True)
    marker = root / "latest"
    named = root / marker.read_text(encoding="utf-8", errors="replace").strip() if marker.is_file() else root
    if named.parent != root or named == root:
        return steps + asides
    first = [path for path in (named, aside(named)) if path in steps + asides]
    earlier = [path for path in steps if path.name < named.name]
    return first + earlier + [path for path in steps + asides if path not in first + earlier]


def superseded(final: Path, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints to delete once `final` is there: those of its past but the last `keep`, and but every so-manieth step."""
    done = sorted(path for path in final.parent.glob("step-*") if path.name <= final.name and is_checkpoint(path))
    return [path for path in done[:-keep] if not (keep_every and step_of(path) % keep_every == 0)] if keep else []


def aside(path: Path) -> Path:
    """Where a checkpoint waits while another takes its name."""
    return path.with_name(f".old-{path.name}")


def replace(temporary: Path, final: Path) -> None:
    """Give a finished folder its name."""
    if final.exists():  # a folder cannot be renamed onto a full one; killed between the renames, `latest` looks aside
        os.rename(final, aside(final))
    os.rename(temporary, final)
    sync(final.parent)
    shutil.rmtree(aside(final), ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a checkpoint."""
    doomed = path.with_name(f".tmp-{path.name}")  # a half-deleted folder never has a step's name
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(root: Path) -> None:
    """Clear away what a killed save left."""
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
