"""Streams: MDS folders, here or elsewhere, as one sequence of samples; and groups of streams for groups of replicas."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmegatron.data.mds.cache import Cache, Place
from fmegatron.data.mds.order import Part
from fmegatron.data.mds.remote import is_remote
from fmegatron.data.mds.sampling import Weight
from fmegatron.data.mds.shard import Sample


@dataclass(frozen=True)
class Stream:
    """One MDS folder: `local`, or a copy in `local` of `remote` (URL or folder); what it adds to an epoch; its group."""

    local: str
    remote: str | None = None
    split: str | None = None
    weight: Weight = field(default_factory=Weight)
    group: str = "all"

    @property
    def place(self) -> Place:
        """The folders themselves, with the split."""
        if is_remote(self.local):
            raise ValueError(f"local = {self.local}: a folder of this machine; the URL goes into remote")
        remote = f"{self.remote.rstrip('/')}/{self.split}" if self.remote and self.split else self.remote
        return Place(Path(self.local, self.split or ""), remote)


class Streams(Sequence[Sample]):
    """The samples of all streams, numbered one stream after another; shards come from one cache (see `cache.Cache`).

    Raises ValueError where two streams share a local folder, or one has no samples.
    """

    def __init__(self, streams: Sequence[Stream], *, storage: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.streams = tuple(streams)
        places = [stream.place for stream in self.streams]
        if len({place.local.resolve() for place in places}) < len(places) or not places:
            raise ValueError("streams: at least one, each with a local folder of its own")
        indices = [place.read_index(options.get("retries", 2), storage) for place in places]
        for place, shards in zip(places, indices, strict=True):
            if not shards:
                raise ValueError(f"{place.local}: the index names no shards; drop this stream")
        known = [(place, shard) for place, shards in zip(places, indices, strict=True) for shard in shards]
        self.cache = Cache(known, storage=storage, **options)
        self.sizes = [np.array([shard.samples for shard in shards], np.int64) for shards in indices]
        self._starts = np.cumsum([0, *(shard.samples for _, shard in known)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.sample(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index % len(self))

    def sample(self, number: int, column: str | None = None) -> Any:
        """One sample, or one column of it."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.cache.shard(shard).sample(number - int(self._starts[shard]), column)

    def where(self, number: int) -> str:
        """A sample's file and its number there, for messages."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        place, info = self.cache.shards[shard]
        return f"{place.local / info.raw_data.basename}: sample {number - int(self._starts[shard])}"

    def ahead(self, numbers: Iterable[int]) -> None:
        """Fetch the shards of these samples in the background, in this order."""
        shards = np.searchsorted(self._starts, np.asarray(list(numbers), np.int64), side="right") - 1
        self.cache.ahead(dict.fromkeys(shards.tolist()))

    def facts(self) -> str:
        """What tells these shards from others, for the name of what is made of them."""
        known = [(str(place.local), place.remote, shard.raw_data, shard.samples) for place, shard in self.cache.shards]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def parts(self, group: str, rows: Sequence[Any] | None = None) -> list[Part]:
        """The streams of a group, as an order sees them: the samples of each shard, or as many `rows` of it."""
        every = self.sizes if rows is None else rows
        firsts = np.cumsum([0, *(int(sizes.sum()) for sizes in every)]).tolist()
        of = zip(firsts, every, self.streams, strict=False)
        return [Part(first, sizes, stream.weight) for first, sizes, stream in of if stream.group == group]

    def groups(self) -> tuple[str, ...]:
        """The names of all groups, in the order of the streams."""
        return tuple(dict.fromkeys(stream.group for stream in self.streams))


def group_of(replica: int, replicas: int, slots: Sequence[str]) -> str:
    """The group whose samples a replica reads: slot k of n is the k-th n-th of every global batch, as are its replicas.

    Raises ValueError where replicas do not divide over slots.
    """
    if replicas % len(slots) or not 0 <= replica < replicas:
        raise ValueError(f"replica {replica} of {replicas} and {len(slots)} slots: the replicas are a multiple of the slots")
    return slots[replica * len(slots) // replicas]
