"""Which experts a token goes to, with what weights, and the losses that keep the experts evenly loaded.

    logits = x w (+ b)                                   in fp32 or fp64
    softmax      s = softmax(l)        weights softmax(l[chosen]) where they are normalised, else s[chosen]
    sigmoid      s = 1 / (1 + e^-l)    weights s[chosen], over their sum where they are normalised
    sqrtsoftplus s = sqrt(ln(1 + e^l)) the same
    chosen = top k of s (+ a bias that no gradient reaches); all weights times `scale`

The lower number wins a tie. Group-limited: the groups with the best sums of best scores are kept, then top k among them.
Sources: Megatron-LM's definitions; Switch 2101.03961, ST-MoE 2202.08906, DeepSeek-V3 2412.19437 (bias without a loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fmegatron import random
from fmegatron.nn.param import Init, Param, bias
from fmegatron.transforms import compiling, inside_transform

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding

TOKENS = "batch seq"
SCORES = "batch seq router_expert"
KINDS = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
LOSSES = ("balance_switch", "balance_sequence", "balance_global", "router_z")  # terms; each is the sum over layers


@dataclass(frozen=True)
class Router:
    """How tokens choose among `experts`.

    Losses with coefficient c, over T tokens, f_e of which choose e by score alone, and p the scores as shares of one:
    E c / (k T^2) sum_e f_e sum_t p_te, with T and f of a data-parallel rank's microbatch (`switch_loss`), of each sequence
    (`sequence_loss`), of the whole microbatch (`global_loss`); z: c logsumexp(l)^2, mean over tokens.
    """

    experts: int
    top_k: int = 2
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    normalize: bool = True  # the chosen weights sum to one (times scale)
    scale: float = 1.0
    groups: int = 1
    group_top_k: int = 1
    group_best: int | None = None  # best scores of a group that are summed to its own; None: top_k // group_top_k
    logit_bias: bool = False  # a learned bias of the logits (gpt-oss)
    balance_bias: bool = False  # added to scores for the choice alone; moved once a step against the load
    bias_rate: float = 1e-3  # by how much: rate * sign(mean load - load)
    switch_loss: float = 0.0
    sequence_loss: float = 0.0
    global_loss: float = 0.0
    z_loss: float = 0.0
    sinkhorn: bool = False  # in training the choice is made on balanced scores; takes no balance loss
    jitter: float = 0.0  # in training inputs times U(1 - jitter, 1 + jitter)
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    global_average: bool = False  # loads in `global_loss` are the mean over the step's microbatches so far (Megatron-LM)
    forced: bool = False  # token t takes experts t k, t k + 1, ...: an even load, for benchmarks

    def __post_init__(self) -> None:
        for name, known in (("score", KINDS), ("router_dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"moe.{name} = {getattr(self, name)!r}: it is one of {', '.join(known)}")
        for name, least in (("experts", 1), ("groups", 1), ("group_top_k", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"moe.{name} = {getattr(self, name)}: it is at least {least}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k = {self.top_k} of {self.experts} experts: it is 1 to {self.experts}")
        if self.experts % self.groups:
            legal = [n for n in range(1, self.experts + 1) if self.experts % n == 0]
            raise ValueError(f"{self.experts} experts do not divide into groups = {self.groups}: use one of {legal}")
        if self.groups > 1:
            self._check_groups(self.experts // self.groups)
        for name in ("bias_rate", *(f"{term}_loss" for term in ("switch", "sequence", "global", "z"))):
            if getattr(self, name) < 0:
                raise ValueError(f"moe.{name} = {getattr(self, name)}: it is 0 or more")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"moe.jitter = {self.jitter}: inputs are multiplied by 1 - jitter at least, so it is 0 to below 1")
        if self.top_k == 1 and self.normalize and not self.sinkhorn:
            raise ValueError("top_k = 1 with normalize: every weight would be one, without a gradient; set normalize = false")
        if self.bias_rate != Router.bias_rate and not self.balance_bias:
            raise ValueError(f"moe.bias_rate = {self.bias_rate} without balance_bias, which it moves: set balance_bias = true")
        if self.groups == 1 and (self.group_top_k != 1 or self.group_best is not None):
            raise ValueError("moe.group_top_k, group_best without groups: give their number, groups")
        if self.global_average and not self.global_loss:
            raise ValueError("global_average without global_loss: it is of that loss, give its coefficient")
        if self.sinkhorn and (self.switch_loss or self.sequence_loss or self.global_loss or self.balance_bias):
            raise ValueError("sinkhorn balances the choice itself: it takes no balance loss and no balance_bias")

    def _check_groups(self, per: int) -> None:
        """ValueError where the choice among groups of `per` experts leaves too few."""
        least = -(-self.top_k // per)
        if not least <= self.group_top_k <= self.groups:
            raise ValueError(
                f"group_top_k = {self.group_top_k} of {self.groups} groups of {per} experts, for top_k = {self.top_k}: "
                f"it is {least} to {self.groups}"
            )
        if not 1 <= self.best <= per:
            raise ValueError(f"group_best = {self.best} of groups of {per} experts: it is 1 to {per}, set it")

    @property
    def best(self) -> int:
        """How many scores make a group's."""
        return self.top_k // max(self.group_top_k, 1) if self.group_best is None else self.group_best

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: its coefficient} of those that are on."""
        every = (self.switch_loss, self.sequence_loss, self.global_loss, self.z_loss)
        return {term: c for term, c in zip(LOSSES, every, strict=True) if c}

    @property
    def trains_otherwise(self) -> bool:
        """Whether training differs from evaluation, which a key tells."""
        return self.sinkhorn or self.jitter > 0


class Routing(NamedTuple):
    """chosen int64 and weight [batch, seq, k]; terms {name: this rank's part of the loss}, and `load`, what the step's next
    microbatch is given, where loads are averaged; scores: shares of one."""

    chosen: Tensor
    weight: Tensor
    terms: dict[str, Tensor]
    scores: Tensor


def declare(router: Router, init: Init) -> dict[str, Param]:
    """Its weights; `balance` is no weight: no gradient reaches it, a step moves it (`move`)."""
    p = {"weight": Param("embed router_expert", init)}
    if router.logit_bias:
        p["bias"] = bias("router_expert")
    if router.balance_bias:
        p["balance"] = replace(bias("router_expert"), exact=True)
    return p


def apply(sh: Sharding, router: Router, p: dict[str, Tensor], x: Tensor, v: dict[str, Tensor], key: Tensor | None) -> Routing:
    """Route x [batch, seq, embed]. v: sample and place.h where there is a key, `route` [batch, seq, k] to replay,
    and `load` [experts], what the step's earlier microbatches have left."""
    if router.jitter and key is not None:
        token = random.fold_in(random.fold_in(random.fold_in(key, "jitter"), v["sample"][:, None]), v["place.h"])
        noise = random.uniform(token[..., None], sh.index("embed", "batch seq embed", x))
        x = x * (1 + router.jitter * (2 * noise - 1)).to(x.dtype)
    dtype = torch.promote_types(x.dtype, DTYPES[router.router_dtype])
    w = p["weight"].to(dtype).t().contiguous()  # so few columns: the product and its gradients are faster with rows
    logits = sh.einsum(f"batch seq embed, router_expert embed -> {SCORES}", x.to(dtype), w)
    if router.logit_bias:
        logits = logits + p["bias"].to(dtype)
    index = v["route"] if "route" in v else choose(router, logits.detach(), p.get("balance"), train=key is not None)
    shares = shares_of(router, logits)
    terms = losses(sh, router, logits, shares, v.get("load"))
    return Routing(index, weights_of(router, logits, index), terms, shares.detach())


# -- choice and weights -----------------------------------------------------------------------------------------------
def scores_of(router: Router, logits: Tensor) -> Tensor:
    """The score function, each expert's for itself or as shares."""
    if router.score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if router.score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()


def shares_of(router: Router, logits: Tensor) -> Tensor:
    """Scores that sum to one over all experts, as the balance losses want them."""
    s = scores_of(router, logits)
    return s if router.score == "softmax" else s / (s.sum(-1, keepdim=True) + 1e-20)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the largest scores, best first; the lower index wins a tie (torch.topk promises nothing)."""
    found = []
    for _ in range(k):
        found.append(scores.argmax(-1, keepdim=True))
        scores = scores.scatter(-1, found[-1], float("-inf"))
    return torch.cat(found, -1)


def choose(router: Router, logits: Tensor, balance: Tensor | None = None, train: bool = False) -> Tensor:
    """The experts of each token, int64 [..., k], best first."""
    if router.forced:
        tokens = torch.arange(logits[..., 0].numel(), device=logits.device).reshape(logits.shape[:-1])
        return (tokens[..., None] * router.top_k + torch.arange(router.top_k, device=logits.device)) % router.experts
    if router.sinkhorn and train:
        return top_k(sinkhorn(logits.flatten(0, -2)), router.top_k).reshape(*logits.shape[:-1], -1)
    shared = router.score == "softmax" and router.normalize and balance is None
    scores = logits if shared else scores_of(router, logits)
    if balance is not None:
        scores = scores + balance.detach().to(scores.dtype)
    if router.groups > 1:
        by_group = scores.unflatten(-1, (router.groups, -1))
        best = by_group.gather(-1, top_k(by_group, router.best)).sum(-1)
        kept = torch.zeros_like(best).scatter(-1, top_k(best, router.group_top_k), 1.0)
        scores = torch.where(kept[..., None] > 0, by_group, torch.full_like(by_group, float("-inf"))).flatten(-2)
    return top_k(scores, router.top_k)


def weights_of(router: Router, logits: Tensor, index: Tensor) -> Tensor:
    """The weights of chosen experts [..., k]; differentiable in the logits."""
    if router.sinkhorn:
        s = logits.sigmoid() if router.top_k == 1 else logits.softmax(-1)
        return s.gather(-1, index) * router.scale
    if router.score == "softmax" and router.normalize:
        return logits.gather(-1, index).softmax(-1) * router.scale
    s = scores_of(router, logits).gather(-1, index)
    return (s / (s.sum(-1, keepdim=True) + 1e-20) if router.normalize else s) * router.scale


def sinkhorn(logits: Tensor, tolerance: float = 1e-4, most: int = 100) -> Tensor:
    """Scores [tokens, experts] with rows and columns balanced: e^l times a factor a token and one an expert.

    In turns each factor is made to even out its sums, until the experts' move by less than `tolerance` in the mean.
    """
    cost = logits.exp()
    row, column = cost.new_ones(cost.shape[0]), cost.new_ones(cost.shape[1])
    done = torch.zeros_like(cost[0, 0], dtype=torch.bool)
    for _ in range(most):
        new_row = 1 / (cost.shape[0] * ((column * cost).sum(1) + 1e-8))
        new_column = 1 / (cost.shape[1] * ((new_row[:, None] * cost).sum(0) + 1e-8))
        row, moved = torch.where(done, row, new_row), (new_column - column).abs().mean()
        column, done = torch.where(done, column, new_column), done | (moved <= tolerance)
        if not (inside_transform() or compiling()) and bool(done):
            break
    return column * cost * row[:, None]


# -- losses -----------------------------------------------------------------------------------------------------------
def losses(sh: Sharding, router: Router, logits: Tensor, shares: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
    """{term: this rank's part of its sum} for the terms that are on, see `denominators`; before: `load`, see `Routing`."""
    on = router.coefficients
    terms: dict[str, Tensor] = {}
    if any(term in on for term in LOSSES[:3]):
        own = sh.reduce(f"{SCORES} -> batch router_expert", hits(shares.detach(), top_k(shares.detach(), router.top_k)), "sum")
        rows, length = shares.shape[0], shares.shape[1] * ranks_of(sh, "seq")
        so_far = own.sum(0) if before is None else own.sum(0) + before
        whole = sh.reduce("batch router_expert -> router_expert", so_far[None], "sum") if "balance_global" in on else own
        whole = whole if before is None else whole * (own.sum() / so_far.sum())
        terms |= {"load": so_far} if router.global_average else {}
        loads = {"balance_switch": own.sum(0), "balance_sequence": own[:, None], "balance_global": whole}
        tokens = {"balance_switch": rows * length, "balance_sequence": length}
        tokens["balance_global"] = rows * length * ranks_of(sh, "batch")
        for term in (term for term in LOSSES[:3] if term in on):
            factor = router.experts * on[term] / (router.top_k * tokens[term] ** 2)
            terms[term] = sh.total(shares * loads[term], SCORES) * factor
    if "router_z" in on:
        terms["router_z"] = sh.total(logits.logsumexp(-1).square(), TOKENS) * on["router_z"]
    return terms


def denominators(sh: Sharding, router: Router, tokens: Tensor) -> dict[str, Tensor]:
    """{term: this rank's part of what its sum is divided by}, for a microbatch of tokens [batch, seq]: data-parallel ranks,
    sequences, one, tokens. So a step's term is the mean over its microbatches, sequences or tokens."""
    ones = torch.ones_like(tokens, dtype=torch.float32)
    shards = ranks_of(sh, "batch")
    counts = {"balance_switch": sh.total(ones[:1, 0], "batch"), "balance_sequence": sh.total(ones[:, 0], "batch")}
    counts |= {"balance_global": sh.total(ones[:1, 0], "batch") / shards, "router_z": sh.total(ones, TOKENS)}
    return {term: counts[term] for term in router.coefficients}


def move(router: Router, load: Tensor) -> Tensor:
    """What a step adds to the balance bias [experts]: up where the load is under the mean, down where it is over."""
    return router.bias_rate * (load.mean() - load).sign()


def hits(like: Tensor, index: Tensor) -> Tensor:
    """One where an expert is chosen, else zero: [..., experts] in like's dtype."""
    return torch.zeros_like(like).scatter(-1, index, 1.0)


def ranks_of(sh: Sharding, name: str) -> int:
    """Over how many ranks a dim of the tokens lies."""
    return math.prod(sh.mesh[axis].size for axis in sh.placement(TOKENS).of(name))

