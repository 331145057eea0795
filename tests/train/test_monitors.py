"""A run with everything that is measured: in its records, its traces, its writers; and settings that do not go together."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from pieces import held_out_nats

from fmegatron import cli, data, tree
from fmegatron.inference import text
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.testing.invariance import NAMES
from fmegatron.train import metrics
from fmegatron.train.facts import read as facts_of
from fmegatron.train.planned import plan_step
from fmegatron.train.state import init
from fmegatron.train.step import make_step
from fmegatron.train.unigram import probabilities, with_unigram

WORDS = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    value = {}\n\n"
SIZES = {"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, numbers in {"train": range(40), "valid": range(100, 107), "other": range(200, 202)}.items():
        documents = [json.dumps({"text": WORDS.format(n) * (1 + n % 3)}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(documents))
        data.tokenize([folder / f"{split}.jsonl"], folder / split, "byte", append_eod=True)
    return folder


def words(corpus: Path, folder: Path, *more: str, steps: int = 4) -> list[str]:
    given = {"source": corpus / "train", "valid": corpus / "valid", "tokenizer": "byte", "seq": 16}
    options = {"run.dir": folder, "training.steps": steps, "optimizer.schedule": "constant", "log.prompt": ""}
    options |= {f"data.{key}": value for key, value in given.items()}
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(folder, records) of a run that measures all there is."""
    folder = tmp_path_factory.mktemp("run") / "all"
    every = ("--monitors.norms=2", "--monitors.optimizer=2", "--monitors.per_parameter=true", "--monitors.activations=2")
    more = (*every, "--monitors.attention=2", "--monitors.unigram=text", f"--validation.sets.other={corpus / 'other'}")
    more = (*more, "--validation.full=true", "--validation.batches=none", "--profile.steps=[2, 3]", "--checkpoint.interval=2")
    assert cli.main(words(corpus, folder, *more)) == 0
    return folder, metrics.read(folder / "metrics.jsonl")


def test_records_have_what_is_due_and_nothing_else(run):
    _, (first, second, third, fourth) = run
    for kind in ("param_norm", "zeros", "optimizer/l2_norm/update/global", "optimizer/l2_norm/mu/layers.1.attn.q",
                 "activations/02.mlp/kurtosis", "activations/skewness/median", "attention/01.max_logit"):
        assert kind in second and kind in fourth and kind not in first and kind not in third
    always = {"perplexity", "lr", "beta1", "beta2", "tflops", "memory_bytes", "goodput", "time/data", "time/forward_backward",
              "time/optimizer", "unigram_normalised_loss"}
    assert all(always <= record.keys() for record in (first, second, third, fourth))
    assert {"time/checkpoint"} == {n for r in (third,) for n in r if n == "time/checkpoint"} and "time/validation" in fourth
    parts = sum(second[f"time/{part}"] for part in ("data", "forward_backward", "optimizer"))
    assert 0 < parts <= second["seconds"] * 1.01
    assert 0 < fourth["goodput"] <= 1


def test_watching_changes_no_loss(run, corpus, tmp_path):
    assert cli.main(words(corpus, tmp_path / "plain")) == 0
    plain = metrics.read(tmp_path / "plain" / "metrics.jsonl")
    assert [r["loss"] for r in plain] == [r["loss"] for r in run[1]]
    assert not any("/" in name and not name.startswith("time/") for record in plain for name in record)


def test_every_held_out_set_is_read_to_its_end(run, corpus):
    folder, records = run
    model, params, _ = text.load(folder)
    for prefix, names in (("valid", ("heldout_loss", "bits_per_byte")), ("other", ("validation/other/loss", None))):
        nats, count = held_out_nats(model, params, corpus / prefix, 16)
        assert records[-1][names[0]] == pytest.approx(nats / count, rel=1e-5)
    assert records[-1]["heldout_perplexity"] == pytest.approx(math.exp(records[-1]["heldout_loss"]))
    counts = np.bincount(data.IndexedDataset(corpus / "train").stream, minlength=264)
    p = np.maximum(counts / counts.sum(), np.finfo(np.float32).tiny)
    held_out = data.IndexedDataset(corpus / "other").stream[1:]
    assert records[-1]["validation/other/unigram_loss"] == pytest.approx(-np.log(p[held_out]).mean(), rel=1e-5)


def test_traces_are_chrome_traces_of_the_steps_asked_for(run):
    traces = sorted((run[0] / "traces").iterdir())
    assert [path.name for path in traces] == ["rank-0.step-00000002.json", "rank-0.step-00000003.json"]
    assert any(event.get("name") == "aten::mm" for event in json.loads(traces[0].read_text())["traceEvents"])


