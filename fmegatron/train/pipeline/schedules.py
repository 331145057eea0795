"""The schedules by name: pure functions (ranks, virtual, microbatches) -> Schedule.

    gpipe                    all forwards, then all backwards                             Huang 2018, arXiv 1811.06965
    1f1b                     as few forwards ahead as keep all ranks busy                 Narayanan 2021, arXiv 2104.04473
    interleaved_1f1b         1f1b over `virtual` stages a rank, stage s on rank s % ranks Narayanan 2021
    looped_bfs               gpipe over `virtual` stages a rank                           Lamy-Poirier 2022, arXiv 2211.05953
    zb_h1                    1f1b with weight gradients in the gaps                       Qi 2023, arXiv 2401.10241
    interleaved_zero_bubble  the same over `virtual` stages a rank                        Qi 2023
    zbv                      two stages a rank, s and 2 ranks - 1 - s: a V                Qi 2023, section 6
    dualpipev                the V with forwards and backwards of two microbatches joined DeepSeek 2024, arXiv 2412.19437

The orders are those of torch.distributed.pipelining, where it has the schedule and takes the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from fmegatron.train.pipeline.schedule import Action, Kind, Schedule, read_csv

Row = Iterable[Action]


def gpipe(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards in the same order."""
    _one_stage("gpipe", virtual, "looped_bfs")
    return _make(
        "gpipe", ranks, lambda r: [Action(r, kind, m) for kind in ("F", "B") for m in range(microbatches)], ranks, microbatches
    )


