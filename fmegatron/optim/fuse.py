"""A whole optimizer step as one pass over memory.

    step = fuse(tx)
    params, state = step(grads, state, params, over=over, ok=isfinite(norm), donate=True, compile=True)

is, with fewer passes and the same formulas,

    updates, new_state = tx.update(grads, state, params, over=over)
    params, state = where(ok, (apply_updates(params, updates), new_state), (params, state))

The links of tx fall into three parts, and only the last elementwise run is fused; any transform may stand before it:

    head      closed boxes and whatever precedes them       run by their own update
    factor    a Scaling right before the tail (clipping)    one number, multiplied in by the kernel
    tail      the last run of elementwise links             composed with p + u and the choice of ok

Where the last link is `multi`, each of its groups is such a step on its own leaves, times the factor before it.

kernels   "triton": one launch for all leaves of adam and adamw; else on a CPU torch's own operator for them, unless the
          compiled pass would fold a factor in: see multi_tensor.py. What neither takes goes as follows
compile   one kernel by Inductor over leaves as rows of 64, any number of them: compiled once a dtype, and free of the
          integer division per vector that Inductor writes for a length it knows nothing about (three times slower)
donate    the old params and slots are overwritten and returned: no new memory. Eager, it goes by pieces that fit a cache
host      the arrays of the tail lie in host memory: they come and go by pieces, see stream.py; with donate only
neither   tx.update on lists of leaves; the only way under vmap or grad, and differentiable
ok        0-D bool: False leaves params, slots and counts as they were; chosen before anything is overwritten
To the kernel all numbers of a step (factor, ok, rates, bias corrections, each leaf's own) are one small vector: data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.compiled import Rows
from fmegatron.kernels.launch import Form
from fmegatron.offload import Copies, copies_of
from fmegatron.optim.base import LOCAL, Over, Scaling, Transform, Tree, apply_updates
from fmegatron.optim.elementwise import Elementwise, plain
from fmegatron.optim.formats import HALVES, SAME, Split
from fmegatron.optim.groups import Groups, join
from fmegatron.optim.multi_tensor import Given, kernel_of
from fmegatron.optim.packed import ROW, draw, halved, joined, on_rows, pack, where_of
from fmegatron.optim.stream import Piece, cuts, in_turn
from fmegatron.programs import Programs

Kernel = Callable[..., tuple[Tensor, ...]]
PIECE = 1 << 17  # elements: some ten fp32 arrays of a piece, temporaries included, stay in a cache of a few MB


@dataclass(frozen=True)
class FusedStep:
    """tx as one function (grads, state, params) -> (params, state); see the module.

    copies: how what lies in host memory travels, None: as the device has it; piece: elements of it at a time.
    programs: where what is compiled is kept, as `name`.
    """

    tx: Transform
    copies: Copies | None = None
    piece: int = 1 << 24
    kernels: Form = "reference"
    programs: Programs | None = None
    name: str = "optimizer"

    @cached_property
    def parts(self) -> tuple[tuple[Transform, ...], Transform | None, tuple[Transform, ...]]:
        """(head, factor, tail)."""
        links = _links(self.tx)
        if links and isinstance(links[-1].form, Groups):
            scaled = len(links) > 1 and isinstance(links[-2].form, Scaling)
            return links[: len(links) - 1 - scaled], links[-2] if scaled else None, ()
        cut = next((i for i in range(len(links), 0, -1) if not isinstance(links[i - 1].form, Elementwise)), 0)
        scaled = cut > 0 and isinstance(links[cut - 1].form, Scaling)
        return links[: cut - scaled], links[cut - 1] if scaled else None, links[cut:]

    @cached_property
    def groups(self) -> dict[str, FusedStep]:
        """{label: step of its group}, where the last link is `multi`; else nothing."""
        form = _links(self.tx)[-1].form if _links(self.tx) else None
        if not isinstance(form, Groups):
            return {}
        inner = {label: replace(tx, host=self.tx.host) for label, tx in form.transforms.items()}
        return {label: replace(self, tx=tx, name=f"{self.name} {label}") for label, tx in inner.items()}

    @cached_property
    def kernel(self) -> Kernel:
        """The tail on one leaf."""
        return _kernel(tuple(link.form for link in self.parts[2]))

    @cached_property
    def compiled(self) -> Kernel:
        """The same, compiled."""
        return Rows(self.kernel, self.programs, self.name)

    @cached_property
    def packed(self) -> dict[bool, tuple[tuple[Kernel, Kernel], tuple[Kernel, Kernel]]]:
        """{whether parameters are in halves: draws and the kernel between formats, eager and compiled}."""
        slots = [link.form.format(slot) for link in self.parts[2] for slot in link.form.slots]
        kernels = {halves: pack(self.kernel, (HALVES if halves else SAME, *slots)) for halves in (False, True)}
        def rows(fn: Kernel, what: str) -> Kernel:
            return Rows(fn, self.programs, f"{self.name} {what}")

        return {halves: ((draw, one), (rows(draw, "draw"), rows(one, f"packed {halves}"))) for halves, one in kernels.items()}

    def __call__(
        self, grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL, ok: Tensor | None = None,
        donate: bool = False, compile: bool = True,
    ) -> tuple[Tree, Tree]:
        """New params and state. Errors: ValueError for compile or donate under a torch.func transform, host without donate."""
        if self.tx.host and not donate:
            raise ValueError("optimizer state in host memory is updated in place: use donate=True, and no virtual mesh")
        if not (compile or donate) and (self.kernels == "reference" or not plain()):
            whole = joined(params)
            updates, new = self.tx.update(grads, state, whole, over=over)
            moved = apply_updates(whole, updates)
            return keep(ok, (halved(moved) if isinstance(params, Split) else moved, new), (params, state))
        if not plain():
            raise ValueError("a compiled or donating optimizer step cannot run under vmap or grad: "
                             "pass compile=False, donate=False")
        with torch.no_grad():
            return self._in_one_pass(grads, state, params, over, ok, donate, compile)

    def _in_one_pass(
        self, u: Tree, state: Tree, params: Tree, over: Over, ok: Tensor | None, donate: bool, compile: bool,
        by: Tensor | None = None,
    ) -> tuple[Tree, Tree]:
        """by: a factor on the updates, of a link before this transform."""
        head, factor, tail = self.parts
        states = list(state) if isinstance(self.tx.form, tuple) else [state]
        if by is not None and (head or factor):
            u, by = tree.map(lambda x: x * by, u), None
        whole = joined(params) if head else None
        for i, link in enumerate(head):
            u, new = link.update(u, states[i], whole, over=over)
            states[i] = keep(ok, new, states[i])
        if factor is not None:
            by = factor.form.factor(u, over)
        if self.groups:
            params, states[-1] = self._by_group(u, states[-1], params, over, ok, donate, compile, by)
            return params, tuple(states) if isinstance(self.tx.form, tuple) else states[0]
        halves = isinstance(params, Split)
        high = params.high if halves else params
        leaves, spec = tree.flatten(high)
        if not leaves:
            return params, state
        start = len(states) - len(tail)
        forms, old = [link.form for link in tail], states[start:]
        arrays = [leaves, tree.leaves(params.low)] if halves else [leaves]
        arrays += [tree.leaves(s[name]) for f, s in zip(forms, old, strict=True) for name in f.arrays]
        packed = halves or any(f.stored for f in forms)
        kernels: Any = self.packed[halves] if packed else (self.kernel, self.compiled if compile else self.kernel)
        eager, kernel = kernels[0], kernels[compile]
        where = where_of(forms, old, high, over) if packed else []

        one = leaves[0].new_ones((), dtype=torch.float64)
        numbers = [one if by is None else by, one if ok is None else ok]
        numbers += [n for f, s in zip(forms, old, strict=True) if f.numbers for n in f.numbers(s["count"]).values()]
        own = zip(*[f.each(high) for f in forms if f.each], strict=True) if any(f.each for f in forms) else None
        vectors: dict[Any, Tensor] = {}
        results: list[tuple[Tensor, ...]] = []
        pieces: list[Piece] = []
        launch = kernel_of(forms, old, halves, self.kernels, leaves[0].device, folds=compile and by is not None)
        together: list[Given] = []
        for i, (p, g) in enumerate(zip(leaves, tree.leaves(u), strict=True)):
            each = next(own) if own else ()
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            own_arrays = tuple(x[i] for x in arrays)
            if (each, dtype) not in vectors:  # few: with and without decay
                vector = torch.stack([n.double() for n in numbers] + [one * e for e in each])
                vectors[each, dtype] = vector.to(dtype)
            update: Callable[..., Any] = partial(on_rows if packed else _on_leaf, kernel, eager, donate)
            rest = (where[i],) if packed else ()
            if not p.numel():
                results.append(own_arrays)
                continue
            if launch is not None and launch.takes(own_arrays):
                update, own_arrays = launch.alone, own_arrays if donate else tuple(x.clone() for x in own_arrays)
                if not self.tx.host:
                    together.append(Given(g, vectors[each, dtype], own_arrays, *rest))
                    results.append(own_arrays)
                    continue
            if self.tx.host:
                pieces += _pieces(update, g, (vectors[each, dtype], *rest), own_arrays, 1 + halves, self.piece)
            results.append(own_arrays if self.tx.host else update(g, vectors[each, dtype], *rest, own_arrays))
        if launch is not None and together:
            launch(together)
        if pieces:
            in_turn(self.copies or copies_of(leaves[0].device), leaves[0].device, pieces)

        made = [spec.unflatten(list(x)) for x in zip(*results, strict=True)]
        params, slots = (Split(*made[:2]), iter(made[2:])) if halves else (made[0], iter(made[1:]))
        for i, (f, s) in enumerate(zip(forms, old, strict=True)):
            count = {"count": s["count"] + (1 if ok is None else ok.long())} if f.counts else {}
            states[start + i] = count | {name: next(slots) for name in f.arrays}
        return params, tuple(states) if isinstance(self.tx.form, tuple) else states[0]

    def _by_group(
        self, u: Tree, state: Tree, params: Tree, over: Over, ok: Tensor | None, donate: bool, compile: bool, by: Tensor | None
    ) -> tuple[Tree, Tree]:
        form, halves = _links(self.tx)[-1].form, isinstance(params, Split)
        parts = form.split(*params, u) if halves else form.split(params, u)
        done = {label: self.groups[label]._in_one_pass(
                    g, state[label], Split(*own) if halves else own[0], over, ok, donate, compile, by)
                for label, (*own, g) in parts.items()}
        new, made = {label: s for label, (_, s) in done.items()}, [p for p, _ in done.values()]
        if not halves:
            return join(made, params), new
        return Split(join([p.high for p in made], params.high), join([p.low for p in made], params.low)), new


def fuse(tx: Transform, kernels: Form = "reference", programs: Programs | None = None) -> FusedStep:
    """tx.update, apply_updates and the skip of a step that is not ok, as one function; compiled when first called."""
    return FusedStep(tx, kernels=kernels, programs=programs)


def keep(ok: Tensor | None, new: Tree, old: Tree) -> Tree:
    """new where ok, else old, leaf by leaf; new if ok is None."""
    return new if ok is None else tree.map(lambda a, b: torch.where(ok, a, b), new, old)


def _links(tx: Transform) -> tuple[Transform, ...]:
    return tx.form if isinstance(tx.form, tuple) else (tx,)


def _pieces(
    update: Callable[..., Any], g: Tensor, rest: tuple[Any, ...], arrays: tuple[Tensor, ...], here: int, most: int
) -> Iterator[Piece]:
    """The update of a leaf's arrays by pieces; the first `here` of them lie on the device."""
    for part in cuts(g.shape, most):
        def run(held: tuple[Tensor, ...], part: slice | EllipsisType = part) -> None:
            vector, *where = rest
            if where and isinstance(part, slice) and len(where[0][0]) == len(g):
                where = [(where[0][0][part], *where[0][1:])]
            update(g[part], vector, *where, (*(x[part] for x in arrays[:here]), *held))

        yield Piece(run, tuple(x[part] for x in arrays[here:]))


