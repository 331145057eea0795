"""The commands about data, behind `fmegatron tokenize` and `fmegatron data …`: they call the library and print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fmegatron.config import imported
from fmegatron.data import inspect as look
from fmegatron.data import mds, tokenizers, verify
from fmegatron.data.indexed import IndexedDataset, IndexedWriter
from fmegatron.data.prepare import Counts, outputs, tokenize
from fmegatron.data.prepare import Progress as Told
from fmegatron.data.text import Source, documents


def tokenize_files(
    files: Sequence[str],
    output: str,
    tokenizer: str | None,
    vocab_size: int,
    append_eod: bool,
    workers: int,
    keys: Sequence[str],
    split_sentences: bool,
    splitter: str,
) -> None:
    """Tokenize, learning a tokenizer of `vocab_size` first where none is named, and say what came out.

    A module:function in place of files returns documents: dicts, as of a Hugging Face data set.
    """
    if tokenizer is None:
        texts = (text for key in keys for _, text in documents(sources(files), key))
        tokenizer = f"{output}.tokenizer.json"
        Path(tokenizer).parent.mkdir(parents=True, exist_ok=True)
        tokenizers.train_bpe(texts, vocab_size).save(tokenizer)
    with bar() as told:
        counts = tokenize(sources(files), output, tokenizer, append_eod, workers, told, keys,
                          split_sentences=split_sentences, splitter=splitter)  # fmt: skip
    written = ", ".join(f"{prefix}.bin" for prefix in outputs(output, keys, split_sentences))
    print(f"{written}: {counts.documents} documents, {counts.tokens} tokens, {counts.bytes} bytes of text")


def sources(files: Sequence[str]) -> Iterable[Source]:
    """The files themselves, or what a module:function returns, called anew each time."""
    called = [file for file in files if ":" in file and "/" not in file and not Path(file).exists()]
    if not called:
        return list(files)
    if len(files) > 1:
        raise ValueError(f"{called[0]} returns all the documents: name it alone, or files only")
    found: Iterable[Source] = imported(called[0])()
    return found


@contextmanager
def bar() -> Iterator[Told | None]:
    """What is done so far, where standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    text = TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens, {task.fields[rate]:.1f} MB/s")
    with Progress(SpinnerColumn(), BarColumn(), text, TimeElapsedColumn(), console=console) as shown:
        task = shown.add_task("", total=None, documents=0, tokens=0, rate=0.0)

        def told(counts: Counts) -> None:
            rate = counts.bytes / 1e6 / max(shown.tasks[0].elapsed or 0, 1e-3)
            shown.update(task, documents=counts.documents, tokens=counts.tokens, rate=rate)

        yield told


def inspect(prefix: str, tokenizer: str | None, tokens: int, seed: int, picture: str | None) -> None:
    """Statistics, a picture of the documents' lengths, and a sample to read."""
    data = IndexedDataset(prefix)
    found = look.statistics(data)
    print("\n".join([f"{prefix}:", *found.lines()]))
    target = picture or f"{Path(prefix).name}.lengths.png"
    look.picture(found, target, Path(prefix).name)
    print(f"{target}: lengths of the documents\n")
    codec = tokenizers.load(tokenizer) if tokenizer else None
    print("\n".join(look.excerpt(data, codec, tokens, seed)))
    if codec and found.largest >= codec.vocab_size:
        print(f"note: ids reach {found.largest}, but {tokenizer} ends at {codec.vocab_size - 1}", file=sys.stderr)


def check(prefix: str, tokenizer: str | None, record: bool) -> None:
    """Index, ids and hashes of a pair of files; with `record` the hashes are written down."""
    if (Path(prefix) / mds.INDEX).is_file():
        print(mds.verify(prefix))
        return
    size = tokenizers.load(tokenizer).vocab_size if tokenizer else None
    print("\n".join(verify.verify(prefix, size)))
    if record:
        verify.record(prefix)


def convert(source: str, to: str, output: str, compression: str | None, hashes: Sequence[str]) -> None:
    """Token files to MDS shards, or back; a document is a sample."""
    if to == "mds":
        count = mds.to_mds(source, output, compression=compression, hashes=hashes)
    else:
        count = mds.to_indexed(source, output)
    print(f"{output}: {count} documents")


def merge(prefixes: Sequence[str], output: str) -> None:
    """One pair of files with the documents of several, in order. Raises ValueError where their dtypes differ."""
    with IndexedWriter(output, IndexedDataset(prefixes[0]).dtype) as out:
        for prefix in prefixes:
            out.add_index(prefix)
    merged = IndexedDataset(output)
    print(f"{output}.bin: {len(merged.documents) - 1} documents, {len(merged.stream)} tokens of {len(prefixes)} files")
