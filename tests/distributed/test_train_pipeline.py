"""`fmegatron train` with stages on processes of their own: its checkpoints are those of any mesh."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from trained import assert_alike, assert_bitwise, on_four_processes, records, step, words

from fmegatron import cli

MORE = {"training.microbatches": "4"}
MESHES = {
    "one": "",
    "stages": "--mesh.pp 2 --mesh.dp 2 --training.check_replicas 2",
    "deep": "--mesh.pp 4 --pipeline.schedule zb_h1",
    "loops": "--mesh.pp 2 --mesh.tp 2 --pipeline.schedule interleaved_1f1b --pipeline.virtual 2 --sharding.rules zero1_tp",
}


@pytest.fixture(scope="module")
def runs(functions, tmp_path_factory) -> Path:
    """Runs "one" and "stages" from the start, then "A-B": on mesh B from step 2 of A."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, mesh: str, start: Path | None = None) -> str:
        return words(functions, root / name, MESHES[mesh], MORE, start)

    assert cli.main(shlex.split(run("one", "one"))) == 0
    pairs = [("stages", "stages"), ("stages", "deep"), ("one", "loops")]
    resumed = [run(f"{a}-{b}", b, step(root / a, 2)) for a, b in pairs]
    said = on_four_processes([run("stages", "stages"), *resumed], timeout=120)
    assert said.count("resumed at step 2") == len(pairs) and "pp=2" in said
    last = run("loops-one", "one", step(root / "one-loops", 4)) + " --training.steps 6"
    assert cli.main(shlex.split(last)) == 0
    return root


def test_resumed_on_the_same_mesh_the_run_is_bitwise_the_same(runs):
    assert_bitwise(runs / "stages", runs / "stages-stages")
    assert records(runs / "stages-stages", "loss") == records(runs / "stages", "loss")[2:]


@pytest.mark.parametrize("name", ["stages", "stages-deep", "one-loops"])
def test_checkpoints_and_numbers_are_those_of_one_device(runs, name):
    assert_alike(runs / name, runs / "one")


def test_one_device_goes_on_from_stages(runs):
    assert len(records(runs / "loops-one", "loss")) == 2


def test_each_tensor_is_written_once_by_a_rank_that_holds_it(runs):
    said = json.loads((step(runs / "stages", 4) / "manifest.json").read_text())["tensors"]
    files = {key: {box[2] for box in entry["boxes"]} for key, entry in said.items()}
    stage = {"rank-00000.safetensors", "rank-00001.safetensors"}, {"rank-00002.safetensors", "rank-00003.safetensors"}
    assert all(files[f"params.layers.{layer}.attn.q"] <= stage[layer // 2] for layer in range(4))
    assert files["params.embed.token"] <= stage[0] and files["step"] <= stage[0]  # tied, and equal everywhere
    assert files["params.norm.weight"] <= stage[1]
