"""Runs in every precision from their configurations: a resumed run is the unbroken one, to the bit; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pieces import files, records_of

from fmegatron import cli

SIZES = {"layers": 2, "embed": 64, "heads": 2, "kv": 2, "mlp": 64, "vocab": 264, "context": 64}

RUNS = {
    "fp16, dynamic": "--training.dtype fp16 --training.loss_scale_window 3 --training.skip_norm 1e4",
    "remainders": "--training.dtype bf16 --training.param_dtype bf16 --training.accumulate_dtype bf16",
    "fp8 and bf16": "--optimizer.mu_dtype fp8 --optimizer.nu_dtype bf16 --training.clip_value 0.1 --training.count_zeros true",
    "all, on a mesh": "--training.dtype bf16 --training.param_dtype bf16 --optimizer.mu_dtype fp16 --optimizer.nu_dtype fp8 "
    "--mesh.dp 2 --mesh.virtual true --sharding.rules zero1 --training.microbatches 2 --training.loss_scale 256",
    "pipeline": "--training.dtype fp16 --mesh.pp 2 --mesh.virtual true --training.microbatches 4 --training.loss_scale 1024",
}


def words(functions: Path, folder: Path, more: str) -> list[str]:
    options = {"data.source": functions / "train", "data.tokenizer": "byte", "data.seq": 16, "run.dir": folder}
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    options |= {"training.steps": 4, "optimizer.schedule": "constant", "checkpoint.interval": 2, "checkpoint.keep": 0}
    options |= {"training.global_batch": 8, "log.prompt": "''"}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more.split()]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_unbroken_one(name, functions, tmp_path):
    assert cli.main(words(functions, tmp_path / "whole", RUNS[name])) == 0
    assert cli.main(words(functions, tmp_path / "broken", f"{RUNS[name]} --training.steps 2")) == 0
    assert cli.main(words(functions, tmp_path / "broken", RUNS[name])) == 0
    records = records_of(tmp_path / "whole")
    assert [r["loss"] for r in records] == [r["loss"] for r in records_of(tmp_path / "broken")]
    assert files(tmp_path / "whole") == files(tmp_path / "broken")
    scaled = "fp16," in name or "loss_scale" in RUNS[name]
    assert all(("loss_scale" in r) == scaled and ("zeros" in r) == ("count_zeros" in RUNS[name]) for r in records)
    if name == "fp16, dynamic":
        assert records[0]["loss_scale"] == 2.0**32 and records[-1]["skipped"] > 0


@pytest.mark.parametrize("more, said", [
    ("--training.dtype fp16 --training.loss_scale off", "training.dtype = fp16 with training.loss_scale = off"),
    ("--training.loss_scale often", "training.loss_scale = often: dynamic, off, or a number above 0"),
    ("--training.param_dtype bf16", "training.param_dtype = bf16 with training.dtype = fp32: compute in bf16 too"),
    ("--training.dtype fp16 --training.initial_loss_scale 0.5", "training: loss scale: minimum = 1.0"),
    ("--optimizer.name adafactor --optimizer.nu_dtype bf16", "optimizer.name = adafactor: second moments in bf16"),
    ("--optimizer.mu_dtype fp8 --mesh.dp 4 --mesh.virtual true --sharding.rules fsdp", "lie in blocks of 32, and"),
])
def test_what_cannot_be_honoured_is_one_line(more, said, functions, tmp_path, capsys):
    assert cli.main(words(functions, tmp_path / "run", more)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
