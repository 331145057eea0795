"""Optimizers: pairs of pure functions, composed by `chain`.

    tx = chain(clip_by_global_norm(1.0), adamw(cosine(3e-4, warmup=100, steps=2000)))

Read base.py, then adam.py. elementwise.py is how a formula becomes a transform, fuse.py how a chain becomes one pass.
"""

from fmegatron.optim.adam import adam, adamw, scale_by_adam
from fmegatron.optim.base import LOCAL, Known, Over, Transform, apply_updates, chain
from fmegatron.optim.clip import clip_by_global_norm, clip_by_value
from fmegatron.optim.decay import add_decayed_weights
from fmegatron.optim.fuse import FusedStep, fuse
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import constant, cosine, inverse_sqrt, linear, wsd
from fmegatron.optim.sgd import scale_by_momentum, sgd

__all__ = [
    "LOCAL", "FusedStep", "Known", "Over", "Transform", "adam", "adamw", "add_decayed_weights", "apply_updates", "chain",
    "clip_by_global_norm", "clip_by_value", "constant", "cosine", "fuse", "inverse_sqrt", "linear", "scale_by_adam",
    "scale_by_learning_rate", "scale_by_momentum", "sgd", "wsd",
]
