"""Mixtures: every source's rows in order, none skipped; counts that follow the schedule; no state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.data.batches import batches
from fmegatron.data.cycle import Skip
from fmegatron.data.mixture import Mixture, ramp


class Source:
    """Row n of source s is 1000 s + n."""

    def __init__(self, source: int) -> None:
        self.source = source

    def row(self, number: int):
        return {"tokens": np.array([1000 * self.source + number]), "sample": np.array(number)}


weights = st.sampled_from([0, 0, 1, 2, 0.1, 1 / 3, 7])


@st.composite
def schedules(draw):
    count = draw(st.integers(1, 5))
    one = st.lists(weights, min_size=count, max_size=count).filter(any)
    at = draw(st.lists(st.integers(1, 200), max_size=4, unique=True))
    return count, {0: draw(one), **{n: draw(one) for n in at}}


@given(schedules())
def test_sources_are_read_in_order_and_counts_follow_the_schedule(drawn):
    count, schedule = drawn
    mixture = Mixture([Source(i) for i in range(count)], schedule)
    given, due = [0] * count, np.zeros(count)
    for number in range(300):
        assert mixture.counts(number) == given
        source, row = mixture.where(number)
        assert row == given[source]  # the next one of its source: none is skipped, none comes twice
        given[source] += 1
        now = np.array(schedule[max(at for at in schedule if at <= number)], float)
        due += now / now.sum()
        assert np.abs(np.array(given) - due).max() <= max(1, count - 1)
        assert now[source] or abs(given[source] - due[source]) <= 1  # a source without weight only catches up
    assert [int(mixture.row(n)["tokens"][0]) for n in (250, 3)] == [1000 * s + r for s, r in map(mixture.where, (250, 3))]


def test_constant_weights_are_even_and_a_source_without_weight_is_never_read():
    mixture = Mixture([Source(i) for i in range(3)], (3, 0, 1))
    read = [mixture.where(n)[0] for n in range(400)]
    assert {tuple(sorted(read[i : i + 4])) for i in range(0, 400, 4)} == {(0, 0, 0, 2)}


def test_far_into_a_run_it_is_as_exact_as_at_its_beginning():
    schedule = {0: (0.1, 0.2, 0.3, 0.4), **ramp(10**9, 2 * 10**9, (1, 2, 3, 4), (1, 1, 1, 1))}
    mixture = Mixture([Source(i) for i in range(4)], schedule)
    for start in (10**9 - 50, 10**9 + 123456789, 10**13):
        given = mixture.counts(start)
        assert sum(given) == start
        for number in range(start, start + 100):
            source, row = mixture.where(number)
            assert row == given[source]
            given[source] += 1
        assert mixture.counts(start + 100) == given
    quarter = np.diff([mixture.counts(10**12), mixture.counts(10**12 + 4000)], axis=0)
    assert np.abs(quarter - 1000).max() <= 2


def test_a_ramp_goes_from_one_to_the_other():
    stages = ramp(100, 164, (1, 0), (0, 1), steps=64)
    assert stages[100] == (1, 0) and stages[164] == (0, 1) and stages[132] == (0.5, 0.5) and len(stages) == 65
    counts = Mixture([Source(0), Source(1)], {0: (1, 0), **stages}).counts(164)
    assert abs(counts[1] - 32) <= 1


@given(schedules(), st.integers(0, 150), st.sampled_from([1, 2, 3, 6]), st.integers(1, 40))
def test_ranks_crashes_and_skips_change_no_sample(drawn, consumed, ranks, skipped):
    count, schedule = drawn
    rows = Skip(Mixture([Source(i) for i in range(count)], schedule), [(160, 160 + skipped)])
    whole, share = batches(rows, 6, consumed, ahead=0), 6 // ranks
    parts = [batches(rows, 6, consumed, rows=range(r * share, (r + 1) * share), ahead=0) for r in range(ranks)]
    for step in range(12):
        batch = next(whole)
        assert batch["tokens"].tolist() == [row for part in parts for row in next(part)["tokens"].tolist()]
        anew = Skip(Mixture([Source(i) for i in range(count)], schedule), [(160, 160 + skipped)])
        assert next(batches(anew, 6, consumed + 6 * step, ahead=0))["tokens"].tolist() == batch["tokens"].tolist()
        assert not {int(n) for n in batch["sample"]} & set(range(160, 160 + skipped))


def test_mistakes():
    two = [Source(0), Source(1)]
    for sources, schedule, message in [
        (two, {5: (1, 1)}, "2 sources from sample 5"),
        ([], {0: ()}, "0 sources"),
        (two, (1, 2, 3), "2 of them"),
        (two, {0: (1, 1), 9: (0, 0)}, "from sample 9"),
        (two, (1, -1), "not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture(sources, schedule)
    with pytest.raises(ValueError, match="a ramp from 5 to 5"):
        ramp(5, 5, (1,), (1,))
