"""The command line: right words reach the library, wrong ones end in one line, exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fmegatron
from fmegatron import cli, toml
from fmegatron.config import RunConfig


@pytest.fixture
def calls(monkeypatch):
    """The library functions behind the commands, replaced by one that records what it is given."""
    seen = []
    for module, name in {"fmegatron.train.loop": "run", "fmegatron.train.explain": "main",
                         "fmegatron.inference.text": "main"}.items():
        fake = ModuleType(module)
        fake.sample = "sampler"
        setattr(fake, name, lambda *args, _name=module, **kwargs: seen.append((_name, args, kwargs)))
        parent, _, child = module.rpartition(".")
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(__import__(parent, fromlist=["_"]), child, fake, raising=False)
    return seen


def test_train_hands_over_one_configuration(calls):
    words = "train quickstart --run.dir D --training.steps 3 --training.compile false --mesh.tp 2 --mesh.virtual true"
    assert cli.main(words.split()) == 0
    ((name, (run,), kwargs),) = calls
    assert (name, kwargs) == ("fmegatron.train.loop", {"sample": "sampler"})
    assert isinstance(run, RunConfig)
    assert (run.run.dir, run.training.steps, run.training.compile) == ("D", 3, False)
    assert (run.mesh.tp, run.mesh.virtual) == (2, True)


def test_the_other_commands(calls):
    assert cli.main(["explain", "quickstart", "--json", "--mesh.tp=2"]) == 0
    assert cli.main(["generate", "DIR", "a prompt", "--top_k", "5", "--temperature", "0"]) == 0
    explain, generate = calls
    assert explain[1][0].mesh.tp == 2 and explain[2] == {"json": True}
    assert generate[1] == ("DIR", "a prompt")
    assert generate[2] == {"tokens": 128, "temperature": 0.0, "top_k": 5, "top_p": None, "seed": 0}


def test_tokenize_learns_a_tokenizer_and_writes_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two one two " * 50)
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n{"body": "four"}\n')
    words = ["tokenize", "a.txt", "b.jsonl", "--vocab-size", "260", "--key", "body", "--workers", "1"]
    assert cli.main(words) == 0
    assert "data.bin: 3 documents" in capsys.readouterr().out
    assert {"data.bin", "data.idx", "data.tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    again = ["tokenize", "a.txt", "--tokenizer", "data.tokenizer.json", "--append-eod", "false", "--output", "o"]
    assert cli.main(again) == 0 and "o.bin: 1 documents" in capsys.readouterr().out
    sizes = [(tmp_path / "o.bin").stat().st_size]
    for words in (["--append-eod", *again[1:-4]], [*again[1:-4], "--append-eod"]):
        assert cli.main(["tokenize", *words, "--output=o"]) == 0
        sizes.append((tmp_path / "o.bin").stat().st_size)
    assert sizes[1] == sizes[2] == sizes[0] + 2
    assert cli.main(["tokenize", "gone.txt", "--tokenizer", "byte"]) == 2
    assert "gone.txt" in capsys.readouterr().err


def shipped() -> list[str]:
    return sorted(path.stem for path in Path(fmegatron.__file__).parent.glob("configs/*.toml"))


@pytest.mark.parametrize("words, said", [
    ("trian quickstart", "trian: no such command (train, explain, plan, doctor, tokenize, data, generate, report, convert)"),
    ("train", "command line: expected CONFIG.toml|quickstart, got nothing"),
    ("train quickstart extra", "command line: expected CONFIG.toml|quickstart, got quickstart extra"),
    ("train nope.toml", f"nope.toml: neither a file nor a shipped configuration ({', '.join(shipped())})"),
    ("train quickstart --training.stepz 3", "command line: there is no training.stepz; did you mean training.steps?"),
    ("train quickstart --training.steps", "command line: --training.steps needs a value"),
    ("train quickstart --training.steps --run.dir x", "command line: --training.steps needs a value"),
    ("train quickstart --mesh.virtual yes", "command line: mesh.virtual = yes: expected true|false"),
    ("train quickstart --mesh.tp 1.5", "command line: mesh.tp = 1.5: expected int"),
    ("train quickstart --training 3", "command line: training is a group: set training.dtype or another of its keys"),
    ("train quickstart --a 1 --a.b 2", "command line: --a.b goes into a, which another option sets to 1"),
    ("train quickstart --json", "command line: train has no --json"),
    ("generate DIR", "command line: expected CHECKPOINT|HF_FOLDER PROMPT, got DIR"),
    ("generate DIR p --top_p -1", "command line: top_p = -1.0: must be at least 0"),
    ("tokenize", "command line: expected FILE ..., got nothing"),
])
def test_mistakes_are_one_line(words, said, calls, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"fmegatron: {said}\n")
    assert not calls


@pytest.mark.parametrize("error, code, said", [
    (ValueError("tp = 3 does not\ndivide 4 heads"), 2, "fmegatron: tp = 3 does not divide 4 heads\n"),
    (FileNotFoundError(2, "No such file", "x.bin"), 2, "fmegatron: [Errno 2] No such file: 'x.bin'\n"),
    (KeyboardInterrupt(), 130, ""),
])
def test_what_the_library_raises(error, code, said, monkeypatch, capsys, calls):
    def fail(run, sample):
        raise error
    monkeypatch.setattr(sys.modules["fmegatron.train.loop"], "run", fail)
    assert cli.main(["train", "quickstart"]) == code
    assert capsys.readouterr().err == said


def test_a_reader_may_leave():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "fmegatron", "train", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_debug_shows_the_traceback(calls):
    with pytest.raises(ValueError, match="no training.x"):
        cli.main(["train", "quickstart", "--training.x", "1", "--debug"])


def test_one_rank_speaks_about_the_configuration(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "nope"]) == 2
    assert capsys.readouterr().err == ""


def test_help_lists_every_option_as_it_is_written(capsys):
    assert cli.main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    for key, hint, _, _ in toml.options(RunConfig):
        assert f"  --{key} {toml.describe(hint)}" in page
    assert max(map(len, page.splitlines())) <= 120
    assert cli.main(["--help"]) == 0 and "fmegatron generate CHECKPOINT|HF_FOLDER" in capsys.readouterr().out
    assert cli.main([]) == 2
