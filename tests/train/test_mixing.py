"""Mixtures by schedule and fill in the middle, from a configuration to the rows that a run trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmegatron import cli, config, data, toml
from fmegatron.train.source import source_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two pairs of files, of bytes: a has only 97, b only 98; documents end."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("a", "b"):
        with data.IndexedWriter(folder / name, "<u2") as out:
            out.add_documents([np.array([*name.encode() * n, 256]) for n in range(5, 60)])
    return folder


def table(corpus: Path, **said) -> config.RunConfig:
    plain = {"seq": 32, "tokenizer": "byte", "source": str(corpus / "a")} | said
    return toml.update(config.RunConfig(), {"data": plain}, "test")


def stages(corpus: Path) -> dict:
    a, b = str(corpus / "a"), str(corpus / "b")
    return {"0": {a: 3, b: 1}, "200:400": {b: 1}}


def letters(c: config.RunConfig, numbers: range) -> list[int]:
    """What most tokens of each sample are."""
    rows = source_of(c, lambda line: None).rows
    return [int(np.bincount(rows.row(n)["tokens"], minlength=257).argmax()) for n in numbers]


def test_weights_follow_the_consumed_samples(corpus):
    c = table(corpus, mixture=stages(corpus))
    assert toml.update(config.RunConfig(), toml.loads(toml.dumps(c)), "again") == c
    found = np.array(letters(c, range(600))) == 97
    assert abs(found[:200].mean() - 0.75) < 0.01 and not found[400:].any()
    assert 0.3 < found[200:400].mean() < 0.45  # on the way from 3/4 to none


def test_documents_are_cut_in_three(corpus):
    words = {"prefix": 1, "middle": 2, "suffix": 3, "rate": 1.0}
    rows = source_of(table(corpus, fim=words), lambda line: None).rows
    text = np.concatenate([rows.row(n)["tokens"] for n in range(20)])
    counts = np.bincount(text, minlength=257)
    assert min(counts[1], counts[2], counts[3]) > 10 and abs(counts[1] - counts[2]) < 20


def test_a_run(corpus, tmp_path):

    words = ["train", "debug", "--run.dir", str(tmp_path), "--data.tokenizer", "byte", "--data.seq", "32",
             "--model.overrides.vocab", "257", "--training.steps", "2", "--data.workers", "2", "--log.prompt", ""]  # fmt: skip
    more = ["--training.compile", "false", "--training.global_batch", "4"]
    file = tmp_path / "mix.toml"
    file.write_text(toml.dumps(table(corpus, mixture=stages(corpus))))
    assert cli.main([*words[:1], str(file), *words[2:], *more, "--model.preset", "llama3:debug"]) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def named(corpus: Path, weights: object) -> object:
    return {str(corpus / name): weight for name, weight in weights.items()} if isinstance(weights, dict) else weights


@pytest.mark.parametrize(("said", "part"), [
    ({"mixture": {"5": {"a": 1}}}, "from sample 5"),
    ({"mixture": {"0": {"a": -1}}}, "a = -1"),
    ({"mixture": {"0": 3}}, "expected a table"),
    ({"mixture": {"x": {"a": 1}}}, "data.mixture.x"),
    ({"mixture": {"0:9": {"a": 1}}}, "a ramp from nothing"),
    ({"mixture": {"0": {"a": 1}, "5:9": {"b": 1}, "7": {"a": 1}}}, "before the ramp to 9"),
    ({"mixture": {"0": {"a": 1}}, "blend": {"b": 1}}, "data.mixture and data.blend"),
    ({"fim": {"prefix": 1, "middle": 2}}, "data.fim.suffix = None"),
    ({"fim": {"prefix": 1, "middle": 2, "suffix": 300}}, "257 tokens"),
    ({"fim": {"prefix": 1, "middle": 2, "suffix": 3, "rat": 1}}, "no rat"),
    ({"fim": {"prefix": 1, "middle": 2, "suffix": 3, "rate": 2}}, "0 to 1"),
])  # fmt: skip
def test_mistakes(corpus, said, part):
    if "mixture" in said:
        whole = {at: named(corpus, weights) for at, weights in said["mixture"].items()}
        said = said | {"mixture": whole}
    with pytest.raises(ValueError, match="data") as error:
        source_of(table(corpus, **said), lambda line: None)
    assert part in str(error.value).replace(str(corpus) + "/", "") and "\n" not in str(error.value)
