"""Configurations: what goes in comes out; a mistake is one line that names the place, the key and the way out."""

from __future__ import annotations

import string
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import config, toml
from fmegatron.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Inner:
    """A group."""

    a_b: int | None = toml.option(3, "an int", at_least=1)
    pair: tuple[float, float] = toml.option((0.1, 0.2), "two floats")
    many: tuple[str, ...] = toml.option((), "any number of words")
    kind: Literal["x", "y"] = toml.option("x", "one of two")
    free: dict[str, Any] = toml.option({}, "a table")


@dataclass(frozen=True)
class Outer:
    """A configuration."""

    word: str = toml.option("w", "a word")
    maybe: str | None = toml.option(None, "a word or none")
    flag: bool = toml.option(False, "a flag")
    ratio: float = toml.option(0.5, "a float")
    inner: Inner = Inner()


texts = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda t: t != "none")
keys = st.text(string.ascii_letters + "_-. é\"\x7f", min_size=1, max_size=6)
floats = st.floats(allow_nan=False)
plain = st.none() | st.booleans() | st.integers(-2**63, 2**63 - 1) | floats | texts
nested = st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3))
free = st.dictionaries(keys, nested)
inners = st.builds(Inner, st.none() | st.integers(1), st.tuples(floats, floats), st.lists(texts).map(tuple),
                   st.sampled_from(["x", "y"]), free)
outers = st.builds(Outer, texts, st.none() | texts, st.booleans(), floats, inners)


@given(outers)
def test_what_is_dumped_reads_back(value):
    text = toml.dumps(value)
    tomllib.loads(text)  # the dump is TOML to the standard library too
    assert toml.update(Outer(), toml.loads(text, {}), "dump") == value


@given(outers)
def test_the_command_line_says_all_that_a_file_says(value):
    args = []
    for key, *_ in toml.options(Outer):
        target = value
        for part in key.split("."):
            target = getattr(target, part)
        if key != "inner.free":
            args.append(f"--{key.replace('_', '-')}={toml.format_value(target).replace('$${', '${')}")
    positional, table = toml.words(["config.toml", *args])
    assert positional == ["config.toml"]
    assert toml.update(Outer(), table, "command line") == replace(value, inner=replace(value.inner, free={}))


@pytest.mark.parametrize("name", sorted(path.stem for path in config.SHIPPED.glob("*.toml")))
def test_shipped_files_load_and_round_trip(name, monkeypatch):
    for variable in ("TRAIN", "VALID", "TOKENIZER"):
        monkeypatch.setenv(variable, "somewhere")
    run = config.load(name)
    assert run.run.name == name
    assert toml.update(RunConfig(), toml.loads(toml.dumps(run)), "dump") == run


def test_a_file_is_laid_over_the_defaults_and_words_over_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nsteps = 7\nmicrobatches = 4\n[model]\noverrides = {layers = 2, rope = {base = 1}}\n")
    _, table = toml.words(["--training.steps", "20", "--training.clip-norm", "none", "--optimizer.betas", "0.8,.9",
                           "--mesh.virtual", "true", "--model.overrides.rope.scale", "8", "--optimizer.lr=3e-4"])
    run = config.load(file, table)
    assert (run.training.steps, run.training.microbatches, run.training.clip_norm) == (20, 4, None)
    assert (run.optimizer.betas, run.optimizer.lr, run.mesh.virtual) == ((0.8, 0.9), 3e-4, True)
    assert run.model.overrides == {"layers": 2, "rope": {"base": 1, "scale": 8}}
    assert run.run.name == "mine" and run.run.folder.as_posix() == "runs/mine"


def test_environment(tmp_path):
    env = {"N": "12", "HOME_": "/h"}
    text = 'word = "${HOME_}/x ${NOT:-fallback} $${HOME_}"\n[inner]\na_b = "${N}"\nfree = {k = ["${N}"]}'
    got = toml.update(Outer(), toml.loads(text, env), "file")
    assert got.word == "/h/x fallback ${HOME_}"
    assert (got.inner.a_b, got.inner.free) == (12, {"k": [12]})