def _kernel(forms: tuple[Elementwise, ...]) -> Kernel:
    """The composition of formulas on one leaf: (donate, g, vector, p, *slots) -> (new p, *new slots).

    vector: [factor, ok, each form's numbers, each form's own number of the leaf], see _in_one_pass.
    """
    zero = torch.zeros((), dtype=torch.int64)
    names = [tuple(f.numbers(zero)) if f.numbers else () for f in forms]
    first_own = 2 + sum(map(len, names))

    def kernel(donate: bool, g: Tensor, vector: Tensor, p: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        u, ok, new = g.to(p.dtype) * vector[0], vector[1] > 0, []
        number, own, slot = 2, first_own, 0
        for f, mine in zip(forms, names, strict=True):
            s = {name: vector[number + j] for j, name in enumerate(mine)}
            if f.each:
                s["each"] = vector[own]
                own += 1
            held = dict(zip(f.slots, slots[slot : slot + len(f.slots)], strict=True))
            u, made = f.leaf(u, p, held, s)
            new += [made[name] for name in f.slots]
            number, slot = number + len(mine), slot + len(f.slots)
        old = (p, *slots)
        chosen = [torch.where(ok, a, b) for a, b in zip((p + u, *new), old, strict=True)]
        if not donate:
            return tuple(chosen)
        for b, a in zip(old, chosen, strict=True):
            b.copy_(a)
        return ()

    return kernel


def _on_leaf(
    kernel: Kernel, eager: Kernel, donate: bool, g: Tensor, vector: Tensor, old: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The kernel on (p, *slots) of one leaf: its rows, and eagerly what is left over or does not lie flat in memory."""
    p, rows = old[0], old[0].numel() // ROW
    if rows < 2 or not all(t.is_contiguous() for t in old):  # one row would be a compilation of its own
        return eager(donate, g, vector, *old) or old
    if kernel is not eager and rows * ROW == p.numel():
        made = kernel(donate, g.reshape(rows, ROW), vector, *(t.view(rows, ROW) for t in old))
        return tuple(t.view(p.shape) for t in made) or old
    g, *flat = (t.reshape(-1) for t in (g, *old))
    if kernel is eager:
        step = PIECE if donate and p.device.type == "cpu" else p.numel()
        parts = [kernel(donate, pieces[0], vector, *pieces[1:])
                 for pieces in zip(*(t.split(step) for t in (g, *flat)), strict=True)]
    else:
        n = rows * ROW
        u, *whole = (t[:n].view(rows, ROW) for t in (g, *flat))
        parts = [kernel(donate, u, vector, *whole), eager(donate, g[n:], vector, *(t[n:] for t in flat))]
    if donate:
        return old
    return tuple(torch.cat([t.view(-1) for t in part]).view(p.shape) for part in zip(*parts, strict=True))
