"""Training: a state, a step, and the loop around them.

    state = init(model, tx, sh, key=0)
    step = make_step(model, tx, sh)
    state, metrics = step(state, batch)
"""

from typing import TYPE_CHECKING

from fmegatron.lazy import submodules
from fmegatron.train.evaluate import make_evaluate
from fmegatron.train.planned import plan_step
from fmegatron.train.state import TrainState, init
from fmegatron.train.step import make_step, value_and_grad

__all__ = ["TrainState", "init", "make_evaluate", "make_step", "plan_step", "value_and_grad"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
