"""One program, run four ways: on one device eager and compiled, on a virtual mesh, and with a thread a rank.

@pytest.mark.parametrize("variant", variants())
def test_it(variant):
    sh = variant.sharding("fsdp_tp_sp", dp=2, tp=2)
    step = make_step(model, tx, sh, **variant.settings)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fmegatron.sharding import RULES, SINGLE, Rules, Sharding, thread_mesh, virtual_mesh
from fmegatron.transforms import why_not_compile


@dataclass(frozen=True)
class Variant:
    """A way to run: what its mesh is made by (None: one device), and whether blocks are compiled."""

    name: str
    mesh: Any = None
    compile: bool = False

    def sharding(self, rules: str | Rules, **sizes: int) -> Sharding:
        """The sharding of these rules on a mesh of these sizes; on one device there is nothing to shard."""
        if self.mesh is None:
            return SINGLE
        return Sharding(self.mesh(**sizes), RULES[rules] if isinstance(rules, str) else rules)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the step that belong to it."""
        return {"compile": True} if self.compile else {}


VARIANTS = MappingProxyType({
    "eager": Variant("eager"),
    "compiled": Variant("compiled", compile=True),
    "virtual": Variant("virtual", virtual_mesh),
    "threads": Variant("threads", thread_mesh),
})


def variants(*names: str) -> list[Any]:
    """Parameters for pytest: the variants named, or all; compiled is skipped, with the reason, where nothing compiles."""
    import pytest

    def marks(variant: Variant) -> list[Any]:
        missing = why_not_compile() if variant.compile else None
        return [pytest.mark.skip(reason=missing)] if missing else []

    chosen = [VARIANTS[name] for name in names or VARIANTS]
    return [pytest.param(variant, id=variant.name, marks=marks(variant)) for variant in chosen]
