"""What a pipeline schedule is: for each rank a list of actions. Plain data, checked, and read from and written to CSV.

    2F0  forward of stage 2 on microbatch 0      2I0  its input gradients     2W0  its weight gradients
    2B0  both gradients at once                  2SEND_F0 2RECV_F0 2SEND_B0 2RECV_B0  what the stage sends and receives

The letters and the CSV (a row a rank, an action a cell, empty cells are ignored) are those of TorchTitan and
torch.distributed.pipelining.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
COMPUTE = ("F", "B", "I", "W")
CELL = re.compile(r"(\d+)(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B|F|I|B|W)(\d*)")


@dataclass(frozen=True, order=True)
class Action:
    """One thing that a rank does for one stage and one microbatch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`actions[rank]`: computations in order. Raises ValueError in one line where it cannot run.

    Each stage lies on one rank, runs F once for each microbatch, and then B, or I and later W; each action waits for what
    it needs: a forward for the stage before, a backward for its own forward and the stage behind.
    """

    name: str
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        check(self)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.actions)

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of each stage."""
        owner = {action.stage: rank for rank, row in enumerate(self.actions) for action in row}
        return tuple(owner[stage] for stage in sorted(owner))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.rank_of)

    @cached_property
    def microbatches(self) -> int:
        """Number of microbatches."""
        return 1 + max(action.microbatch for row in self.actions for action in row)

    @cached_property
    def splits(self) -> bool:
        """Whether input and weight gradients are computed apart."""
        return any(action.kind == "W" for row in self.actions for action in row)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage, owner in enumerate(self.rank_of) if owner == rank]

    def needs(self, action: Action) -> list[Action]:
        """The computations that must be done before one: each of them on any rank."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            return [Action(stage - 1, "F", microbatch)] if stage else []
        if action.kind == "W":
            return [Action(stage, "I", microbatch)]
        own, behind = Action(stage, "F", microbatch), stage + 1
        return [own] if behind == self.stages else [own, Action(behind, self.backward_kind(behind, microbatch), microbatch)]

    def backward_kind(self, stage: int, microbatch: int) -> Kind:
        """Whether a stage's backward of a microbatch is whole (B) or split (I)."""
        return "I" if Action(stage, "I", microbatch) in self._split else "B"

    @cached_property
    def _split(self) -> frozenset[Action]:
        return frozenset(action for row in self.actions for action in row if action.kind == "I")

    @cached_property
    def order(self) -> tuple[tuple[int, Action], ...]:
        """All ranks' computations, (rank, action), in one order that respects what each needs; slots of time, ranks in turn."""
        return tuple(_orders(self))

    def peaks(self) -> list[int]:
        """For each rank, the most (stage, microbatch) pairs whose activations it holds: from F until B or W."""
        most = []
        for row in self.actions:
            held = peak = 0
            for action in row:
                held += {"F": 1, "I": 0}.get(action.kind, -1)
                peak = max(peak, held)
            most.append(peak)
        return most

    def forward_only(self) -> Schedule:
        """The forwards alone, as validation runs them."""
        return Forwards(self.name, tuple(tuple(a for a in row if a.kind == "F") for row in self.actions))


class Forwards(Schedule):
    """A schedule without backwards."""


