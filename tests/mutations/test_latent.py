"""Planted bugs of latent attention and of multi-token prediction: the property that is there to see each sees it."""

from __future__ import annotations

import pytest
import torch

from fmegatron.models.gpt import Config, gpt
from fmegatron.sharding import RULES, Sharding, virtual_mesh
from fmegatron.testing import assert_mesh_invariant

torch.set_num_threads(1)


def batch(rows=4, length=8, vocab=24):
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, vocab, (rows, length), generator=generator) for _ in range(2))
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return {"tokens": tokens, "labels": labels, "weights": weights}


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
