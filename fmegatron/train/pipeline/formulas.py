"""What a schedule costs, in closed form: time lost to the bubble, and activations held. tests compare them with the timelines.

p ranks, v stages a rank, m microbatches; F, I, W: durations of one stage (1/v of a rank's layers), sends free.

    schedule                        time lost beside m v (F + I + W)            source
    gpipe, 1f1b                     (p-1) (F+I+W)                               Narayanan 2021, 2.2.1
    interleaved_1f1b, looped_bfs    (p-1 + (v-1) max(p-m, 0)) (F+I+W)           Narayanan 2021, 2.2.2; Lamy-Poirier 2022, 4.1;
                                                                                the term for m < p is ours
    zb_h1                           (p-1) (F+I) - (min(m, p)-1) W               Qi 2023, table 2, for m >= p; W <= F and I
    interleaved_zero_bubble         (p-1) (F+I-W)                               the same, m >= p, W <= F and I
    zbv                             (p-1) I                                     ours: ranks start one after another and
                                                                                lose nothing after it; m >= 2p-1, I >= F and W
    dualpipev                       (p-1) (F+I-W)                               ours: a forward and a backward that overlap
                                                                                count one after the other; W <= F and I

    schedule                        stages' activations held by rank r          source
    gpipe                           m
    1f1b                            min(m, p-r)                                 Narayanan 2021
    interleaved_1f1b                min(v m, (v-1) g + 2 (p-1-r) + 1)           g microbatches a round: m / max(1, m // p)
    looped_bfs                      v m                                         Lamy-Poirier 2022
    zb_h1                           min(m, p)                                   Qi 2023: no more than 1f1b's largest
    interleaved_zero_bubble         min(v m, (v-1) g + p)
    zbv                             min(2 m, 2 p), some ranks fewer if m < 2p-1 Qi 2023, section 6: 1f1b's, on all ranks
    dualpipev                       2 p + 1                                     DeepSeek 2024, table 2
"""

from __future__ import annotations

from fmegatron.train.pipeline.schedules import group_of
from fmegatron.train.pipeline.timeline import Durations


def lost_time(name: str, ranks: int, virtual: int, microbatches: int, durations: Durations) -> float | None:
    """span - m v (F + I + W), or None where there is no formula for these sizes or durations: then simulate."""
    p, v, m = ranks, virtual, microbatches
    f, i, w = durations.forward, durations.inputs, durations.weights
    if durations.send or durations.load:
        return None
    if name in ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"):
        return (p - 1 + (v - 1) * max(p - m, 0)) * (f + i + w)
    if name == "zbv":
        return (p - 1) * i if i >= max(f, w) and m >= 2 * p - 1 else None
    if w > min(f, i):
        return None
    if name == "zb_h1":
        return (p - 1) * (f + i) - (min(m, p) - 1) * w
    return (p - 1) * (f + i - w) if name in ("interleaved_zero_bubble", "dualpipev") and m >= p else None


def bubble(name: str, ranks: int, virtual: int, microbatches: int, durations: Durations) -> float | None:
    """Time lost over time needed, as a timeline's `bubble`; None where there is no formula."""
    lost = lost_time(name, ranks, virtual, microbatches, durations)
    needed = microbatches * virtual * (durations.forward + durations.inputs + durations.weights)
    return None if lost is None else lost / needed


def peak(name: str, ranks: int, virtual: int, microbatches: int, rank: int) -> int | None:
    """The most stages' activations that a rank holds; of zbv with few microbatches an upper bound; None: no formula."""
    p, v, m, r = ranks, virtual, microbatches, rank
    group = group_of(p, m)
    table = {
        "gpipe": m,
        "1f1b": min(m, p - r),
        "interleaved_1f1b": min(v * m, (v - 1) * group + 2 * (p - 1 - r) + 1),
        "looped_bfs": v * m,
        "zb_h1": min(m, p),
        "interleaved_zero_bubble": min(v * m, (v - 1) * group + p),
        "zbv": min(2 * m, 2 * p),
        "dualpipev": 2 * p + 1,
    }
    return table.get(name)
