"""The folders of a run's checkpoints: which there are, which comes first, and how one takes another's place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fmegatron import tensorfile
from fmegatron.files import sync, write_atomically
from fmegatron.train.manifest import NAME, Store, is_checkpoint, open_store

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Local:
    """A folder of steps, or one step's folder."""

    root: Path

    def is_checkpoint(self) -> bool:
        """Whether this is a step's folder."""
        return is_checkpoint(self.root)

    def candidates(self) -> list[Path]:
        """Folders of steps, best first."""
        return candidates(self.root)

    def open(self) -> Store:
        """The checkpoint in this folder."""
        return open_store(self.root)

    def address(self, step: int | None = None) -> Path:
        """The folder of a step; None: this one."""
        return self.root if step is None else step_folder(self.root, step)

    def prepare(self, step: int) -> None:
        """Clear away what was left, and make the folder to write into."""
        self.root.mkdir(parents=True, exist_ok=True)
        clean(self.root)
        self._temporary(step).mkdir()

    def write(self, step: int, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """Write one rank's file; its bytes and sha256."""
        file = self._temporary(step) / name
        digest = tensorfile.write(file, tensors)
        return file.stat().st_size, digest

    def publish(self, step: int, text: str, keep: int, keep_every: int) -> None:
        """The manifest, the step's name, the marker; then delete what is superseded."""
        final = self.address(step)
        write_atomically(self._temporary(step) / NAME, text)
        replace(self._temporary(step), final)
        write_atomically(self.root / "latest", final.name + "\n")
        there = [path.name for path in self.root.glob("step-*") if is_checkpoint(path)]
        for name in superseded(there, final.name, keep, keep_every):
            delete(self.root / name)

    def discard(self, step: int) -> None:
        """Delete a step that failed."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        final = self.address(step)
        return final.with_name(f".tmp-{final.name}")


def step_folder(folder: AnyPath, step: int) -> Path:
    """Where the checkpoint of a step lies. Names sort as steps do."""
    return Path(folder) / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder's name, the inverse of `step_folder`; None for another name, such as that of a copy beside it."""
    number = name.removeprefix("step-")
    return int(number) if number != name and number.isdecimal() else None


def candidates(root: Path) -> list[Path]:
    """Folders of steps, best first: the one that the marker names, then earlier ones, then later ones, then those put aside.

    Some may be damaged, and hold no checkpoint.
    """
    steps = sorted((path for path in root.glob("step-*") if path.is_dir() and step_of(path.name) is not None), reverse=True)
    asides = sorted((path for path in root.glob(".old-step-*") if is_checkpoint(path)), reverse=True)
    marker = root / "latest"
    named = root / marker.read_text(encoding="utf-8", errors="replace").strip() if marker.is_file() else root
    if named.parent != root or named == root:
        return steps + asides
    first = [path for path in (named, aside(named)) if path in steps + asides]
    earlier = [path for path in steps if path.name < named.name]
    return first + earlier + [path for path in steps + asides if path not in first + earlier]


def superseded(names: Iterable[str], last: str, keep: int, keep_every: int) -> list[str]:
    """Of checkpoints' names those to delete once `last` is there: its past but the last `keep`, and but every so-manieth step.

    keep 0: none. What has not just a step's name is its owner's: neither counted nor deleted.
    """
    steps = {step: name for name in names if (step := step_of(name)) is not None and name <= last}
    return [steps[step] for step in sorted(steps)[:-keep] if not (keep_every and step % keep_every == 0)] if keep else []


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
