"""Forms of context parallelism against one device, whatever is masked; work of each rank; launches and waits; memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron.models.gpt import Config, gpt
from fmegatron.nn import context, ring
from fmegatron.nn.attention import Attention
from fmegatron.nn.documents import from_cu_seqlens, to_cu_seqlens
from fmegatron.sharding import (
    RULES,
    SINGLE,
    Rules,
    Sharding,
    abstract_mesh,
    shard,
    shard_map,
    spmd,
    thread_mesh,
    unshard,
    virtual_mesh,
)  # fmt: skip
from fmegatron.sharding.mesh import with_transports
from fmegatron.sharding.traffic import counted
from fmegatron.sharding.transports import Abstract
from fmegatron.testing import assert_same, assert_trees_all_close, measure

torch.set_num_threads(1)
S, HD = 16, 4
FORMS = {"gather": {"cp": 4}, "ring": {"cp": 4}, "ulysses": {"cp": 2, "tp": 2}, "hierarchical": {"cp": 2, "cpa": 2}}
IN = ["batch seq heads hd", "batch seq kv hd", "batch seq kv hd", "batch seq", "heads", "batch seq heads hd"]


def rules(form, zigzag=False):
    return replace(RULES["fsdp_tp"], attention=form, zigzag=("cp",) if zigzag else ())


def attention(attn, kind):
    """A function of global q, k, v, documents, sink and cotangent on a sharding: output and gradients of sum(y * ct)."""

    def on_rank(sh, q, k, v, documents, sink, ct):
        def forward(q, k, v, sink):
            more = {"documents.all": context.table(sh, documents)} if kind == "documents" else {}
            q = sh.relayout(q, f"batch seq heads hd -> {context.QUERIES}")
            k, v = context.meet(sh, k, v)
            extra = sh.relayout(sink, "heads -> q_heads") if attn.sink == "learned" else None
            y = context.attend(sh, attn, q, k, v, more, extra)
            return sh.relayout(y, f"{context.QUERIES} -> batch seq heads hd")

        if sh.mesh.kind == "threads":  # torch.autograd
            wrt = [x.detach().requires_grad_() for x in (q, k, v, sink)]
            with torch.enable_grad():
                y = forward(*wrt)
                grads = torch.autograd.grad((y * ct).sum(), wrt, allow_unused=True)
            grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wrt, strict=True)]
        else:
            y, pull = torch.func.vjp(forward, q, k, v, sink)
            grads = list(pull(ct))
        return [y.detach() if sh.mesh.kind == "threads" else y, *grads[:3]]

    return on_rank


def tensors(heads, kv, seed):
    g = torch.Generator().manual_seed(seed)
    q, ct = (torch.randn(2, S, heads, HD, generator=g, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, S, kv, HD, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 6, (S,), generator=g).cumsum(0)
    documents = from_cu_seqlens(torch.cat([torch.zeros(1, dtype=torch.int64), lengths[lengths < S], torch.tensor([S])]), S)
    return [q, k, v, documents.expand(2, S), torch.randn(heads, generator=g, dtype=torch.float64), ct]


@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(st.booleans(), st.sampled_from(["documents", "none"]), st.sampled_from([None, 3, 6, 9]),
       st.sampled_from([1, 2, 4]), st.sampled_from([None, "one", "learned"]), st.sampled_from([None, 2.0]),
       st.sampled_from([True, True, False]), st.integers(0, 99))  # fmt: skip
def test_every_form_is_dense_attention(form, make, zigzag, kind, window, kv, sink, softcap, causal, seed):
    attn = Attention(scale=0.4, window=window, sink=sink, softcap=softcap, causal=causal)
    given_ = tensors(4, kv, seed)
    sizes = {"heads": 4, "kv": kv, "hd": HD}
    out = ["batch seq heads hd", "batch seq heads hd", "batch seq kv hd", "batch seq kv hd"]
    expected = shard_map(attention(attn, kind), SINGLE.bind(sizes), IN, out)(*given_)
    sh = Sharding(make(**FORMS[form]), rules(form, zigzag)).bind(sizes)
    with torch.no_grad():
        local = [shard(sh, x, names) for x, names in zip(given_, IN, strict=True)]
        got = spmd(sh, attention(attn, kind))(*local)
    names = dict(zip(("y", "q", "k", "v"), out, strict=True))


    for (name, dims), x, y in zip(names.items(), got, expected, strict=True):
        whole = unshard(sh, x, dims)
        if name in ("k", "v") and kv % sh.mesh.sizes.get("tp", 1):
            continue  # replicated over tp: each rank holds its part of the gradient
        assert_trees_all_close({name: whole}, {name: y.detach()}, 1e-12)


@pytest.mark.parametrize("form, sizes, heads, kv, sent", [
    ("gather", {"cp": 2}, 4, 2, {"all_gather": (1, 2)}),
    ("gather", {"cp": 2, "tp": 4}, 4, 2, {"all_gather": (1, 1)}),  # two on four: each rank has taken the one that it reads
    ("gather", {"cp": 2, "tp": 2}, 12, 3, {"all_gather": (1, 3)}),  # six queries read of two or more
    ("ulysses", {"cp": 2, "tp": 2}, 4, 4, {"all_to_all": (3, (2 + 2) / 2)}),
    ("ulysses", {"cp": 2, "tp": 4}, 8, 2, {"all_to_all": (2, 2 / 2), "all_gather": (1, 1)}),  # cp divides them, tp does not
    ("ulysses", {"cp": 2, "tp": 2}, 12, 3, {"all_to_all": (2, 6 / 2), "all_gather": (1, 3)}),
    ("ring", {"cp": 2, "tp": 4}, 4, 2, {"permute": (1, 1 / 2)}),
])  # fmt: skip
def test_keys_and_values_travel_together_and_none_for_nothing(form, sizes, heads, kv, sent):
    """Bytes in heads of whole sequences, keys and values; queries and their output are as many. y is that of one device."""
    q, k, v = tensors(heads, kv, 0)[:3]
    mesh, traffic = counted(virtual_mesh(**sizes))
    sh, alone = (s.bind({"heads": heads, "kv": kv, "hd": HD}) for s in (Sharding(mesh, rules(form)), SINGLE))

    def forward(sh, q, k, v):
        q, (k, v) = sh.relayout(q, f"batch seq heads hd -> {context.QUERIES}"), context.meet(sh, k, v)
        return sh.relayout(context.attend(sh, Attention(scale=0.4), q, k, v, {}), f"{context.QUERIES} -> batch seq heads hd")

    y = spmd(sh, forward)(*(shard(sh, x, names) for x, names in zip((q, k, v), IN, strict=False)))
    assert_trees_all_close(unshard(sh, y, IN[0]), forward(alone, q, k, v), 1e-12)
    head = 2 * 2 * S * HD * 8
    assert traffic.counts() == {(name, "cp"): (n, int(size * head)) for name, (n, size) in sent.items()}


def batch(length=S):
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 24, (4, length), generator=g) for _ in range(2))
    return {"tokens": tokens, "labels": labels, "weights": torch.rand(4, length, generator=g, dtype=torch.float64)}


@pytest.mark.parametrize("make", [virtual_mesh, thread_mesh])
def test_a_form_for_each_layer(make):
    model = gpt(Config(layers=3, embed=16, heads=4, kv=2, mlp=12, vocab=24, init_std=0.2))
    mixed = replace(RULES["cp_ring"], layers={1: "gather", 3: "ulysses"})
    mesh, traffic = counted(make(cp=2))
    assert_same(measure(model, Sharding(mesh, mixed), batch(), expected=(e := measure(model, SINGLE, batch()))), e, 1e-12)
    assert {"permute", "all_to_all"} <= {kind for kind, _ in traffic.counts()}


class Work(TorchDispatchMode):
    """Multiplications of score blocks, which are the products whose last dim is the number of keys."""

    def __init__(self):
        super().__init__()
        self.done = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name == "aten::bmm":
            self.done += out.numel() * args[0].shape[-1]
        return out


@pytest.mark.parametrize("form, least", [("ring", 1.0), ("gather", 1.35)])
def test_zigzag_ranks_do_equal_work_and_skip_what_nobody_sees(form, least, n=4):
    attn, done, seen = Attention(scale=0.4, softcap=9.0), {}, {}
    q = torch.randn(2, 32, 4, HD, dtype=torch.float64)
    c = 32 // (2 * n)

    def on_rank(sh, q):
        place = sh.index("seq", "batch seq heads hd", q)
        with Work() as work:
            k = sh.relayout(q, f"batch seq kv hd -> {context.KEYS}")
            context.attend(sh, attn, q, k, k, {})
        done[int(sh.rank)], seen[int(sh.rank)] = work.done, int((place + 1).sum())
        return q

    sh = Sharding(thread_mesh(cp=n), rules(form, zigzag=True)).bind({"heads": 4, "kv": 4})
    with torch.no_grad():
        spmd(sh, on_rank)(shard(sh, q, "batch seq heads hd"))
    mean = sum(done.values()) / n
    assert max(done.values()) <= 1.05 * mean and max(seen.values()) <= 1.05 * sum(seen.values()) / n
    tiles = mean / (2 * 4 * c * c * HD * 2)  # of c x c scores, and of the values
    assert tiles == {"ring": 2 * n + 1, "gather": 3 * n}[form]  # all pairs would be 4 n
    assert max(seen.values()) == 2 * n * c * c + c  # the visible scores: every rank as many

    lopsided = Sharding(thread_mesh(cp=n), rules(form)).bind({"heads": 4, "kv": 4})
    with torch.no_grad():
        spmd(lopsided, on_rank)(shard(lopsided, q, "batch seq heads hd"))
    assert max(seen.values()) > 1.5 * sum(seen.values()) / n  # what contiguous ranks see


class Background(Abstract):
    background = True


def test_the_next_exchange_is_sent_for_before_a_block_is_computed_and_waited_for_after(monkeypatch):
    plain = abstract_mesh(cp=3)
    mesh, traffic = counted(with_transports(plain, {"cp": Background()}))
    sh = Sharding(mesh, rules("ring")).bind({"heads": 4, "kv": 4}).at(torch.zeros((), dtype=torch.int64, device="meta"))
    right, log = ring._scores, traffic.events

    def scores(*args):
        log.setdefault(0, []).append(("compute",))
        return right(*args)

    monkeypatch.setattr(ring, "_scores", scores)
    q, k, v = (torch.empty(2, 6, 4, HD, device="meta", requires_grad=True) for _ in range(3))
    y = context.attend(sh, Attention(scale=1.0), q, k, v, {})
    assert [event[0] for event in log[0]] == ["issue", "compute", "wait", "issue", "compute", "wait", "compute"]
    log.clear()
    y.sum().backward()
    order = [event[0] for event in log[0]]
    # own block while the farthest comes; the next while that one is computed; gradients go on their way behind
    assert order == ["issue", "compute", "wait", "issue", "compute", "issue", "wait", "compute", "wait", "issue", "wait"]
    assert {event[1] for event in log[0] if len(event) > 1} == {"permute"}


def test_a_causal_window_ends_a_contiguous_ring_early():
    def exchanges(window):
        mesh, traffic = counted(virtual_mesh(cp=4))
        sh = Sharding(mesh, rules("ring")).bind({"heads": 2, "kv": 2})
        q = shard(sh, torch.randn(1, S, 2, HD), "batch seq heads hd")
        spmd(sh, lambda here, q: context.attend(here, Attention(scale=1.0, window=window), q, q, q, {}))(q)
        return traffic.counts().get(("permute", "cp"), (0, 0))[0]

    assert [exchanges(w) for w in (1, 2, 5, 6, 9, 10, None)] == [0, 1, 1, 2, 2, 3, 3]


def kept_bytes(form, n):
    """Bytes that a forward leaves alive on rank 0, in units of one rank's k and v."""
    found = {}
    length, hd = 256, 16
    q = torch.randn(1, length, 2, hd)

    class Alive(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now, self.held = 0, {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and id(s := x.untyped_storage()) and s.data_ptr() not in self.held:
                    self.held[s.data_ptr()] = s.nbytes()
                    self.now += s.nbytes()
                    weakref.finalize(s, self.free, s.data_ptr())
            return out

        def free(self, ptr):
            self.now -= self.held.pop(ptr, 0)

    def on_rank(sh, q):
        q = q.clone().requires_grad_()
        with torch.enable_grad(), Alive() as alive:
            k = sh.relayout(q, f"batch seq kv hd -> {context.KEYS}")
            y = context.attend(sh, Attention(scale=1.0, softcap=9.0), q, k, k, {})
            found[int(sh.rank)] = alive.now
            y.sum().backward()
        return q.detach()

    sh = Sharding(thread_mesh(cp=n), rules(form)).bind({"heads": 2, "kv": 2})
    spmd(sh, on_rank)(shard(sh, q, "batch seq heads hd"))
    return found[0] / (2 * length // n * 2 * hd * 4)


def test_a_ring_keeps_one_block_for_its_backward_whatever_the_number_of_ranks():
    kept = {n: kept_bytes("ring", n) for n in (2, 4, 8)}
    assert kept[2] <= kept[4] == kept[8] < 4, kept  # k and v together, output, logsumexp, and what the threads' hub holds
    assert kept_bytes("gather", 8) > 4 * kept[8]


@pytest.mark.parametrize("choice, word", [
    (lambda: Sharding(virtual_mesh(cp=4), RULES["cp_ulysses"]).bind({"heads": 6, "kv": 6}), "use cp=2 or cp=3"),
    (lambda: shard(Sharding(virtual_mesh(cp=4), RULES["cp_ring"]), torch.zeros(2, 20), "batch seq"), "use 16 or 24 tokens"),
    (lambda: Rules(attention="rings"), "gather, ring, ulysses, hierarchical"),
    (lambda: Rules(attention=[("mlp", "cp")]), "inside attention"),
    (lambda: Sharding(virtual_mesh(cp=2, cpa=2), replace(RULES["cp_ring"], zigzag="cpa")).zigzag, "name its first mesh axes"),
])  # fmt: skip
def test_bad_choices_end_in_one_line_with_the_nearest_legal_one(choice, word):
    with pytest.raises(ValueError) as error:
        choice()
    assert word in str(error.value) and "\n" not in str(error.value)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_cu_seqlens_and_documents_are_inverse(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    documents = from_cu_seqlens(cu, int(cu[-1]))
    assert documents.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert torch.equal(to_cu_seqlens(documents), cu)


@pytest.mark.parametrize("cu, word", [([1, 4], "starts at 1"), ([0, 5, 3], "decrease"), ([0, 3], "ends at 3")])
def test_bad_cu_seqlens(cu, word):
    with pytest.raises(ValueError, match=word):
        from_cu_seqlens(torch.tensor(cu), 5)


