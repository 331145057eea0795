"""A model is a value: declarations of parameters, a table of sizes, and a chain of pure functions.

    params ----.          .----------.          .----------.
               |          |          |          |          |
    batch -> inputs -> embed -> h -> layer 0 -> h -> ... -> final -> loss -> {"loss.ce": local sum}

Each node reads named values and writes named values; it gets its own parameters, as they lie in use. A train step
walks the same chain on its own terms (one node's parameters at a time, backward node by node, stages of a pipeline);
`loss` here is the whole of it as one function, for torch.func and for small things. Bring your own: any `Model` trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.kernels.quantize import Recipe
from fmegatron.nn import param
from fmegatron.nn.param import Param
from fmegatron.sharding import SINGLE, Sharding
from fmegatron.sharding.moments import Taps, collect
from fmegatron.sharding.placement import Sizes
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.tree import Tree

Values = dict[str, Tensor]
Terms = dict[str, tuple[Tensor, Tensor]]
NodeFn = Callable[[Sharding, Any, Values, Tensor | None], Values]


@dataclass(frozen=True)
class Node:
    """One step of the chain: `fn(sh, params, values, key) -> new values`.

    params: (name inside fn, dotted path in the tree); the name "" merges the subtree itself.
    reads: values it may read, left out where the batch does not lead to them. writes: values it may write.
    own: (name inside fn, name outside) of values that are this node's alone, so that nodes may share a function.
    layer: which slice of the stacked subtrees among its parameters.
    mtp: it predicts further tokens, for the loss alone: logits and generation leave it out.
    index: its number in the whole model, by which a step knows it; the key it gets is folded with it (None without dropout).
        Where no node of a model has one they are counted from 0: with an embedding first, layers count from 1.
    linear: in its parameters, so that their values are not needed again for its backward (a lookup).
    light: cheap beside the layers and run once: a compiled step leaves it eager, it is not worth the compile.
    chunks: n > 0 says that all it reads may be cut along dim 1 into equal parts, and the results of the parts added;
        n is a good number of parts. Of the loss only one part's logits are then alive.
    low: (dotted path inside, recipe) of weights that fn multiplies in few bits, and takes gathered so.
    probes: (dotted path inside, name of a tap) of parameters whose cotangent is no gradient, but a statistic of the backward:
        its largest element is tapped, and the gradient is zeros.
    """

    fn: NodeFn
    params: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    own: tuple[tuple[str, str], ...] = ()
    layer: int | None = None
    mtp: bool = False
    index: int = 0
    linear: bool = False
    light: bool = False
    chunks: int = 0
    low: tuple[tuple[str, Recipe], ...] = ()
    probes: tuple[tuple[str, str], ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it is one of the decoder's layers."""
        return self.layer is not None and not self.mtp

    def given(self, values: Values) -> Values:
        """Those of the values that it reads, under the names inside fn."""
        inside = {outside: name for name, outside in self.own}
        return {inside.get(name, name): values[name] for name in self.reads if name in values}

    def outside(self, name: str) -> str:
        """The name outside of what fn calls `name`."""
        return dict(self.own).get(name, name)


