"""The picture holds what the records say, in one unit; the closing text names results, places and commands."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from fmegatron.train.report import closing, duration, loss_curve, smooth


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is plotted, by label."""
    calls: dict[str, Any] = {}
    plot, axhline = Axes.plot, Axes.axhline

    def spy_plot(self: Axes, *args: Any, **kwargs: Any) -> Any:
        calls[kwargs.get("label", "raw")] = [list(part) for part in args[:2]]
        return plot(self, *args, **kwargs)

    def spy_line(self: Axes, y: float, **kwargs: Any) -> Any:
        calls[kwargs["label"]] = y
        return axhline(self, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy_plot)
    monkeypatch.setattr(Axes, "axhline", spy_line)
    return calls


def records(bits: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 8.0 - step / 50} for step in range(1, 101)]
    rows[30]["loss"] = None  # a step whose loss was not finite
    for step in (50, 100):
        rows[step - 1] |= {"heldout_loss": 6.0 - step / 50} | (
            {"bits_per_byte": 0.5 * (6.0 - step / 50)} if bits else {}
        )
    return rows


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_training_loss_is_brought_to_bits_per_byte(tmp_path: Path, drawn: dict[str, Any]) -> None:
    path = loss_curve(records(True), tmp_path / "pictures" / "loss.png", compressors={"gzip -9": 2.3, "xz -9": 2.0})
    assert png_size(path) == (1200, 675)
    steps, values = drawn["raw"]
    assert 31 not in steps and len(steps) == 99
    assert values == pytest.approx([0.5 * (8.0 - step / 50) for step in steps])
    assert drawn["held-out"] == [[50, 100], [2.5, 2.0]]
    assert drawn["gzip -9 2.300"] == 2.3 and drawn["xz -9 2.000"] == 2.0


def test_without_bytes_everything_is_in_nats(tmp_path: Path, drawn: dict[str, Any]) -> None:
    loss_curve(records(False), tmp_path / "loss.png", compressors={"gzip -9": 2.3})
    assert drawn["raw"][1][0] == pytest.approx(7.98) and drawn["held-out"] == [[50, 100], [5.0, 4.0]]
    assert not any(name.startswith("gzip") for name in drawn)  # bits per byte do not belong on an axis of nats


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 3.0}], [{"step": 1, "loss": None}]])
def test_a_run_that_ended_early_still_has_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert png_size(loss_curve(rows, tmp_path / "loss.png")) == (1200, 675)


def test_smooth_keeps_straight_lines_and_averages_noise() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == pytest.approx([1.5, 2.0, 3.0, 4.0, 4.5])
    assert smooth([7.0, 8.0]) == [7.0, 8.0] and smooth([]) == []


def test_closing_text() -> None:
    text = closing(
        steps=400,
        seconds=252,
        heldout_bits_per_byte=1.8,
        compressors={"gzip -9": 1.9, "xz -9": 1.6},
        sample="def f():\n    pass",
        checkpoint="run/checkpoints/step-00000400",
        resume="fmegatron train quickstart --run.dir run",
        generate='fmegatron generate run "def "',
    )
    assert text.splitlines() == [
        "sample",
        "  | def f():",
        "  |     pass",
        "",
        "trained     400 steps in 4 min 12 s",
        "held-out    1.8000 bits per byte",
        "gzip -9     1.9000 bits per byte (beaten)",
        "xz -9       1.6000 bits per byte (not beaten)",
        "checkpoint  run/checkpoints/step-00000400",
        "resume      fmegatron train quickstart --run.dir run",
        'generate    fmegatron generate run "def "',
    ]
    assert closing(steps=1, seconds=0.2) == "trained  1 steps in 0 s"
    assert duration(3599.7) == "1 h 00 min" and duration(7500) == "2 h 05 min"
