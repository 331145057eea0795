"""Schedules for all small sizes: complete, in order, without deadlock, as long and as large as their formulas."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import cli
from fmegatron.train.pipeline import formulas
from fmegatron.train.pipeline.schedule import Action, Schedule, parse, with_transfers
from fmegatron.train.pipeline.schedules import SCHEDULES, VIRTUAL, make_schedule
from fmegatron.train.pipeline.timeline import Durations, simulate

RANKS, VIRTUALS, MICROBATCHES = range(1, 6), range(1, 4), range(1, 11)


def legal(name):
    """(sizes, schedule) of every small size that a schedule takes; what it refuses, it refuses with a legal choice."""
    for sizes in itertools.product(RANKS, VIRTUALS, MICROBATCHES):
        try:
            yield sizes, make_schedule(name, *sizes)
        except ValueError as error:
            assert "use " in str(error) and "\n" not in str(error)


def names(rows):
    return [[str(action) for action in row] for row in rows]


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_small_sizes(name):
    count = 0
    for (p, v, m), schedule in legal(name):
        count += 1
        actions = [action for row in schedule.actions for action in row]
        assert (schedule.ranks, schedule.stages, schedule.microbatches) == (p, p * v, m)
        assert len(actions) == len(set(actions))
        done = set()
        for _, action in schedule.order:  # what an action needs, counted here from the outside
            s, k = action.stage, action.microbatch
            backs = {Action(s + 1, "B", k), Action(s + 1, "I", k)}
            if action.kind == "F":
                assert s == 0 or Action(s - 1, "F", k) in done
            elif action.kind == "W":
                assert Action(s, "I", k) in done
            else:
                assert Action(s, "F", k) in done and (s == p * v - 1 or backs & done)
            done.add(action)
        assert done == set(actions)
        for stage, microbatch in itertools.product(range(p * v), range(m)):
            kinds = {kind for kind in "FBIW" if Action(stage, kind, microbatch) in done}
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
    assert count >= 20


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock_even_where_a_send_waits_for_its_receive(name):
    for _, schedule in legal(name):
        rows = [list(row) for row in with_transfers(schedule)]
        sent = 0
        while any(rows):
            before = sum(map(len, rows))
            for row in rows:
                while row and row[0].kind in ("F", "B", "I", "W"):
                    row.pop(0)
            for row in rows:
                if row and row[0].kind.startswith("SEND"):
                    to = row[0].stage + (1 if row[0].kind == "SEND_F" else -1)
                    other = rows[schedule.rank_of[to]]
                    want = Action(to, row[0].kind.replace("SEND", "RECV"), row[0].microbatch)
                    if other and other[0] == want:
                        row.pop(0), other.pop(0)
                        sent += 1
            assert sum(map(len, rows)) < before, f"stuck at {[str(row[0]) for row in rows if row]}"
        hops = sum(a != b for a, b in itertools.pairwise(schedule.rank_of))
        assert sent == 2 * hops * schedule.microbatches


def test_a_receive_comes_before_its_use():
    for name in SCHEDULES:
        for row in with_transfers(make_schedule(name, 3, None, 6)):
            for i, action in enumerate(row):
                if action.kind in ("F", "B", "I"):
                    way = "F" if action.kind == "F" else "B"
                    received = Action(action.stage, f"RECV_{way}", action.microbatch)
                    assert received not in row[i:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_and_peaks_are_their_formulas(name):
    durations = [Durations(), Durations(5, 6, 3), Durations(6, 5, 3), Durations(3, 6, 5), Durations(4, 7, 7)]
    known = 0
    for (p, v, m), schedule in legal(name):
        for times in durations:
            timeline = simulate(schedule, times)
            lost = formulas.lost_time(name, p, v, m, times)
            if lost is not None:
                known += 1
                assert timeline.span - m * v * (times.forward + times.inputs + times.weights) == pytest.approx(lost, abs=1e-9)
                assert timeline.bubble == pytest.approx(formulas.bubble(name, p, v, m, times))
            assert timeline.peaks() == schedule.peaks()
        for rank, held in enumerate(schedule.peaks()):
            bound = formulas.peak(name, p, v, m, rank)
            assert held == bound or (name == "zbv" and m < 2 * p - 1 and held <= bound)
    assert known >= 60


def test_less_bubble_where_it_is_promised():
    def lost(name):
        return simulate(make_schedule(name, 4, None, 8), Durations(1, 1, 1)).bubble

    assert lost("zbv") < lost("zb_h1") < lost("1f1b") == lost("gpipe")
    assert lost("interleaved_1f1b") == pytest.approx(lost("1f1b") / 2)


def test_cells():
    assert names([parse("(0F8;7B0)OVERLAP_F_B"), parse(" 2W1 "), parse(""), parse("1UNSHARD"), parse("0REDUCE_GRAD")]) == [
        ["0F8", "7B0"], ["2W1"], [], [], []]  # fmt: skip
    with pytest.raises(ValueError, match="no action of a schedule: '2X0'"):
        parse("2X0")


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 4), st.integers(0, 10**6))
def test_a_broken_schedule_is_refused_in_one_line(name, ranks, seed):
    draw = random.Random(seed)
    rows = [list(row) for row in make_schedule(name, ranks, None, 2 * ranks).actions]
    rank = draw.randrange(ranks)
    at = draw.randrange(len(rows[rank]))
    action = rows[rank].pop(at)
    how = draw.choice(["lost", "twice", "elsewhere", "too early"])
    if how == "twice":
        rows[rank] += [action, action]
    elif how == "elsewhere":
        rows[(rank + 1) % ranks].append(action)
    elif how == "too early":
        rows[rank][:] = sorted([*rows[rank], action], key=lambda a: (a.kind == "F", a.stage, a.microbatch))
    with pytest.raises(ValueError, match="^schedule broken: ") as error:
        Schedule("broken", tuple(map(tuple, rows)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, sizes, message", [
    ("1f1b", (2, 2, 4), "1f1b has one stage a rank, not 2: use virtual 1, or interleaved_1f1b"),
    ("zbv", (2, 3, 4), "zbv has two stages a rank, not 3: use virtual 2"),
    ("dualpipev", (4, 2, 7), "dualpipev needs at least 8 microbatches on 4 ranks, not 7: use 8, or zbv"),
    ("interleaved_1f1b", (4, 2, 9), "9 microbatches do not go in 2 equal rounds over 4 ranks: use 8 or 10"),
    ("gpipe", (4, 1, 0), "gpipe: microbatches are at least 1, not 0: use 1"),
    ("f1b1", (4, 1, 4), "schedule 'f1b1': known are gpipe, 1f1b"),
])  # fmt: skip
def test_illegal_sizes(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, *sizes)


def test_simulated_sends_take_time():
    schedule = make_schedule("1f1b", 2, None, 2)
    slow, fast = (simulate(schedule, Durations(send=t)).span for t in (1.0, 0.0))
    assert fast == 9.0 and slow == 11.0  # one send down and one up lie on the way of the last microbatch
    loaded = simulate(schedule, replace(Durations(), load=(1.0, 2.0)))
    assert loaded.busy(1) == 2 * loaded.busy(0)


def test_text():
    lines = str(simulate(make_schedule("interleaved_1f1b", 2, 2, 2))).splitlines()
    assert lines[0] == "interleaved_1f1b: 2 ranks, 4 stages; span 15, bubble 25.0%, peak activations 4 3"
    assert lines[1].split()[2:9] == ["F0", "F1", "F0'", "F1'", ".", ".", "B0'"]
    assert set(VIRTUAL) < set(SCHEDULES)


def test_explain_prints_and_draws(tmp_path, capsys):
    words = "explain --pipeline 1f1b,zbv --ranks 2 --microbatches 4 --inputs 1.5 --picture"
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        assert cli.main([*words.split(), str(tmp_path / f"a{suffix}")]) == 0
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
    out = capsys.readouterr().out
    assert "1f1b: 2 ranks, 2 stages; span 17.5, bubble 25.0%, peak activations 2 1" in out and "bubble by formula 25.0%" in out
    assert cli.main("explain --pipeline zb_h1 --ranks 2 --microbatches 2 --measure llama3:debug --seq 4".split()) == 0
    assert "zb_h1, measured: 2 ranks, 2 stages; span" in capsys.readouterr().out
    assert cli.main(["explain", "--pipeline", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == list(SCHEDULES) and found[0]["bars"][0]["action"] == "0F0"
    assert cli.main("explain --pipeline dualpipev --microbatches 3".split()) == 2
    assert capsys.readouterr().err.endswith("not 3: use 8, or zbv\n")
