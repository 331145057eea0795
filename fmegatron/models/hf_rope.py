"""Rotary settings of Hugging Face configs, both ways: plain, linear, Llama 3.1's, YaRN.

Read in the form of transformers 5 (rope_parameters) or before (rope_theta, rope_scaling); written in the older one, which
both read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmegatron.models.config import Config
from fmegatron.nn.rope import Llama3Scaling, Scaling, Yarn

LLAMA3 = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "context": "original_max_position_embeddings",
}
YARN = {
    "factor": "factor",
    "context": "original_max_position_embeddings",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}  # ours: theirs


def rope_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our Config. Raises ValueError on a rope_type that is not supported."""
    given = c.get("rope_parameters") or {}
    table = given or c.get("rope_scaling") or {}
    kind = table.get("rope_type", table.get("type", "default"))
    fields: dict[str, Any] = {"rope_base": float(given.get("rope_theta", c.get("rope_theta", 10000.0)))}
    fields["rope_fraction"] = float(given.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)))
    if kind == "default":
        return fields
    if kind == "linear":
        return fields | {"rope_interpolation": float(table["factor"])}
    if kind == "llama3":
        return fields | {"rope_scaling": _scaling(Llama3Scaling, LLAMA3, table)}
    if kind == "yarn":
        factor = c["max_position_embeddings"] / table["original_max_position_embeddings"]
        return fields | {"rope_scaling": _scaling(Yarn, YARN, table if table.get("factor") else table | {"factor": factor})}
    raise ValueError(f"config.json: rope_type = {kind!r} is not supported, only default, linear, llama3 and yarn")


def _scaling(kind: type[Scaling], names: Mapping[str, str], table: Mapping[str, Any]) -> Scaling:
    given = {ours: table[theirs] for ours, theirs in names.items() if table.get(theirs) is not None}
    whole = ("context", "truncate")
    numbers: dict[str, Any] = {name: x if name in whole else float(x) for name, x in given.items()}
    return kind(**numbers)


def describe_rope(c: Config) -> dict[str, Any]:
    """The inverse of `rope_fields`."""
    plain: dict[str, Any] = {"rope_theta": c.rope_base, "rope_scaling": None}
    s = c.rope_scaling
    if s is not None:
        kind, names = ("yarn", YARN) if isinstance(s, Yarn) else ("llama3", LLAMA3)
        known = {theirs: getattr(s, ours) for ours, theirs in names.items() if getattr(s, ours) is not None}
        plain["rope_scaling"] = {"rope_type": kind, **known}
    elif c.rope_interpolation != 1.0:
        plain["rope_scaling"] = {"rope_type": "linear", "factor": c.rope_interpolation}
    return plain