@dataclass(frozen=True)
class Model:
    """Declarations, sizes and a chain; holds no tensors.

    declare: tree of Param. chain: its nodes write "loss.TERM": local sums, whose total over ranks divided by the term's
    global count is the term; the loss is the sum of the terms.
    inputs: fills in what a batch lacks: `inputs(sh, batch) -> values`.
    counts_of: {term: local count} of such values. moves: from a step's taps, what is added to leaves that no gradient reaches,
    {path with the global layer's number: tensor, or a function from the old value to the new one}; factors: what leaves are
    multiplied by, {path: (name of a dim, [its size])}. output: the node that writes "logits" from what the chain leaves.
    """

    declare: Tree
    sizes: Sizes
    chain: tuple[Node, ...]
    inputs: Callable[[Sharding, Mapping[str, Tensor]], Values]
    counts_of: Callable[[Sharding, Values], dict[str, Tensor]]
    output: Node | None = None
    config: Any = None
    dropout: bool = field(default=False)  # whether a key changes anything
    carries: tuple[str, ...] = ()  # values that nodes may write, constants of which a step's next microbatch is given
    moves: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    factors: Callable[[Mapping[str, Tensor]], dict[str, tuple[str, Tensor]]] | None = None

    def __post_init__(self) -> None:
        numbers = [node.index for node in self.chain]
        if len(numbers) > 1 and not any(numbers):
            object.__setattr__(self, "chain", tuple(replace(node, index=i) for i, node in enumerate(self.chain)))
        elif twice := [i for i in numbers if numbers.count(i) > 1]:
            raise ValueError(f"two nodes of the chain have index {twice[0]}: number all of them, or none")

    def init(self, key: Tensor | int = 0, dtype: torch.dtype = torch.float32) -> Tree:
        """Initial parameters on one device."""
        return param.init(self.declare, self.sizes, key, dtype)

    def count(self, active: bool = False) -> int:
        """Number of parameters, pads left out. active: those that a token meets, of experts the chosen ones."""
        total = param.count(self.declare, self.sizes)
        moe = getattr(self.config, "moe", None)
        if not active or moe is None:
            return total
        routed = {path: p for path, p in tree.to_paths(self.declare).items() if "expert" in p.names.split()}
        return total - param.count(routed, self.sizes) * (moe.experts - moe.top_k) // moe.experts

    def counts(self, batch: Mapping[str, Tensor], sh: Sharding = SINGLE) -> dict[str, Tensor]:
        """{term: local count}; the sum over ranks is the term's global denominator."""
        sh = sh.bind(self.sizes)
        return self.counts_of(sh, self.inputs(sh, batch))

    @property
    def trunk(self) -> tuple[Node, ...]:
        """The nodes on the way to the logits."""
        return tuple(node for node in self.chain if not node.mtp and not any(name.startswith("loss.") for name in node.writes))

    def loss(
        self,
        params: Tree,
        batch: Mapping[str, Tensor],
        *,
        sh: Sharding = SINGLE,
        key: Tensor | None = None,
        state: Tree = None,
    ) -> tuple[Terms, dict[str, Any]]:
        """{term: (local sum, local denominator)} and aux; on one device sum / denominator is the term's mean.

        key: of dropout; None is none. state: of models that carry some beside their parameters. aux: what was tapped.
        """
        sh, taps = sh.bind(self.sizes), Taps()
        values = self.inputs(sh, batch)
        counts = self.counts_of(sh, values)
        values = run_chain(self, self.chain, params, values, sh=sh.tapping(taps), key=key)
        terms = {name: (values[f"loss.{name}"], count) for name, count in counts.items()}
        return terms, {"taps": {name: value for name, (_, value) in taps.items()}}

    def logits(self, params: Tree, tokens: Tensor, *, sh: Sharding = SINGLE, **batch: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, true vocab] on one device; on a mesh the local piece, with its pads.

        batch: positions, documents, as in `loss`.
        """
        if self.output is None:
            raise ValueError("this model has no output node, so it has no logits")
        sh = sh.bind(self.sizes)
        values = run_chain(self, (*self.trunk, self.output), params, self.inputs(sh, {"tokens": tokens, **batch}), sh=sh)
        return values["logits"][..., : sh.true_size("vocab")]


def run_chain(
    model: Model,
    nodes: tuple[Node, ...],
    params: Tree,
    values: Values,
    *,
    sh: Sharding = SINGLE,
    key: Tensor | None = None,
) -> Values:
    """Run nodes one after the other, forwards; `sh` is bound to the model's sizes. Returns all values."""
    slices = tree.map(lambda p, x: x.unbind(0) if p.layers is not None else x, model.declare, params)
    for node in nodes:
        own = node_params(node, model.declare, slices, sh)
        folded = random.fold_in(key, node.index) if key is not None and model.dropout else None
        mine, here = Taps(), sh.of_layer(node.index)
        found = node.fn(here if sh.taps is None else here.tapping(mine), own, node.given(values), folded)
        values = {**values, **{node.outside(name): x for name, x in found.items()}}
        if sh.taps is not None:
            collect(sh.taps, mine, node.index)
    return values


