"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """`data` under the name `path`, complete on disk before the name appears. OSError says what to do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise OSError(
            error.errno, f"{path}: {error.strerror} while writing {len(data)} bytes: free space there or choose another folder"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
