"""Text from trained models: tokens one after the other, with what attention has seen kept."""

from typing import TYPE_CHECKING

from fmegatron.inference.decode import generate, stream
from fmegatron.lazy import submodules

__all__ = ["generate", "stream"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
