"""Building blocks: declarations of parameters and pure functions of named tensors. They know names, and no mesh."""

from typing import TYPE_CHECKING

from fmegatron.lazy import submodules

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
