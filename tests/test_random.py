"""Random values by counter: quality, and the promise that a value depends on (key, index) only."""

from __future__ import annotations

import math

import pytest
import torch

from fmegatron import random

N = 1 << 18
KEYS = ("zero", "far", "named")


def the_key(kind: str) -> torch.Tensor:
    keys = {"zero": random.key(0), "far": random.key(2**40 + 3), "named": random.fold_in(random.key(0), "layers.q")}
    return keys[kind]


def indices(kind: str) -> torch.Tensor:
    near = torch.arange(N)
    return {"near": near, "strided": near * 4096, "far": near + 2**32 - N // 2, "high": (near << 32) + 5}[kind]


def chi_square(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic of equal bins is from its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Correlation in standard deviations of the chance value."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1]) * math.sqrt(x.numel())


def distance(sample: torch.Tensor, cdf) -> float:
    """Kolmogorov-Smirnov: sqrt(n) times the largest distance between distributions; above 1.95 once in a thousand."""
    u, n = cdf(sample.sort().values), sample.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((u - steps[:-1]).max(), (steps[1:] - u).max())) * math.sqrt(n)


@pytest.mark.parametrize("kind", ["near", "strided", "far", "high"])
@pytest.mark.parametrize("name", KEYS)
def test_bytes_are_uniform_and_bits_balanced(name, kind):
    drawn = random.bits(the_key(name), indices(kind))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < 2**32
    for shift in (0, 8, 16, 24):
        assert abs(chi_square(torch.bincount((drawn >> shift) & 255, minlength=256).double())) < 4.5
    pairs = (drawn[:-1] >> 24 << 8) | (drawn[1:] >> 24)  # neighbours together: serial dependence of the high bytes
    assert abs(chi_square(torch.bincount(pairs, minlength=1 << 16).double())) < 4.5


@pytest.mark.parametrize("kind", ["near", "strided", "far", "high"])
def test_moments_and_correlations(kind):
    key, index = random.key(1), indices(kind)
    u = random.uniform(key, index)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert abs(float(u.mean()) - 0.5) * math.sqrt(12 * N) < 4.5
    assert abs(float((u - 0.5).square().mean()) - 1 / 12) * math.sqrt(180 * N) < 4.5
    for lag in (1, 2, 3, 64, 1024):
        assert abs(correlation(u[:-lag], u[lag:])) < 4.5
    folded = [random.fold_in(key, 0), random.fold_in(key, 1), random.fold_in(key, "x")]
    for other in [random.key(2), *folded, key ^ 1, key ^ (1 << 32)]:
        assert abs(correlation(u, random.uniform(other, index))) < 4.5


@pytest.mark.parametrize("what", ["index", "key", "fold"])
def test_one_flipped_bit_flips_half_of_the_bits(what):
    """Avalanche: over every input bit, each output bit flips with probability one half."""
    n = 4096
    keys, index = random.fold_in(random.key(3), torch.arange(n)), random.bits(random.key(4), torch.arange(n)) << 20
    for flipped in range(0, 63 if what == "index" else 62, 3):
        bit = 1 << flipped
        if what == "index":
            change = random.bits(keys, index) ^ random.bits(keys, index ^ bit)
        elif what == "key":
            change = random.bits(keys, index) ^ random.bits(keys ^ bit, index)
        else:
            change = random.fold_in(keys, index) ^ random.fold_in(keys, index ^ bit)
        flips = torch.stack([(change >> b & 1).double().mean() for b in range(63 if what == "fold" else 32)])
        assert (flips - 0.5).abs().max() < 0.05, (what, flipped)
        assert abs(float(flips.mean()) - 0.5) < 0.01, (what, flipped)


def test_normal_is_normal():
    z = random.normal(random.key(5), torch.arange(N))
    assert z.dtype == torch.float64 and torch.isfinite(z).all()
    assert distance(z, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) < 1.95
    moments = torch.stack([z.mean(), z.square().mean() - 1, z.pow(3).mean(), z.pow(4).mean() - 3])
    assert (moments.abs() * math.sqrt(N) / torch.tensor([1, 2, 15, 96]).sqrt() < 4.5).all()
    assert distance(z * 1.02, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) > 1.95  # the test can fail


def test_keys_do_not_collide():
    keys = random.fold_in(random.key(0)[None], torch.arange(1 << 16))
    both = random.fold_in(keys[:256, None], torch.arange(256))
    everything = torch.cat([keys, both.flatten(), random.key(torch.arange(1 << 16))])
    repeated = 256  # keys folded once, again under fold_in(key(0), n): none; key(n) and key(0) are counted once
    assert everything.unique().numel() >= everything.numel() - repeated
    assert (everything >= 0).all()
    one = random.fold_in(random.fold_in(random.key(0), 1), 2)
    two = random.fold_in(random.fold_in(random.key(0), 2), 1)
    assert one != two


def test_values_are_pinned():
    """Checkpoints and papers depend on them: a change of any of these numbers is a new major version."""
    key = random.fold_in(random.key(0), "layers.mlp.up")
    assert int(key) == 2777069422039859433
    assert random.bits(key, torch.tensor([0, 1, 2**32, 2**40 + 7])).tolist() == [783436498, 1833187992, 3254306257, 2773935131]
    assert int(random.key(-1)) == int(random.key(2**64 - 1))


@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.normal])
def test_any_slice_draws_the_same_bits(draw):
    key, index = random.key(6), torch.arange(1 << 14).view(16, 32, 32) + 2**33
    whole = draw(key, index)
    for part in [(slice(3, 5),), (slice(None), slice(7, 9)), (..., slice(1, None, 3)), (5, 6, 7), (slice(0, 1), 3)]:
        assert torch.equal(draw(key, index[part].contiguous()), whole[part])
        assert torch.equal(draw(key, index[part]), whole[part])
    assert torch.equal(draw(key, index.permute(2, 0, 1)), whole.permute(2, 0, 1))
    flat = whole.flatten()
    for start in range(0, 40, 3):  # every alignment and length of a vector register's tail
        assert torch.equal(draw(key, index.flatten()[start : start + 37 + start]), flat[start : start + 37 + start])


