"""What general compressors make of a text: the numbers beside which a model's bits per byte are read."""

from __future__ import annotations

import gzip
import lzma


def compressed_sizes(data: bytes) -> dict[str, int]:
    """Bytes after `gzip -9` and `xz -9`; bits per byte = 8 * size / len(data)."""
    return {"gzip": len(gzip.compress(data, 9, mtime=0)), "xz": len(lzma.compress(data, preset=9))}
