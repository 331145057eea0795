"""The command line: reads words, calls one library function. Exit 0, 2 for a user's mistake (one line), 130 for Ctrl-C.

Nothing heavy is imported before the words are known to be right, so `--help` and mistakes answer at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from fmegatron import config, toml
from fmegatron.config import ConfigError
from fmegatron.plan.config import DoctorConfig, PlanConfig
from fmegatron.toml import option

# Options that a word alone turns on.
FLAGS = ("--append-eod", "--append_eod", "--split-sentences", "--split_sentences", "--record")


@dataclass(frozen=True)
class Tokenize:
    """Options of `tokenize`."""

    output: str = option("data", "prefix of the written .bin and .idx")
    tokenizer: str | None = option(None, "tokenizer.json, its folder, byte, null; none: learn OUTPUT.tokenizer.json")
    vocab_size: int = option(32768, "of the tokenizer that is learned", at_least=257)
    append_eod: bool = option(False, "end each document with the tokenizer's end-of-document token")
    workers: int = option(1, "processes", at_least=1)
    key: str = option("text", "where a line of .jsonl, or a Parquet file, has its text; several: a,b")
    split_sentences: bool = option(False, "each sentence is a sequence of its document")
    splitter: str = option("punctuation", "of --split-sentences: punctuation, or nltk's punkt, punkt:german, …")


@dataclass(frozen=True)
class Data:
    """Options of `data inspect | verify | merge | convert`."""

    tokenizer: str | None = option(None, "that made the files; shows text, and checks that all ids are in it")
    tokens: int = option(400, "inspect: tokens of the sample shown", at_least=1)
    seed: int = option(0, "inspect: chooses where the sample lies", at_least=0)
    picture: str | None = option(None, "inspect: where the lengths are drawn; none: NAME.lengths.png")
    record: bool = option(False, "verify: write the hashes to PREFIX.sha256")
    output: str = option("data", "merge, convert: prefix of the written .bin and .idx, or folder of shards")
    to: Literal["mds", "bin"] = option("mds", "convert: MDS shards from a PREFIX, or bin (and idx) from a folder of them")
    compression: str | None = option(None, "convert: of shards, such as zstd or gz:3")
    hashes: tuple[str, ...] = option((), "convert: of shards, such as sha1 or xxh64")


@dataclass(frozen=True)
class Generate:
    """Options of `generate`."""

    tokens: int = option(128, "tokens to generate", at_least=1)
    temperature: float = option(1.0, "0: always the likeliest", at_least=0)
    top_k: int | None = option(None, "draw from the k likeliest; none: all", at_least=1)
    top_p: float | None = option(None, "draw from the likeliest that hold this probability; none: all", at_least=0)
    seed: int = option(0, "of the draws", at_least=0)


@dataclass(frozen=True)
class Pipelines:
    """Options of `explain --pipeline`."""

    pipeline: str = option("all", "a schedule, several (1f1b,zbv), all, or a .csv in TorchTitan's format")
    ranks: int = option(4, "of the pipeline", at_least=1)
    virtual: int | None = option(None, "stages a rank; none: the fewest that a schedule is made for", at_least=1)
    microbatches: int = option(8, "of a step", at_least=1)
    forward: float = option(1.0, "duration of a rank's forward of a microbatch", at_least=0)
    inputs: float = option(1.0, "duration of its input gradients", at_least=0)
    weights: float = option(1.0, "duration of its weight gradients", at_least=0)
    send: float = option(0.0, "duration of a transfer to the next rank", at_least=0)
    picture: str | None = option(None, "a .png or .svg to draw the timelines in")
    measure: str | None = option(None, "a preset (llama3:debug) of which a step is run here, one layer a stage, and shown too")
    seq: int = option(128, "tokens in a sample of that step", at_least=2)


def train(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """CONFIG.toml|quickstart: train, or go on with the run in --run.dir"""
    (name,) = _exactly(words, "CONFIG.toml|quickstart")
    run = _configured(name, table)
    from fmegatron.inference import text
    from fmegatron.train import loop
    loop.run(run, sample=text.sample)


def explain(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """CONFIG.toml|quickstart [--json]: leaves, placements, bytes and collectives of a step, before anything runs;
    explain --pipeline SCHEDULE|all [--ranks 4 --microbatches 8 --picture FILE.svg]: timelines of pipelines"""
    if isinstance(table.get("pipeline"), str):
        _exactly(words)
        options = toml.update(Pipelines(), table, "command line")
        from fmegatron.train.pipeline import show
        show.main(json=json, **{f.name: getattr(options, f.name) for f in fields(options)})
        return
    (name,) = _exactly(words, "CONFIG.toml|quickstart")
    run = _configured(name, table)
    from fmegatron.train import explain
    explain.main(run, json=json)


def plan(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """CONFIG.toml|PRESET [--json]: memory, traffic, seconds and MFU of a step on a mesh and hardware that need not be here"""
    (name,) = _exactly(words, "CONFIG.toml|PRESET")
    from fmegatron.plan import main
    main.main(name, table, json=json)


def doctor(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """(under torchrun too): versions, devices, launcher; each collective of each axis, its transpose, latency, bandwidth"""
    _exactly(words)
    options = toml.update(DoctorConfig(), table, "command line")
    from fmegatron.plan import doctor
    doctor.main(options)


def tokenize(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """FILE ...|MODULE:FUNCTION: text, .jsonl, .parquet files, or a data set in Python, to tokens in Megatron's .bin and .idx"""
    options = toml.update(Tokenize(), table, "command line")
    if not words:
        raise ConfigError("command line: expected FILE ..., got nothing")
    from fmegatron.data import commands
    commands.tokenize_files(words, options.output, options.tokenizer, options.vocab_size, options.append_eod,
                            options.workers, options.key.split(","), options.split_sentences, options.splitter)


