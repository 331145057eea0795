"""Semi-synchronous runs from their configuration: the keys, explain's table, and a run that loses replicas and regains them."""

from __future__ import annotations

import json

import pytest
from pieces import records_of

from fmegatron import cli, config, data
from fmegatron.models import presets
from fmegatron.sharding import abstract_mesh
from fmegatron.train import checkpoint, setup
from fmegatron.train.explain import explain

DESLOC = ("--semisync.params", "2", "--semisync.moments", "{mu = 3, nu = 4}")
DILOCO = ("--semisync.params=4", "--semisync.outer=sgd", "--semisync.outer_arguments={momentum = 0.9, nesterov = true}",
          "--semisync.fragments=2")  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of a tiny run on bytes."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("train", 40), ("valid", 4)):
        lines = [json.dumps({"text": f"def f{i}(a):\n    return a + {i}\n\n" * (1 + i % 3)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        data.tokenize([folder / f"{name}.jsonl"], folder / name, "byte", append_eod=True)
    sizes = {"layers": 2, "embed": 8, "heads": 2, "kv": 1, "mlp": 8, "vocab": 264, "context": 32}
    text = {"source": folder / "train", "valid": folder / "valid", "tokenizer": "byte", "seq": 16}
    options = {f"model.overrides.{key}": n for key, n in sizes.items()} | {f"data.{key}": value for key, value in text.items()}
    options |= {"optimizer.schedule": "constant", "log.prompt": "", "training.global_batch": 4}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items())]


def run(words, folder, steps, replicas, *more):
    sizes = ("--mesh.virtual=true", f"--mesh.replica={replicas}")
    assert cli.main([*words, f"--run.dir={folder}", f"--training.steps={steps}", *sizes, *more]) == 0
    return records_of(folder)


def test_a_run_loses_a_replica_and_takes_one_back(words, tmp_path, capsys):
    whole = run(words, tmp_path / "whole", 6, 2, *DESLOC)
    assert [record["step"] for record in whole] == list(range(1, 7)) and whole[-1]["heldout_loss"] < whole[0]["loss"]
    run(words, tmp_path / "parts", 3, 2, *DESLOC)  # in the middle of a period
    capsys.readouterr()
    run(words, tmp_path / "parts", 5, 1, *DESLOC)
    assert "is of 2 replicas, here are 1: each goes on from their mean" in capsys.readouterr().out
    records = run(words, tmp_path / "parts", 6, 2, *DESLOC)
    assert [r["loss"] for r in records[:3]] == [r["loss"] for r in whole[:3]]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(abs(a["loss"] - b["loss"]) < 0.05 for a, b in zip(records, whole, strict=True))
    assert checkpoint.tensors(tmp_path / "parts/checkpoints")["params.norm.weight"][0] == (2, 8)


def test_diloco_from_its_keys(words, tmp_path):
    records = run(words, tmp_path / "run", 4, 2, *DILOCO, "--mesh.tp=2", "--training.check_replicas=1")
    assert len(records) == 4
    held = checkpoint.tensors(tmp_path / "run/checkpoints")
    assert held["outer.state.0.0.trace.layers.0.attn.q"][0] == held["outer.params.layers.1.attn.q"][0] == (8, 2, 4)


def explained(*more):
    table = config.toml.words(more)[1]
    c = config.load("debug", table)
    sh = setup.sharding_of(c, abstract_mesh(replica=4, dp=2))
    return explain(presets.preset("llama3:debug"), sh, batch=(8, 32), semisync=setup.semisync_of(c))


def test_explain_shows_what_meetings_cost():
    found = explained("--semisync.params=32", "--semisync.moments={mu = 96, nu = 192}")
    held = found.per_rank["parameters"]
    assert [(m.what, m.every, m.bytes) for m in found.meetings] == [("params", 32, held), ("mu", 96, held), ("nu", 192, held)]
    share = 1 / 32 + 1 / 96 + 1 / 192
    assert round(share, 4) == 0.0469  # published, against data parallelism
    assert f"in all {held * share:,.0f} bytes a step; gradients in every step would be {held:,}" in str(found)
    assert [r.bytes for r in found.collectives if r.axis == "replica"] == [8 * 4]  # metrics, in every step
    parts = explained(*DILOCO)
    assert [(m.what, m.count, m.bytes) for m in parts.meetings] == [("params", 2, held)]


@pytest.mark.parametrize("more, said", [
    (("--semisync.moments=4",), "semisync.moments: say semisync.params too"),
    (("--semisync.params=2", "--semisync.outer=sdg"), "semisync.outer = sdg: known are adamw"),
    (("--semisync.params=2", "--semisync.outer=sgd", "--semisync.outer_arguments={beta = 1}"), "semisync.outer_arguments: "),
    (("--semisync.params=2", "--semisync.outer_lr=0.5"), "outer_lr = 0.5 does nothing without semisync.outer"),
    (("--semisync.params=2", "--semisync.moments={mu = 'x', nu = 2}"), "periods are whole numbers of steps"),
    (("--semisync.params=2", "--semisync.fragments=3"), "semisync: fragments = 3"),
])  # fmt: skip
def test_mistakes_are_one_line(more, said):
    with pytest.raises(config.ConfigError, match=said):
        explained(*more)
