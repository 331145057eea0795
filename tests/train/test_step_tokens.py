"""Steps of so many tokens, by keys: rows of like lengths, the same samples resumed and on any mesh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pieces import files, records_of

from fmegatron import cli, config, data
from fmegatron.data.batches import batches
from fmegatron.train.source import source_of

SIZES = {"layers": 1, "embed": 16, "heads": 2, "kv": 2, "mlp": 16, "vocab": 264, "context": 256}
BUDGET, ROWS, MULTIPLE = 1024, 4, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A pair of files of 60 documents of 0 to 150 tokens."""
    folder, draw = tmp_path_factory.mktemp("steps"), np.random.default_rng(0)
    with data.IndexedWriter(folder / "x", "<u2") as out:
        out.add_documents(draw.integers(0, 256, n) for n in [0, 1, *draw.integers(2, 150, 58)])
    return folder / "x"


def words(corpus: Path, out: Path, *more: str) -> list[str]:
    options = {"data.source": corpus, "data.tokenizer": "byte", "data.seq": 160, "run.dir": out, "training.steps": 7,
               "data.step_tokens": BUDGET, "data.step_multiple": MULTIPLE, "training.global_batch": ROWS, "run.seed": 5,
               "checkpoint.keep": 0, "log.prompt": "", "optimizer.schedule": "constant"}  # fmt: skip
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more]


def rows(corpus: Path, out: Path, **more) -> data.Rows:
    return source_of(config.load("debug", _table(words(corpus, out)[2:]) | more), lambda line: None).rows


def _table(given: list[str]) -> dict:
    table: dict = {}
    for word in given:
        key, value = word.removeprefix("--").split("=", 1)
        inner, *path = reversed(key.split("."))
        at = table
        for part in reversed(path):
            at = at.setdefault(part, {})
        at[inner] = int(value) if value.isdigit() else value
    return table


def test_every_document_comes_once_an_epoch_in_steps_that_keep_the_budget(corpus, tmp_path):
    steps, read = rows(corpus, tmp_path / "run"), data.IndexedDataset(corpus)
    assert isinstance(steps, data.Steps)
    consumed, seen, sizes = 0, [], set()
    while consumed < len(steps.index.items):
        step = steps.step(consumed)
        made = [steps.row(number) for number in step]
        assert len(step) % ROWS == 0 and len(step) * len(made[0]["tokens"]) <= BUDGET and len(made[0]["tokens"]) % MULTIPLE == 0
        for row in made:
            count = int(row["weights"].sum())
            seen += [tuple([*row["tokens"][:count].tolist(), int(row["labels"][count - 1])])] if count else []
            padding = (np.arange(len(row["tokens"])) >= count) & (count > 0)
            assert not row["weights"][count:].any() and (row["documents"] == padding).all()
        sizes.add(len(step))
        consumed = step.stop
    assert sorted(seen) == sorted(tuple(text.tolist()) for text in read if len(text) > 1) and len(sizes) > 1


def test_resumed_and_on_other_meshes_the_samples_are_the_same(corpus, tmp_path):
    assert cli.main(words(corpus, tmp_path / "whole")) == 0
    assert cli.main(words(corpus, tmp_path / "broken", "--training.steps", "3")) == 0
    assert cli.main(words(corpus, tmp_path / "broken")) == 0
    mesh = "--mesh.virtual true --mesh.dp 2 --mesh.cp 2 --training.microbatches 2".split()
    assert cli.main(words(corpus, tmp_path / "mesh", *mesh)) == 0
    whole, broken, other = (records_of(tmp_path / name) for name in ("whole", "broken", "mesh"))
    assert files(tmp_path / "whole").items() <= files(tmp_path / "broken").items()
    assert [(r["loss"], r["consumed"]) for r in whole] == [(r["loss"], r["consumed"]) for r in broken]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in other], rel=1e-5)
    steps, consumed = rows(corpus, tmp_path / "run"), 0
    for a, b in zip(whole, other, strict=True):
        step = steps.step(consumed)
        consumed = step.stop
        assert a["consumed"] == b["consumed"] == consumed
        tokens = len(step) * len(steps.row(step.start)["tokens"])
        assert a["tokens_per_second"] * a["seconds"] == pytest.approx(tokens) == b["tokens_per_second"] * b["seconds"]


def test_skipped_samples_take_their_steps_with_them(corpus, tmp_path):
    table = _table(words(corpus, tmp_path / "run")[2:])
    table["data"] |= {"skip": ["9:10"]}
    left = source_of(config.load("debug", table), lambda line: None).rows
    steps = rows(corpus, tmp_path / "run")
    gone, kept = steps.around(9), batches(left, ahead=0)
    got = [n for _ in range(5) for n in next(kept)["sample"].tolist()]
    assert len(gone) > 1 and got == [n for n in range(len(got) + len(gone)) if n not in gone]
    assert [n for n in next(batches(left, consumed=gone.start, ahead=0))["sample"].tolist()][0] == gone.stop


@pytest.mark.parametrize("more, said", [
    ("--data.step_tokens 500", "a budget of 500 tokens: the longest example takes 160"),
    ("--data.seq 100", "documents are longer than seq 100, the longest has"),
    ("--training.rampup_batch [2,2,12]", "data.step_tokens and training.rampup_batch are both set"),
    ("--optimizer.unit samples", 'data.step_tokens and optimizer.unit = "samples" are both set'),
    ("--data.step_multiple 9 --mesh.cp 2 --mesh.virtual true", "9"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_one_line(more, said, corpus, tmp_path, capsys):
    assert cli.main(words(corpus, tmp_path / "run", *more.split())) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
