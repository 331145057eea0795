"""Documents to token files: read, tokenize on several processes, write in order, appear complete or not at all."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmegatron.data.indexed import IndexedWriter, token_dtype
from fmegatron.data.text import Document, documents
from fmegatron.data.tokenizers import Tokenizer, load

CHUNK = 64  # documents handed to a process at once


class Counts(NamedTuple):
    """What has been written so far; `bytes` counts the text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


Progress = Callable[[Counts], None]


def tokenize(
    files: Iterable[str | Path],
    output: str | Path,
    tokenizer: str | Path | Tokenizer,
    append_eod: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    key: str = "text",
) -> Counts:
    """Tokenize text and JSONL files into `output.bin` and `output.idx`, in the files' order whatever `workers` is.

    `append_eod` ends each document with the tokenizer's end-of-document id. An empty document has no sequences, as in
    Megatron's tool. An error leaves nothing behind, and an earlier output as it was.
    """
    made = load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    return write_documents(documents(files, key), output, made, append_eod, workers, progress)


def write_documents(
    texts: Iterable[Document],
    output: str | Path,
    tokenizer: Tokenizer,
    append_eod: bool,
    workers: int = 1,
    progress: Progress | None = None,
) -> Counts:
    """Like `tokenize`, for documents from anywhere."""
    if workers < 1:
        raise ValueError(f"workers {workers}: at least 1")
    end = [tokenizer.eod] if append_eod else []
    counts = Counts()
    with IndexedWriter(output, token_dtype(tokenizer.vocab_size)) as out:
        for encoded, size in _encoded(_chunks(texts), tokenizer, workers):
            for ids in encoded:
                out.add_document(*([np.array(ids + end)] if ids else []))
            new = len(encoded), sum(len(ids) + len(end) for ids in encoded if ids), size
            counts = Counts(*(old + more for old, more in zip(counts, new, strict=True)))
            if progress:
                progress(counts)
    return counts


Encoded = tuple[list[list[int]], int]  # the documents of a chunk, bytes of their text


def _encoded(chunks: Iterator[list[Document]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    if workers == 1:
        yield from (_encode(tokenizer, chunk) for chunk in chunks)
        return
    # Not plain forks, which would copy the locks of this process's threads. Its imports are made once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pickled = pickle.dumps(tokenizer)  # once; a worker unpickles it once
    with context.Pool(workers, _alone) as pool:
        waiting = []
        for chunk in chunks:  # a window of tasks, so that a slow writer does not fill the memory
            waiting.append(pool.apply_async(_work, (pickled, chunk)))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).get()
        for task in waiting:
            yield task.get()


def _encode(tokenizer: Tokenizer, chunk: list[Document]) -> Encoded:
    try:
        encoded = tokenizer.encode_batch([text for _, text in chunk])
    except ValueError:
        for source, text in chunk:  # again one by one, to name the document
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        raise
    return encoded, sum(len(text.encode()) for _, text in chunk)


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


@lru_cache(1)
def _unpickle(pickled: bytes) -> Tokenizer:
    return pickle.loads(pickled)


def _work(pickled: bytes, chunk: list[Document]) -> Encoded:
    return _encode(_unpickle(pickled), chunk)


def _chunks(texts: Iterable[Document]) -> Iterator[list[Document]]:
    texts = iter(texts)
    while chunk := list(islice(texts, CHUNK)):
        yield chunk
