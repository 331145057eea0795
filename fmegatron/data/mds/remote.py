"""Files elsewhere: a folder, or any URL that fsspec knows (s3:// with the package s3fs; credentials as boto finds them).

An S3 API elsewhere than Amazon: `AWS_ENDPOINT_URL` in the environment, or `storage` = {"endpoint_url": ...}.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)  # trying again changes nothing


def is_remote(place: str | Path) -> bool:
    """Whether `place` is a URL, not a folder."""
    return "://" in str(place)


def download(source: str, target: Path, *, retries: int = 2, storage: Mapping[str, Any] | None = None) -> None:
    """Copy one file to `target`, trying again `retries` times. OSError names the source and what to do."""

    def copy() -> None:
        filesystem, path = _filesystem(source, storage)
        filesystem.get_file(path, str(target))

    _trying(copy, source, retries)


def upload(source: Path, target: str, *, retries: int = 2, storage: Mapping[str, Any] | None = None) -> None:
    """Copy one file away, trying again `retries` times."""

    def copy() -> None:
        filesystem, path = _filesystem(target, storage)
        filesystem.put_file(str(source), path)

    _trying(copy, target, retries)


def _filesystem(place: str, storage: Mapping[str, Any] | None) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{place}: files elsewhere need the package fsspec: pip install 'fmegatron[s3]'") from None
    filesystem, path = url_to_fs(str(place), **(storage or {}))
    return filesystem, str(path)


def _trying(work: Callable[[], T], place: str, retries: int) -> T:
    for left in range(retries, -1, -1):
        try:
            return work()
        except FINAL as error:
            raise _line(error, place, "check the address and the rights to it") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _line(error, place, "free space in the local folder, or lower cache_limit") from None
            if not left:
                raise _line(error, place, f"tried {retries + 1} times; is it up?") from None
        time.sleep(0.2 * 2 ** (retries - left))
    raise AssertionError("the last attempt returns or raises")


def _line(error: Exception, place: str, remedy: str) -> Exception:
    if isinstance(error, ImportError):
        return ValueError(f"{place}: {error}; pip install 'fmegatron[s3]'")
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    code = error.errno if isinstance(error, OSError) else None
    return OSError(code or errno.EIO, f"{place}: {os.strerror(code) if not what and code else what}: {remedy}")
