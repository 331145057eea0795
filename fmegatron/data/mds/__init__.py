"""MosaicML's MDS shards: written, read, streamed from elsewhere, mixed and shuffled as pure functions of (seed, epoch)."""

from fmegatron.data.mds.cache import Cache, Place
from fmegatron.data.mds.convert import to_indexed, to_mds
from fmegatron.data.mds.corpus import StreamCorpus, stream_of
from fmegatron.data.mds.encodings import Encoding, encoding
from fmegatron.data.mds.index import INDEX, FileInfo, ShardInfo
from fmegatron.data.mds.order import Order, epoch_order
from fmegatron.data.mds.partition import partition, traversal
from fmegatron.data.mds.rows import StreamRows, TokenRows
from fmegatron.data.mds.sampling import Weight, choose, resample
from fmegatron.data.mds.shard import Shard
from fmegatron.data.mds.shuffle import shuffle
from fmegatron.data.mds.streams import Stream, Streams, group_of
from fmegatron.data.mds.verify import verify
from fmegatron.data.mds.writer import MDSWriter

__all__ = [
    "INDEX", "Cache", "Encoding", "FileInfo", "MDSWriter", "Order", "Place", "Shard", "ShardInfo", "Stream",
    "StreamCorpus", "StreamRows", "Streams", "TokenRows", "Weight", "choose", "encoding", "epoch_order", "group_of",
    "partition", "resample", "shuffle", "stream_of", "to_indexed", "to_mds", "traversal", "verify",
]  # fmt: skip