def data(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """inspect PREFIX | verify PREFIX | merge PREFIX ... | convert PREFIX|FOLDER: token files"""
    options = toml.update(Data(), table, "command line")
    if len(words) < 2 or words[0] not in ("inspect", "verify", "merge", "convert") or (len(words) > 2 and words[0] != "merge"):
        raise ConfigError(f"command line: expected inspect|verify|merge|convert PREFIX, got {' '.join(words) or 'nothing'}")
    from fmegatron.data import commands
    if words[0] == "inspect":
        commands.inspect(words[1], options.tokenizer, options.tokens, options.seed, options.picture)
    elif words[0] == "verify":
        commands.check(words[1], options.tokenizer, options.record)
    elif words[0] == "convert":
        commands.convert(words[1], options.to, options.output, options.compression, options.hashes)
    else:
        commands.merge(words[1:], options.output)


def generate(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """CHECKPOINT|HF_FOLDER PROMPT: continue a text"""
    options = toml.update(Generate(), table, "command line")
    source, prompt = _exactly(words, "CHECKPOINT|HF_FOLDER", "PROMPT")
    from fmegatron.inference import text
    text.main(source, prompt, **{f.name: getattr(options, f.name) for f in fields(options)})


@dataclass(frozen=True)
class Report:
    """`report` has no options."""


def report(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """DIR: a run's folder to DIR/report.html, one page with its curves, time, mesh, memory, settings and environment"""
    toml.update(Report(), table, "command line")
    (folder,) = _exactly(words, "DIR")
    from fmegatron.train import page
    print(page.write(folder))


@dataclass(frozen=True)
class Convert:
    """Options of `convert`."""

    to: Literal["hf", "checkpoint", "config"] = option("hf", "what to write; config: our TOML from another's settings")
    dtype: Literal["fp32", "bf16", "fp16"] | None = option(None, "of what is written; none: as it is")
    file_bytes: int = option(5_000_000_000, "most bytes of a file of a Hugging Face folder", at_least=1)
    config: str | None = option(None, "a file of Megatron-LM's flags, where its checkpoint does not say its model")


def convert(words: Sequence[str], table: toml.Table, json: bool) -> None:
    """CHECKPOINT|HF_FOLDER|MEGATRON --to hf|checkpoint FOLDER; or config FLAGS|TOML [NEW.toml]: settings of others as ours"""
    options = toml.update(Convert(), table, "command line")
    if words[:1] == ["config"] or options.to == "config":
        from fmegatron.train import migrate
        migrate.main(words[1:] if words[:1] == ["config"] else words)
        return
    source, target = _exactly(words, "CHECKPOINT|HF_FOLDER|MEGATRON", "FOLDER")
    from fmegatron.train import convert
    written = convert.convert(
        source, target, options.to, dtype=options.dtype, file_bytes=options.file_bytes, config=options.config)
    print(f"wrote {written}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {flag: flag in words for flag in ("--help", "-h", "--debug", "--json", "--version")}
    try:
        code = _run([word for word in words if word not in flags], flags)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left: `fmegatron train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if flags["--debug"]:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, ConfigError):  # all ranks read the same configuration: one speaks
            line = " ".join(str(error).split()) or type(error).__name__
            print(f"fmegatron: {'' if rank == '0' else f'rank {rank}: '}{line}", file=sys.stderr)
        return 2


def _run(words: list[str], flags: dict[str, bool]) -> int:
    commands: dict[str, tuple[Callable[..., None], type]] = {
        "train": (train, config.RunConfig), "explain": (explain, config.RunConfig), "plan": (plan, PlanConfig),
        "doctor": (doctor, DoctorConfig), "tokenize": (tokenize, Tokenize), "data": (data, Data),
        "generate": (generate, Generate), "report": (report, Report), "convert": (convert, Convert)}
    if flags["--version"]:
        print(importlib.metadata.version("fmegatron"))
        return 0
    if not words:
        print(_overview({name: function.__doc__ or "" for name, (function, _) in commands.items()}))
        return 0 if flags["--help"] or flags["-h"] else 2
    name, *rest = words
    if name not in commands:
        raise ConfigError(f"{name}: no such command ({', '.join(commands)})")
    function, options = commands[name]
    if flags["--help"] or flags["-h"]:
        print(f"usage: fmegatron {name} {function.__doc__}\n\n{_page(options)}")
        return 0
    if flags["--json"] and name not in ("explain", "plan"):
        raise ConfigError(f"command line: {name} has no --json")
    sys.path.insert(0, os.getcwd())  # import paths in a configuration are seen from here, as with python -m
    function(*toml.words(rest, FLAGS), flags["--json"])
    return 0


def _configured(name: str, table: toml.Table) -> config.RunConfig:
    """The run in a file or shipped, or the one that a checkpoint was written by."""
    if not (os.path.isdir(name) or "://" in name or os.path.basename(name).startswith("step-")):
        return config.load(name, table)
    from fmegatron.train import resume
    return resume.config_of(name, table)


def _exactly(words: Sequence[str], *names: str) -> Sequence[str]:
    if len(words) != len(names):
        raise ConfigError(f"command line: expected {' '.join(names)}, got {' '.join(words) or 'nothing'}")
    return words


def _overview(commands: dict[str, str]) -> str:
    lines = [f"  fmegatron {name} {doc}" for name, doc in commands.items()]
    return "\n".join(["Train transformers under any sharding rules.", "", *lines, "",
                      "  --help after a command lists its options; --debug shows the traceback of an error; --version"])


def _page(options: type) -> str:
    """Every option with its type, what it means and its default, one group after another."""
    lines: list[str] = []
    group = None
    for key, hint, default, doc in toml.options(options):
        head = key.rpartition(".")[0]
        if head != group:
            group, kind = head, type(getattr(options(), head)) if head else options
            lines += [*([""] if lines else []), f"{head or 'options'}: {kind.__doc__}"]
        text = f"{doc} [{toml.format_value(default).strip(chr(34))}]"
        left = f"  --{key} {toml.describe(hint)}"
        right = textwrap.wrap(text, 78)
        first = [left] if len(left) > 39 else [f"{left:<40}{right.pop(0)}"]
        lines += first + [" " * 40 + line for line in right]
    return "\n".join(lines)