def check(schedule: Schedule) -> None:
    """ValueError in one line where a schedule misses or repeats an action, or would wait for ever."""
    name, seen = schedule.name, dict[Action, int]()
    owner: dict[int, int] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action in seen:
                raise ValueError(f"schedule {name}: {action} is there twice, on ranks {seen[action]} and {rank}")
            seen[action] = rank
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"schedule {name}: stage {action.stage} is on ranks {owner[action.stage]} and {rank}")
    if not seen:
        raise ValueError(f"schedule {name}: no actions")
    stages, microbatches = 1 + max(a.stage for a in seen), 1 + max(a.microbatch for a in seen)
    for stage in range(stages):
        for microbatch in range(microbatches):
            kinds = "".join(kind for kind in COMPUTE if Action(stage, kind, microbatch) in seen)  # type: ignore[arg-type]
            if kinds not in (("F",) if isinstance(schedule, Forwards) else ("FB", "FIW")):
                found = f"stage {stage} has {kinds or 'nothing'} for microbatch {microbatch}"
                raise ValueError(f"schedule {name}: {found}: it takes F, and B or I and W")
    done = len(schedule.order)
    if done < len(seen):
        finished = {action for _, action in schedule.order}
        rank, stuck = next((r, a) for r, row in enumerate(schedule.actions) for a in row if a not in finished)
        missing = next(a for a in schedule.needs(stuck) if a not in finished)
        where = f"after {done} of {len(seen)} actions rank {rank} waits at {stuck} for {missing}"
        raise ValueError(f"schedule {name}: deadlock: {where}")


def _orders(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Slots of time in which each rank does its next action if all it needs was done before the slot; ends where none can."""
    done: set[Action] = set()
    at = [0] * schedule.ranks
    while True:
        ready = [
            (rank, row[at[rank]])
            for rank, row in enumerate(schedule.actions)
            if at[rank] < len(row) and all(need in done for need in schedule.needs(row[at[rank]]))
        ]
        if not ready:
            return
        for rank, action in ready:
            at[rank] += 1
            done.add(action)
        yield from ready


def sends(schedule: Schedule, action: Action) -> tuple[Action, Action] | None:
    """(send, receive) that follow a computation whose result another rank needs; None where no rank does."""
    forward = action.kind == "F"
    to = action.stage + (1 if forward else -1)
    if action.kind == "W" or not 0 <= to < schedule.stages or schedule.rank_of[to] == schedule.rank_of[action.stage]:
        return None
    send: Kind = "SEND_F" if forward else "SEND_B"
    receive: Kind = "RECV_F" if forward else "RECV_B"
    return Action(action.stage, send, action.microbatch), Action(to, receive, action.microbatch)


def with_transfers(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Each rank's actions with its sends and receives; a receive names the stage that receives.

    All are taken from one order in which a receive follows its send at once. So no rank waits for ever, even where a send
    returns only when it has been received.
    """
    rows: list[list[Action]] = [[] for _ in schedule.actions]
    for rank, action in schedule.order:
        rows[rank].append(action)
        pair = sends(schedule, action)
        if pair is not None:
            rows[rank].append(pair[0])
            rows[schedule.rank_of[pair[1].stage]].append(pair[1])
    return tuple(map(tuple, rows))


# -- CSV ------------------------------------------------------------------------------------------------------------
def parse(cell: str) -> list[Action]:
    """The actions of a cell: one; none (empty, or about shards of weights); two that overlap, "(0F8;7B0)OVERLAP_F_B"."""
    text = cell.strip()
    if text.startswith("("):
        return [action for part in text[1 : text.index(")")].split(";") for action in parse(part)]
    match = CELL.fullmatch(text)
    if text and not match:
        raise ValueError(f"no action of a schedule: {text!r}; one is like 2F0, 2I0, 2W0, 2B0, 2SEND_F0")
    if not match or match[2] not in get_args(Kind):
        return []
    return [Action(int(match[1]), match[2], int(match[3]))]  # type: ignore[arg-type]


def read_csv(path: str | os.PathLike[str]) -> Schedule:
    """A schedule in TorchTitan's format, of computations alone or with communication (which is derived anew)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [[action for cell in row for action in parse(cell)] for row in csv.reader(file)]
    return Schedule(os.path.basename(path), tuple(tuple(a for a in row if a.kind in COMPUTE) for row in rows if row))


def write_csv(rows: Sequence[Sequence[Action]], path: str | os.PathLike[str]) -> None:
    """Actions as `read_csv` and torch read them, a row a rank."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[str(action) for action in row] for row in rows])
