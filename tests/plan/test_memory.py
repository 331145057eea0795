"""Predicted peaks against the bytes that a real step on CPU tensors has alive; few layers stand for many."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from fmegatron import optim, tree
from fmegatron.data.batches import NAMES
from fmegatron.kernels.quantize import recipe
from fmegatron.models import Config, gpt
from fmegatron.models.lower import lower
from fmegatron.nn.moe import Moe
from fmegatron.optim.host import arrays_of
from fmegatron.plan.meter import Meter
from fmegatron.plan.pipeline import in_flight
from fmegatron.plan.work import _period, first_layers, work_of
from fmegatron.sharding import RULES, SINGLE, Sharding, abstract_mesh, shard, thread_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.train.explain import explain
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.stages import Pipeline
from fmegatron.train.remat import parse_remat
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
C = Config(layers=5, embed=64, heads=4, kv=2, mlp=160, vocab=512)
BATCH = (12, 64)
FIELDS = {key: names for key, names in NAMES.items() if key != "documents"}


def tx(model):
    return optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))


def real(c, sh, tx=tx, donate=True, make=gpt, **settings):
    """The most bytes alive in a step of real tensors, on the device and in host memory; on an abstract mesh only the peers
    are missing."""
    model, meter = make(c), Meter()
    policy = replace(parse_remat(settings.pop("remat", "none")), copies=meter)
    rule = tx(model)
    state, step = init(model, rule, sh), make_step(model, rule, sh, donate=donate, remat=policy, **settings)
    tokens = torch.zeros(BATCH, dtype=torch.int64)
    values = dict.fromkeys(NAMES, tokens) | {"weights": torch.ones(BATCH), "sample": torch.arange(BATCH[0])}
    data = {key: shard(sh, values[key], names) for key, names in FIELDS.items()}
    del values, tokens
    away = arrays_of(rule, state.opt_state) if rule.host else []
    meter.keep(away)
    meter.hold(x for x in [*tree.leaves(state), *data.values()] if all(x is not other for other in away))
    with meter:
        step(state, data)
    return max(meter.peaks.values()), meter.host


def run_once(model, sh, **settings):
    """A step on real ranks."""
    rule = tx(model)
    tokens = torch.zeros(BATCH, dtype=torch.int64)
    data = {"tokens": tokens, "labels": tokens}
    make_step(model, rule, sh, **settings)(init(model, rule, sh), {k: shard(sh, x, "batch seq") for k, x in data.items()})


def predicted(c, sh, tx=tx, make=gpt, **settings):
    work = work_of(make(c), sh, tx, batch=BATCH, fields=FIELDS, **({"donate": True} | settings))
    return max(line(c.layers) for line in work.peaks.values()), work.host(c.layers)


def on_cpu(**sizes):
    return replace(abstract_mesh(**sizes), device="cpu")


def cases():
    """Every remat with every rules; a Latin square of them in each run, in which each of both comes up."""
    yield pytest.param("every-2", 3, None, "fsdp", {"dp": 4}, id="every-2-fsdp")
    yield pytest.param("offload", 3, None, "single", {}, id="offload-single")
    for remat, rules, sizes in (("offload-1", "fsdp", {"dp": 4}), ("full+offload", "tp", {"tp": 2})):
        yield pytest.param(remat, 1, torch.bfloat16, rules, sizes, marks=pytest.mark.long, id=f"{remat}-{rules}")
    for i, (remat, microbatches) in enumerate([("none", 1), ("selective", 3), ("full", 1)]):
        for j, (rules, sizes, dtype) in enumerate([
            ("single", {}, None), ("fsdp", {"dp": 4}, torch.bfloat16), ("tp", {"tp": 2}, None),
            ("zero1_tp_sp", {"dp": 2, "tp": 2}, torch.bfloat16), ("fsdp_tp_sp", {"dp": 2, "tp": 2}, None),
        ]):  # fmt: skip
            marks = () if (i + j) % 3 == 0 or (remat, rules) == ("full", "fsdp") else pytest.mark.long
            yield pytest.param(remat, microbatches, dtype, rules, sizes, marks=marks, id=f"{remat}-{rules}")


@pytest.mark.parametrize("remat, microbatches, dtype, rules, sizes", list(cases()))
def test_prediction_is_what_a_real_step_holds(remat, microbatches, dtype, rules, sizes):
    sh = Sharding(on_cpu(**sizes), RULES[rules]) if sizes else SINGLE
    settings = {"microbatches": microbatches, "remat": remat, "dtype": dtype}
    measured = real(C, sh, **settings)
    said = predicted(C, Sharding(abstract_mesh(**sizes), RULES[rules]), **settings)
    assert said == pytest.approx(measured, rel=0.10)
    assert said == pytest.approx(measured, rel=0.03)  # what it reaches
    assert (measured[1] > 0) == ("offload" in remat)


def test_weights_gathered_in_eight_bits_count_a_byte_an_element():
    """Memory of a real step, where gathered weights are what there is most of, and what a real one sends."""
    found, c = {}, replace(C, layers=3, embed=128, mlp=512, vocab=64)
    settings = {"remat": "none", "dtype": torch.bfloat16, "reshard": "never"}
    there = Sharding(abstract_mesh(dp=4), RULES["fsdp"])
    for gather in (False, True):
        def make(c, gather=gather):
            return lower(gpt(c), {"layers.*": recipe("tensorwise")}, gather=gather)

        found[gather] = real(c, Sharding(on_cpu(dp=4), RULES["fsdp"]), make=make, **settings)
    assert predicted(c, there, make=make, **settings) == pytest.approx(found[True], rel=0.01)
    seen = explain(make(c), there, batch=BATCH, **settings)
    assert {leaf.path: leaf.compute_bytes for leaf in seen.leaves}["layers.0.mlp.up"] == c.layers * 128 * 512
    mesh, traffic = counted(thread_mesh(dp=4))
    run_once(make(c), Sharding(mesh, RULES["fsdp"]), **settings)
    assert {(row.collective, row.axis): row.bytes for row in seen.collectives} == {
        key: size for key, (_, size) in traffic.counts().items()}
    assert found[False][0] - found[True][0] > 0.035 * found[True][0]  # so that a plan of wide weights would be seen


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.long),
                                   pytest.param("full+offload", marks=pytest.mark.long)])  # fmt: skip
def test_what_a_pipeline_holds_of_each_microbatch_under_way(remat, monkeypatch):
    """Between four and eight microbatches under way; the last stage keeps what its loss sends back, too."""
    read, peaks = 3 * 256 * C.embed * 4, []
    for m in (4, 8):
        monkeypatch.setattr(sys.modules[__name__], "BATCH", (3 * m, 256))
        peaks.append(real(C, SINGLE, pipeline=Pipeline(make_schedule("gpipe", 1, None, m)), remat=remat)[0])
    shape = {"batch": (24, 256), "fields": FIELDS, "microbatches": 8}
    kept = work_of(gpt(C), SINGLE_ABSTRACT, tx, **shape, remat=remat).kept(C.layers)
    assert kept == {"full": C.layers * read, "full+offload": 2 * read}.get(remat, kept)
    assert 3 * read < (peaks[1] - peaks[0]) / 4 - kept < 3.5 * read
    assert (in_flight("gpipe", 4, 1, 4), in_flight("1f1b", 4, 1, 4, 3)) == (4, 1)


def test_what_is_not_kept_is_seen():
    sh = Sharding(abstract_mesh(dp=2), RULES["fsdp"])
    (full, _), (none, _) = predicted(C, sh, remat="full"), predicted(C, sh)
    assert full < 0.7 * none
    assert predicted(C, sh, donate=False)[0] > full


def test_layers_of_two_kinds_repeat_with_their_period():
    c = replace(C, layers=8, window=32, no_window=2)
    assert predicted(c, SINGLE_ABSTRACT) == pytest.approx(real(c, SINGLE), rel=0.03)


def test_the_first_layers_are_a_model():
    part = first_layers(gpt(replace(C, no_rope=(False, True, False, True, False))), 3)
    assert [node.layer for node in part.chain] == [None, 0, 1, 2, None, None]
    assert part.count() == gpt(replace(C, layers=3)).count()


@pytest.mark.parametrize("remat", ["full", pytest.param("full+offload", marks=pytest.mark.long)])
def test_optimizer_state_in_host_memory(remat):
    def there(model):
        return optim.in_host_memory(tx(model))

    sh, settings = Sharding(on_cpu(dp=4), RULES["zero1"]), {"remat": remat, "dtype": torch.bfloat16}
    measured = real(C, sh, there, **settings)
    assert predicted(C, Sharding(abstract_mesh(dp=4), RULES["zero1"]), there, **settings) == pytest.approx(measured, rel=0.03)
    moments = 2 * 4 * gpt(C).count() // 4
    assert measured[1] >= moments and (measured[1] == moments) == (remat == "full")
    assert measured[0] < real(C, sh, tx, **settings)[0] - 0.3 * moments


SINGLE_ABSTRACT = Sharding(abstract_mesh(), RULES["single"])


@pytest.mark.long
@pytest.mark.parametrize("capacity", [None, pytest.param(1.0, marks=pytest.mark.long)])
def test_dense_layers_before_those_with_experts(capacity):
    """As a CPU runs them, one expert after another; the load is as even as a plan takes it to be."""
    c = replace(C, layers=6, moe=Moe(4, 2, mlp=96, shared=32, first_dense=1, capacity=capacity, forced=True), mtp=1)
    assert predicted(c, replace(SINGLE_ABSTRACT, mesh=on_cpu())) == pytest.approx(real(c, SINGLE), rel=0.03)
    assert predicted(c, SINGLE_ABSTRACT)[0] > 1.1 * predicted(c, replace(SINGLE_ABSTRACT, mesh=on_cpu()))[0]  # all rows


def test_kinds_of_layers_repeat_from_somewhere():
    assert _period([0, 1, 1, 1]) == (1, 1) and _period([0, 1, 0, 1, 0]) == (0, 2) and _period([0, 1, 2]) == (0, 3)