def one_f_one_b(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """ranks - 1 - rank forwards, then a forward and a backward in turn."""
    _one_stage("1f1b", virtual, "interleaved_1f1b")
    return _make("1f1b", ranks, lambda r: _steady(ranks, r, 1, microbatches, hops=1, split=False), ranks, microbatches)


def interleaved_1f1b(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """1f1b depth first over `virtual` stages a rank; microbatches in rounds of the number of ranks, or of a few more."""
    _rounds("interleaved_1f1b", ranks, microbatches)
    name, hops = "interleaved_1f1b", 2
    return _make(name, ranks, lambda r: _steady(ranks, r, virtual, microbatches, hops, split=False), virtual, microbatches)


def looped_bfs(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """All forwards stage by stage, then all backwards, the last microbatch first."""

    def row(rank: int) -> Row:
        stages, order = range(rank, ranks * virtual, ranks), range(microbatches)
        yield from (Action(stage, "F", m) for stage in stages for m in order)
        yield from (Action(stage, "B", m) for stage in reversed(stages) for m in reversed(order))

    return _make("looped_bfs", ranks, row, virtual, microbatches)


def zb_h1(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """1f1b whose weight gradients come `rank` backwards late, so that those before them pass on sooner."""
    _one_stage("zb_h1", virtual, "interleaved_zero_bubble")
    return _make("zb_h1", ranks, lambda r: _steady(ranks, r, 1, microbatches, hops=1, split=True), ranks, microbatches)


def interleaved_zero_bubble(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """zb_h1 over `virtual` stages a rank."""
    _rounds("interleaved_zero_bubble", ranks, microbatches)
    name, hops = "interleaved_zero_bubble", 1
    return _make(name, ranks, lambda r: _steady(ranks, r, virtual, microbatches, hops, split=True), virtual, microbatches)


def zbv(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """Down the ranks and up again: rank r holds stages r and 2 ranks - 1 - r. No idle slot where F, I and W take as long."""
    _two_stages("zbv", virtual)
    padded = max(2 * ranks - 1, microbatches)  # with fewer the pattern is that of a full pipeline, with holes

    def row(rank: int) -> Row:
        line = _Line((rank, 2 * ranks - 1 - rank))
        line.add("F0", 2 * (ranks - rank) - 1)
        line.add("F1 F0", rank)
        line.add("F1 I1 W1", ranks - rank)
        while line.count("F1") < line.count("F0") or line.count("F0") < padded:
            line.add("F0 I0 W0 F1 I1 W1" if line.count("F0") < padded else "I0 W0 F1 I1 W1")
        line.add("I0 I1", rank)
        line.add("I0 W0", ranks - rank)
        line.add("W1", line.count("I1") - line.count("W1"))
        line.add("W0", line.count("I0") - line.count("W0"))
        return [action for action in line.actions if action.microbatch < microbatches]

    return _make("zbv", ranks, row, virtual, microbatches)


def dualpipev(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """A V on which forwards of one half run beside backwards of the other; needs 2 ranks microbatches at least."""
    _two_stages("dualpipev", virtual)
    if microbatches < 2 * ranks:
        raise ValueError(
            f"dualpipev needs at least {2 * ranks} microbatches on {ranks} ranks, not {microbatches}: use {2 * ranks}, or zbv"
        )

    def row(rank: int) -> Row:
        line, behind = _Line((rank, 2 * ranks - 1 - rank)), ranks - 1 - rank
        line.add("F0", 2 * behind)
        line.add("F0 F1", rank + 1)
        line.add("I1 W F1", behind)
        line.add("F0 B1 F1 B0", microbatches - 2 * ranks + rank + 1)
        line.add("B1 F1 B0", behind)
        split = False
        for i in range(rank + 1):  # the second half of these leave their weight gradients for later
            split = split or (rank % 2 == 1 and i == (rank + 1) // 2)
            line.add("I1" if split else "B1")
            split = split or (rank % 2 == 0 and i == (rank + 1) // 2)
            line.add("I0" if split else "B0")
        line.add("W I0" if split else "W B0", behind)
        line.add("W", rank + 1)
        return line.actions

    return _make("dualpipev", ranks, row, virtual, microbatches)


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = MappingProxyType({
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "looped_bfs": looped_bfs,
    "zb_h1": zb_h1,
    "interleaved_zero_bubble": interleaved_zero_bubble,
    "zbv": zbv,
    "dualpipev": dualpipev,
})
VIRTUAL: Mapping[str, int] = MappingProxyType({"zbv": 2, "dualpipev": 2, "interleaved_1f1b": 2, "looped_bfs": 2,
                                               "interleaved_zero_bubble": 2})  # fmt: skip


def make_schedule(name: str, ranks: int, virtual: int | None, microbatches: int) -> Schedule:
    """The schedule of a name, or of a CSV file; virtual None is the least that the schedule is made for.

    Raises ValueError in one line, with the nearest legal choice, for sizes that it cannot have.
    """
    if name.endswith(".csv"):
        found = read_csv(name)
        sizes = found.ranks, found.microbatches
        if sizes != (ranks, microbatches):
            raise ValueError(
                f"schedule {name} is for {sizes[0]} ranks and {sizes[1]} microbatches, not {ranks} and {microbatches}"
            )
        return found
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}: known are {', '.join(SCHEDULES)}, or the path of a .csv")
    return SCHEDULES[name](ranks, VIRTUAL.get(name, 1) if virtual is None else virtual, microbatches)


# -- patterns -------------------------------------------------------------------------------------------------------
def group_of(ranks: int, microbatches: int) -> int:
    """Microbatches that a rank takes through one of its stages before it goes to the next: the ranks', or a few more."""
    return microbatches // max(1, microbatches // ranks)


def _steady(ranks: int, rank: int, virtual: int, microbatches: int, hops: int, split: bool) -> Row:
    """Forwards ahead, then one forward and one backward in turn, then what is left of backwards.

    hops: forwards more for each rank that is behind. split: backwards are I, and each W comes `rank` backwards later.
    """
    group, total = group_of(ranks, microbatches) if virtual > 1 else microbatches, virtual * microbatches
    ahead = min((virtual - 1) * group + hops * (ranks - 1 - rank), total)

    def visit(i: int, kind: Kind) -> Action:
        chunk = i // group % virtual
        chunk = chunk if kind == "F" else virtual - 1 - chunk
        return Action(chunk * ranks + rank, kind, i // (group * virtual) * group + i % group)

    yield from (visit(i, "F") for i in range(ahead))
    for i in range(total):
        if ahead + i < total:
            yield visit(ahead + i, "F")
        yield visit(i, "I" if split else "B")
        if split and i >= rank:
            yield visit(i - rank, "W")
    if split:
        yield from (visit(i, "W") for i in range(max(total - rank, 0), total))


class _Line:
    """A rank's actions, written as patterns: "F0 I1" is the next forward of its first stage, the next I of its second."""

    def __init__(self, stages: tuple[int, int]) -> None:
        self.stages, self.actions = stages, list[Action]()

    def count(self, word: str) -> int:
        """How often an action is there: "I0" counts B0 too, as "W0" does."""
        stage, kinds = self.stages[int(word[1])], {word[0], "B"} if word[0] in "IW" else {word[0]}
        return sum(action.stage == stage and action.kind in kinds for action in self.actions)

    def add(self, pattern: str, times: int = 1) -> None:
        """Write a pattern some times; "W" alone is the weight gradient that waits longest, if any."""
        for word in pattern.split() * times:
            if word == "W":
                done = {(a.stage, a.microbatch) for a in self.actions if a.kind == "W"}
                waiting = [a for a in self.actions if a.kind == "I" and (a.stage, a.microbatch) not in done]
                self.actions += [Action(a.stage, "W", a.microbatch) for a in waiting[:1]]
            else:
                kind: Kind = word[0]  # type: ignore[assignment]
                counted = self.count("I" + word[1]) if kind == "B" else self.count(word)
                self.actions.append(Action(self.stages[int(word[1])], kind, counted))


# -- legal sizes ----------------------------------------------------------------------------------------------------
def _make(name: str, ranks: int, row: Callable[[int], Row], virtual: int, microbatches: int) -> Schedule:
    for what, size in (("ranks", ranks), ("virtual stages", virtual), ("microbatches", microbatches)):
        if size < 1:
            raise ValueError(f"{name}: {what} are at least 1, not {size}: use 1")
    return Schedule(name, tuple(tuple(row(rank)) for rank in range(ranks)))


def _one_stage(name: str, virtual: int, other: str) -> None:
    if virtual != 1:
        raise ValueError(f"{name} has one stage a rank, not {virtual}: use virtual 1, or {other}")


def _two_stages(name: str, virtual: int) -> None:
    if virtual != 2:
        raise ValueError(f"{name} has two stages a rank, not {virtual}: use virtual 2")


def _rounds(name: str, ranks: int, microbatches: int) -> None:
    """Rounds must be equal: m // ranks of them, of m / rounds microbatches each."""

    def legal(m: int) -> bool:
        return m % max(1, m // ranks) == 0

    if ranks >= 1 and microbatches >= 1 and not legal(microbatches):
        below = next(m for m in range(microbatches, 0, -1) if legal(m))
        above = next(m for m in range(microbatches, 2 * microbatches + ranks) if legal(m))
        raise ValueError(
            f"{name}: {microbatches} microbatches do not go in {microbatches // ranks} equal rounds over {ranks} ranks: "
            f"use {below} or {above}"
        )
