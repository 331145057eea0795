"""A bar on a terminal, lines elsewhere: the same records, the same words."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from fmegatron.train.progress import Bar, Lines, memory_bytes, progress


def records(steps: range) -> list[dict[str, float]]:
    measured = {"heldout_loss": 3.5, "bits_per_byte": 1.75}
    return [
        {"step": s, "loss": 4.0 - s / 100, "tokens_per_second": 5000.0, "tflops": 0.11, "memory_bytes": 2e9}
        | (measured if s == 7 else {})
        for s in steps
    ]


def test_lines_every_n_steps_and_where_held_out_text_was_measured() -> None:
    out = io.StringIO()
    with progress(24, every=10, console=Console(file=out, width=40)) as show:
        assert isinstance(show, Lines)
        for record in records(range(1, 25)):
            show.update(record)
        show.note("saved [run/step-24]")
    lines = out.getvalue().splitlines()  # one a record however narrow the console
    assert [line[:10] for line in lines] == ["step  7/24", "step 10/24", "step 20/24", "step 24/24", "saved [run"]
    assert "bits/byte 1.7500" in lines[0] and "bits/byte" not in lines[1]
    assert "\x1b" not in out.getvalue()


def test_bar_shows_the_last_numbers_and_keeps_the_held_out_ones() -> None:
    out = io.StringIO()
    with progress(24, start=4, console=Console(file=out, force_terminal=True, width=100)) as show:
        assert isinstance(show, Bar)
        for record in records(range(5, 13)):
            show.update(record)
        show.note("saved run/step-12")
    last = out.getvalue().rsplit("step", 1)[1]
    assert "12/24" in last
    for part in ("loss 3.8800", "5,000 tokens/s", "0.11 TFLOP/s", "2.00 GB", "bits/byte 1.7500"):
        assert part in last
    assert "saved run/step-12" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") <= out.getvalue().count("\x1b[?25h")  # the cursor is never left hidden


def test_memory_of_this_process() -> None:
    before = memory_bytes("cpu")
    held = torch.ones(25_000_000)
    assert 80e6 < memory_bytes("cpu") - before < 200e6
    assert held.numel() == 25_000_000
