"""The experiment's files say one thing, and the planner's efficiencies are those it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments.plan_vs_published import plan_vs_published as module  # noqa: E402
from fmegatron.plan.hardware import STEP, Efficiency  # noqa: E402

FOUND = json.loads((module.HERE / "rows.json").read_text())


def test_the_planner_uses_what_was_calibrated():
    assert vars(STEP) == FOUND["efficiency"]


def test_the_readme_says_what_was_found():
    text = (module.HERE / "README.md").read_text()
    for name in ("Megatron-LM", "TorchTitan"):
        rows = [row for row in FOUND["rows"] if row["table"].startswith(name) and not row["calibrates"]]
        errors = [f"{100 * module.errors(rows, key):.1f} %" for key in ("predicted", "constant")]
        assert f"{len(rows)} rows | {errors[0]} | {errors[1]} |" in text
    assert (module.HERE / "table.md").read_text() == module.table(FOUND)


def test_the_planner_halves_a_constants_error_on_rows_that_calibrate_nothing():
    rows = [row for row in FOUND["rows"] if row["table"].startswith("TorchTitan")]
    assert len(rows) == 22 and not any(row["calibrates"] for row in rows)
    assert sum(row["calibrates"] for row in FOUND["rows"]) == 2
    assert module.errors(rows, "predicted") < module.errors(rows, "constant") / 2


@pytest.mark.parametrize("attention, hidden", [(1e9, True), (0.0, False)])
def test_repeated_keys_and_values_wait_only_for_what_no_block_hides(monkeypatch, attention, hidden):
    row = next(row for row in module.torchtitan() if row.name == "405B 512 GPU 128K tp8 pp8 cp4")
    monkeypatch.setattr(module, "studied", lambda row, remat: SimpleNamespace(layers=16))
    plan = SimpleNamespace(mesh={"pp": 8, "dp": 2, "cp": 4, "tp": 8}, batch=(16, 131072), microbatches=8,
                           seconds={"attention": attention})  # fmt: skip
    own = 2 * 32768 * 128 * 2 / (50e9 * 0.8)  # seconds in which a rank's key and value head of its tokens travel once
    gathers, hops = (0, 1) if hidden else (3, 4)
    wanted = 16 * 8 * (gathers * 3 * 16 * own + hops * 2 * 16 * own - 3 * 3 * own)
    assert module.torch_ring(row, plan, Efficiency(0.6, 0.5)) == pytest.approx(wanted)


@pytest.mark.long
def test_a_row_is_predicted_again():
    row, noted = module.megatron()[0], FOUND["rows"][0]
    assert row.measured == pytest.approx(noted["measured"], rel=1e-9)
    assert module.predict(row, Efficiency(**FOUND["efficiency"])) == pytest.approx(noted["predicted"], rel=1e-6)
