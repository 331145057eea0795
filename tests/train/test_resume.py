"""How runs take up states: in the background, from a damaged folder, from another run's step, parameters only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pieces import files, records_of

from fmegatron import cli
from fmegatron.train import checkpoint

SIZES = {"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64}


def words(functions: Path, folder: Path, more: str = "") -> list[str]:
    options = {"data.source": functions / "train", "data.tokenizer": "byte", "data.seq": 16, "run.dir": folder}
    options |= {f"model.overrides.{key}": value for key, value in SIZES.items()}
    options |= {"training.steps": 4, "optimizer.schedule": "constant", "checkpoint.interval": 1, "checkpoint.keep": 0}
    options |= {"training.global_batch": 8, "log.prompt": "''"}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more.split()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records_of(folder)]


@pytest.fixture(scope="module")
def whole(functions, tmp_path_factory) -> Path:
    """A run of 4 steps, each saved in the foreground."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(words(functions, folder)) == 0
    return folder


def test_the_background_writes_the_same_files(whole, functions, tmp_path):
    assert cli.main(words(functions, tmp_path / "behind", "--checkpoint.background true")) == 0
    assert files(tmp_path / "behind") == files(whole) and len(files(whole)) == 4
    assert losses(tmp_path / "behind") == losses(whole)


def test_a_damaged_checkpoint_costs_its_steps_only(whole, functions, tmp_path, capsys):
    hurt = tmp_path / "hurt"
    assert cli.main(words(functions, hurt, "--training.steps 3")) == 0
    os.truncate(hurt / "checkpoints/step-00000003/rank-00000.safetensors", 1000)
    capsys.readouterr()
    assert cli.main(words(functions, hurt)) == 0
    said = capsys.readouterr().out
    assert "step-00000003 is damaged: rank-00000.safetensors has 1000 bytes" in said and "resumed at step 2" in said
    assert losses(hurt) == losses(whole) and files(hurt) == files(whole)


def test_the_configuration_comes_from_the_checkpoint(whole, tmp_path, capsys):
    step = whole / "checkpoints" / "step-00000002"
    assert cli.main(["train", str(step)]) == 2
    assert "is not the last of its run: name a new --run.dir" in capsys.readouterr().err
    branch = tmp_path / "branch"
    assert cli.main(["train", str(step), "--run.dir", str(branch), "--optimizer.lr", "0.5"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert losses(branch)[0] == losses(whole)[2] and losses(branch)[1] != losses(whole)[3]


def test_parameters_only_to_the_end_and_on_from_there(whole, functions, tmp_path, capsys):
    last = tmp_path / "last"
    assert cli.main(words(functions, last, "--checkpoint.last_model_only true --checkpoint.export_dtype bf16")) == 0
    held = checkpoint.tensors(last / "checkpoints")
    assert {dtype for _, dtype in held.values()} == {torch.bfloat16}
    capsys.readouterr()
    assert cli.main(words(functions, last, "--training.steps 6")) == 2
    assert "holds parameters only" in capsys.readouterr().err
    tuned = tmp_path / "tuned"
    more = f"--checkpoint.resume {whole / 'checkpoints'} --checkpoint.load params --training.steps 1"
    assert cli.main(words(functions, tuned, more)) == 0
    assert "starts from the parameters of" in capsys.readouterr().out
    assert len(losses(tuned)) == 1 and losses(tuned)[0] < losses(whole)[0]  # step 0's data, the trained parameters
