"""Text from trained models: tokens one after the other, with what attention has seen kept."""

from fmegatron.inference.decode import generate, stream

__all__ = ["generate", "stream"]
