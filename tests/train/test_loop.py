"""A run from its configuration: what it writes, that it resumes to the bit, and that a mesh changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pieces import held_out_nats

from fmegatron import cli, config, data, models
from fmegatron.inference import text
from fmegatron.models import Model
from fmegatron.train import checkpoint, loop, saving

WORDS = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    value = {}\n\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Token files of bytes: 40 documents to learn from, 7 held out."""
    folder = tmp_path_factory.mktemp("text")
    for split, numbers in {"train": range(40), "valid": range(100, 107)}.items():
        documents = [json.dumps({"text": WORDS.format(n) * (1 + n % 3)}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(documents))
        data.tokenize([folder / f"{split}.jsonl"], folder / split, "byte", append_eod=True)
    return folder


SIZES = {"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64}


def words(corpus: Path, folder: Path, *more: str) -> list[str]:
    text = {"source": corpus / "train", "valid": corpus / "valid", "tokenizer": "byte", "seq": 16}
    options = {"run.dir": folder, "training.steps": 4, "optimizer.schedule": "constant"}
    options |= {f"data.{key}": value for key, value in text.items()}
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more]


def losses(folder: Path, name: str = "loss") -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert all(record.keys() >= {"step", "loss", "grad_norm", "tokens_per_second"} for record in records)
    return [record[name] for record in records]


def test_a_pipeline_changes_nothing_and_its_checkpoints_know_none(corpus, tmp_path, capsys):
    plain, staged = tmp_path / "plain", tmp_path / "staged"
    batch = ("--training.microbatches", "4", "--training.steps")
    assert cli.main(words(corpus, plain, *batch, "5")) == 0
    stages = "--mesh.pp 2 --mesh.virtual true --pipeline.schedule".split()
    assert cli.main(words(corpus, staged, *batch, "2", *stages, "zb_h1", "--pipeline.layout", "Et|tL")) == 0
    assert cli.main(words(corpus, staged, *batch, "3", *stages, "1f1b", "--mesh.dp", "2", "--training.remat", "full")) == 0
    turns = ("interleaved_1f1b", "--pipeline.virtual", "2", "--pipeline.layout", "Et|t||L")
    assert cli.main(words(corpus, staged, *batch, "4", *stages, *turns)) == 0
    assert cli.main(words(corpus, staged, *batch, "5")) == 0
    assert losses(staged) == pytest.approx(losses(plain), rel=1e-5)
    capsys.readouterr()
    assert cli.main(words(corpus, tmp_path / "no", *batch, "4", *stages, "zbv")) == 2
    assert capsys.readouterr().err == "fmegatron: pipeline: zbv has two stages a rank, not 1: use virtual 2\n"
    assert cli.main(words(corpus, tmp_path / "no", *batch, "4", *stages, "zbv", "--pipeline.virtual", "2")) == 2
    said = "pipeline: 2 layers: 2 do not divide over 4 of 4 stages: use 4 layers, or a layout such as Et|t||L"
    assert capsys.readouterr().err == f"fmegatron: {said}\n"


def test_resume_is_bitwise_and_fresh_starts_over(corpus, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(words(corpus, whole)) == 0
    said = capsys.readouterr().out
    for word in ("held-out", "checkpoint", "resume", "generate", "sample", "loss.png"):
        assert word in said
    assert (whole / "loss.png").stat().st_size > 1000 and (whole / "config.toml").is_file()
    assert cli.main(words(corpus, parts, "--training.steps", "2")) == 0
    assert cli.main(words(corpus, parts)) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    assert cli.main(["train", str(parts / "config.toml"), "--training.steps", "5"]) == 0  # as the last lines tell
    assert losses(parts)[:4] == losses(whole) and len(losses(parts)) == 5
    assert cli.main(words(corpus, parts, "--run.fresh", "true")) == 0
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("more", [
    "--mesh.virtual true --mesh.dp 2 --mesh.tp 2 --training.microbatches 2 --sharding.rules fsdp_tp_sp",
    "--mesh.virtual true --mesh.threads true --mesh.dp 2 --sharding.rules zero2",
    "--training.microbatches 4 --training.remat full",
])
def test_the_mesh_changes_nothing(more, corpus, tmp_path):
    assert cli.main(words(corpus, tmp_path / "one", "--training.steps", "3")) == 0
    assert cli.main(words(corpus, tmp_path / "other", "--training.steps", "3", *more.split())) == 0
    for name in ("loss", "grad_norm"):
        assert losses(tmp_path / "other", name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-4)


def test_torchrun(corpus, tmp_path):
    assert cli.main(words(corpus, tmp_path / "one", "--training.steps", "3")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fmegatron"]
    more = words(corpus, tmp_path / "two", "--training.steps", "3", "--mesh.dp", "2")
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checkpoint ") == 1  # one process speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    resumed = words(corpus, tmp_path / "two", "--mesh.virtual", "true", "--mesh.tp", "2")
    assert cli.main(resumed) == 0 and len(losses(tmp_path / "two")) == 4


def test_held_out_counts_every_token_and_byte_once(corpus, tmp_path):
    folder = tmp_path / "run"
    assert cli.main(words(corpus, folder, "--validation.batches", "100", "--training.steps", "2")) == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    model, params, _ = text.load(folder)
    stream = data.IndexedDataset(corpus / "valid").stream
    nats, count = held_out_nats(model, params, corpus / "valid", 16)
    assert last["heldout_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / int((stream[1:] != 256).sum()), rel=1e-5)


class Stopping:
    """Rows whose reading asks the run to stop, as a scheduler would."""

    def row(self, number: int):
        if number == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return data.Samples(data.IndexedDataset(self.prefix), 16, 0).row(number)


def stopping(prefix: str):
    rows = Stopping()
    rows.prefix = prefix
    return rows


def tiny(**overrides) -> Model:
    return models.llama3("debug", layers=1, embed=16, heads=2, kv=2, mlp=24, vocab=264, **overrides)


def halved(sh, logits, labels, weights):
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return sh.total(nats.reshape(labels.shape) * weights / 2, "batch loss_seq")


def test_a_signal_saves_and_leaves_and_users_bring_functions(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    table = {
        "run": {"dir": str(tmp_path)},
        "data": {"source": "mine:stopping", "arguments": {"prefix": str(corpus / "train")}, "seq": 16},
        "model": {"function": "mine:tiny"},
        "training": {"steps": 1000},
    }
    loop.run(config.load("debug", table))
    assert "stopped at step" in capsys.readouterr().out
    done = len(losses(tmp_path))
    assert 1 <= done < 20 and saving.checkpoint.find(tmp_path / "checkpoints").name == f"step-{done:08d}"
    plain = losses(tmp_path)
    table["model"]["loss"], table["run"]["dir"] = "mine:halved", str(tmp_path / "half")
    loop.run(config.load("debug", table))
    assert losses(tmp_path / "half")[0] == pytest.approx(plain[0] / 2, rel=1e-5)


@pytest.mark.parametrize("more, said", [
    ("--model.overrides.embed 32", "embed = 16, this run's is 32"),
    ("--sharding.rules nope", "sharding.rules = nope: no such rules, known are"),
    ("--mesh.tp 2", "mesh tp=2 needs 2 process(es) but 1 are running"),
    ("--mesh.virtual true --mesh.tp 3", "does not divide over mesh axis 'tp' of 3"),
    ("--mesh.virtual true --mesh.dp 3", "does not divide over 3 data-parallel ranks"),
    ("--training.microbatches 8 --mesh.virtual true --mesh.dp 2", "2 data-parallel ranks and 8 microbatches: use 16"),
    ("--mesh.virtual true --mesh.dp -1", "mesh.dp = -1"),
    ("--data.source nope", "no file nope.bin"),
    ("--data.tokenizer nope.json", "no tokenizer at nope.json"),
    ("--model.overrides.vocab 100", "the tokenizer has 257 tokens and the model 100"),
    ("--model.preset llama3:9b", "llama3 has the sizes"),
    ("--model.function nope:f", "nope"),
    ("--optimizer.name adan", "optimizer.name = adan: known are adamw, adam, sgd"),
    ("--training.remat some", "remat is none, full"),
    ("--training.compile true --mesh.virtual true", "a mesh.virtual runs eager"),
    ("--checkpoint.resume nope --run.dir fresh", "no checkpoint in nope"),
])
def test_mistakes_are_one_line(more, said, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "embed" in more:
        assert cli.main(words(corpus, tmp_path / "run", "--training.steps", "1")) == 0
    capsys.readouterr()
    assert cli.main([*words(corpus, tmp_path / "run"), *more.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_generate_reads_what_a_run_left(corpus, tmp_path, capsys):
    assert cli.main(words(corpus, tmp_path, "--training.steps", "1")) == 0
    capsys.readouterr()
    said = set()
    for source in (tmp_path, tmp_path / "checkpoints", checkpoint.latest(tmp_path / "checkpoints")):
        assert cli.main(["generate", str(source), "def ", "--tokens", "5", "--temperature", "0"]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and said.pop().startswith("def ")
    assert cli.main(["generate", str(tmp_path / "nope"), "def "]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    ("--mesh.pp 3", "pipeline: 4 layers: 4 do not divide over 3 of 3 stages: use 3 or 6 layers, or a layout such as Ett|t|tL"),
    ("--mesh.pp 2 --pipeline.schedule dualpipev --pipeline.virtual 2 --training.microbatches 2", "not 2: use 4, or zbv"),
    ("--mesh.tp 8", "dim 'heads' of [heads] has size 6, which does not divide over mesh axis 'tp' of 8: use tp=3 or tp=6"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_any_text_is_read(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "quickstart", "--mesh.virtual", "true", *words.split()]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
