"""`fmegatron train` with experts on processes of their own, in stages and over ep: its checkpoints are those of one device."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from trained import assert_alike, assert_bitwise, on_four_processes, step, tensors, words

from fmegatron import cli

MOE = {"experts": 4, "top_k": 2, "mlp": 8, "shared": 8, "first_dense": 1, "score": "sigmoid", "balance_bias": True,
       "bias_rate": 0.01, "sequence_loss": 0.01, "z_loss": 0.001}  # fmt: skip
MORE = {f"model.overrides.moe.{key}": str(value).lower() for key, value in MOE.items()}
MORE |= {"model.overrides.mtp": "1", "training.microbatches": "2", "training.dtype": "fp32"}
MESHES = {
    "one": "",
    "stages": "--mesh.pp 2 --mesh.ep 2 --training.check_replicas 2",
    "spread": "--mesh.ep 2 --mesh.tp 2",
    "gather": "--mesh.dp 2 --mesh.ep 2 --sharding.rules zero1",
}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def runs(functions, tmp_path_factory) -> Path:
    """Each mesh from the start, then "A-B": on mesh B from step 2 of A."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, mesh: str, start: Path | None = None) -> str:
        return words(functions, root / name, MESHES[mesh], MORE, start)

    assert cli.main(shlex.split(run("one", "one"))) == 0
    pairs = [("spread", "spread"), ("stages", "stages"), ("stages", "gather"), ("one", "spread")]
    resumed = [run(f"{a}-{b}", b, step(root / a, 2)) for a, b in pairs]
    said = on_four_processes([*(run(mesh, mesh) for mesh in MESHES if mesh != "one"), *resumed], timeout=500)
    assert said.count("resumed at step 2") == len(pairs)
    return root


@pytest.mark.parametrize("mesh", ["spread", "stages"])
def test_resumed_the_run_is_bitwise_the_same(runs, mesh):
    assert_bitwise(runs / mesh, runs / f"{mesh}-{mesh}")


@pytest.mark.parametrize("name", ["stages", "spread", "gather", "stages-gather", "one-spread"])
def test_checkpoints_and_numbers_are_those_of_one_device(runs, name):
    """The balance bias among them, which a step moves by 0.01 once: experts' loads are then the same choices."""
    one, found = tensors(step(runs / "one", 4)), tensors(step(runs / name, 4))
    biases = [key for key in one if key.startswith("params.") and key.endswith("router.balance")]
    assert biases and all(one[key].any() for key in biases)
    for key in biases:
        torch.testing.assert_close(found[key], one[key], msg=lambda text, key=key: f"{key}: {text}")
        assert (one[key] / 0.01).round().sub(one[key] / 0.01).abs().max() < 1e-4 and one[key].abs().max() < 0.0401
    assert_alike(runs / name, runs / "one")