def test_facts_say_machine_mesh_and_sessions(run):
    facts = facts_of(run[0])
    assert facts["environment"]["torch"] and facts["mesh"]["kind"] == "single" and facts["model"]["parameters"] > 1000
    data = (run[0] / "report.html").read_text().split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["loss"] == [[r["step"], r["loss"]] for r in run[1]]
    assert len(facts["sessions"]) == 1 and facts["started"] <= run[1][0]["time"]


def test_the_unigram_loss_is_an_oracles_on_any_mesh_and_moves_nothing():
    net = gpt(Config(layers=1, embed=16, heads=4, kv=2, mlp=16, vocab=21))
    counts = {i: i + 1.0 for i in range(20)}  # token 20 never comes
    tokens = torch.randint(0, 21, (8, 8), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.flip(1), "weights": torch.rand(8, 8)}
    p = np.maximum(np.arange(1, 22) / sum(counts.values()), 0)
    p[20] = np.finfo(np.float32).tiny
    expected = float(-(np.log(p)[batch["labels"]] * batch["weights"].numpy()).sum() / batch["weights"].sum())
    from fmegatron import optim
    tx, after = optim.adamw(1e-2), []
    for model, term_weights in ((net, {}), (with_unigram(net, probabilities(counts, 21)), {"unigram": 0.0})):
        for sh in (SINGLE, Sharding(virtual_mesh(dp=2, cp=2), RULES["fsdp_tp_sp"])):
            settings = {"microbatches": 2, "remat": "full", "term_weights": term_weights}
            step, state = make_step(model, tx, sh, **settings), init(model, tx, sh)
            local = {k: shard(plan_step(model, sh).sh, x, NAMES[k]) for k, x in batch.items()}
            state, found = step(state, local)
            after.append((tree.leaves(state.params), found["loss"]))
            if term_weights:
                assert float(found["unigram"].flatten()[0]) == pytest.approx(expected, rel=1e-5)
    for (params, loss), (same, equal) in zip(after[:2], after[2:], strict=True):
        assert torch.equal(loss, equal) and all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def test_wandb_offline(corpus, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert cli.main(words(corpus, tmp_path / "run", "--log.wandb=fm", steps=2)) == 0
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    known = (tmp_path / "run" / "wandb-id").read_text().strip()
    assert known in written.name
    raw = written.read_bytes()
    for word in (b"loss", b"perplexity", b"time/optimizer"):
        assert word in raw
    losses = [record["loss"] for record in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert all(json.dumps(loss).encode()[:10] in raw for loss in losses)
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **more: given.update(more) or MagicMock())
    metrics.WandB(tmp_path / "run", "fm", "run", {})  # as a resumed run does: it goes on under its id
    assert given["id"] == known and given["resume"] == "allow"


def test_without_wandb_one_line_says_what_to_install(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(words(corpus, tmp_path / "run", "--log.wandb=fm")) == 2
    assert capsys.readouterr().err == "fmegatron: log.wandb is set and wandb is not installed: pip install wandb\n"


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**more):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"log.wandb = fm: No API key configured.* WANDB_MODE=offline"):
        metrics.WandB(tmp_path, "fm", "run", {})


@pytest.mark.parametrize("more, said", [
    (["--validation.full=true", "--validation.batches=3"], "validation.full = true and validation.batches = 3: drop one"),
    (["--monitors.per_parameter=true"], "monitors.per_parameter = true needs monitors.optimizer"),
    (["--profile.steps=[5, 3]"], "profile.steps = [5, 3]: the first and the last step"),
    (["--profile.stack=true"], "profile.shapes, stack and memory need profile.steps"),
    (["--profile.steps=[3, 9]"], "profile.steps = [3, 9]: the run has 4 steps"),
    (["--profile.steps=[1, 2]", "--profile.ranks=5"], "profile.ranks = [5]: there is no 5, processes are 0 to 0"),
    (["--validation.sets.x=/no/where"], "validation.sets.x = /no/where: no file /no/where.bin"),
    (["--validation.sets.a/b=/no/where"], "validation.sets: 'a/b' is no name"),
    (["--monitors.unigram=/no/counts.json"], "monitors.unigram = /no/counts.json: text, or a JSON file of counts"),
])
def test_settings_that_cannot_be_honoured(more, said, corpus, tmp_path, capsys):
    assert cli.main(words(corpus, tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