def node_params(node: Node, declare: Tree, params: Tree, sh: Sharding = SINGLE) -> Tree:
    """A node's parameters as it uses them: its layer's slices, brought from where they are stored.

    `params` holds a sequence of layers, or one stacked tensor, where the declaration is stacked.
    """

    def use(p: Param, x: Any) -> Tensor:
        names = p.names
        if p.layers is not None:
            assert node.layer is not None, f"a node with stacked parameters ({p.names}) needs a layer"
            x, names = x[node.layer], p.names.removeprefix("layers ")
        stored, used = sh.placement(names, "storage"), sh.placement(names)
        return x if stored == used else run(x, sh.rank, plan_relayout(sh.mesh, stored, used))

    own: dict[str, Any] = {}
    for name, path in node.params:
        here, there = declare, params
        for part in path.split("."):
            here, there = here[part], there[part]
        own |= {name: _map(use, here, there)} if name else _map(use, here, there)
    return own


def _map(fn: Callable[[Param, Any], Tensor], declare: Any, params: Any) -> Any:
    """Map over declarations: a leaf of `params` may be a tuple of layers there."""
    if isinstance(declare, Param):
        return fn(declare, params)
    return {name: _map(fn, sub, params[name]) for name, sub in declare.items()}


# -- batches of tokens ----------------------------------------------------------------------------------------------
def next_token(sh: Sharding, batch: Mapping[str, Tensor]) -> Values:
    """A batch of tokens with what it lacks: labels (the next token; the last has weight 0), weights (1).

    tokens, labels [batch, seq] int64; weights [batch, seq] float32; where a label is below 0 (torch's ignore_index is -100)
    the weight is 0. Optional, passed through: positions (else the index), documents (else one a sample), order (a token's
    place in its sequence, else the index), sample [batch] (ids, for dropout).
    Raises ValueError where tokens are missing, shapes differ, or labels are missing and the sequence lies on several ranks.
    """
    values = dict(batch)
    if "tokens" not in values:
        raise ValueError(f"the batch has no tokens [batch, seq], but {', '.join(values) or 'nothing'}")
    tokens = values["tokens"]
    if tokens.dim() != 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: they are [batch, seq]; on a mesh cut by fm.shard")
    weights = values.get("weights", torch.ones_like(tokens, dtype=torch.float32))
    if "labels" in values:
        labels, out = values["labels"], values["labels"] < 0
    else:
        axes = sh.placement("batch seq").of("seq")
        if axes:
            raise ValueError(f"the batch has no labels, and seq lies over mesh axes {', '.join(axes)}: add labels [batch, seq]")
        labels, out = tokens.roll(-1, 1), torch.arange(tokens.shape[1], device=tokens.device) == tokens.shape[1] - 1
    for name, x in (("labels", labels), ("weights", weights)):
        if x.shape != tokens.shape:
            raise ValueError(f"{name} of shape {tuple(x.shape)} for tokens of shape {tuple(tokens.shape)}: one for each token")
    return values | {"labels": labels.clamp(min=0), "weights": torch.where(out, torch.zeros_like(weights), weights)}


def count_tokens(terms: tuple[str, ...]) -> Callable[[Sharding, Values], dict[str, Tensor]]:
    """Denominators of terms that are means over tokens: the sum of the weights."""

    def counts(sh: Sharding, values: Values) -> dict[str, Tensor]:
        return dict.fromkeys(terms, sh.total(values["weights"], "batch seq"))

    return counts
