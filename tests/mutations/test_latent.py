"""Planted bugs of latent attention, of multi-token prediction, of sinks: the property that is there to see each sees it."""

from __future__ import annotations

import pytest
import torch
from pieces import batches

from fmegatron import tree
from fmegatron.models import mtp
from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, Sharding, virtual_mesh
from fmegatron.testing import assert_mesh_invariant
from fmegatron.train import state

torch.set_num_threads(1)


def batch():
    return next(batches(1, rows=4, vocab=24, seed=1))


def check(rules, mesh, **more):
    """What the properties assert, on one sharding."""
    config = Config(**{"layers": 1, "embed": 16, "heads": 4, "mlp": 16, "vocab": 24} | more)
    assert_mesh_invariant(gpt(config), batch(), [Sharding(virtual_mesh(**mesh), RULES[rules])])


LATENT = {"hd": 8, "kv_lora": 6, "rope_hd": 4}


@pytest.mark.parametrize("rules", ["tp", "tp_sp"])
def test_a_shared_rope_key_whose_gradient_is_not_reduced(rules, monkeypatch):
    """Each rank's cotangent of the one key is of its own heads; here the first rank's is taken for all."""
    case = {"rules": rules, "mesh": {"tp": 2}, **LATENT}
    check(**case)
    right = Sharding.align

    def align(self, x, names, within):
        y = right(self, x, names, within)
        if "rope_hd" not in names or self.rank is None:
            return y
        first = (self.mesh["tp"].coordinate(self.rank) == 0).to(y.dtype)
        return y * first + (y * (1 - first)).detach()

    monkeypatch.setattr(Sharding, "align", align)
    with pytest.raises(AssertionError, match=r"leaves differ[\s\S]*kv_down"):
        check(**case)


def test_a_loss_ahead_that_is_normalised_locally(monkeypatch):
    """Each rank divides by its own count of tokens that have one ahead, and the ranks are averaged."""
    case = {"rules": "fsdp", "mesh": {"dp": 2}, "mtp": 1}
    check(**case)
    right = mtp.judge

    def judge(c, k, sh, p, v, key):
        own, ranks = v[f"out.weights.{k}"].sum(), 2 if sh.mesh.axes else 1
        whole = sh.reduce("batch loss_seq -> loss_seq", v[f"out.weights.{k}"], "sum").sum()
        return {name: x * whole / own / ranks for name, x in right(c, k, sh, p, v, key).items()}

    monkeypatch.setattr(mtp, "judge", judge)
    with pytest.raises(AssertionError, match="loss.mtp_1"):
        check(**case)


def test_a_shift_inside_each_shard(monkeypatch):
    """Tokens ahead are looked for in a rank's own piece of the sequence: its last ones have none."""
    case = {"rules": "fsdp", "mesh": {"cp": 2}, "mtp": 1}
    check(**case)
    monkeypatch.setattr(mtp, "in_order", lambda sh, x, v: x)
    monkeypatch.setattr(mtp, "in_place", lambda sh, x, v: x)
    with pytest.raises(AssertionError, match="node 3"):
        check(**case)


def test_sinks_left_out_of_the_clip_norm(monkeypatch):
    """They belong to attention's core, not to a projection: a sum over projections forgets them."""
    case = {"rules": "tp", "mesh": {"tp": 2}, "sink": "learned"}
    check(**case)
    right = state.Over.norm

    def norm(self, grads):
        without = tree.map_with_path(lambda path, x: x * (not path.endswith("sink")), grads)
        return right(self, without if self.sh.mesh.axes else grads)

    monkeypatch.setattr(state.Over, "norm", norm)
    with pytest.raises(AssertionError, match="gradient norm"):
        check(**case)
