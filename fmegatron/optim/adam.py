"""Adam and its relatives, by name: each a chain of the same few links.

    p = p - rate u                       adam
    p = p - rate (u + weight_decay p)    adamw: decay times the rate
    p = p (1 - rate / rate_0 weight_decay) - rate u       the decoupled ones: decay as the rate's shape, not its size
    g = g + weight_decay p               the others' decouple=False: coupled, into the gradient

u is that of momenta.py. rate_0 is the schedule's peak (of 0: the decay is weight_decay itself).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmegatron.optim.base import Transform, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.momenta import Clip, fourth_root, scale_by_adopt, scale_by_momenta
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import Schedule, schedule
from fmegatron.optim.switch import Number, peak_of

Moving = float | Tensor | Schedule


def adam(
    learning_rate: Moving, betas: Sequence[Number] = (0.9, 0.95), eps: float = 1e-8, eps_root: float = 0.0
) -> Transform:
    """Adam (Kingma and Ba 2015); eps_root as in `scale_by_momenta`."""
    return chain(scale_by_adam(betas, eps, eps_root), scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: Moving, betas: Sequence[Number] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: Moving = 0.1, mask: Mask = None, eps_root: float = 0.0,
) -> Transform:
    """AdamW (Loshchilov and Hutter 2019), decay times the rate as in torch; `mask` says which leaves decay (decay.py);
    eps_root as in `scale_by_momenta`."""
    decay = add_decayed_weights(weight_decay, mask)
    return chain(scale_by_adam(betas, eps, eps_root), decay, scale_by_learning_rate(learning_rate))


def decoupled_adamw(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: Moving = 1e-5, decouple: bool = True, amsgrad: bool = False, mask: Mask = None,
) -> Transform:
    """AdamW with decay by rate / rate_0 (llm-foundry's DecoupledAdamW); decouple=False is torch's AdamW."""
    core = scale_by_momenta(betas, eps=eps, amsgrad=amsgrad)
    if not decouple:
        return chain(core, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))
    return _decaying(core, learning_rate, weight_decay, True, mask)


def qhadamw(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.9, 0.95), vs: Sequence[Number] = (0.7,), eps: float = 1e-8,
    weight_decay: Moving = 1e-5, decouple: bool = True, amsgrad: bool = False, mask: Mask = None,
) -> Transform:
    """Quasi-hyperbolic AdamW (Ma and Yarats 2019, nu_2 = 1): vs = (1,) is AdamW, (0,) RMSProp with bias correction."""
    return _decaying(scale_by_momenta(betas, _one(vs), eps, amsgrad), learning_rate, weight_decay, decouple, mask)


def aggmo_adamw(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.9, 0.95), vs: Sequence[Number] = (0.7,), eps: float = 1e-8,
    weight_decay: Moving = 1e-5, decouple: bool = True, amsgrad: bool = False, mask: Mask = None,
) -> Transform:
    """AdamW over several momenta (after AggMo, Lucas et al. 2019; as means with free weights, MT-DAO)."""
    return _decaying(scale_by_momenta(betas, vs, eps, amsgrad), learning_rate, weight_decay, decouple, mask)


def adopt(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.9, 0.9999), eps: float = 1e-6,
    weight_decay: Moving = 0.0, decouple: bool = False, clip: Clip | float | None = fourth_root, mask: Mask = None,
) -> Transform:
    """ADOPT (Taniguchi et al. 2024), clipped by t**0.25 unless clip is None; its first update changes nothing but nu."""
    return _decaying(scale_by_adopt(betas, (1.0,), eps, clip), learning_rate, weight_decay, decouple, mask, late=True)


def qhadopt(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.999, 0.9999), vs: Sequence[Number] = (0.9,), eps: float = 1e-6,
    weight_decay: Moving = 0.0, decouple: bool = False, clip: Clip | float | None = fourth_root, mask: Mask = None,
) -> Transform:
    """Quasi-hyperbolic ADOPT: vs = (1,) is ADOPT."""
    return _decaying(scale_by_adopt(betas, _one(vs), eps, clip), learning_rate, weight_decay, decouple, mask, late=True)


def aggmo_adopt(
    learning_rate: Moving = 1e-3, betas: Sequence[Number] = (0.999, 0.9999), vs: Sequence[Number] = (0.9,), eps: float = 1e-6,
    weight_decay: Moving = 0.0, decouple: bool = False, clip: Clip | float | None = fourth_root, mask: Mask = None,
) -> Transform:
    """ADOPT over several momenta."""
    return _decaying(scale_by_adopt(betas, vs, eps, clip), learning_rate, weight_decay, decouple, mask, late=True)


def scale_by_adam(betas: Sequence[Number] = (0.9, 0.95), eps: float = 1e-8, eps_root: float = 0.0) -> Transform:
    """The mean of gradients over the root of the mean of squares, both unbiased. State: {"count", "mu", "nu"}."""
    return scale_by_momenta(betas, (1.0,), eps, eps_root=eps_root)


def _one(vs: Sequence[Number]) -> Sequence[Number]:
    if len(vs) != 1:
        raise ValueError(f"vs {tuple(vs)}: one momentum, one weight; the aggmo optimizers take several")
    return vs


def _decaying(
    core: Transform, learning_rate: Moving, weight_decay: Moving, decouple: bool, mask: Mask, late: bool = False
) -> Transform:
    """core and the rate, with decay behind them as rate / rate_0, or coupled in front. late: none at the first update."""
    rate, decay = schedule(learning_rate), schedule(weight_decay)
    if isinstance(weight_decay, float | int) and weight_decay == 0:
        return chain(core, scale_by_learning_rate(learning_rate))
    if not decouple:
        return chain(add_decayed_weights(weight_decay, mask), core, scale_by_learning_rate(learning_rate))
    peak = peak_of(learning_rate)

    def shrink(count: Tensor) -> Tensor:
        lr, start = rate(count), torch.zeros_like(count).double() + peak
        relative = torch.where(start == 0, torch.ones_like(lr), lr / start)
        return -relative * decay(count) * ((count > 0) if late else 1)

    return chain(core, scale_by_learning_rate(learning_rate), add_decayed_weights(shrink, mask))
