"""Attention against a loop over queries, fused and not; masks, sinks, groups and dropout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fmegatron.nn.attention import Attention
from fmegatron.nn.core import attend, see

SCALE = 0.3
PLAIN = Attention(scale=SCALE)


def qkv(heads=4, kv=2, seq=7, keys=7):
    torch.manual_seed(0)
    shapes = ((2, seq, heads, 4), (2, keys, kv, 4), (2, keys, kv, 4))
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def loop(q, k, v, sees, softcap=None, extra=None):
    """softmax over the keys that `sees(i, j)`, one query at a time."""
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                js = [j for j in range(k.shape[1]) if sees(b, i, j)]
                x = SCALE * k[b, js, g] @ q[b, i, h]
                x = x if softcap is None else softcap * torch.tanh(x / softcap)
                e = x.exp()
                below = e.sum() + (0 if extra is None else math.exp(extra[h]))
                y[b, i, h] = (e / below) @ v[b, js, g]
    return y


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("transformed", [False, True])
def test_causal_grouped(kv, transformed):
    q, k, v = qkv(kv=kv)
    run = (
        torch.vmap(lambda q, k, v: attend(PLAIN, q[None], k[None], v[None])[0]) if transformed else lambda *x: attend(PLAIN, *x)
    )
    torch.testing.assert_close(run(q, k, v), loop(q, k, v, lambda b, i, j: j <= i))


def test_window_documents_and_order():
    q, k, v = qkv()
    places = torch.arange(7)[None]
    torch.testing.assert_close(
        attend(PLAIN, q, k, v, see(places, places, 3)[:, None]), loop(q, k, v, lambda b, i, j: i - 3 < j <= i)
    )
    order = torch.tensor([[0, 1, 6, 2, 5, 4, 3], [6, 5, 4, 3, 2, 1, 0]])
    torch.testing.assert_close(
        attend(PLAIN, q, k, v, see(order, order, None)[:, None]), loop(q, k, v, lambda b, i, j: order[b, j] <= order[b, i])
    )


def test_queries_at_given_places_over_cached_keys():
    q, k, v = qkv(seq=2)
    mask = see(torch.tensor([[3, 6]]), torch.arange(7)[None], None)[:, None]
    torch.testing.assert_close(attend(PLAIN, q, k, v, mask), loop(q, k, v, lambda b, i, j: j <= (3, 6)[i]))


def test_softcap_sinks_and_layer_scaling():
    q, k, v = qkv()

    def causal(b, i, j):
        return j <= i

    torch.testing.assert_close(attend(replace(PLAIN, softcap=0.5), q, k, v), loop(q, k, v, causal, softcap=0.5))
    torch.testing.assert_close(attend(replace(PLAIN, sink="one"), q, k, v), loop(q, k, v, causal, extra=[0.0] * 4))
    sink = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        attend(replace(PLAIN, sink="learned"), q, k, v, sink=sink), loop(q, k, v, causal, extra=sink.tolist())
    )
    torch.testing.assert_close(
        attend(replace(PLAIN, sink="one", undo=7.0), q, k, v), attend(replace(PLAIN, sink="one"), q, k, v)
    )
    torch.testing.assert_close(attend(replace(PLAIN, causal=False), q, k, v), loop(q, k, v, lambda b, i, j: True))


def test_second_derivatives_forward_over_reverse_and_reverse_over_reverse():
    q, k, v = qkv()

    def f(q):
        return attend(PLAIN, q, k, v).sin().sum()

    grad, direction = torch.func.grad(f), torch.randn_like(q)
    forward = torch.func.jvp(grad, (q,), (direction,))[1]
    reverse = torch.func.grad(lambda q: (grad(q) * direction).sum())(q)
    torch.testing.assert_close(forward, reverse)
    step = 1e-6 * direction
    torch.testing.assert_close(forward, (grad(q + step) - grad(q - step)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_dropped_weights_are_zero_or_scaled_and_keyed_by_index():
    q, k, v = qkv(heads=2, kv=2)
    attn = replace(PLAIN, dropout=0.4)
    rows, columns = torch.arange(2 * 2 * 7).reshape(2, 2, 7, 1) * 1_000_003, torch.arange(7)[None, None, None]
    eye = torch.eye(7, dtype=torch.float64)[None, :, None].expand(2, 7, 2, 7)  # values that show the weights
    dropped = attend(attn, q, k, eye, rows=rows, columns=columns)
    plain = attend(PLAIN, q, k, eye)
    ratio = dropped[plain > 0] / plain[plain > 0]
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.6))
    assert 0.4 < kept.double().mean() < 0.8
    part = attend(
        attn,
        q[:, 3:],
        k,
        eye,
        see(torch.arange(3, 7)[None], torch.arange(7)[None], None)[:, None],
        rows=rows[:, :, 3:],
        columns=columns,
    )
    torch.testing.assert_close(part, dropped[:, 3:])
