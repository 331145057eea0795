"""A run's [fp8] keys as a change of its model."""

from __future__ import annotations

from typing import Any

from fmegatron.config import ConfigError, RunConfig
from fmegatron.kernels.quantize import Recipe, recipe
from fmegatron.models import Model
from fmegatron.models.lower import lower


def lowered(c: RunConfig, model: Model) -> Model:
    """The model with the products that `c.fp8` names in few bits. Raises ConfigError."""
    f = c.fp8
    try:
        found: dict[str, Recipe | None] = {pattern: _named(c, str(name)) for pattern, name in f.others.items()}
        if f.recipe is not None:
            found |= dict.fromkeys(f.match, _named(c, f.recipe))
        return lower(model, found, first=f.first, last=f.last, gather=f.gather) if found else model
    except ValueError as error:
        raise ConfigError(f"fp8: {error}") from None


def _named(c: RunConfig, name: str) -> Recipe | None:
    f = c.fp8
    if name == "off":
        return None
    own: dict[str, Any] = {"history": f.history, "algorithm": f.algorithm} if name == "delayed" else {}
    own |= {"block": f.block} if name in ("blockwise", "mxfp8", "nvfp4") else {}
    own |= {"format": f.format, "pow2": f.pow2} if name != "nvfp4" else {}
    return recipe(name, margin=f.margin, wgrad=f.wgrad, **own)
