"""einsum, reduce, lookup, groups, align, index, total: on any mesh what plain torch gives on one device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmegatron.sharding import RULES, SINGLE, Sharding, Size, shard, shard_map, spmd, unshard, virtual_mesh
from fmegatron.sharding.rules import Rules
from fmegatron.testing import assert_placement, assert_trees_all_close, assert_trees_all_equal

torch.set_num_threads(1)
NAMES = ("a", "b", "c", "d", "e")
AXES = {"p": 2, "q": 2, "r": 1}


@st.composite
def rules(draw):
    """Any names over any axes of the mesh, in any order."""
    lines = []
    for name in draw(st.permutations(NAMES)):
        axes = draw(st.permutations(tuple(AXES)))[: draw(st.integers(0, 2))]
        lines += [(name, tuple(axes))] if axes else []
    rest = tuple(axis for axis in AXES if axis not in {a for _, axes in lines for a in axes})
    return Rules(compute=(*lines, ("other", rest)) if rest else tuple(lines))


@st.composite
def patterns(draw):
    """x, w -> out: contracted, shared and own names of each operand, in any order."""
    role = {name: draw(st.sampled_from(("contracted", "x", "w", "both"))) for name in NAMES}
    x = draw(st.permutations([n for n in NAMES if role[n] in ("contracted", "x", "both")]))
    w = draw(st.permutations([n for n in NAMES if role[n] in ("contracted", "w", "both")]))
    out = draw(st.permutations([n for n in NAMES if role[n] != "contracted"]))
    return tuple(x), tuple(w), tuple(out)


@given(rules(), patterns(), st.integers(0, 999))
def test_einsum_is_torch_einsum(lists, pattern, seed):
    x, w, out = pattern
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn([4] * len(names), generator=generator, dtype=torch.float64) for names in (x, w))
    plain = f"{''.join(x)},{''.join(w)}->{''.join(out)}"
    sh = Sharding(virtual_mesh(**AXES), lists)
    text = f"{' '.join(x)}, {' '.join(w)} -> {' '.join(out)}"

    def run(here, x, w):
        return here.einsum(text, x, w)

    def product(left, right):
        if not out:  # a scalar output is a value that all ranks hold
            return spmd(sh, run)(shard(sh, left, " ".join(x)), shard(sh, right, " ".join(w)))[0]
        return shard_map(run, sh, [" ".join(x), " ".join(w)], " ".join(out))(left, right)

    expected = torch.einsum(plain, left, right)
    assert_trees_all_close({"product": product(left, right)}, {"product": expected}, 1e-13)
    assert_trees_all_close({"single": SINGLE.einsum(text, left, right)}, {"single": expected}, 1e-13)
    ct = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    mine = torch.func.vjp(product, left, right)[1](ct)
    theirs = torch.func.vjp(lambda x, w: torch.einsum(plain, x, w), left, right)[1](ct)
    assert_trees_all_close(list(mine), list(theirs), 1e-13)


@given(rules(), st.permutations(NAMES[:4]), st.integers(0, 3), st.sampled_from(("sum", "max", "logsumexp")), st.integers(0, 99))
def test_reduce_is_torch_reduce(lists, names, kept, op, seed):
    out = tuple(names[:kept])
    order = [n for n in names if n in out]
    x = 100 * torch.randn([4] * 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sh = Sharding(virtual_mesh(**AXES), lists)
    text, dims = f"{' '.join(names)} -> {' '.join(order)}", tuple(i for i, n in enumerate(names) if n not in out)
    local = spmd(sh, lambda here, x: here.reduce(text, x, op))(shard(sh, x, " ".join(names)))
    expected = {"sum": x.sum(dims), "max": x.amax(dims), "logsumexp": x.logsumexp(dims)}[op]
    assert_trees_all_close({op: unshard(sh, local, " ".join(order))}, {op: expected}, 1e-12)
    assert_trees_all_close({op: SINGLE.reduce(text, x, op)}, {op: expected}, 1e-12)


@given(rules(), st.integers(0, 99))
def test_lookup_align_relayout_index_and_total(lists, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, table = torch.randint(0, 8, (4, 4), generator=generator), torch.randn(8, 4, generator=generator, dtype=torch.float64)
    sh = Sharding(virtual_mesh(**AXES), lists)

    def program(here, ids, table):
        rows = here.lookup("a b, c d -> a b d", ids, table)
        index = here.index("a", "a b d", rows) + 0 * here.rank
        return rows, here.align(ids, "a b", within="b c a"), here.total(rows, "a b d"), index

    rows, aligned, total, index = spmd(sh, program)(shard(sh, ids, "a b"), shard(sh, table, "c d"))
    assert_trees_all_equal({"rows": unshard(sh, rows, "a b d")}, {"rows": table[ids]})
    assert torch.allclose(total.sum(), table[ids].sum(), rtol=1e-13)
    place, sized = sh.placement("a b d"), sh.bind({"a": 4, "b": 4, "d": 4})
    assert_placement(sized, rows, "a b d")
    whole = torch.arange(4)[:, None, None].expand(4, 4, 4)
    assert torch.equal(index, shard(sh, whole, "a b d")[:, :, 0, 0]), place
    inside = shard(sh, ids.t()[:, None, :].expand(4, 4, 4), "b c a")[:, :, 0, :].transpose(1, 2)
    assert torch.equal(aligned, inside)


GROUPS = "batch kv_seq kv hd -> batch kv_seq heads hd"
HEADS = [(8, 8, 4), (8, 4, 4), (8, 2, 4), (8, 1, 4), (4, 2, 4), (6, 3, 2), (6, 2, 3), (12, 3, 4), (12, 4, 6)]


@pytest.mark.parametrize("heads, kv, tp", HEADS)
def test_each_query_head_gets_its_own_key_head(heads, kv, tp):
    sh = Sharding(virtual_mesh(dp=1, tp=tp), RULES["tp"]).bind({"heads": heads, "kv": kv})
    keys = torch.arange(kv).reshape(1, 1, kv, 1).expand(2, 3, kv, 5)
    local = shard(sh, keys, "batch kv_seq kv hd")
    mine = spmd(sh, lambda here, k: here.groups(k, GROUPS))(local)
    queries = heads // tp
    spread = mine.repeat_interleave(queries // mine.shape[3], 3)  # query head j uses head j // (queries / heads of the result)
    assert torch.equal(spread[:, 0, 0, :, 0].flatten(), torch.arange(heads) // (heads // kv))


def test_groups_over_an_axis_behind_a_skipped_one():
    lists = Rules(compute=(("heads", ("a", "b")), ("kv", ("a?", "b?"))))
    sh = Sharding(virtual_mesh(a=4, b=2), lists).bind({"heads": 8, "kv": 2})  # 2 divides over b, not over a
    keys = torch.arange(2).reshape(1, 1, 2, 1).expand(1, 1, 2, 3)
    mine = spmd(sh, lambda here, k: here.groups(k, GROUPS))(shard(sh, keys, "batch kv_seq kv hd"))
    assert torch.equal(mine[:, 0, 0, 0, 0], torch.arange(8) // 4)


def test_pads_are_zero_and_gone_again():
    sh = Sharding(virtual_mesh(tp=4), RULES["tp"]).bind({"vocab": Size(10, 3)})
    x = torch.randn(10, 2)
    local = shard(sh, x, "vocab embed")
    assert local.shape == (4, 3, 2) and sh.size("vocab") == 12 and sh.true_size("vocab") == 10
    assert (local.reshape(12, 2)[10:] == 0).all()
    assert torch.equal(unshard(sh, local, "vocab embed"), x)
    assert_placement(sh, local, "vocab embed")
    with pytest.raises(AssertionError, match=r"shape \(4, 4, 2\), expected \(4, 3, 'any'\)"):
        assert_placement(sh, torch.zeros(4, 4, 2), "vocab embed")


def test_replicas_that_differ_are_found():
    sh = Sharding(virtual_mesh(dp=2, tp=2), RULES["tp"])
    x = torch.zeros(4, 3)
    assert_placement(sh, x, "embed")
    x[2:] += 1
    with pytest.raises(AssertionError, match="ranks 0 and 2 hold one piece"):
        assert_placement(sh, x, "embed")
    assert_placement(sh, x, "batch")  # over dp: ranks 0, 1 and 2, 3 hold pieces


# -- errors ------------------------------------------------------------------------------------------------------------
def test_local_refuses_to_mix_over_a_sharded_name():
    sh = Sharding(virtual_mesh(cp=2, tp=2), RULES["tp_sp"])
    with pytest.raises(ValueError, match="mixes over 'seq', which lies over mesh axes cp, tp"):
        sh.local(torch.sum, "batch seq embed -> batch embed")
    with pytest.raises(ValueError, match="'seq' lies over .cp, tp. in .*sh.align"):
        sh.local(torch.add, "batch seq, batch seq heads hd -> batch seq heads hd")
    assert sh.local(torch.add, "batch embed, batch embed -> batch embed") is torch.add


def test_indivisible_names_leaf_dim_size_axis_and_the_nearest():
    sh = Sharding(virtual_mesh(dp=2, tp=4), RULES["tp"]).bind({"heads": 6})
    with pytest.raises(ValueError) as error:
        sh.placement("embed heads hd", leaf="layers.attn.q")
    for part in ("layers.attn.q", "'heads'", "size 6", "'tp' of 4", "tp=2 or tp=3", "'tp?'"):
        assert part in str(error.value), error.value


@pytest.mark.parametrize("call, message", [
    (lambda sh: sh.einsum("a b, c d -> a d", None, None), "'b' stands on one side only"),
    (lambda sh: sh.einsum("a b -> a", None), "not of the form"),
    (lambda sh: sh.einsum("a b, (b c | b d) -> a c", None, None, None), "2 right operands but 1 outputs"),
    (lambda sh: sh.einsum("a b, (b c | b d) -> (a c | a d)", None, None), "2 right operands but got 1"),
    (lambda sh: sh.einsum("a a, a b -> b", None, None), "'a a'"),
    (lambda sh: sh.reduce("a b -> c", torch.zeros(1, 1), "sum"), "adds no name"),
    (lambda sh: sh.reduce("a b -> a", torch.zeros(1, 1), "mean"), "not 'mean'"),
    (lambda sh: sh.lookup("a b, c d -> a d b", None, None), "the ids' names followed by"),
    (lambda sh: Sharding(virtual_mesh(xp=2), RULES["tp"]), "axis 'xp' of 2 ranks is named by no rule of 'tp'"),
    (lambda sh: shard(sh.bind({"a": 3}), torch.zeros(4), "a"), "size 4, but the table of sizes says 3"),
    (lambda sh: shard(sh, torch.zeros(4), "a b"), "one name a dim"),
    (lambda sh: Rules(compute=("heads tp",)), "a rule is a pair"),
    (lambda sh: Rules(reduce="never"), "reduce is 'step' or 'microbatch', not 'never'"),
    (lambda sh: virtual_mesh(tp=0), "'tp' has size 0"),
])  # fmt: skip
def test_errors_speak_to_the_mistake(call, message):
    with pytest.raises(ValueError) as error:
        call(Sharding(virtual_mesh(tp=2), RULES["tp"]))
    assert message in str(error.value) and "\n" not in str(error.value)
