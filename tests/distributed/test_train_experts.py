"""`fmegatron train` with experts on processes of their own, in stages and over ep: its checkpoints are those of one device."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pieces import records_of

from fmegatron import cli
from fmegatron.sharding.chunks import whole
from fmegatron.train import checkpoint

RANKS = Path(__file__).with_name("train_ranks.py")
MODEL = {"layers": 4, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64, "tied": True, "mtp": 1}
MOE = {"experts": 4, "top_k": 2, "mlp": 8, "shared": 8, "first_dense": 1, "score": "sigmoid", "balance_bias": True,
       "bias_rate": 0.01, "sequence_loss": 0.01, "z_loss": 0.001}  # fmt: skip
MESHES = {
    "one": "",
    "stages": "--mesh.pp 2 --mesh.ep 2 --training.check_replicas 2",
    "spread": "--mesh.ep 2 --mesh.tp 2",
    "gather": "--mesh.dp 2 --mesh.ep 2 --sharding.rules zero1",
}
pytestmark = pytest.mark.long


def words(functions: Path, folder: Path, mesh: str, start: Path | None = None) -> str:
    """The command of a run of four steps on real text."""
    options = {"data.source": functions / "train", "data.valid": functions / "train", "data.tokenizer": "byte", "data.seq": 16}
    options |= {f"model.overrides.{key}": str(value).lower() for key, value in MODEL.items()}
    options |= {f"model.overrides.moe.{key}": str(value).lower() for key, value in MOE.items()}
    options |= {"training.steps": 4, "optimizer.schedule": "constant", "checkpoint.interval": 2, "checkpoint.keep": 0}
    options |= {"training.global_batch": 16, "training.microbatches": 2, "training.compile": "false", "log.prompt": "''"}
    options |= {"validation.interval": 2, "validation.batches": 1, "run.dir": folder, "training.dtype": "fp32"}
    options |= {"checkpoint.resume": start} if start else {}
    return " ".join(["train debug", *(f"--{key}={value}" for key, value in options.items()), MESHES[mesh]])


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number:08d}"


@pytest.fixture(scope="module")
def runs(functions, tmp_path_factory) -> Path:
    """Each mesh from the start, then "A-B": on mesh B from step 2 of A."""
    root = tmp_path_factory.mktemp("runs")
    assert cli.main(shlex.split(words(functions, root / "one", "one"))) == 0
    given = [words(functions, root / mesh, mesh) for mesh in MESHES if mesh != "one"]
    pairs = [("spread", "spread"), ("stages", "stages"), ("stages", "gather"), ("one", "spread")]
    given += [words(functions, root / f"{a}-{b}", b, step(root / a, 2)) for a, b in pairs]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *given], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[:6000]
    assert done.stdout.count("resumed at step 2") == len(pairs)
    return root


def tensors(found: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, whole."""
    wanted = {key: whole(torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in checkpoint.tensors(found).items()}
    checkpoint.load(found, wanted)
    return {key: chunks.pieces[0][1] for key, chunks in wanted.items()}


def records(folder: Path, key: str) -> list[float]:
    return [record[key] for record in records_of(folder) if record.get(key) is not None]


@pytest.mark.parametrize("mesh", ["spread", "stages"])
def test_resumed_the_run_is_bitwise_the_same(runs, mesh):
    through, resumed = tensors(step(runs / mesh, 4)), tensors(step(runs / f"{mesh}-{mesh}", 4))
    assert through.keys() == resumed.keys()
    assert [key for key in through if not torch.equal(through[key], resumed[key])] == []


@pytest.mark.parametrize("name", ["stages", "spread", "gather", "stages-gather", "one-spread"])
def test_checkpoints_and_numbers_are_those_of_one_device(runs, name):
    """The balance bias among them, which a step moves by 0.01 once: experts' loads are then the same choices."""
    one, found = tensors(step(runs / "one", 4)), tensors(step(runs / name, 4))
    assert {key: x.shape for key, x in one.items()} == {key: x.shape for key, x in found.items()}
    biases = [key for key in one if key.startswith("params.") and key.endswith("router.balance")]
    assert biases and all(one[key].any() for key in biases)
    for key in biases:
        torch.testing.assert_close(found[key], one[key], msg=lambda text, key=key: f"{key}: {text}")
        assert (one[key] / 0.01).round().sub(one[key] / 0.01).abs().max() < 1e-4 and one[key].abs().max() < 0.0401
    for key, x in one.items():
        torch.testing.assert_close(found[key], x, atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    for key in ("loss", "grad_norm", "heldout_loss"):
        numbers = records(runs / name, key)
        assert numbers and numbers == pytest.approx(records(runs / "one", key)[-len(numbers) :], rel=1e-4)
