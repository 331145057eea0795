"""The benchmarks run: participants of two kinds agree on the first loss, ratios and their intervals come out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_train_step_runs(tmp_path):
    out = tmp_path / "rows"
    only = "fp32,fmegatron eager,transformers eager"
    words = [sys.executable, str(BENCHMARKS / "train_step.py"), "--quick", "--only", only, "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fmegatron eager takes" in done.stdout and out.read_text().count('"step"') == 6


def test_overhead_runs():
    words = [sys.executable, str(BENCHMARKS / "overhead.py"), "--rounds", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mesh / none" in done.stdout


@pytest.mark.long
def test_monitors_run():
    words = [sys.executable, str(BENCHMARKS / "monitors.py"), "--rounds", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("default      / bare") and "activations" in done.stdout and " 2 rounds" in done.stdout


@pytest.mark.long
def test_optimizers_are_raced(tmp_path):
    words = [sys.executable, str(BENCHMARKS / "optim.py"), "--rounds", "3", "--elements", "65536", "--only", "adamw,sgd"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "adamw: first step" in done.stdout and "| torch AdamW |" in done.stdout and "| adamw " in done.stdout
    words[-1], limit = "adamw,lion", ["--seconds", "0"]
    done = subprocess.run([*words, *limit], capture_output=True, text=True, timeout=300)
    assert "lion is left out: 0 s for compiling are over" in done.stdout and done.returncode == 0, done.stderr


@pytest.mark.long
def test_checkpoint_stall_is_measured():
    found = load("checkpoint").main(4, 2)
    assert 0 < found["cpu_ratio"] < 1 and found["MB"] > 4


@pytest.mark.long
def test_moe_runs():
    words = [sys.executable, str(BENCHMARKS / "moe.py"), "--rounds", "1", "--tokens", "64"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loop over experts") == 2


def test_a_ratio_is_of_rounds_and_its_interval_holds_it():
    ratio = load("report").ratio
    theirs = np.random.default_rng(0).uniform(1, 10, 20)  # the machine's speed drifts tenfold; the ratio does not
    middle, low, high = ratio(0.9 * theirs, theirs)
    assert np.allclose([middle, low, high], 0.9)
    noisy = 0.9 * theirs * np.random.default_rng(1).normal(1, 0.05, 20)
    middle, low, high = ratio(noisy, theirs)
    assert low <= middle <= high and high - low < 0.1


@pytest.mark.long
def test_kernels_are_raced_in_the_interpreter(tmp_path):
    out = tmp_path / "rows.md"
    env = {**os.environ, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}  # of torch.compile's sides only that they run
    words = [sys.executable, str(BENCHMARKS / "kernels.py"), "--tiny", "--to", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    measured = [line for line in out.read_text().splitlines() if "triton" in line and " ms" in line]
    assert len(measured) == 15 and out.read_text() == done.stdout
