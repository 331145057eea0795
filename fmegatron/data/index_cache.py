"""Index arrays kept on disk, so that they are drawn once: by the first of many ranks that start together.

    FOLDER/{hash}-{kind}-description.txt     what they are, in JSON; the hash is of this text; written last
    FOLDER/{hash}-{kind}-{name}.npy          each array

The others wait for a lock. Where the file system has none, all draw the same arrays and rename them to the same names: a
reader sees a whole file, whoever wrote it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray[Any], ...]


def cached(
    folder: str | Path | None, kind: str, description: Mapping[str, Any], names: Sequence[str], build: Callable[[], Arrays]
) -> Arrays:
    """What `build()` returns, one array for each of `names`; from disk, mapped, where a description like this one is there.

    Without a folder they are only built. A damaged array is built again. Raises OSError where the folder cannot be written.
    """
    if folder is None:
        return build()
    text = json.dumps(description, indent=4, sort_keys=True)
    base = Path(folder) / f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}-{kind}"
    base.parent.mkdir(parents=True, exist_ok=True)
    found = _load(base, text, names)
    if found is None:
        with _locked(Path(f"{base}.lock")):
            found = _load(base, text, names)
            if found is None:
                for name, array in zip(names, build(), strict=True):
                    _place(Path(f"{base}-{name}.npy"), lambda file, array=array: np.save(file, array))  # type: ignore[misc]
                _place(Path(f"{base}-description.txt"), lambda file: file.write(text.encode()))
                found = _load(base, text, names)
    assert found is not None
    return found


def _load(base: Path, text: str, names: Sequence[str]) -> Arrays | None:
    with suppress(OSError, ValueError, EOFError):
        if Path(f"{base}-description.txt").read_text() == text:
            return tuple(np.load(f"{base}-{name}.npy", mmap_mode="r") for name in names)
    return None


def _place(path: Path, write: Callable[[Any], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror}: the indices need room here; free some, or name another folder (data.cache)"
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
