"""Indices, tokenizing and rows beside megatron-core and tokenizers, interleaved in one process; memory in processes of its own.

    python benchmarks/data.py [--only index,text,rows,memory,mds,loader] [--rounds 7] [--results benchmarks/RESULTS.md]

Each part takes less than two minutes of an idle machine, and prints as it goes. `mds` and `loader` are what the scripts of
these names print: mosaicml-streaming, and what a training step waits. `datasets` is raced where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each side

import numpy as np
import report

from fmegatron import data
from fmegatron.data.gpt import GptOptions, GptSamples
from fmegatron.data.gpt_indices import _sample_index

DOCUMENTS, TOKENS, SEQ = 1_000_000, 1_000_000_000, 2048
ROWS = 500
PARTS = ("index", "text", "rows", "memory", "mds", "loader")


def lengths_of(documents: int, tokens: int) -> np.ndarray:
    """Lengths spread like those of web pages, int32, that sum to `tokens`."""
    weights = np.random.default_rng(0).lognormal(0, 1, documents)
    lengths = np.maximum((weights / weights.sum() * tokens).astype(np.int32), 1)
    lengths[0] += tokens - int(lengths.sum(dtype=np.int64))
    return lengths


def theirs_index(lengths: np.ndarray, samples: int | None = None) -> Any:
    """Megatron's three arrays, by its own method."""
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.utils import Split

    own = object.__new__(gpt_dataset.GPTDataset)
    own.config = SimpleNamespace(
        defer_npy_index_mmap=False, path_to_cache=None, mock=True, sequence_length=SEQ, random_seed=1,
        add_extra_token_to_sequence=True)  # fmt: skip
    own.num_samples, own.index_split, own.indices = samples, Split.train, np.arange(len(lengths), dtype=np.int32)
    own.dataset = SimpleNamespace(sequence_lengths=lengths)
    return own._build_document_sample_shuffle_indices()


