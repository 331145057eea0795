"""The experiment runs, and its README says what was found: bytes by the formula of docs/semisync.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fmegatron import data

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments.desloc import desloc as module  # noqa: E402

FOUND = json.loads((module.HERE / "results.json").read_text())


def meetings(period, after=0):
    """How many of the experiment's steps meet."""
    return sum(t + after > 0 and (t + after) % period == 0 for t in range(FOUND["steps"]))


def test_the_readme_says_what_was_found_and_bytes_are_the_formula():
    text = (module.HERE / "README.md").read_text()
    assert (module.HERE / "table.md").read_text() == module.table(FOUND) and module.table(FOUND) in text
    k, held = FOUND["period"], 4 * FOUND["runs"]["DDP"]["parameters"]
    expected = {
        "DDP": FOUND["steps"],
        f"Local Adam, K = {k}": 3 * meetings(k),
        f"DES-LOC, {k}/{3 * k}/{6 * k}": meetings(k) + meetings(3 * k) + meetings(6 * k),
        f"DiLoCo, H = {k}": meetings(k, after=1),
    }
    assert {name: sum(FOUND["runs"][name]["bytes"]) / held for name in expected} == expected


def test_the_script_runs(tmp_path):
    lines = [json.dumps({"text": f"def f{i}(a):\n    return a\n"}) for i in range(40)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data.tokenize([tmp_path / f"{name}.jsonl"], tmp_path / name, "byte", append_eod=True)
    corpus = data.Corpus(str(tmp_path / "train"), "byte", str(tmp_path / "valid"))
    words = ["--steps", "3", "--replicas", "2", "--period", "2", "--only", "DES-LOC", "--out", str(tmp_path)]
    found = module.main(words, corpus)["runs"]["DES-LOC, 2/6/12"]
    assert found["bytes"] == [0, 0, 4 * found["parameters"]] and len(found["heldout"]) == 3
    assert (tmp_path / "desloc.png").stat().st_size > 1000 and "| DES-LOC, 2/6/12 |" in (tmp_path / "table.md").read_text()
