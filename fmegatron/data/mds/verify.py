"""A local MDS folder checked as a whole."""

from __future__ import annotations

from pathlib import Path

from fmegatron.data.mds.cache import Place, check
from fmegatron.data.mds.codecs import decompress
from fmegatron.data.mds.shard import Shard


def verify(folder: str | Path, *, allow_unsafe: bool = False) -> str:
    """Sizes, every hash and every sample of a folder's shards; what was found, in a line. Raises ValueError at the first fault.

    A shard may lie there packed, unpacked, or both; a packed one is unpacked in memory.
    """
    place = Place(Path(folder))
    infos = place.read_index(0, None)
    samples = hashes = 0
    for info in infos:
        here = [file for file in (info.raw_data, info.zip_data) if file and (place.local / file.basename).is_file()]
        for file in here:
            data = (place.local / file.basename).read_bytes()
            for name in file.hashes:
                check(data, file, place.local / file.basename, name)
            check(data, file, place.local / file.basename)
            hashes += len(file.hashes)
            if file is info.zip_data and info.compression:
                try:
                    data = decompress(info.compression, data, info.raw_data.bytes)
                except ValueError as error:
                    raise ValueError(f"{place.local / file.basename}: {error}") from None
            count = sum(1 for _ in Shard(place.local / file.basename, info, allow_unsafe=allow_unsafe, data=data))
        if not here:
            Shard(place.local / info.raw_data.basename, info)  # raises: it is not there
        samples += count
    return f"{folder}: {len(infos)} shards, {samples} samples, {hashes} hashes: as the index says"
