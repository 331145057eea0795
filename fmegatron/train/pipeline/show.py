"""`fmegatron explain --pipeline`: schedules as text, as JSON, and as a picture."""

from __future__ import annotations

from fmegatron.models import preset
from fmegatron.train.pipeline import formulas
from fmegatron.train.pipeline.draw import draw
from fmegatron.train.pipeline.measure import measure as run
from fmegatron.train.pipeline.schedules import SCHEDULES, make_schedule
from fmegatron.train.pipeline.timeline import Durations, Timeline, simulate

LEGEND = """F3 forward of microbatch 3, B backward, I its input gradients, W its weight gradients; later stages of a rank ' '';
- goes on, . waits; bubble: time lost over time needed; peak activations: (stage, microbatch) pairs that a rank holds at once"""


def main(
    *,
    pipeline: str,
    ranks: int,
    virtual: int | None,
    microbatches: int,
    forward: float,
    inputs: float,
    weights: float,
    send: float,
    picture: str | None = None,
    measure: str | None = None,
    seq: int = 128,
    json: bool = False,
) -> None:
    """Print the timelines of schedules, with bubble, peak activations and their formulas; draw them if asked.

    measure: a preset of which a step is run here, with one layer a stage, and shown beside each schedule. seq: its tokens.
    forward, inputs, weights: of all layers of a rank, so that schedules of one and of several stages a rank compare.
    """
    names = list(SCHEDULES) if pipeline == "all" else pipeline.split(",")
    timelines, lines = list[Timeline](), list[str]()
    for name in names:
        schedule = make_schedule(name, ranks, virtual, microbatches)
        stages = schedule.stages // schedule.ranks
        durations = Durations(forward / stages, inputs / stages, weights / stages, send)
        timelines.append(simulate(schedule, durations))
        expected = formulas.bubble(name, ranks, stages, microbatches, durations)
        lines.append("no formula for these sizes and durations" if expected is None else f"bubble by formula {expected:.1%}")
        if measure is not None:
            timelines.append(run(preset(measure, layers=schedule.stages), schedule, seq))
            lines.append("each computation as long as it took here, ranks side by side")
    if json:
        print("[" + ",\n".join(timeline.json() for timeline in timelines) + "]")
    else:
        print("\n\n".join(f"{timeline}\n{line}" for timeline, line in zip(timelines, lines, strict=True)), LEGEND, sep="\n\n")
    if picture is not None:
        where = draw(timelines, picture)
        if not json:
            print(f"\n{where}")
