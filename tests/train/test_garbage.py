"""Python's garbage is collected at chosen steps only, and its own way of collecting comes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import cli
from fmegatron.train.garbage import collecting


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that were collected while Python's own collection was paused."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not gc.isenabled():
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


class Circle:
    def __init__(self, alive: set[int], name: int) -> None:
        self.me, self.alive, self.name = self, alive, name
        alive.add(name)

    def __del__(self) -> None:
        self.alive.discard(self.name)


@given(st.integers(1, 7), st.integers(0, 9), st.integers(0, 20), st.booleans())
def test_circles_die_at_the_first_step_and_where_the_interval_divides(every: int, done: int, more: int, automatic: bool):
    alive: set[int] = set()
    before = gc.isenabled()
    (gc.enable if automatic else gc.disable)()
    try:
        with collecting(every) as collect:
            for step in range(done + 1, done + more + 1):
                assert not gc.isenabled()
                Circle(alive, step)
                collect(step)
                last = max([done + 1, step // every * every])
                assert alive == set(range(last + 1, step + 1))
        assert gc.isenabled() == automatic
    finally:
        (gc.enable if before else gc.disable)()


def test_python_collects_as_before_whatever_the_end():
    with pytest.raises(ZeroDivisionError), collecting(3):
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    with collecting(0) as collect:
        assert gc.isenabled()
        collect(1)


@pytest.mark.parametrize("words, expected", [(["2"], [1, 1, 1]), (["0"], [])], ids=["each second step", "never"])
def test_a_run_collects_so(functions, tmp_path, collections, words, expected):
    assert cli.main(["train", "debug", "--run.dir", str(tmp_path / "run"), "--data.source", str(functions / "train"),
                     "--data.tokenizer", "byte", "--data.seq", "8", "--log.report", "false", "--log.prompt", "",
                     "--model.overrides.layers", "1", "--model.overrides.embed", "16", "--model.overrides.heads", "2",
                     "--model.overrides.kv", "1", "--model.overrides.mlp", "16",
                     "--training.collect", *words]) == 0  # fmt: skip
    assert collections == expected and gc.isenabled()
