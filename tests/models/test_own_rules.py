"""Rules of one's own: any order in which names take an axis gives the loss of one device."""

from __future__ import annotations

import pytest
import torch

from fmegatron import tree
from fmegatron.models import Config, gpt
from fmegatron.sharding import SINGLE, Rules, Sharding, shard_map, virtual_mesh

MODEL = gpt(Config(layers=1, embed=16, heads=4, kv=2, mlp=24, vocab=32))
NAMES = tree.map(lambda param: param.names, MODEL.declare)


def loss(sh: Sharding, ranks: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 32, (ranks, 8), generator=generator) for _ in range(2))
    weights = torch.rand(ranks, 8, generator=generator, dtype=torch.float64)

    def local(here, params, tokens, labels, weights):
        batch = {"tokens": tokens, "labels": labels, "weights": weights}
        return MODEL.loss(params, batch, sh=here)[0]["ce"][0]

    mapped = shard_map(local, sh.bind(MODEL.sizes), [NAMES, *["batch seq"] * 3], "")
    return mapped(MODEL.init(0, torch.float64), tokens, labels, weights)


@pytest.mark.parametrize(
    "lines", [[("vocab", "tp"), ("batch", "tp")], [("batch", "tp"), ("vocab", "tp")], [("vocab", "tp"), ("loss_seq", "tp")]]
)
def test_vocab_may_share_an_axis_with_what_the_labels_have(lines):
    # one sample a rank: a label that is not brought to its logits would broadcast, or fail
    sharded = loss(Sharding(virtual_mesh(tp=4), Rules(compute=lines)))
    torch.testing.assert_close(sharded, loss(SINGLE), rtol=1e-12, atol=0)
