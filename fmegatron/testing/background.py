"""What is under way while blocks compute: collectives that go on by themselves, on a mesh without peers, and matmuls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fmegatron.sharding.traffic import Event, Traffic
from fmegatron.sharding.transports import Abstract


class Background(Abstract):
    """Issued work goes on by itself."""

    background = True


class Products(TorchDispatchMode):
    """Notes matmuls in the record of collectives, as issued "matmul" events of rank 0."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.overloadpacket._qualified_op_name in ("aten::mm", "aten::bmm", "aten::addmm"):
            self.traffic.add(0, [Event("issue", "matmul", "", 0)])
        return func(*args, **(kwargs or {}))
