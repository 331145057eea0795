"""What meetings of replicas that go apart send, for `explain`: each kind alone, on meta tensors, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fmegatron.sharding import spmd
from fmegatron.sharding.apart import inside
from fmegatron.sharding.traffic import Traffic
from fmegatron.train.explanation import MeetingRow
from fmegatron.train.leaves import to_optimizer
from fmegatron.train.rehearsal import Rehearsal
from fmegatron.train.semisync import SemiSync, slots_of


def explain_meetings(practice: Rehearsal, traffic: Traffic) -> tuple[MeetingRow, ...]:
    """The meetings of a rehearsed step, those of fragments over their whole period; none where replicas do not go apart."""
    meeting, state = practice.plan.meeting, practice.state
    rule = meeting.rule
    if rule is None:
        return ()
    run = spmd(practice.plan.meeting.sh, lambda here: to_optimizer(practice.plan.leaves, state.params, inside(here)))
    held, rows = (run(), state.opt_state, state.outer), []
    alone = {"params": (rule.params, replace(meeting, rule=replace(rule, moments=0)))}
    never = dict.fromkeys(slots_of(held[0], held[1]), 0)
    moments = rule.moments if isinstance(rule.moments, Mapping) else dict.fromkeys(never, rule.moments)
    for slot, every in moments.items():
        apart = SemiSync(every + 1, {**never, slot: every}) if every else rule
        alone |= {slot: (every, replace(meeting, rule=apart))} if every else {}
    for what, (every, only) in alone.items():
        traffic.clear()
        for clock in range(1, every + 1):
            spmd(meeting.sh, lambda here, only=only, clock=clock: only.at(here, clock, held))()
        sent = [row for row in traffic.rows() if row.axis == practice.plan.meeting.sh.rules.apart]
        rows.append(MeetingRow(what, every, sum(row.count for row in sent), sum(row.bytes for row in sent)))
    return tuple(rows)
