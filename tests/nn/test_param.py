"""Declarations: counts, masks, and initial values that do not know how they are cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron import random
from fmegatron.nn import param
from fmegatron.nn.param import Param, normal, ones, stack, zeros
from fmegatron.sharding import Size

SIZES = {"embed": 6, "heads": 4, "hd": 3, "vocab": Size(10, 8)}
DECLARE = {
    "table": Param("vocab embed", normal(0.5)),
    "layers": {"0": stack({"q": Param("embed heads hd", normal(0.1)), "bias": param.bias("heads hd")}, 5)},
    "norm": Param("embed", ones),
}


def test_counts_leave_pads_out_and_shapes_have_them():
    assert param.count(DECLARE, SIZES) == 10 * 6 + 5 * (6 * 4 * 3 + 4 * 3) + 6
    assert param.shapes(DECLARE, SIZES)["table"] == (16, 6)
    assert param.abstract(DECLARE, SIZES)["layers"]["0"]["q"].shape == (5, 6, 4, 3)
    with pytest.raises(ValueError, match="no size for 'mlp'"):
        param.count({"w": Param("embed mlp", zeros)}, SIZES)


def test_decay_touches_matrices_only():
    mask = param.decay_mask(DECLARE)
    assert mask == {"table": True, "layers": {"0": {"q": True, "bias": False}}, "norm": False}


def test_values_have_their_distribution_and_pads_are_zero():
    big = {"w": Param("vocab embed", normal(0.5))}
    w = param.init(big, {"vocab": Size(3000, 512), "embed": 40}, 0)["w"]
    assert torch.equal(w[3000:], torch.zeros(72, 40))
    assert w[:3000].std().item() == pytest.approx(0.5, rel=0.01)
    assert abs(w[:3000].mean().item()) < 4 * 0.5 / math.sqrt(120000)
    assert w[:3000].unique().numel() > 119_000


@given(st.data())
def test_any_piece_is_a_piece_of_the_whole(data):
    whole = param.init(DECLARE, SIZES, 7)
    key = random.key(7)
    for path, leaf, p in (
        ("table", whole["table"], DECLARE["table"]),
        ("layers.0.q", whole["layers"]["0"]["q"], DECLARE["layers"]["0"]["q"]),
    ):
        cuts = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in leaf.shape]
        index = [torch.tensor(cut) for cut in cuts]
        piece = param.init_leaf(p, path, key, SIZES, index)
        assert torch.equal(piece, leaf[torch.meshgrid(*index, indexing="ij")])


def test_pieces_under_vmap_and_in_small_portions(monkeypatch):
    p, whole = DECLARE["table"], param.init(DECLARE, SIZES, 3)["table"]
    rows, columns = torch.arange(16).reshape(4, 4), torch.arange(6)
    pieces = torch.vmap(lambda r: param.init_leaf(p, "table", random.key(3), SIZES, [r, columns]))(rows)
    assert torch.equal(pieces.reshape(16, 6), whole)
    monkeypatch.setattr(param, "PIECE", 13)
    assert torch.equal(param.init(DECLARE, SIZES, 3)["table"], whole)


def test_values_do_not_depend_on_the_grouping_of_layers():
    one = {"w": Param("embed hd", normal(1.0))}
    together = param.init({"layers": {"0": stack(one, 5)}}, SIZES, 1)["layers"]["0"]["w"]
    apart = param.init({"layers": {"0": stack(one, 2), "2": stack(one, 3)}}, SIZES, 1)["layers"]
    assert torch.equal(together, torch.cat([apart["0"]["w"], apart["2"]["w"]]))
    assert not torch.equal(together[0], together[1])


def test_the_padding_of_the_vocabulary_changes_no_value():
    narrow = param.init(DECLARE, SIZES, 0)["table"][:10]
    wide = param.init(DECLARE, SIZES | {"vocab": Size(10, 64)}, 0)["table"][:10]
    assert torch.equal(narrow, wide)
