"""Every kernel compiles for an H100: Triton's front end, its passes and ptxas need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
SOME = ("rms", "grouped_matmul")


def compiled(tmp_path, *names):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, HERE / "compile_ahead.py", *names], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_some(tmp_path):
    assert len(compiled(tmp_path, *SOME)) >= 4


@pytest.mark.long
def test_all(tmp_path):
    compiled(tmp_path)
