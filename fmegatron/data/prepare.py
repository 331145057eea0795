"""Documents to token files: read, tokenize on several processes, write in order, appear complete or not at all.

Documents are tokenized in parts of about 128 MiB of text. A finished part lies in the folder PREFIX.parts until all are
there and become one pair of files; the same command, started again after whatever stopped it, goes on behind the last of
them (parts.py).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fmegatron.data import sentences as sentence
from fmegatron.data.indexed import IndexedWriter, token_dtype
from fmegatron.data.parts import Parts, Spent, digest
from fmegatron.data.text import Document, Record, Source, records, texts_of
from fmegatron.data.tokenizers import Tokenizer, load

CHUNK = 64  # documents handed to a process at once, at most
CHUNK_BYTES = 2**20  # or this many bytes of them
PART_BYTES = 2**27  # of text in a part: a minute of one core, which is what an interrupted job does again

Counts = Spent  # what has been written so far: documents, tokens, bytes of text in UTF-8
Progress = Callable[[Counts], None]


class How(NamedTuple):
    """What is done with each document: the same for all of them, and known to every process."""

    tokenizer: Tokenizer
    append_eod: bool
    keys: tuple[str, ...]
    splitter: str | None  # None: a document is one sequence


def tokenize(
    files: Iterable[Source],
    output: str | Path,
    tokenizer: str | Path | Tokenizer,
    append_eod: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    key: str | Sequence[str] = "text",
    *,
    split_sentences: bool = False,
    splitter: str = "punctuation",
    part_bytes: int = PART_BYTES,
) -> Counts:
    """Tokenize files, or dicts, into `output.bin` and `output.idx`, in their order whatever `workers` is.

    `append_eod` ends each document with the tokenizer's end-of-document id. An empty document has no sequences, as in
    Megatron's tool; with `split_sentences` each sentence is a sequence, cut by `splitter` (see `sentences.splitter`). Several
    keys make a pair of files each, `output_KEY_document` or `output_KEY_sentence`. Dicts may be any iterable, a streaming
    Hugging Face data set for one. What was tokenized before an interruption is not tokenized again; an error leaves an
    earlier output as it was.
    """
    if splitter != "punctuation" and not split_sentences:
        raise ValueError(f"splitter {splitter}: nothing to cut without split_sentences (--split-sentences)")
    sentence.splitter(splitter)  # what is missing is said before anything is read
    how = How(load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer,
              append_eod, (key,) if isinstance(key, str) else tuple(key), splitter if split_sentences else None)  # fmt: skip
    if not how.keys or len(set(how.keys)) < len(how.keys):
        raise ValueError(f"keys {', '.join(how.keys) or 'none'}: name each key once")
    sources, paths = _paths(files)
    with Parts.open(output, outputs(output, how.keys, split_sentences), paths, how, part_bytes) as parts:
        return _write(records(sources, how.keys), parts, how, workers, progress)


def _paths(files: Iterable[Source]) -> tuple[Iterable[Source], list[str | Path]]:
    """(all sources, those that are files: all or none). Documents stay where they are, more of them than memory holds."""
    rest = iter(files)
    first = list(islice(rest, 1))
    if not first or not isinstance(first[0], str | Path):
        return chain(first, rest), []
    found = [*first, *rest]
    return found, [path for path in found if isinstance(path, str | Path)]


def write_documents(
    texts: Iterable[Document],
    output: str | Path,
    tokenizer: Tokenizer,
    append_eod: bool,
    workers: int = 1,
    progress: Progress | None = None,
) -> Counts:
    """Like `tokenize`, for documents from anywhere, in one go."""
    how = How(tokenizer, append_eod, ("text",), None)
    found = (Record(source, {"text": text}) for source, text in texts)
    with Parts.open(output, [str(output)], None, how, PART_BYTES) as parts:
        return _write(found, parts, how, workers, progress)


def outputs(prefix: str | Path, keys: Sequence[str], split_sentences: bool) -> list[str]:
    """The prefixes that are written: one a key, named as Megatron's tool names them where there are several."""
    level = "sentence" if split_sentences else "document"
    return [str(prefix)] if len(keys) == 1 else [f"{prefix}_{key}_{level}" for key in keys]


