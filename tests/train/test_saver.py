"""Saving in the background: the same files as in the foreground, of the state as it was; its errors come out in one line."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fmegatron.train import checkpoint
from fmegatron.train.checkpoint import whole
from fmegatron.train.saver import Saver


def state(value: float, rows: int = 300):
    x = torch.full((rows, 40), value)
    return {"x": x, "t": x.T.clone(memory_format=torch.preserve_format), "n": torch.tensor(value), "copy": x.clone()}


def items(state):
    x = state["x"]
    halves = checkpoint.Chunks(tuple(x.shape), (((0, 0), x[:100]), ((100, 0), x[100:])))
    return {"a": halves, "n": whole(state["n"]), "t": whole(state["t"])}


def writer(folder, before=lambda: None):
    def write(step, held, meta, group):
        before()
        return checkpoint.save(folder, step, held, meta, keep=3, group=group)

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_files_are_the_same_bit_for_bit(tmp_path):
    for name, background in (("front", False), ("back", True)):
        with Saver(writer(tmp_path / name), items, background=background) as saver:
            for step in (1, 2, 3):
                given = state(float(step), rows=400 if step == 3 else 300)  # the third has another structure
                saver.save(given, step, {"step": step})
                for x in given.values():  # the next step reuses the state's memory
                    x.fill_(-1.0)
    front, back = contents(tmp_path / "front"), contents(tmp_path / "back")
    # in the foreground all was on the disk before it was overwritten; in the background the copy was
    assert front == back and len(front) == 7


def test_training_goes_on_and_the_next_save_waits(tmp_path):
    gate, begun = threading.Event(), []
    with Saver(writer(tmp_path, lambda: (begun.append(len(begun)), gate.wait(10))), items, background=True) as saver:
        assert saver.save(state(1.0), 1, {}) is None  # returns though the thread is held up
        assert saver.check() is None and checkpoint.latest(tmp_path) is None
        threading.Timer(0.05, gate.set).start()
        assert saver.save(state(2.0), 2, {}).name == "step-00000001"  # waited for the first
        assert saver.wait().name == "step-00000002" and saver.wait() is None
    assert begun == [0, 1]


@pytest.mark.parametrize("when", ["check", "save", "close"])
def test_an_error_in_the_thread_comes_out(when, tmp_path):
    def fails():
        raise OSError(28, "No space left on device")

    saver = Saver(writer(tmp_path, fails), items, background=True)
    saver.save(state(1.0), 1, {})
    with pytest.raises(OSError, match="No space left") as error:
        if when == "save":
            saver.save(state(2.0), 2, {})
        elif when == "close":
            with saver:
                pass
        else:
            while True:
                saver.check()
    assert "\n" not in str(error.value)
    with saver:  # once told, it is over
        pass


def test_a_state_of_one_structure_is_cut_once_and_copies_have_no_memory(tmp_path):
    """Items are made of the given state (what is given), then of the host's; and again only for another structure."""
    made = []

    def counted(state):
        made.append({key: x.untyped_storage().nbytes() for key, x in state.items()})
        return items(state)

    with Saver(writer(tmp_path), counted, background=True) as saver:
        for step in (1, 2, 3):
            saver.save(state(float(step)), step, {})
            saver.wait()
        assert len(made) == 2 and made[1] == {"x": 48000, "t": 48000, "n": 4, "copy": 4}
        saver.save(state(4.0, rows=200), 4, {})
        assert len(made) == 4
