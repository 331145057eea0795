"""The experiment's files say one thing, and the planner's efficiencies are those it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


@pytest.mark.long
def test_a_row_is_predicted_again():
    row, noted = module.megatron()[0], FOUND["rows"][0]
    assert row.measured == pytest.approx(noted["measured"], rel=1e-9)
    assert module.predict(row, Efficiency(**FOUND["efficiency"])) == pytest.approx(noted["predicted"], rel=1e-6)
