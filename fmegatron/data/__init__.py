"""Data: from text to batches. A batch is a pure function of (seed, consumed samples, split)."""

from fmegatron.data.batches import Batch, batch_at, held_out_batches, rows_at
from fmegatron.data.blending import blend_index
from fmegatron.data.compress import compressed_sizes
from fmegatron.data.corpus import Corpus, quickstart
from fmegatron.data.gpt_indices import GptIndex, gpt_index
from fmegatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from fmegatron.data.place import batches
from fmegatron.data.prepare import Counts, tokenize, write_documents
from fmegatron.data.samples import HeldOut, Samples
from fmegatron.data.text import Document, documents, stdlib_documents

__all__ = [
    "Batch",
    "Corpus",
    "Counts",
    "Document",
    "GptIndex",
    "HeldOut",
    "IndexedDataset",
    "IndexedWriter",
    "Samples",
    "batch_at",
    "batches",
    "blend_index",
    "compressed_sizes",
    "documents",
    "gpt_index",
    "held_out_batches",
    "quickstart",
    "rows_at",
    "stdlib_documents",
    "token_dtype",
    "tokenize",
    "write_documents",
]
