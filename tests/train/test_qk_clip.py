"""QK-Clip: after a step no head's scores exceed the threshold, on any mesh and form of context parallelism."""

from __future__ import annotations

import pytest
import torch

from fmegatron import optim
from fmegatron.models.gpt import Config, gpt
from fmegatron.optim import qk_clip
from fmegatron.sharding import RULES, SINGLE, Sharding, shard, virtual_mesh
from fmegatron.testing.invariance import NAMES, whole_leaves
from fmegatron.train.planned import plan_step
from fmegatron.train.precision import Precision
from fmegatron.train.state import init
from fmegatron.train.step import make_step

torch.set_num_threads(1)
THRESHOLD = 0.02


def model(**more):
    sizes = {"layers": 3, "embed": 16, "heads": 4, "kv": 2, "mlp": 16, "vocab": 21, "vocab_pad": 8, "init_std": 0.3}
    return gpt(Config(**{**sizes, "qk_clip": THRESHOLD, "attention_bias": True, "no_rope": 2, **more}))


def train(net, sh, tx, steps=2, dtype=torch.float64, **settings):
    """(whole parameters, each step's largest scores [layers, heads])."""
    g = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 21, (4, 8), generator=g) for _ in range(2))
    batch = {"tokens": tokens, "labels": labels, "weights": torch.rand(4, 8, generator=g, dtype=torch.float64)}
    plan, state = plan_step(net, sh, **settings), init(net, tx, sh, key=0, dtype=dtype)
    step, found = make_step(net, tx, sh, **settings), []
    for _ in range(steps):
        state, metrics = step(state, {name: shard(plan.sh, x, NAMES[name]) for name, x in batch.items()})
        tops = [x for name, x in sorted(metrics.items()) if name.endswith(".max_logits")]
        found += [torch.stack([x[0] if sh.mesh.stacked else x for x in tops])] if tops else []
    return whole_leaves(plan, state.params, "storage"), found


def test_heads_come_back_to_the_threshold_and_others_stay():
    """At a rate of zero nothing else moves, so the second step of one layer sees what the first one made."""
    sizes = {"kv": 4, "layers": 1, "no_rope": 0}
    _, (scores,) = train(model(**sizes, qk_clip=1e9), SINGLE, optim.sgd(0.0), steps=1)
    most = float(scores.median())
    before, _ = train(model(**sizes, qk_clip=None), SINGLE, optim.sgd(0.0), steps=1)
    after, _ = train(model(**sizes, qk_clip=most), SINGLE, optim.sgd(0.0), steps=1)
    _, (first, second) = train(model(**sizes, qk_clip=most), SINGLE, optim.sgd(0.0))
    large = first > most
    assert torch.equal(first, scores) and large.any() and not large.all()
    torch.testing.assert_close(second[large], torch.full_like(second[large], most), rtol=1e-9, atol=0)
    torch.testing.assert_close(second[~large], first[~large], rtol=1e-12, atol=0)
    q, k = qk_clip(before["layers.0.attn.q"], before["layers.0.attn.k"], first, most)
    torch.testing.assert_close((after["layers.0.attn.q"], after["layers.0.attn.k"]), (q, k), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rules, sizes, settings", [
    ("fsdp_tp_sp", {"dp": 2, "tp": 2}, {"microbatches": 2}), ("cp_ring", {"cp": 2}, {}), ("cp_ulysses", {"cp": 2}, {}),
    ("zero1", {"dp": 2}, {"remat": "full"})])
def test_any_mesh_clips_alike(rules, sizes, settings):
    tx = optim.sgd(0.1)
    expected, tops = train(model(), SINGLE, tx)
    assert all((t > THRESHOLD).any() for t in tops)
    got, seen = train(model(), Sharding(virtual_mesh(**sizes), RULES[rules]), tx, **settings)
    torch.testing.assert_close(torch.stack(seen), torch.stack(tops), rtol=1e-9, atol=1e-12)
    for path, x in expected.items():
        torch.testing.assert_close(got[path], x, rtol=1e-8, atol=1e-11, msg=path)


def test_parameters_in_halves_are_clipped_too():
    net, tx, precision = model(kv=4, layers=1, no_rope=0, attention_bias=False), optim.sgd(0.0), Precision(remainder=True)
    state = init(net, tx, SINGLE, precision=precision)
    step = make_step(net, tx, SINGLE, dtype=torch.bfloat16, precision=precision)
    batch, tops = {"tokens": torch.arange(32).reshape(4, 8) % 21}, []
    for _ in range(2):
        state, metrics = step(state, batch)
        tops.append(torch.stack([x for name, x in metrics.items() if name.endswith(".max_logits")]))
    large = tops[0] > THRESHOLD
    assert large.any() and (tops[1][large] < 1.1 * THRESHOLD).all()


def test_what_undoes_it_is_refused():
    with pytest.raises(ValueError, match="qk_clip = 0.02: above 0, and without qk_norm"):
        model(qk_norm="norm")
