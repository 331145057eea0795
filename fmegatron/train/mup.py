"""muP and CompleteP: a model whose best learning rate does not move with width and depth, read off its declarations.

m_N is a leaf's fan-in over the base's, m_L the depth over the base's, a the depth exponent (CompleteP: 1).

    leaf                       initial std   rate                  decay   eps
    hidden matrices            m_N^-1/2      m_N^-1 m_L^(a-1)      m_N     m_N^-1 m_L^-a
    hidden norms and biases    1             m_L^(a-1)             0       m_N^-1 m_L^-a
    embedding, head            1             1                     1       m_N^-1
    norms at the ends          1             1                     0       m_N^-1

and in the forward pass: logits / m_N, what blocks add m_L^-a. decay is of AdamW, where it is multiplied by the rate; decay
that is not (decouple) stays 1, or it would grow with m_N. With m_N = m_L = 1 all is as without.
Yang et al. 2022; Dey et al. 2025 (CompleteP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fmegatron import optim, tree
from fmegatron.config import ConfigError, RunConfig
from fmegatron.models import Config, Model
from fmegatron.models.gpt import gpt
from fmegatron.nn import param
from fmegatron.nn.param import Param, normal
from fmegatron.optim import Transform
from fmegatron.optim.adam import Moving
from fmegatron.sharding import Size
from fmegatron.tree import Tree


@dataclass(frozen=True)
class Scale:
    """Factors on a leaf's initial std, learning rate, weight decay and eps."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


def mup(c: Config, base: Config, *, alpha: float = 1.0, attention: bool = False) -> tuple[Model, dict[str, Scale]]:
    """The model of `c` in the parametrization in which it trains as `base` does, and its leaves' scales by path.

    attention: scores fall as 1 / hd, not as its root. ValueError where initial values depend on depth in another way.
    """
    if c.init_scaled and c.layers != base.layers:
        raise ValueError(f"init_scaled makes initial values depend on layers = {c.layers}: set it false for another depth")
    width, depth = c.embed / base.embed, c.layers / base.layers
    scores = math.sqrt(base.head_dim) / c.head_dim if attention else c.attention_scale
    c = replace(c, logit_multiplier=c.logit_multiplier / width, attention_scale=scores,
                residual_multiplier=c.residual_multiplier * depth**-alpha)
    model = gpt(c)
    found = scales(model.declare, c.sizes, base.sizes, depth, alpha)
    declare = tree.map_with_path(lambda path, p: _started(p, path, found[path].init), model.declare)
    return replace(model, declare=declare), found


def mup_of(c: RunConfig, model: Model) -> tuple[Model, dict[str, Scale]]:
    """A run's model in the parametrization of its model.mup, and its leaves' scales. Raises ConfigError."""
    said = dict(c.model.mup)
    how = {name: said.pop(name) for name in ("alpha", "attention") if name in said}
    if not isinstance(model.config, Config) or c.model.hf or c.model.function:
        raise ConfigError("model.mup: it is for presets, which say their sizes")
    if unknown := sorted(said.keys() - {"embed", "layers", "heads", "kv", "hd", "mlp"}):
        raise ConfigError(f"model.mup.{unknown[0]}: the base's embed, layers, heads, kv, hd, mlp, and alpha, attention")
    for name, value in c.model.mup.items():
        kind = {"alpha": (int, float), "attention": (bool,)}.get(name, (int,))
        if type(value) not in kind or value < (0 if name in ("alpha", "attention") else 1):
            expected = {"alpha": "a number of at least 0", "attention": "true or false"}.get(name, "an int of at least 1")
            raise ConfigError(f"model.mup.{name} = {value}: expected {expected}")
    try:
        return mup(model.config, replace(model.config, **said), **how)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.mup: {error}") from None


def scales_of(c: RunConfig, model: Model) -> dict[str, Scale]:
    """The scales of the leaves of a model of `mup_of`, or of some stages of it."""
    base = {name: n for name, n in c.model.mup.items() if name not in ("alpha", "attention")}
    own = model.config
    base_config = replace(own, **base)
    depth = own.layers / base_config.layers
    return scales(model.declare, own.sizes, base_config.sizes, depth, c.model.mup.get("alpha", 1.0))


def scales(
    declare: Tree, sizes: Mapping[str, int | Size], base: Mapping[str, int | Size], depth: float = 1.0, alpha: float = 1.0
) -> dict[str, Scale]:
    """{path: Scale} of declarations, from the table of sizes and the base's."""

    def ratio(names: list[str]) -> float:
        size = {which: math.prod(_n(table[name]) for name in names) for which, table in (("own", sizes), ("base", base))}
        return size["own"] / size["base"]

    def scale(declared: Param) -> Scale:
        view, hidden = param.matrix(declared), declared.layers is not None
        width, far = ratio(["embed"]), depth**-alpha
        decay = 1.0 if declared.decays else 0.0
        if not hidden or param.table(declared):
            return Scale(decay=decay, eps=1 / width)
        rate = depth ** (alpha - 1)
        if view is None:
            return Scale(rate=rate, decay=decay, eps=far / width)
        fan = ratio(declared.names.split()[view.batch : view.batch + view.rows])
        return Scale(fan**-0.5, rate / fan, decay * fan, far / width)

    return {path: scale(declared) for path, declared in tree.to_paths(declare).items()}


def mup_adamw(
    found: Mapping[str, Scale], learning_rate: Moving, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: float = 0.1, decouple: bool = False,
) -> Transform:
    """AdamW with each leaf's scales; decouple: decay by rate / peak, the same for all that decay."""

    def each(field: str, power: int = 1) -> dict[str, float]:
        return {path: getattr(scale, field) ** power for path, scale in found.items()}

    # eps times k is the gradient over k: Adam's quotient does not see the scale of its gradients
    core = [optim.scale_by_leaf(each("eps", -1)), optim.scale_by_adam(betas, eps)]
    rates = [optim.scale_by_leaf(each("rate")), optim.scale_by_learning_rate(learning_rate)]
    if not decouple:
        return optim.chain(*core, optim.add_decayed_weights(weight_decay, lambda path, leaf: found[path].decay), *rates)
    rate, peak = optim.schedule(learning_rate), optim.peak_of(learning_rate)
    decay = optim.add_decayed_weights(lambda count: -rate(count) / peak * weight_decay,
                                      lambda path, leaf: found[path].decay > 0)
    return optim.chain(*core, *rates, decay)


def _started(declared: Param, path: str, by: float) -> Param:
    """The declaration with its initial std times `by`."""
    if by == 1:
        return declared
    if not isinstance(declared.init, normal):
        raise ValueError(f"{path}: muP scales initial values that are normal, not {declared.init}")
    return replace(declared, init=normal(declared.init.std * by))


def _n(size: int | Size) -> int:
    return size if isinstance(size, int) else size.n
