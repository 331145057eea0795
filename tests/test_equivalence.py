"""A sample of `make equivalence`; and that it can fail."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fmegatron.sharding import RULES
from fmegatron.testing import equivalence
from fmegatron.testing.equivalence import BATCH, CONFIG, FORMS, MODELS, Result, compare, expert_ways, meshes, ways
from fmegatron.testing.formula import Case
from fmegatron.testing.formula_models import model_traffic

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.equivalence import equivalence as table  # noqa: E402

ALL = ways(8)
SAMPLE = random.Random(0).sample(ALL, 10)
EXPERTS = random.Random(0).sample(expert_ways(8), 12)
KINDS = (1, "gather"), (2, "padded")  # stages, form
SHORT = [next(way for way in EXPERTS if (way.pp, way.form) == kind) for kind in KINDS]
MARKED = [pytest.param(way, id=str(way), marks=() if way in SHORT else pytest.mark.long) for way in EXPERTS]


def test_every_way_to_give_ranks_to_axes():
    found = list(meshes(8, ("dp", "fsdp", "cp", "tp")))
    assert len(found) == len({tuple(m.items()) for m in found}) == 20  # 3 twos into 4 axes
    assert {"dp": 2, "cp": 2, "tp": 2} in found and {"tp": 8} in found


@pytest.mark.parametrize("way", SAMPLE, ids=str)
def test_a_step_is_one_devices_and_sends_what_the_formula_says(way):
    found = compare(way)
    assert found.worst < 1e-10 and found.traffic


def test_other_data_and_other_traffic_are_seen(monkeypatch):
    way = next(w for w in ALL if w.case.rules == "tp" and w.mesh == "tp8")
    monkeypatch.setattr(equivalence, "step_traffic", lambda case: {})
    assert not compare(way).traffic
    first = equivalence.batch
    monkeypatch.setattr(equivalence, "batch", lambda seed: first(seed + (seed == 4)))
    assert compare(way).parameters > 1e-6


@pytest.mark.parametrize("way", MARKED)
def test_a_step_with_experts_is_one_devices_and_exchanges_what_the_formula_says(way):
    found = compare(way)
    assert found.worst < 1e-10 and found.traffic and found.flips == 0


def test_the_table_of_all_ways_goes_on_where_it_was_cut_and_shows_the_worst(tmp_path):
    good, wrong = Result(1e-16, 2e-16, 3e-16, True), Result(1e-16, 2e-3, 1e-9, False, 1)
    one, other = ALL[0], replace(ALL[0], schedule="gpipe")  # two ways of one field of the picture
    whole = table.line(str(one), wrong) + table.line(str(other), good)
    (tmp_path / "results.jsonl").write_text(whole + table.line("cut", good)[:-9])
    assert table.kept(tmp_path / "results.jsonl") == {str(one): wrong, str(other): good}
    assert table.kept(tmp_path / "none") == {}
    assert table.fields([(one, wrong), (other, good)]) == {(one.case.rules, one.mesh): 2e-3}


AHEAD = replace(CONFIG, embed=32, kv=4, mtp=2)  # dense, with modules that look ahead
LATENT = replace(MODELS["latent"], moe=None, mtp=0)


def drawn(number):
    """Cases of a model each, on any mesh of 2, 4 or 8 ranks, by each preset."""
    rng, found = random.Random(1), []
    for i in range(number):
        c = (MODELS["experts"], LATENT, AHEAD, MODELS["latent"])[i % 4]
        rules = rng.choice([name for name in RULES if name != "single"])
        every = [m for n in (2, 4, 8) for m in meshes(n, ("dp", "fsdp", "ep", "cp", "cpa", "tp"))]
        sizes = rng.choice([m for m in every if m.keys() <= RULES[rules].axes])
        rows = BATCH[0] // math.prod(n for axis, n in sizes.items() if axis in ("dp", "fsdp", "ep"))
        m, remat = min(rows, rng.choice((1, 2))), rng.choice(("none", "full", "every-2", "selective"))
        found.append((Case(rules, sizes, c, BATCH, m, remat, keeps=True), rng.choice(FORMS[:2])))
    return found


def name_of(x):
    return f"{x.rules} {x.sizes} m={x.m} {x.remat}" if isinstance(x, Case) else x


@pytest.mark.parametrize("case, form", [pytest.param(*each, marks=pytest.mark.long if i > 3 else ()) for i, each in
                                        enumerate(drawn(60))], ids=name_of)  # fmt: skip
def test_all_that_a_step_sends_is_a_closed_form(case, form):
    """With experts, latent attention, modules that look ahead, and all of them."""
    assert equivalence.stepped(case, form) == model_traffic(case, form)
