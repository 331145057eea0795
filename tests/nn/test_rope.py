"""Rotations: scores see differences of positions only; the two orders of pairs are one rotation."""

from __future__ import annotations

import pytest
import torch

from fmegatron.nn import rope
from fmegatron.nn.rope import Llama3Scaling, Rope, Yarn


def turn(r, x, positions):
    return rope.rotate(r, x, *rope.tables(r, x.shape[-1], positions))


@pytest.mark.parametrize(
    "r", [Rope(), Rope(interleaved=True), Rope(fraction=0.5), Rope(interpolation=4.0), Rope(scaling=Llama3Scaling(context=32)),
     Rope(scaling=Yarn(context=16, fast=1.0, slow=0.1))]
)
def test_scores_depend_on_differences(r):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    places = torch.tensor([[0], [5], [40]])

    def score(i, j):
        return (turn(r, q, i[None]) * turn(r, k, j[None])).sum()

    for shift in places:
        torch.testing.assert_close(score(places[1] + shift, shift), score(places[1], places[0]), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(places[2], places[0]), score(places[0], places[0]), rtol=1e-4)


def test_interleaved_is_a_permutation_of_halves():
    x, positions = torch.randn(2, 5, 3, 8), torch.arange(5)[None]
    order = torch.arange(8).reshape(4, 2).T.flatten()  # features 0 2 4 6 1 3 5 7
    torch.testing.assert_close(turn(Rope(), x[..., order], positions), turn(Rope(interleaved=True), x, positions)[..., order])


def test_a_fraction_leaves_the_rest_and_lengths_alone():
    x = torch.randn(1, 4, 2, 12)
    y = turn(Rope(fraction=1 / 3), x, torch.arange(4)[None])
    assert torch.equal(y[..., 4:], x[..., 4:]) and not torch.equal(y[..., :4], x[..., :4])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_interpolation_divides_positions():
    x = torch.randn(1, 3, 1, 8)
    torch.testing.assert_close(
        turn(Rope(interpolation=2.0), x, torch.tensor([[0, 2, 8]])), turn(Rope(), x, torch.tensor([[0, 1, 4]]))
    )


def test_bf16_is_turned_in_fp32():
    x, positions = torch.randn(1, 1, 1, 64, dtype=torch.bfloat16), torch.tensor([[4095]])
    y, exact = turn(Rope(), x, positions), turn(Rope(), x.double(), positions)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding, at the end


@pytest.mark.parametrize("yarn", [
    Yarn(32.0, 64, truncate=False), Yarn(40.0, 4096, mscale=0.707, mscale_all=0.8),
    Yarn(4.0, 256, fast=8.0, attention_factor=1.5), Yarn(40.0, 4096, mscale=1.0, mscale_all=1.0),
    Yarn(2.0, 8, fast=1.0, slow=0.9),
])
def test_yarn_is_transformers_own(yarn):
    transformers = pytest.importorskip("transformers")
    given = {"rope_type": "yarn", "rope_theta": 500.0, "factor": yarn.factor, "original_max_position_embeddings": yarn.context}
    given |= {"beta_fast": yarn.fast, "beta_slow": yarn.slow, "truncate": yarn.truncate, "mscale": yarn.mscale,
              "mscale_all_dim": yarn.mscale_all, "attention_factor": yarn.attention_factor}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=given)
    wanted, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = Rope(500.0, scaling=yarn)
    torch.testing.assert_close(rope.frequencies(ours, 64, torch.zeros(1)), wanted)
    cos, _ = rope.tables(ours, 64, torch.zeros(1, 1))
    torch.testing.assert_close(cos, torch.full_like(cos, factor))
