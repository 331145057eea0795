"""Bugs that mixtures of experts have had, planted: each is seen by what is there to see it, see test_mutations.py."""

from __future__ import annotations

import pytest
import torch

from fmegatron import optim
from fmegatron.models import Config, gpt
from fmegatron.nn import dispatch, losses, router
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, virtual_mesh
from fmegatron.sharding.collectives import AllGather
from fmegatron.sharding.relayout import run
from fmegatron.testing import assert_mesh_invariant
from fmegatron.train import chain, state
from fmegatron.train.state import init
from fmegatron.train.step import make_step

BLOCK = Moe(experts=4, top_k=2, mlp=8, score="sigmoid", sequence_loss=0.1, balance_bias=True, bias_rate=0.1)
CONFIG = Config(layers=2, embed=16, heads=4, kv=2, mlp=16, vocab=24, sink="learned", moe=BLOCK)


def batch():
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 24, (4, 8), generator=g)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "weights": torch.rand(4, 8, generator=g, dtype=torch.float64)}


def on(rules, **mesh):
    """One device's values, on a mesh."""
    return lambda: assert_mesh_invariant(gpt(CONFIG), batch(), [Sharding(virtual_mesh(**mesh), RULES[rules])])


def differences():
    """The router's gradient is that of differences."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 5), (5, 4)))
    sh, balance = SINGLE.bind({"embed": 5, "router_expert": 4}), torch.zeros(4)
    p = {"weight": w, "balance": balance}
    fn = lambda w: sum(router.apply(sh, BLOCK, {**p, "weight": w}, x.detach(), {}, None).terms.values())  # noqa: E731
    assert torch.autograd.gradcheck(fn, (w,), eps=1e-7, atol=1e-6, raise_exception=False), "differences differ"


def one_move_a_step():
    """Choices are counted once a step, and move the bias once, whatever runs again."""
    given = {**batch(), "weights": torch.ones(4, 8)}
    model, tx = gpt(CONFIG), optim.sgd(0.0)
    for settings in ({}, {"remat": "full"}, {"remat": "every-2", "microbatches": 2}):
        new, metrics = make_step(model, tx, SINGLE, **settings)(init(model, tx, SINGLE), given)
        load = metrics["tap.sum.experts/01.load"]
        assert load.sum() == 32 * 2, f"counted {load.sum():.0f} choices of 64"
        assert (new.params["layers"]["0"]["mlp"]["router"]["balance"][0].abs() <= 0.1).all()


def lost_gradient(patch):
    """The balance loss is in the total, and its gradient is not: attached to a tensor that was detached."""
    right = router.losses
    patch.setattr(router, "losses", lambda sh, r, logits, shares, before: right(sh, r, logits.detach(), shares.detach()))


def counted_again(patch):
    """What a layer counts is counted once more when it is computed again."""
    right = chain.forward

    def forward(node, step, values, moving, again=False, kept=False):
        return right(node, step, values, moving, kept=kept)

    patch.setattr(chain, "forward", forward)


def gathered_logits(patch):
    """The head gives whole logits to a loss that takes them for this rank's part of the vocabulary."""
    right = losses.logits

    def logits(sh, loss, h, table):
        x = right(sh, loss, h, table)
        return run(x, sh.rank, [AllGather(sh.mesh["tp"], 2)]) if sh.mesh.axes else x

    patch.setattr(losses, "logits", logits)


def sinks_left_out(patch):
    """The norm by which gradients are clipped does not see the sinks."""
    right = state.Over.norm

    def norm(self, grads):
        if not self.sh.mesh.axes:
            return right(self, grads)
        kept = {**grads["layers"]["0"]["attn"], "sink": 0 * grads["layers"]["0"]["attn"]["sink"]}
        return right(self, {**grads, "layers": {"0": {**grads["layers"]["0"], "attn": kept}}})

    patch.setattr(state.Over, "norm", norm)


def experts_by_the_wrong_rank(patch):
    """Rows come back in the order in which they went, not in that of their slots."""
    right = dispatch.back
    patch.setattr(dispatch, "back", lambda ops: right(ops) if len(ops) != 1 else ops)


def weights_forgotten(patch):
    """Results of a token's experts are added up without their weights."""
    right = dispatch.unpermute
    patch.setattr(dispatch, "unpermute", lambda rows, slot, weight, **form: right(rows, slot, torch.ones_like(weight), **form))


BUGS = [  # bug, what must see it, what it says
    (lost_gradient, differences, "differences"),
    (counted_again, one_move_a_step, "choices of 64"),
    (gathered_logits, on("tp", tp=2), "node"),
    (sinks_left_out, on("ddp", dp=2), "gradient norm"),
    (experts_by_the_wrong_rank, on("ddp", ep=2), "differ|size|shape"),
    (weights_forgotten, on("ddp", ep=2), "differ"),
]


@pytest.mark.parametrize("bug, check, message", BUGS, ids=[bug.__name__ for bug, *_ in BUGS])
def test_a_planted_bug_is_seen(bug, check, message, monkeypatch):
    check()  # sound without it
    with monkeypatch.context() as patch:
        bug(patch)
        with pytest.raises((AssertionError, RuntimeError), match=message):
            check()
