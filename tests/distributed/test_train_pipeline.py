"""`fmegatron train` with stages on processes of their own: its checkpoints are those of any mesh."""

from __future__ import annotations

import json
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
SIZES = {"layers": 4, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64, "tied": True}
STEPS = 4
MESHES = {
    "one": "",
    "stages": "--mesh.pp 2 --mesh.dp 2 --training.check_replicas 2",
    "deep": "--mesh.pp 4 --pipeline.schedule zb_h1",
    "loops": "--mesh.pp 2 --mesh.tp 2 --pipeline.schedule interleaved_1f1b --pipeline.virtual 2 --sharding.rules zero1_tp",
}


def words(functions: Path, folder: Path, mesh: str, start: Path | None = None) -> str:
    options = {"data.source": functions / "train", "data.valid": functions / "train", "data.tokenizer": "byte", "data.seq": 16}
    options |= {f"model.overrides.{key}": str(value).lower() for key, value in SIZES.items()}
    options |= {"training.steps": STEPS, "optimizer.schedule": "constant", "checkpoint.interval": 2, "checkpoint.keep": 0}
    options |= {"training.global_batch": 16, "training.microbatches": 4, "training.compile": "false", "log.prompt": "''"}
    options |= {"validation.interval": 2, "validation.batches": 1, "run.dir": folder}
    options |= {"checkpoint.resume": start} if start else {}
    return " ".join(["train debug", *(f"--{key}={value}" for key, value in options.items()), MESHES[mesh]])


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number:08d}"


@pytest.fixture(scope="module")
def runs(functions, tmp_path_factory) -> Path:
    """Runs "one" and "stages" from the start, then "A-B": on mesh B from step 2 of A."""
    root = tmp_path_factory.mktemp("runs")
    assert cli.main(shlex.split(words(functions, root / "one", "one"))) == 0
    pairs = [("stages", "stages"), ("stages", "deep"), ("one", "loops")]
    given = [words(functions, root / "stages", "stages")]
    given += [words(functions, root / f"{a}-{b}", b, step(root / a, 2)) for a, b in pairs]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *given], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("resumed at step 2") == len(pairs) and "pp=2" in done.stdout
    last = words(functions, root / "loops-one", "one", step(root / "one-loops", 4)) + " --training.steps 6"
    assert cli.main(shlex.split(last)) == 0
    return root


def tensors(found: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, whole."""
    wanted = {key: whole(torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in checkpoint.tensors(found).items()}
    checkpoint.load(found, wanted)
    return {key: chunks.pieces[0][1] for key, chunks in wanted.items()}


def records(folder: Path, key: str) -> list[float]:
    return [record[key] for record in records_of(folder) if record.get(key) is not None]


def test_resumed_on_the_same_mesh_the_run_is_bitwise_the_same(runs):
    through, resumed = tensors(step(runs / "stages", 4)), tensors(step(runs / "stages-stages", 4))
    assert through.keys() == resumed.keys()
    assert [key for key in through if not torch.equal(through[key], resumed[key])] == []
    assert records(runs / "stages-stages", "loss") == records(runs / "stages", "loss")[2:]


@pytest.mark.parametrize("name", ["stages", "stages-deep", "one-loops"])
def test_checkpoints_and_numbers_are_those_of_one_device(runs, name):
    one, found = tensors(step(runs / "one", 4)), tensors(step(runs / name, 4))
    assert {key: x.shape for key, x in one.items()} == {key: x.shape for key, x in found.items()}
    for key, x in one.items():
        torch.testing.assert_close(found[key], x, atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    for key in ("loss", "grad_norm", "heldout_loss"):
        numbers = records(runs / name, key)
        assert numbers and numbers == pytest.approx(records(runs / "one", key)[-len(numbers) :], rel=1e-4)


def test_one_device_goes_on_from_stages(runs):
    assert len(records(runs / "loops-one", "loss")) == 2


def test_each_tensor_is_written_once_by_a_rank_that_holds_it(runs):
    said = json.loads((step(runs / "stages", 4) / "manifest.json").read_text())["tensors"]
    files = {key: {box[2] for box in entry["boxes"]} for key, entry in said.items()}
    stage = {"rank-00000.safetensors", "rank-00001.safetensors"}, {"rank-00002.safetensors", "rank-00003.safetensors"}
    assert all(files[f"params.layers.{layer}.attn.q"] <= stage[layer // 2] for layer in range(4))
    assert files["params.embed.token"] <= stage[0] and files["step"] <= stage[0]  # tied, and equal everywhere
    assert files["params.norm.weight"] <= stage[1]
