"""Cross-entropy against torch's, whole and over a sharded, padded vocabulary (label smoothing there is Megatron-LM's bug)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop

from fmegatron.nn import losses
from fmegatron.nn.losses import Loss
from fmegatron.sharding import RULES, SINGLE, Sharding, Size, shard_map, virtual_mesh

B, S, E, V = 2, 6, 5, 11
OPTIONS = [
    Loss(),
    Loss(smoothing=0.2),
    Loss(z=0.01),
    Loss(smoothing=0.1, z=0.1, softcap=2.0, multiplier=0.3),
]


def batch():
    torch.manual_seed(0)
    h, table = torch.randn(B, S, E, dtype=torch.float64), torch.randn(16, E, dtype=torch.float64)
    table[V:] = 0
    return h, table, torch.randint(0, V, (B, S)), torch.rand(B, S, dtype=torch.float64)


def oracle(loss, h, table, labels, weights):
    x = h @ table[:V].T * loss.multiplier
    x = x if loss.softcap is None else loss.softcap * torch.tanh(x / loss.softcap)
    ce = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=loss.smoothing)
    z = loss.z * torch.logsumexp(x, -1).flatten() ** 2
    return ((ce + z) * weights.flatten()).sum()


@pytest.mark.parametrize("loss", OPTIONS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_terms_and_gradients_equal_torch(loss, tp):
    h, table, labels, weights = batch()
    sh = SINGLE if tp == 1 else Sharding(virtual_mesh(tp=tp), RULES["tp"])
    sh = sh.bind({"vocab": Size(V, 16)})  # on 8 ranks some hold pads only

    def total(sh, h, table, labels, weights):
        return sum(losses.cross_entropy(sh, loss, h, table, labels, weights).values())

    names = ["batch loss_seq embed", "vocab embed", "batch loss_seq", "batch loss_seq"]
    ours = shard_map(total, sh, names, "") if tp > 1 else lambda *x: total(sh, *x)
    value, grads = torch.func.grad_and_value(ours, argnums=(0, 1))(h, table, labels, weights)
    grads, value = (value, grads) if isinstance(value, tuple) else (grads, value)
    wanted, exact = torch.func.grad_and_value(oracle, argnums=(1, 2))(loss, h, table, labels, weights)
    torch.testing.assert_close(value, exact)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_compiled_picks_the_same_logits():
    h, table, labels, weights = batch()
    sh = SINGLE.bind({"vocab": Size(V, 16)})
    run = aot_function(
        lambda h, *rest: losses.cross_entropy(sh, OPTIONS[3], h, *rest), fw_compiler=nop, bw_compiler=nop
    )
    x, y = h.clone().requires_grad_(), h.clone().requires_grad_()
    sum(run(x, table, labels, weights).values()).backward()
    oracle(OPTIONS[3], y, table, labels, weights).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_bf16_logits_are_judged_in_fp32():
    h, table, labels, weights = batch()
    terms = losses.cross_entropy(
        SINGLE.bind({"vocab": Size(V, 16)}), Loss(), h.bfloat16(), table.bfloat16(), labels, weights.float()
    )
    assert terms["ce"].dtype == torch.float32
    torch.testing.assert_close(terms["ce"].double(), oracle(Loss(), h, table, labels, weights), rtol=2e-2, atol=0)
