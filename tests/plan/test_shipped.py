"""Every shipped configuration of a cluster is legal and fits its devices; the scripts start what exists."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fmegatron.config import SHIPPED
from fmegatron.plan.main import plan
from fmegatron.plan.options import request

CLUSTERS = Path(__file__).parents[2] / "experiments" / "clusters"
RANKS = {"llama3_8b": 8, "llama3_70b": 256, "llama3_405b": 1024, "qwen3_8b": 8, "gpt3_175b": 512}
EXPERTS = {"mixtral_8x7b": 64, "mixtral_8x22b": 128, "qwen3_30b_a3b": 32, "qwen3_235b_a22b": 256, "deepseek_v2_lite": 8,
           "deepseek_v3": 1024, "gpt_oss_20b": 16, "gpt_oss_120b": 64}  # fmt: skip
SHORT = {"llama3_8b", "qwen3_8b", "llama3_405b", "deepseek_v2_lite"}
RANKS |= EXPERTS


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in RANKS])
def test_a_shipped_run_is_legal_and_fits(name):
    found = plan(request(f"{name}.toml", {}))
    assert found.ranks == RANKS[name] and found.fits and found.device_memory == 80e9
    assert 0.1 < found.mfu < 1


def test_no_shipped_cluster_is_forgotten():
    assert {path.stem for path in SHIPPED.glob("*.toml")} - {"quickstart", "debug"} == RANKS.keys()


@pytest.mark.parametrize("script", ["train.sbatch", "train.sh"])
def test_scripts_start_the_doctor_and_the_run(script, tmp_path):
    """With programs of the same names that write down how they are called."""
    note = f'echo "$(basename $0) $*" >> {tmp_path}/calls'
    for name, body in {"torchrun": note, "srun": 'shift; "$@"', "scontrol": "echo node0; echo node1"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NUM_NODES": "2", "NODES": "2", "NODE_RANK": "1", "HEAD": "node0"}  # fmt: skip
    done = subprocess.run([str(CLUSTERS / script), "llama3_8b", "--mesh.dp", "8"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("torchrun")]
    assert calls[0].endswith("-m fmegatron doctor") and calls[1].endswith("-m fmegatron train llama3_8b --mesh.dp 8")
    assert all("--nnodes 2" in call and "node0" in call and "--nproc-per-node 8" in call for call in calls)