@pytest.mark.parametrize("text, said", [
    ("word = 1", "f.toml: word = 1: expected text"),
    ("flag = 1", "f.toml: flag = 1: expected true|false"),
    ("ratio = true", "f.toml: ratio = true: expected float"),
    ('ratio = "1.0"', 'f.toml: ratio = "1.0": expected float'),
    ("[inner]\npair = [1]", "f.toml: inner.pair = [1]: expected [float, float]"),
    ("[inner]\na_b = 0", "f.toml: inner.a_b = 0: must be at least 1"),
    ('[inner]\nkind = "z"', 'f.toml: inner.kind = "z": expected x|y'),
    ("[inner]\na_c = 1", "f.toml: there is no inner.a_c; did you mean inner.a_b?"),
    ("[iner]\na_b = 1", "f.toml: there is no iner; did you mean inner?"),
    ("pair = [1, 2]", "f.toml: there is no pair; did you mean inner.pair?"),
    ("zzz = 1", "f.toml: there is no zzz"),
    ("inner = 1", "f.toml: inner is a group: set inner.a_b or another of its keys"),
    ('word = "${GONE}"', "f.toml: word: ${GONE} is not set in the environment (${GONE:-x} defaults to x)"),
    ('word = "${"', "f.toml: word = '${': write ${NAME}, ${NAME:-default}, or $${ for a plain ${"),
    ("word = ", "f.toml: not valid TOML: Invalid value (at end of document)"),
])
def test_mistakes_in_a_file(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        path = config.find("f.toml")
        toml.update(Outer(), toml.read(path), str(path))
    assert str(caught.value) == said


@pytest.mark.parametrize("table, word", [
    ({"training": {"global_batch": 6, "microbatches": 4}}, "use 3 microbatches, or a batch of 4 or 8"),
    ({"mesh": {"dp": 0}}, "or -1 for every process"),
    ({"training": {"compile": True}, "mesh": {"virtual": True}}, "runs eager"),
    ({"mesh": {"threads": True}}, "needs mesh.virtual"),
    ({"model": {"hf": "a", "function": "b:c"}}, "one model"),
    ({"training": {"hysteresis": 3}}, "hysteresis = 3 does nothing without a dynamic loss scale"),
    ({"training": {"dtype": "fp16", "loss_scale": "8", "loss_scale_window": 5}}, "loss_scale_window = 5 does nothing"),
    ({"training": {"skip_norm": 0}}, "skip_norm = 0: must be above 0"),
    ({"training": {"clip_value": float("nan")}}, "at least 0"),
    ({"training": {"clip_norm": float("inf")}}, "must be finite"), ({"faults": {"tolerance": 0.1}}, "or faults.recheck"),
    ({"faults": {"memory": False, "memory_history": True}}, "does nothing without faults.memory = true"),
])
def test_groups_that_contradict_each_other(table, word):
    with pytest.raises(ConfigError, match=f"command line: .*{word}"):
        config.load("quickstart", table)


def test_import_paths():
    assert config.imported("os.path:join") is __import__("os").path.join
    for target in ("os.path", "os.path:nope", "nope_.x:f", ":f", "os:sep"):
        with pytest.raises(ConfigError, match="package.module:function"):
            config.imported(target)


def test_every_field_is_documented_and_frozen():
    for key, _, _, doc in toml.options(RunConfig):
        assert doc, key
    groups = [getattr(RunConfig(), f.name) for f in fields(RunConfig)]
    for group in groups:
        assert is_dataclass(group) and type(group).__dataclass_params__.frozen
        assert type(group).__doc__


def test_configurations_need_no_torch():
    code = "import sys, fmegatron.cli, fmegatron.config as c; c.load('quickstart'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
