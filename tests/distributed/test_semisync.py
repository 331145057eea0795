"""Replicas on real processes: what a virtual mesh computes; a worker killed and restarted; other numbers of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from pieces import records_of

from fmegatron import cli, data
from fmegatron.train import checkpoint

RANKS = Path(__file__).with_name("semisync_ranks.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(count, *words, restarts=0):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    launch += ["--max-restarts", str(restarts)]
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_four_processes_are_the_virtual_mesh(tmp_path):
    report = json.loads(processes.torchrun(4, RANKS, tmp_path).splitlines()[-1])
    assert not report["wrong"]
    # A small collective a step for metrics, and what is due: x at 2 and 4, u at 3, v at 4, in one when together; outer: 4 turns
    # The last rule sends at the end of step 3, in the middle of which it is saved, and no step waits before the fifth.
    assert report["seen"] == (5 + 3) + (5 + 5) + (5 + 1) and report["late"] == 1
    assert report["held"] == [2, 8]


@pytest.fixture
def words(tmp_path):
    """The words of a tiny run of as many replicas as there are processes."""
    lines = [json.dumps({"text": f"def f{i}(a):\n    return a + {i}\n\n"}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data.tokenize([tmp_path / "text.jsonl"], tmp_path / "text", "byte", append_eod=True)
    sizes = {"layers": 1, "embed": 8, "heads": 2, "kv": 1, "mlp": 8, "vocab": 264, "context": 32}
    options = {f"model.overrides.{key}": n for key, n in sizes.items()}
    options |= {"data.source": tmp_path / "text", "data.tokenizer": "byte", "data.seq": 16, "training.compile": "false"}
    options |= {"optimizer.schedule": "constant", "log.prompt": "", "training.global_batch": 4, "checkpoint.interval": 1}
    options |= {"semisync.params": 2, "semisync.moments": "{mu = 3, nu = 4}", "checkpoint.keep": 0}
    return ["-m", "fmegatron", "train", "debug", *(f"--{key}={value}" for key, value in options.items())]


def losses(folder):
    return [record["loss"] for record in records_of(folder)]


def shape(folder, step):
    return checkpoint.tensors(checkpoint.step_folder(folder / "checkpoints", step))["params.norm.weight"][0]


@pytest.mark.long  # tests/faults kills workers of every run of the tests
def test_a_killed_worker_is_restarted_and_nothing_is_lost(words, tmp_path):
    run, kill = tmp_path / "run", "--faults.inject=[\"kill:4:1\"]"
    said = torchrun(2, *words, f"--run.dir={run}", "--training.steps=5", "--mesh.replica=-1", kill, restarts=1)
    assert "resumed at step 3" in said and len(losses(run)) == 5 and shape(run, 5) == (2, 8)
    mesh = ["--mesh.replica=2", "--mesh.virtual=true"]
    assert cli.main([*words[2:], f"--run.dir={tmp_path / 'whole'}", "--training.steps=5", *mesh]) == 0
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.long
def test_fewer_processes_go_on_and_one_comes_back(words, tmp_path):
    run = tmp_path / "run"
    for count, steps in ((2, 2), (1, 3), (4, 4), (2, 5)):
        said = torchrun(count, *words, f"--run.dir={run}", f"--training.steps={steps}", "--mesh.replica=-1")
        assert ("goes on from their mean" in said) == (steps == 3 or steps == 5)
        assert shape(run, steps) == ((count, 8) if count > 1 else (8,))
    assert len(losses(run)) == 5
