"""torch.distributed.pipelining generates, or runs, the same actions; and each reads the other's CSV."""

from __future__ import annotations

import itertools
import logging
from unittest import mock

import pytest
from torch.distributed.pipelining import schedules

from fmegatron.train.pipeline.schedule import read_csv, with_transfers, write_csv
from fmegatron.train.pipeline.schedules import SCHEDULES, make_schedule

CLASSES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "looped_bfs": schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


def stage(ranks, virtual, rank=0, index=0):
    """A stage as far as a schedule asks it anything: it has places, and nothing to send."""
    no_transfers = {name: mock.Mock(return_value=[]) for name in
                    ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops")}
    return mock.MagicMock(group_size=ranks, group_rank=rank, num_stages=ranks * virtual, stage_index=index, **no_transfers)


def made(name, ranks, virtual, microbatches):
    """torch's schedule object; its error where it refuses the sizes."""
    logging.disable(logging.CRITICAL)
    try:
        return CLASSES[name]([stage(ranks, virtual, 0, i * ranks) for i in range(virtual)], microbatches)
    finally:
        logging.disable(logging.NOTSET)


def generated(name, ranks, virtual, microbatches):
    """[rank][i] of action names: the pipeline_order of a schedule of several stages a rank."""
    order = made(name, ranks, virtual, microbatches).pipeline_order
    return [[word for action in order[rank] for word in words(action)] for rank in range(ranks)]


def words(action):
    """Idle slots are nothing; two that overlap are one after the other, as torch runs them."""
    if action is None:
        return []
    return [word for sub in action.sub_actions for word in words(sub)] if action.sub_actions else [str(action)]


def executed(name, ranks, microbatches):
    """[rank][i]: what a schedule of one stage a rank calls when it runs."""
    rows = []
    for rank in range(ranks):
        own, row = stage(ranks, 1, rank, rank), []
        own.forward_one_chunk = lambda m, *args, row=row, rank=rank, **_: row.append(f"{rank}F{m}")
        own.backward_one_chunk = lambda m, *args, row=row, rank=rank, **_: row.append(f"{rank}B{m}")
        schedule = CLASSES[name](own, microbatches)
        schedule._initialize_stage = mock.Mock()
        schedule._step_microbatches([()] * microbatches, [{}] * microbatches)
        rows.append(row)
    return rows


def legal(name):
    """(sizes, schedule) of every small size that a schedule takes."""
    for sizes in itertools.product(range(1, 6), range(1, 4), range(1, 11)):
        try:
            yield sizes, make_schedule(name, *sizes)
        except ValueError:
            continue


def names(rows):
    return [[str(action) for action in row] for row in rows]


@pytest.mark.parametrize("name", CLASSES)
def test_torch_has_the_same_actions(name):
    count = 0
    for (p, v, m), schedule in legal(name):
        if name in ("gpipe", "1f1b"):
            if m >= p:  # torch's 1f1b takes no fewer
                assert names(schedule.actions) == executed(name, p, m)
                count += 1
        else:
            assert names(schedule.actions) == generated(name, p, v, m)
            count += 1
    assert count >= 20


def test_zb_h1_is_torchs_with_one_stage_a_rank():
    for (p, _, m), schedule in legal("zb_h1"):
        if m % max(1, m // p) == 0:
            assert names(schedule.actions) == generated("interleaved_zero_bubble", p, 1, m)


def test_csv_round_trip_and_torch_reads_it(tmp_path):
    for name in SCHEDULES:
        schedule = make_schedule(name, 3, None, 6)
        write_csv(schedule.actions, tmp_path / "plain.csv")
        write_csv(with_transfers(schedule), tmp_path / "transfers.csv")
        assert read_csv(tmp_path / "plain.csv").actions == read_csv(tmp_path / "transfers.csv").actions == schedule.actions
        theirs = made("looped_bfs", 3, schedule.stages // 3, 6)
        theirs._load_csv(str(tmp_path / "plain.csv"), format="compute_only")
        assert [[word for action in row for word in words(action)] for row in theirs.pipeline_order.values()] == names(
            schedule.actions
        )


def test_reads_what_torch_writes(tmp_path):
    for name in ("interleaved_1f1b", "zbv", "dualpipev"):
        theirs = made(name, 3, 2, 6)
        theirs._dump_csv(str(tmp_path / "a.csv"), format="compute_only")
        assert read_csv(tmp_path / "a.csv").actions == make_schedule(name, 3, 2, 6).actions
    assert make_schedule(str(tmp_path / "a.csv"), 3, None, 6).microbatches == 6
    with pytest.raises(ValueError, match="is for 3 ranks and 6 microbatches, not 4 and 6"):
        make_schedule(str(tmp_path / "a.csv"), 4, None, 6)
