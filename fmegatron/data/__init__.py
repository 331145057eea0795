"""Data: from text to batches. A batch is a pure function of (seed, consumed samples, split)."""

from fmegatron.data.batches import Batch, Rows, batch_at, held_out_batches, rows_at
from fmegatron.data.bert import Bert
from fmegatron.data.blend import Blend, HeldOuts, gpt_blend
from fmegatron.data.blending import blend_index
from fmegatron.data.chat import Chat, load_chat
from fmegatron.data.compress import compressed_sizes
from fmegatron.data.corpus import Corpus, Files, Megatron, quickstart
from fmegatron.data.cycle import Cycle, InOrder, Skip, SkipSteps
from fmegatron.data.fim import Fim
from fmegatron.data.gpt import GptOptions, GptSamples, split_bounds
from fmegatron.data.gpt_indices import GptIndex, gpt_index
from fmegatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from fmegatron.data.masked import MaskedText
from fmegatron.data.masking import Masking, continuations
from fmegatron.data.mixture import Mixture, ramp
from fmegatron.data.pack import Packed, PackIndex, Sizes, StepIndex, Steps, by_length, first_fit, one_each
from fmegatron.data.place import batches
from fmegatron.data.prepare import Counts, tokenize, write_documents
from fmegatron.data.samples import HeldOut, Samples
from fmegatron.data.sft import Conversations, Turns
from fmegatron.data.t5 import T5
from fmegatron.data.text import Document, documents, stdlib_documents

__all__ = [
    "Batch",
    "Bert",
    "Blend",
    "Chat",
    "Conversations",
    "Corpus",
    "Counts",
    "Cycle",
    "Document",
    "Fim",
    "Files",
    "GptIndex",
    "GptOptions",
    "GptSamples",
    "HeldOut",
    "HeldOuts",
    "InOrder",
    "IndexedDataset",
    "IndexedWriter",
    "Masking",
    "MaskedText",
    "Mixture",
    "Megatron",
    "PackIndex",
    "Packed",
    "Rows",
    "Samples",
    "Sizes",
    "Skip",
    "SkipSteps",
    "StepIndex",
    "Steps",
    "T5",
    "Turns",
    "batch_at",
    "batches",
    "blend_index",
    "by_length",
    "compressed_sizes",
    "continuations",
    "documents",
    "first_fit",
    "gpt_blend",
    "gpt_index",
    "held_out_batches",
    "load_chat",
    "one_each",
    "quickstart",
    "ramp",
    "rows_at",
    "split_bounds",
    "stdlib_documents",
    "token_dtype",
    "tokenize",
    "write_documents",
]
