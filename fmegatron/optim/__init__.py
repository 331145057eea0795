"""Optimizers: pairs of pure functions, composed by `chain`.

    tx = chain(clip_by_global_norm(1.0), adamw(cosine(3e-4, warmup=100, steps=2000)))

Read base.py, then adam.py. elementwise.py is how a formula becomes a transform, fuse.py how a chain becomes one pass.
"""

from fmegatron.optim.adafactor import adafactor
from fmegatron.optim.adam import (
    adam,
    adamw,
    adopt,
    aggmo_adamw,
    aggmo_adopt,
    decoupled_adamw,
    qhadamw,
    qhadopt,
    scale_by_adam,
)
from fmegatron.optim.base import LOCAL, Known, Over, Transform, apply_updates, chain
from fmegatron.optim.batch_size import BatchSizes, rampup, stepwise
from fmegatron.optim.clip import clip_by_global_norm, clip_by_value
from fmegatron.optim.decay import add_decayed_weights
from fmegatron.optim.formats import Split
from fmegatron.optim.fuse import FusedStep, fuse
from fmegatron.optim.groups import freeze, masked, multi
from fmegatron.optim.host import in_host_memory
from fmegatron.optim.lion import lion, scale_by_lion
from fmegatron.optim.low_bit import in_formats
from fmegatron.optim.momenta import fourth_root, scale_by_adopt, scale_by_momenta
from fmegatron.optim.muon import muon, newton_schulz, orthogonalize, qk_clip, scale_by_mean
from fmegatron.optim.rate import scale_by_leaf, scale_by_learning_rate
from fmegatron.optim.schedules import Rate, by_samples, constant, cosine, increment, inverse_sqrt, linear, schedule, wsd
from fmegatron.optim.sgd import scale_by_momentum, sgd
from fmegatron.optim.switch import Switch, peak_of, scaled

__all__ = [
    "LOCAL", "BatchSizes", "FusedStep", "Known", "Over", "Rate", "Split", "Switch", "Transform", "adafactor", "adam",
    "adamw", "add_decayed_weights", "adopt", "aggmo_adamw", "aggmo_adopt", "apply_updates", "by_samples", "chain",
    "clip_by_global_norm", "clip_by_value", "constant", "cosine", "decoupled_adamw", "fourth_root", "freeze", "fuse",
    "in_formats", "in_host_memory", "increment", "inverse_sqrt", "linear", "lion", "masked", "multi", "muon",
    "newton_schulz", "orthogonalize", "peak_of", "qhadamw", "qhadopt", "qk_clip", "rampup", "scale_by_adam",
    "scale_by_adopt", "scale_by_leaf", "scale_by_learning_rate", "scale_by_lion", "scale_by_mean", "scale_by_momenta",
    "scale_by_momentum", "scaled", "schedule", "sgd", "stepwise", "wsd",
]
