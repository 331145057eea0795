"""How values travel between stages: inside one process, or from process to process.

    send(action, payload)         action: SEND_F or SEND_B of a stage that ran here
    take = receive(action)        action: RECV_F or RECV_B of a stage that will run here; `take()` waits for its payload
    flush()                       what was asked for goes on its way

A payload is named tensors and the names among them that depend on parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron.models.model import Values
from fmegatron.sharding import Mesh
from fmegatron.train.pipeline.schedule import Action

Payload = tuple[Values, frozenset[str]]
Spec = list[tuple[str, tuple[int, ...], torch.dtype, bool]]


class Transport(Protocol):
    """What an executor asks. shapes: of the microbatch; what is sent for equal ones has equal shapes."""

    def send(self, action: Action, payload: Payload, shapes: Hashable) -> None: ...

    def receive(self, action: Action, shapes: Hashable) -> Callable[[], Payload]: ...

    def flush(self) -> None: ...

    def finish(self) -> None: ...


def receiver(action: Action) -> Action:
    """The receive that belongs to a send."""
    forward = action.kind == "SEND_F"
    return replace(action, stage=action.stage + (1 if forward else -1), kind="RECV_F" if forward else "RECV_B")


def spec_of(payload: Payload) -> Spec:
    """Names, shapes and dtypes of a payload, and whether each depends on parameters."""
    values, moving = payload
    return [(name, tuple(x.shape), x.dtype, name in moving) for name, x in values.items()]


class Local:
    """All ranks in one process: a payload is handed on as it is; `specs` notes its shapes."""

    def __init__(self, specs: dict[Any, Spec]) -> None:
        self.box: dict[Action, Payload] = {}
        self.specs = specs

    def send(self, action: Action, payload: Payload, shapes: Hashable) -> None:
        """Lay it ready."""
        to = receiver(action)
        self.box[to] = payload
        self.specs[to.kind, to.stage, shapes] = spec_of(payload)

    def receive(self, action: Action, shapes: Hashable) -> Callable[[], Payload]:
        """It is there."""
        return lambda: self.box.pop(action)

    def flush(self) -> None:
        """Nothing is on its way."""

    def finish(self) -> None:
        """All that was sent was taken."""
        assert not self.box, f"never received: {', '.join(map(str, self.box))}"


class Imagined:
    """One rank of a mesh without peers: what comes has the shapes of `specs`, what goes is reported by the axis's transport."""

    def __init__(self, mesh: Mesh, specs: dict[Any, Spec]) -> None:
        self.mesh, self.specs = mesh, specs

    def send(self, action: Action, payload: Payload, shapes: Hashable) -> None:
        """Report it, one permute a tensor."""
        imagine(self.mesh, payload[0].values())

    def receive(self, action: Action, shapes: Hashable) -> Callable[[], Payload]:
        """Tensors without values."""
        spec = self.specs[action.kind, action.stage, shapes]
        values = {name: torch.empty(shape, dtype=dtype, device=self.mesh.device) for name, shape, dtype, _ in spec}
        return lambda: (values, frozenset(name for name, _, _, moves in spec if moves))

    def flush(self) -> None:
        """Nothing is on its way."""

    def finish(self) -> None:
        """Nobody waits."""


def imagine(mesh: Mesh, values: Iterable[Tensor]) -> None:
    """Report tensors that go to another stage."""
    axis = mesh["pp"]
    for x in values:
        rank = torch.empty((), dtype=torch.int64, device=mesh.device)
        axis.transport.wait(axis.transport.permute(x, axis, rank, tuple(range(axis.size))))


class PointToPoint:
    """Each rank of the axis pp is a process; neighbouring transfers of its list go in one `batch_isend_irecv`.

    Shapes are known on both sides: where a microbatch's are new, a header goes ahead; `specs` remembers it over steps.
    """

    def __init__(self, mesh: Mesh, rank_of: tuple[int, ...], specs: dict[Any, Spec]) -> None:
        self.mesh, self.rank_of, self.specs = mesh, rank_of, specs
        self.ops: list[dist.P2POp] = []
        self.slots: list[list[Any] | None] = []
        self.sent: list[Any] = []

    def peer(self, stage: int) -> int:
        """The global rank of the process that runs a stage."""
        axis, rank = self.mesh["pp"], self.mesh.rank
        assert rank is not None
        return rank + (self.rank_of[stage] - rank // axis.stride % axis.size) * axis.stride

    def send(self, action: Action, payload: Payload, shapes: Hashable) -> None:
        """Queue it; a header at once where the shapes are new."""
        to, values = receiver(action), payload[0]
        key = (to.kind, to.stage, shapes)
        if key not in self.specs:
            self.flush()
            spec = spec_of(payload)
            dist.send_object_list([spec], self.peer(to.stage))
            self.specs[key] = spec
        for name, _, _, _ in self.specs[key]:
            x = values[name].contiguous()
            self._queue(dist.P2POp(dist.isend, x, self.peer(to.stage)), None)

    def receive(self, action: Action, shapes: Hashable) -> Callable[[], Payload]:
        """Queue it; a header first where the shapes are new."""
        source = action.stage + (-1 if action.kind == "RECV_F" else 1)
        key = (action.kind, action.stage, shapes)
        if key not in self.specs:
            self.flush()
            header: list[Any] = [None]
            dist.recv_object_list(header, self.peer(source))
            self.specs[key] = header[0]
        spec, works, values = self.specs[key], list[Any](), dict[str, Tensor]()
        for name, shape, dtype, _ in spec:
            values[name] = torch.empty(shape, dtype=dtype, device=self.mesh.device)
            self._queue(dist.P2POp(dist.irecv, values[name], self.peer(source)), works)

        def take() -> Payload:
            self.flush()
            for work in works:
                work.wait()
            return values, frozenset(name for name, _, _, moves in spec if moves)

        return take

    def _queue(self, op: dist.P2POp, works: list[Any] | None) -> None:
        self.ops.append(op)
        self.slots.append(works)

    def flush(self) -> None:
        """Start the batch."""
        if not self.ops:
            return
        started = dist.batch_isend_irecv(self.ops)
        joint = len(started) != len(self.ops)  # NCCL gives one work for the whole batch
        for i, (op, works) in enumerate(zip(self.ops, self.slots, strict=True)):
            work = started[0] if joint else started[i]
            if works is None:
                self.sent.append((work, op.tensor))  # the tensor lives until it has gone
            else:
                works.append(work)
        self.ops, self.slots = [], []

    def finish(self) -> None:
        """Wait for all that was sent."""
        self.flush()
        for work, _ in self.sent:
            work.wait()
        self.sent = []
