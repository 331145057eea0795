"""Planning without the hardware: memory, traffic, seconds and MFU of a run on a mesh that need not exist."""

from typing import TYPE_CHECKING

from fmegatron.lazy import submodules

if not TYPE_CHECKING:
    __getattr__, __dir__ = submodules(__name__)