@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.normal, random.fold_in])
def test_vmap_over_keys_and_indices(draw):
    keys, index = random.fold_in(random.key(7)[None], torch.arange(4)), torch.arange(28).view(4, 7) * 2**31
    both = torch.stack([draw(k, i) for k, i in zip(keys, index, strict=True)])
    assert torch.equal(torch.vmap(draw)(keys, index), both)
    assert torch.equal(torch.vmap(draw, (0, None))(keys, index[0]), torch.stack([draw(k, index[0]) for k in keys]))
    assert torch.equal(torch.vmap(draw, (None, 1))(keys[0], index), torch.stack([draw(keys[0], i) for i in index.T]))
    names = torch.vmap(lambda k: random.fold_in(random.fold_in(k, "a"), 3))(keys)
    assert torch.equal(names, torch.stack([random.fold_in(random.fold_in(k, "a"), 3) for k in keys]))


def coordinates(batch: int, seq: int, feature: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(batch)[:, None, None], torch.arange(seq)[:, None], torch.arange(feature)


def test_dropout_keeps_the_mean_and_its_own_elements():
    x, key = torch.ones(8, 64, 96), random.key(8)
    where = coordinates(8, 64, 96)
    out = random.dropout(x, 0.1, key, where)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) * (1 / 0.9))}
    kept = (out != 0).double()
    assert abs(float(kept.mean()) - 0.9) < 4.5 * math.sqrt(0.09 / x.numel())
    for dims in [(0, 1), (0, 2), (1, 2)]:  # no row, column or sample is special
        share = kept.mean(dims)
        assert (share - 0.9).abs().max() < 5 * math.sqrt(0.09 * share.numel() / x.numel())
    part = random.dropout(x[2:5, 8:9], 0.1, key, (where[0][2:5], where[1][8:9], where[2]))
    assert torch.equal(part, out[2:5, 8:9])
    flat = random.dropout(x, 0.1, key, torch.arange(x.numel()).view_as(x))
    assert not torch.equal(flat, out) and abs(float((flat != 0).double().mean()) - 0.9) < 0.01
    assert random.dropout(x, 0.0, key, where) is x
    with pytest.raises(ValueError, match="1.5"):
        random.dropout(x, 1.5, key, where)


def test_dropout_gradient_is_the_mask():
    x = torch.randn(3, 4, 5, requires_grad=True)
    out = random.dropout(x, 0.5, random.key(9), coordinates(3, 4, 5))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, (out != 0) * 2.0)
    per_sample = torch.vmap(lambda x, s: random.dropout(x, 0.5, random.key(9), (s, *coordinates(3, 4, 5)[1:])))
    assert torch.equal(per_sample(x, torch.arange(3)[:, None, None])[:, 0], out) or torch.equal(
        per_sample(x, torch.arange(3)), out)


def test_compiled_draws_the_same_bits():
    def draw(x, key, index, where):
        return random.bits(key, index), random.uniform(key, index), random.dropout(x, 0.3, key, where)

    x, key = torch.randn(3, 5, 40), random.key(10)
    args = (x, key, torch.arange(1000) + 2**32 - 500, coordinates(3, 5, 40))
    compiled = torch.compile(draw, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), draw(*args), strict=True))