def race(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, one after the other, in changing order; one round of both before the first is not counted."""
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        print(".", end="", file=sys.stderr, flush=True)
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (ours, theirs)[which]()
            if number:
                spent[which].append(time.perf_counter() - start)
    return spent


def memory(who: str) -> int:
    """Bytes by which the peak of a fresh process grows while the whole index is made."""
    words = [sys.executable, "-W", "ignore", __file__, "--memory", who]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(who: str) -> None:
    """In a process of its own: print the growth of the peak."""
    lengths = lengths_of(DOCUMENTS, TOKENS)
    make: Callable[..., Any] = (lambda x: data.gpt_index(x, None, SEQ, 1)) if who == "ours" else theirs_index
    make(np.full(9, 9000, np.int32))  # what is imported late
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = np.zeros(max(before * 1024 - _resident(), 0) // 8)  # up to the peak so far, so that what follows raises it
    held[:] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = make(lengths)
    print(len(kept) + len(held) * 0, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def index_rows(rounds: int) -> list[tuple[str, Any, Any]]:
    """(what, seconds of ours, of theirs)."""
    from megatron.core.datasets import helpers

    lengths = lengths_of(DOCUMENTS, TOKENS)
    order = data.gpt_index(lengths, None, SEQ, 1).document
    rows = (TOKENS - 1) // SEQ
    found = [
        ("sample index, against the C++ helper alone", *race(
            lambda: _sample_index(lengths, order, SEQ, 1, rows),
            lambda: helpers.build_sample_idx(lengths, order, SEQ, 1, TOKENS, True, True), rounds)),
        ("document, sample and shuffle index", *race(
            lambda: data.gpt_index(lengths, None, SEQ, 1), lambda: theirs_index(lengths), rounds))]  # fmt: skip
    size, weights = 1_000_000, np.array([0.35, 0.25, 0.15, 0.1, 0.08, 0.05, 0.02])

    def loop() -> None:
        helpers.build_blending_indices(np.zeros(size, np.int16), np.zeros(size, np.int64), weights, len(weights), size, False)

    return [*found, ("blend of 7 data sets, 1 million samples", *race(lambda: data.blend_index(weights, size), loop, rounds))]


def text_rows(folder: Path, rounds: int) -> tuple[list[tuple[str, Any, Any]], float]:
    """Tokenizing JSONL, and the size of its text in MB."""
    texts = [text for _, text in data.stdlib_documents("train")][:40]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    codec = data.tokenizers.train_bpe(texts, 4096)

    def ours() -> None:
        data.tokenize([folder / "x.jsonl"], folder / "out", codec, append_eod=True)

    def theirs() -> None:
        for first in range(0, len(texts), 64):
            codec.inner.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)

    size = sum(len(text.encode()) for text in texts) / 1e6
    found = [("tokenize JSONL to .bin/.idx, against encode_batch of texts in memory", *race(ours, theirs, rounds))]
    if importlib.util.find_spec("datasets"):
        found.append(("tokenize JSONL to .bin/.idx, against datasets.map of it", *race(ours, mapped(folder, codec), rounds)))
    return found, size


def mapped(folder: Path, codec: Any) -> Callable[[], None]:
    """The same file through `datasets`: read, mapped in batches, written to its cache, which is emptied first."""
    import datasets

    datasets.disable_progress_bars()

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [one.ids for one in codec.inner.encode_batch_fast(rows["text"], add_special_tokens=False)]}

    def run() -> None:
        shutil.rmtree(folder / "hf", ignore_errors=True)
        found = datasets.load_dataset("json", data_files=str(folder / "x.jsonl"), split="train", cache_dir=str(folder / "hf"))
        found.map(encode, batched=True, batch_size=64, remove_columns=["text"], load_from_cache_file=False)

    return run


def sample_rows(folder: Path, rounds: int) -> list[tuple[str, Any, Any]]:
    """500 rows of 1,024 tokens from the same files."""
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.utils import Split

    with data.IndexedWriter(folder / "rows", np.uint16) as out:
        out.add_documents(np.arange(n) % 60_000 for n in lengths_of(20_000, 10_000_000))
    prefix, count = str(folder / "rows"), ROWS
    tokenizer = SimpleNamespace(vocab_size=60_000, eod=7, unique_identifiers={})
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1, sequence_length=1024, path_to_cache=str(folder / "cache"), tokenizer=tokenizer, split="1",
        blend=([prefix], None), reset_position_ids=True, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False)  # fmt: skip
    low = gpt_dataset.GPTDataset.build_low_level_dataset(prefix, config)
    theirs = gpt_dataset.GPTDataset(low, prefix, np.arange(20_000, dtype=np.int32), None, Split.train, config)
    gpt = GptSamples(data.IndexedDataset(prefix), GptOptions(1024, 1, reset_positions=True), eod=7, vocab_size=60_000)
    own = data.Samples(data.IndexedDataset(prefix), 1024, 1, reset_positions=True, vocab_size=60_000)

    def read(rows: Any) -> Callable[[], None]:
        def run() -> None:
            for number in range(count):
                rows(number)

        return run

    names = (("rows in Megatron's order", gpt), ("rows in our own order", own))
    return [(what, *race(read(rows.row), read(theirs.__getitem__), rounds)) for what, rows in names]


def alone(part: str) -> list[str]:
    """The section that another script prints, but for its title."""
    words = [sys.executable, str(Path(__file__).with_name(f"{part}.py"))]
    printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed.partition("## ")[2].splitlines()[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--memory")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory:
        measure_memory(args.memory)
        return
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    body, notes = list[list[str]](), list[str]()

    def add(rows: list[tuple[str, Any, Any]]) -> None:
        for what, ours, theirs in rows:
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*report.ratio(ours, theirs))
            body.append([what, ratio, f"{np.median(ours) * 1e3:.1f}", f"{np.median(theirs) * 1e3:.1f}"])
            print("", *body[-1], sep="\n  ", flush=True)

    with tempfile.TemporaryDirectory() as name:
        if "index" in args.only:
            add(index_rows(args.rounds))
        if "text" in args.only:
            text, size = text_rows(Path(name), args.rounds)
            add(text)
            notes.append(f"- tokenizing: {size / float(np.median(text[0][1])):.1f} MB/s on one core")
        if "rows" in args.only:
            rows = sample_rows(Path(name), args.rounds)
            add(rows)
            notes.append(f"- rows of 1,024 tokens: {ROWS / float(np.median(rows[0][1])):,.0f} a second in Megatron's order")
    if "memory" in args.only:
        mine, other = memory("ours"), memory("theirs")
        body.append(["peak memory of the three indices, MB", f"{mine / other:.2f}", f"{mine / 1e6:.1f}", f"{other / 1e6:.1f}"])
    what = f"{TOKENS:,} tokens in {DOCUMENTS:,} documents, seq {SEQ}"
    lines = [f"## {datetime.datetime.now():%Y-%m-%d %H:%M}  `python {' '.join(sys.argv)}`", "", report.machine(), "",
             f"One core a side; index of {what}. Ours / theirs, below 1 is less, median of rounds [95 % interval]:", "",
             *report.table(["", "ours / theirs", "ours ms", "theirs ms"], body), "", *notes, ""]  # fmt: skip
    for part in [part for part in ("mds", "loader") if part in args.only.split(",")]:
        lines += [f"`python benchmarks/{part}.py`:", "", *alone(part)]
    print("\n".join(lines))
    if args.results:
        args.results.write_text(args.results.read_text() + "\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
