"""A local MDS folder checked as a whole."""

from __future__ import annotations

from pathlib import Path

from fmegatron.data.mds.cache import Place, check
from fmegatron.data.mds.codecs import decompress
from fmegatron.data.mds.shard import Shard


def verify(folder: str | Path, *, allow_unsafe: bool = False) -> str:
    """Sizes, every hash and every sample of a folder's shards; what was found, in a line. Raises ValueError at the first fault.

    A shard may lie there packed, unpacked, or both; a packed one alone is unpacked in memory, for its size.
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
                    decompress(info.compression, data, info.raw_data.bytes)
                except ValueError as error:
                    raise ValueError(f"{place.local / file.basename}: {error}") from None
        if info.raw_data in here or not here:
            samples += len(list(Shard(place.local / info.raw_data.basename, info, allow_unsafe=allow_unsafe)))
    total = sum(info.samples for info in infos)
    packed = "" if samples == total else f", {total - samples} of them in packed shards and not decoded"
    return f"{folder}: {len(infos)} shards, {total} samples{packed}, {hashes} hashes: as the index says"
