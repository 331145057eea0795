"""How runs take up states: in the background, from a damaged folder, from another run's step, parameters only."""

from __future__ import annotations

import os
import shutil
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
    said = capsys.readouterr().out
    assert "resumed at step 2" in said and "\nother settings than before: optimizer.lr = 0.5, was 0.001\n" in said
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
    assert cli.main(words(functions, tuned, more.replace("steps 1", "steps 2"))) == 0
    assert "resumed at step 1 from" in capsys.readouterr().out and len(losses(tuned)) == 2  # its own, which is whole


def test_checkpoints_that_lie_elsewhere(functions, tmp_path, capsys):
    """What a run's folder, a folder of steps and a step mean is one thing for train, convert and generate."""
    run, steps, plain = tmp_path / "run", tmp_path / "steps", words(functions, tmp_path / "run")
    more = [f"--checkpoint.folder={steps}", "--training.steps=3"]
    assert cli.main([*plain, *more, "--log.prompt=def "]) == 0  # the text at its end is of the model there
    assert (run / "sample.txt").is_file() and not (run / "checkpoints").exists()
    for source in (run, steps, steps / "step-00000003"):
        assert cli.main(["convert", str(source), "--to", "checkpoint", str(tmp_path / "of" / source.name)]) == 0
    assert cli.main(["generate", str(run), "def ", "--tokens", "2"]) == 0
    found = list((tmp_path / "of").rglob("*.safetensors"))
    assert len({path.read_bytes() for path in found}) == 1
    assert [path.parent.name for path in found] == ["step-00000003"] * 3
    capsys.readouterr()
    for command, said in (
        ([*plain, *more, "--run.fresh=true"], f"run.fresh: {steps} holds checkpoints, up to step-00000003: delete them"),
        ([*plain, *more, "--optimizer.lr=0.5", "--optimizer.on_resume=match"], "optimizer.lr = 0.5, the checkpoint's is"),
        (["train", str(steps / "step-00000002"), f"--run.dir={tmp_path / 'new'}"], "is not the last of its run: name a new "
         "--checkpoint.folder"),
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert sorted(path.name for path in steps.iterdir()) == ["latest", *(f"step-0000000{n}" for n in (1, 2, 3))]


def test_a_run_goes_on_where_it_lies(whole, functions, tmp_path, capsys):
    """A copied folder is a run of its own; a branch that has begun goes on, and what would be passed over is refused."""
    moved, branch, step = tmp_path / "moved", tmp_path / "branch", whole / "checkpoints/step-00000002"
    shutil.copytree(whole, moved)
    before = files(whole)
    assert cli.main(["train", str(moved), "--training.steps", "5"]) == 0
    assert "resumed at step 4" in capsys.readouterr().out and files(whole) == before
    assert files(moved).keys() - before.keys() == {"step-00000005/rank-00000.safetensors"}
    for steps, said in (("3", "resumed at step 2"), ("4", "resumed at step 3")):  # the same command, for longer
        assert cli.main(["train", str(step), "--run.dir", str(branch), "--training.steps", steps]) == 0
        assert said in capsys.readouterr().out
    for source, message in (
        (moved / "checkpoints/step-00000005", f"{branch}/checkpoints has steps of its own, the last is step-00000004: "
         "name a new --run.dir"),
        (moved / "checkpoints/step-00000009", "beside it the nearest is step-00000005"),
    ):
        assert cli.main(["train", str(source), "--run.dir", str(branch)]) == 2
        assert message in capsys.readouterr().err
    settings = (moved / "config.toml").read_text()
    assert cli.main([*words(functions, moved), "--model.overrides.embed=32"]) == 2
    assert (moved / "config.toml").read_text() == settings  # and it can be gone on with as before
    assert "has a model of embed = 16, this run's is 32" in capsys.readouterr().err


def test_a_worker_that_is_started_again_does_not_start_over(whole, functions, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.main(words(functions, tmp_path / "run", "--training.steps 5 --run.fresh true")) == 0
    assert "resumed at step 4" in capsys.readouterr().out
