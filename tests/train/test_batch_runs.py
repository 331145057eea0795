"""Batches that grow: consumed samples decide, a run taken up in the middle is the unbroken one; muP and matrices by TOML."""

from __future__ import annotations

from pathlib import Path

import pytest
from pieces import files, records_of

from fmegatron import cli
from fmegatron.config import RunConfig, Training
from fmegatron.train.setup_batch import parts_of, samples_before, sizes_of

SIZES = {"layers": 2, "embed": 32, "heads": 2, "kv": 2, "mlp": 32, "vocab": 264, "context": 64}


def words(functions: Path, folder: Path, more: str) -> list[str]:
    options = {"data.source": functions / "train", "data.tokenizer": "byte", "data.seq": 16, "run.dir": folder}
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    options |= {"training.steps": 5, "optimizer.schedule": "linear", "checkpoint.interval": 0, "checkpoint.keep": 0}
    options |= {"training.global_batch": 8, "log.prompt": "''", "optimizer.warmup": 2, "optimizer.decay_steps": 40}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more.split()]


RUNS = {
    "ramp": "--training.rampup_batch [2,2,12] --training.microbatches 2 --optimizer.unit samples --run.seed 3",
    "steps": "--training.batch_unit tokens --training.microbatches 4 --mesh.dp 2 --mesh.virtual true",
    "muon": "--optimizer.name muon --optimizer.lr 0.01",
    "adafactor": "--optimizer.name adafactor --mesh.dp 2 --mesh.virtual true",
    "mup": '--model.mup.embed 16 --model.mup.layers 1 --model.mup.heads 1 --model.mup.kv 1 --model.overrides.init_scaled false',
    "fp32 residual": "--model.overrides.fp32_residual true --training.dtype bf16",
}
SIZE = {"ramp": [2, 2, 4, 6, 8], "steps": [4, 4, 4, 8, 8]}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_unbroken_one(name, functions, tmp_path):
    more = words(functions, tmp_path / "whole", RUNS[name])
    more += ["--training.batch_sizes", "0:4 160:8"] if name == "steps" else []
    broken = [word.replace("whole", "broken") for word in more]
    assert cli.main([*broken, "--training.steps", "3"]) == 0
    assert cli.main(more) == 0 and cli.main(broken) == 0
    records = records_of(tmp_path / "whole")
    assert [(r["loss"], r["consumed"], r["lr"]) for r in records[3:]] == [
        (r["loss"], r["consumed"], r["lr"]) for r in records_of(tmp_path / "broken")[3:]]
    whole, again = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert whole.items() <= again.items() and len(whole) == 1
    if name in SIZE:
        consumed = [0, *(r["consumed"] for r in records)]
        assert [b - a for a, b in zip(consumed, consumed[1:], strict=False)] == SIZE[name]


def test_microbatches_are_never_larger_than_those_of_the_end():
    c = RunConfig(training=Training(global_batch=32, microbatches=4, rampup_batch=(8, 8, 100)))
    parts = parts_of(c, 2)
    assert [(size, parts(size // 2)) for _, size in sizes_of(c).stages] == [(8, 1), (16, 2), (24, 3), (32, 4)]
    assert samples_before(c, 3) == 24 and samples_before(RunConfig(), 3) == 96


@pytest.mark.parametrize("more, said", [
    ("--training.rampup_batch [2,4,12]", "a ramp from 2 to 8 by 4"),
    ("--training.rampup_batch [2,2]", "rampup_batch = [2, 2]: start, increment, samples"),
    ("--training.rampup_batch [2,2,12] --mesh.dp 4 --mesh.virtual true", "a batch of 2 does not divide into 4 parts"),
    ("--training.batch_sizes 0:4", "training.batch_sizes grow to 4, and training.global_batch is 8"),
    ("--training.batch_unit tokens", "does nothing without training.batch_sizes"),
    ("--model.mup.embed 0", "model.mup.embed = 0: expected an int of at least 1"),
    ("--model.mup.width 3", "model.mup.width: the base's embed"),
    ("--model.mup.embed 16 --optimizer.name lion", "its scales are of adamw"),
    ("--model.overrides.fp32_residual true --model.overrides.norm_at post", "fp32_residual with norm_at = post"),
])
def test_what_cannot_be_honoured_is_one_line(more, said, functions, tmp_path, capsys):
    assert cli.main(words(functions, tmp_path / "run", more)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
