"""Records: written once a step, read back as written, cut at the step a run resumes from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.train.metrics import FIELDS, JsonLines, TensorBoard, clean, read, step_line


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 5.0 - step / 100}


def test_each_record_is_on_disk_at_once_and_null_where_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write({"step": torch.tensor(1), "loss": torch.tensor(2.5), "grad_norm": math.nan, "lr": math.inf})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "grad_norm": null, "lr": null}\n'
    writer.close()


@given(written=st.integers(0, 8), after=st.none() | st.integers(0, 9), torn=st.integers(0, 20))
def test_resume_drops_later_and_torn_lines(
    tmp_path_factory: pytest.TempPathFactory, written: int, after: int | None, torn: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    text = "".join(json.dumps(record(step)) + "\n" for step in range(1, written + 1))
    path.write_text(text + (json.dumps(record(written + 1)) + "\n")[:torn])  # a kill inside the next write
    assert [r["step"] for r in read(path)] == list(range(1, written + 1))
    kept = written if after is None else min(written, after)
    writer = JsonLines(path, after=after)
    writer.write(record(kept + 1))
    writer.close()
    assert read(path) == [record(step) for step in range(1, kept + 2)]
    assert path.read_text().count("\n") == kept + 1


def test_tensorboard_has_the_numbers_and_purges_on_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps in ((None, (1, 2, 3)), (1, (2,))):
        writer = TensorBoard(tmp_path, after=after)
        for step in steps:
            writer.write({"step": step, "loss": step + (0.5 if after else 0.0), "grad_norm": math.nan, "note": "text"})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.5)]


def test_step_line_says_what_there_is() -> None:
    full = dict.fromkeys(FIELDS, 1.0) | {"step": 120, "mfu": 0.412, "memory_bytes": 1.23e9, "tokens_per_second": 5120.4}
    line = step_line(full, 2000)
    assert line.startswith("step  120/2000  loss 1.0000  ")
    for part in ("5,120 tokens/s", "1 TFLOP/s", "MFU 41.2%", "1.23 GB", "skipped 1", "bits/byte 1.0000", "lr 1.00e+00"):
        assert part in line.split("  ") or part in line
    assert step_line({"step": 3, "loss": 2.0, "mfu": None, "skipped": 0, "extra": 7}) == "step 3  loss 2.0000"
    assert step_line({"step": 3, "loss": math.nan}) == "step 3  loss not finite"


def test_clean_leaves_text_and_none() -> None:
    assert clean({"a": None, "b": "x", "c": -math.inf, "d": torch.tensor(True)}) == {
        "a": None,
        "b": "x",
        "c": None,
        "d": True,
    }