def _write(found: Iterator[Record], parts: Parts, how: How, workers: int, progress: Progress | None) -> Counts:
    if workers < 1:
        raise ValueError(f"workers {workers}: at least 1")
    encoded = _encoded(_chunks(parts.rest(found)), how, workers)
    counts, read, dtype = parts.spent, parts.read, token_dtype(how.tokenizer.vocab_size)
    for first in encoded:
        start = counts.bytes
        with ExitStack() as stack:
            writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in parts.next()]
            for chunk in chain([first], encoded):
                for writer, key in zip(writers, chunk.keys, strict=True):
                    writer.add_many(*key)
                tokens = sum(len(key.tokens) for key in chunk.keys)
                counts = Counts(counts.documents + chunk.documents, counts.tokens + tokens, counts.bytes + chunk.bytes)
                read += chunk.digest
                if progress:
                    progress(counts)
                if counts.bytes - start >= parts.part_bytes:
                    break
        parts.finish(counts, read)
    parts.join(dtype)
    return counts


class Key(NamedTuple):
    """A chunk's documents under one key: tokens, the length of each sequence, the number of sequences of each document."""

    tokens: npt.NDArray[np.generic]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32]


class Encoded(NamedTuple):
    """A chunk of documents as tokens, for each key."""

    keys: list[Key]
    documents: int
    bytes: int
    digest: int


def _encoded(chunks: Iterator[list[Record]], how: How, workers: int) -> Iterator[Encoded]:
    if workers == 1:
        yield from (_encode(how, chunk) for chunk in chunks)
        return
    # Not plain forks, which would copy the locks of this process's threads. Its imports are made once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pickled = pickle.dumps(how)  # once; a worker unpickles it once
    waiting: deque[Future[Encoded]] = deque()
    # The processes are the parallelism.
    variables = {"TOKENIZERS_PARALLELISM": "false", **sentence.environment(how.splitter)}
    with ProcessPoolExecutor(workers, context, _begin, (variables,)) as pool:
        try:
            for chunk in chunks:  # a window of tasks, so that a slow writer does not fill the memory
                waiting.append(pool.submit(_work, pickled, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError("a worker was killed, perhaps for its memory: take fewer workers; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode(how: How, chunk: list[Record]) -> Encoded:
    texts = [texts_of(record, how.keys) for record in chunk]
    keys = [_encode_key(how, [text[i] for text in texts], chunk) for i in range(len(how.keys))]
    return Encoded(keys, len(chunk), sum(len(text.encode()) for row in texts for text in row), digest(chunk))


def _encode_key(how: How, texts: list[str], chunk: list[Record]) -> Key:
    pieces = [sentence.splitter(how.splitter)(text) if how.splitter else [text] for text in texts]
    ids = iter(_ids(how.tokenizer, [piece for document in pieces for piece in document], pieces, chunk))
    end = [how.tokenizer.eod] if how.append_eod else []
    found: list[list[int]] = []
    counts = np.zeros(len(texts), np.int32)
    for number, document in enumerate(pieces):
        sequences = [sequence for sequence in (next(ids) for _ in document) if sequence]
        if sequences:
            sequences[-1] = sequences[-1] + end
        counts[number] = len(sequences)
        found += sequences
    lengths = np.fromiter(map(len, found), np.int32, len(found))
    tokens = np.fromiter(chain.from_iterable(found), np.int64, int(lengths.sum(dtype=np.int64)))
    smallest = token_dtype(how.tokenizer.vocab_size)
    fits = not len(tokens) or (tokens.min() >= 0 and tokens.max() <= np.iinfo(str(smallest)).max)
    return Key(tokens.astype(smallest) if fits else tokens, lengths, counts)  # what does not fit, the writer refuses


def _ids(tokenizer: Tokenizer, texts: list[str], pieces: list[list[str]], chunk: list[Record]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except ValueError:
        for record, document in zip(chunk, pieces, strict=True):  # again one by one, to name the document
            try:
                tokenizer.encode_batch(document)
            except ValueError as error:
                raise ValueError(f"{record.source}: {error}") from None
        raise


def _begin(variables: dict[str, str]) -> None:
    os.environ.update(variables)


@lru_cache(1)
def _unpickle(pickled: bytes) -> How:
    return pickle.loads(pickled)


def _work(pickled: bytes, chunk: list[Record]) -> Encoded:
    return _encode(_unpickle(pickled), chunk)


def _chunks(found: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in found:
        chunk.append(record)
        size += len(record.found) if isinstance(record.found, bytes) else sum(len(str(x)) for x in record.found.values())
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
