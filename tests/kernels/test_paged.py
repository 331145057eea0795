"""Pages of keys and values: appending, and decoding against plain attention over the same tokens."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE

from fmegatron.kernels import paged

pytest.importorskip("triton")
LENGTHS = [0, 1, 7, 16, 23]  # pages of 8: none, part of one, several, full ones
PAGE, KV, HD = 8, 2, 12


def pool(dtype, group, seed=0):
    """Random pools, a table with the pages of each sequence in disorder, queries."""
    torch.manual_seed(seed)
    keys, values = (torch.randn(20, PAGE, KV, HD, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    table = torch.randperm(20)[: len(LENGTHS) * 3].reshape(-1, 3).to(DEVICE, torch.int32)
    q = torch.randn(len(LENGTHS), KV * group, HD, dtype=torch.float64).to(DEVICE, dtype)
    return q, keys, values, table, torch.tensor(LENGTHS, device=DEVICE)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("options", [{}, {"window": 5, "softcap": 2.0, "sink": True}], ids=["plain", "full"])
def test_decode(dtype, tolerance, options):
    q, keys, values, table, lengths = pool(dtype, 3)
    options = {**options, "scale": HD**-0.5}
    if options.get("sink"):
        options["sink"] = torch.randn(q.shape[1], device=DEVICE)
    got = paged.decode(q, keys, values, table, lengths, form="triton", **options)
    want = paged.decode(q.double(), keys.double(), values.double(), table, lengths, **options)
    assert got.dtype == dtype and float((got.double() - want).abs().max()) < tolerance * float(want.abs().max())
    assert not got[0].any()  # of no tokens


def test_decode_is_attention():
    """Torch's own attention over each sequence's tokens."""
    q, keys, values, table, lengths = pool(torch.float64, 2)
    got = paged.decode(q, keys, values, table, lengths, scale=0.3, form="triton")
    for b, length in enumerate(LENGTHS[1:], 1):
        k, v = (x[table[b].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (keys, values))
        want = torch.nn.functional.scaled_dot_product_attention(q[b][None, :, None], k, v, scale=0.3, enable_gqa=True)
        assert torch.allclose(got[b], want[0, :, 0], rtol=1e-12, atol=1e-12)


def test_other_pages_do_not_matter():
    """What lies behind a sequence's end, and in pages of others, may be anything."""
    q, keys, values, table, lengths = pool(torch.float32, 1)
    want = paged.decode(q, keys, values, table, lengths, scale=0.3, form="triton")
    mine = torch.zeros(20, PAGE, dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            mine[int(table[b, t // PAGE]), t % PAGE] = True
    for x in (keys, values):
        x[~mine] = float("nan")
    assert torch.equal(paged.decode(q, keys, values, table, lengths, scale=0.3, form="triton"), want)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_append(form):
    _, *drawn = pool(torch.float32, 1)[:3]
    guarded = [torch.cat((x[:1], x)) for x in drawn]  # what lies before a pool is somebody else's
    keys, values = (x[1:] for x in guarded)
    before, slots = (keys.clone(), values.clone()), torch.tensor([3, -1, 150, 17], device=DEVICE)
    k, v = (torch.randn(4, 2 * KV, HD, device=DEVICE)[:, ::2] for _ in range(2))
    paged.append(keys, values, k, v, slots, form=form)
    for pool_, old, new in ((keys, before[0], k), (values, before[1], v)):
        flat, was = pool_.view(-1, KV, HD), old.view(-1, KV, HD)
        assert torch.equal(flat[slots[slots >= 0]], new[slots >= 0])
        rest = torch.ones(len(flat), dtype=torch.bool)
        rest[slots[slots >= 0].cpu()] = False
        assert torch.equal(flat[rest], was[rest])
    assert all(torch.equal(x[0], old[0]) for x, old in zip(guarded, before, strict=True))
