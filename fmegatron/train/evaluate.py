"""Held-out loss: the chain of the train step, forward only, on the same mesh; each token counts once.

loss = sum of nats / sum of weights         bits per byte = sum of nats / ln 2 / bytes of text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Model, Node, Values
from fmegatron.sharding import Sharding, spmd
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.microbatches import rows_of, split
from fmegatron.train.pipeline.across import everywhere, execute_forward
from fmegatron.train.pipeline.stages import Pipeline, place_pipeline, without_pp
from fmegatron.train.state import sum_together
from fmegatron.train.weights import Weights
from fmegatron.transforms import inside_transform
from fmegatron.tree import Tree

Batch = Mapping[str, Tensor]
Sums = dict[str, Tensor]


def make_evaluate(
    model: Model, sh: Sharding, *, dtype: torch.dtype | None = None, prefetch: int = 1, pipeline: Pipeline | None = None
) -> Callable[..., Sums]:
    """`evaluate(params, batch) -> {"TERM.sum", "TERM.count"}` over all ranks, without dropout, on local shards.

    pipeline: the step's; a batch is then cut into its microbatches, or into fewer where it has fewer rows.
    """
    placed = None if pipeline is None else place_pipeline(pipeline, model, sh.mesh)
    model, sh = (model, sh) if placed is None else (placed.model, without_pp(sh))
    sh = sh.bind(model.sizes)
    leaves = plan_leaves(model, sh)

    def on_rank(here: Sharding, params: Tree, batch: Batch) -> Sums:
        weights = Weights(here, leaves, tree.to_paths(params), dtype, prefetch, not inside_transform(), hold=placed is not None)
        values = model.inputs(here, batch)
        counts = model.counts_of(here, values)

        def run_nodes(nodes: Sequence[Node], values: Values) -> Values:
            for node in nodes:
                own, inside = weights.take(node), here.of_layer(node.index)
                reads = node.given(values)
                new = _in_parts(node, inside, own, reads) if node.chunks else node.fn(inside, own, reads, None)
                values = {**values, **{node.outside(name): x for name, x in new.items()}}
                weights.leave(node, own)
            return values

        n = {f"{term}.count": count for term, count in counts.items()}
        if placed is None:
            weights.plan(model.chain)
            losses = run_nodes(model.chain, values)
            return sum_together(here, {**{f"{term}.sum": losses[f"loss.{term}"] for term in counts}, **n})
        parts = split(values, min(rows_of(values), placed.schedule.microbatches), even=False)
        losses, _ = everywhere(placed, execute_forward(placed, parts, run_nodes, weights), {}, counts, frozenset())
        sums = {f"{term}.sum": losses[f"loss.{term}"] for term in counts}
        return sum_together(placed.every(here), sums) | sum_together(here, n)

    run = spmd(sh, on_rank)

    def evaluate(params: Tree, batch: Batch) -> Sums:
        with torch.set_grad_enabled(inside_transform() and torch.is_grad_enabled()):  # as in a step
            return run(params, dict(batch))

    return evaluate


def _in_parts(node: Node, sh: Sharding, own: Tree, reads: Values) -> Values:
    """A loss node part by part along dim 1, so that one part's logits are alive."""
    length = next(iter(reads.values())).shape[1]
    parts = max(n for n in range(1, node.chunks + 1) if length % n == 0)
    total: Values = {}
    for i in range(parts):
        size = length // parts
        out = node.fn(sh, own, {name: x.narrow(1, i * size, size) for name, x in reads.items()}, None)
        total = {name: x + total[name] if name in total else x for name, x in out.items()}
    return total


def held_out(evaluate: Callable[..., Sums], params: Tree, batches: Iterable[Batch], size: int | None) -> dict[str, float]:
    """{"heldout_loss": nats a token, "heldout_perplexity", "bits_per_byte"} of all batches; size: bytes of their text, None
    where unknown."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name, x in evaluate(params, batch).items():
            sums[name] = sums.get(name, 0.0) + float(x.flatten()[0])
    terms = [name.removesuffix(".sum") for name in sums if name.endswith(".sum")]
    term = "ce" if "ce" in terms else terms[0]
    out = {"heldout_loss": sums[f"{term}.sum"] / max(sums[f"{term}.count"], 1.0)}
    if term == "ce":
        out["heldout_perplexity"] = math.exp(min(out["heldout_loss"], 700.0))
    if "unigram" in terms:
        out["heldout_unigram_loss"] = sums["unigram.sum"] / max(sums["unigram.count"], 1.0)
    if size and term == "ce":
        out["bits_per_byte"] = sums["ce.sum"] / math.log(2) / size
    return out
