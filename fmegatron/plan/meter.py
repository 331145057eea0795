"""What a piece of torch does to a device: FLOPs of its products, bytes it moves, and the most memory alive at once.

    with Fused(), Meter() as meter:
        step()
    meter.counts, meter.peaks

It counts on any device, on meta tensors too: there a step of a large model costs no memory and next to no time. `Fused` is
for those: attention is then the fused kernel that it will be, not the products that torch writes out without a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from fmegatron.offload import Plain, Wait

aten = torch.ops.aten
ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward)
FREE = (aten.detach, aten.alias, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten._unsafe_view)


@dataclass(frozen=True)
class Count:
    """matmul, attention: FLOPs, of attention those that a causal kernel computes. Bytes read and written by kernels:

    moved: by every kernel but views, one after the other, as an eager step runs them.
    operands: of products and attention alone: what is left where all between two products is fused into one kernel.
    """

    matmul: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    operands: float = 0.0

    def __add__(self, other: Count) -> Count:
        matmul, attention = self.matmul + other.matmul, self.attention + other.attention
        return Count(matmul, attention, self.moved + other.moved, self.operands + other.operands)

    def __mul__(self, times: float) -> Count:
        return Count(self.matmul * times, self.attention * times, self.moved * times, self.operands * times)

    def __sub__(self, other: Count) -> Count:
        return self + other * -1.0


class Alive:
    """The storages of a memory that are alive. bound: at least their bytes, as nobody tells when a storage shrinks."""

    def __init__(self) -> None:
        self.bound = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __contains__(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._alive

    def hold(self, values: Iterable[Tensor]) -> None:
        """Tensors to count as alive for as long as they are."""
        for x in values:
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            ref, before = self._alive.get(key, (None, 0))
            if ref is None or ref() is None:
                ref = weakref.ref(storage, partial(self._drop, key))
            self._alive[key] = (ref, size)
            self.bound += size - before

    def bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        for key, (ref, _) in list(self._alive.items()):
            storage = ref()
            if storage is not None:
                self._alive[key] = (ref, storage.nbytes())
        self.bound = sum(size for _, size in self._alive.values())
        return self.bound

    def _drop(self, key: int, ref: Any) -> None:
        if key in self._alive and self._alive[key][0] is ref:  # the address may be another storage's by now
            self.bound -= self._alive.pop(key)[1]


class Meter(TorchDispatchMode):
    """Counts what runs while it is entered, for each label; the label is set from outside.

    counts: {label: Count}. peaks: {label: most bytes of tensor storages alive after one of its operators}; what was alive
    before is alive only if it was told (`hold`). marks: bytes alive at moments that somebody wanted to keep. It is the
    transport of what waits in host memory too: that counts as `host`, its copies under the label "link", or "update link".
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.counts: dict[str, Count] = {}
        self.peaks: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.host = 0  # most bytes
        self._device, self._host = Alive(), Alive()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold(x for x in _tensors(out) if x not in self._host)
        self.counts[self.label] = self.counts.get(self.label, Count()) + count(func, args, kwargs or {}, out)
        if self._device.bound > self.peaks.get(self.label, -1):
            self.peaks[self.label] = max(self.peaks.get(self.label, 0), self.alive())
        return out

    def hold(self, values: Iterable[Tensor]) -> None:
        """Tensors to count as alive for as long as they are."""
        self._device.hold(values)

    def alive(self) -> int:
        """Bytes of the storages that are alive now."""
        return self._device.bytes()

    def out(self, xs: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Wait]:
        """Copies that count as host memory."""
        with _disable_current_modes():
            made, wait = Plain().out(xs, into)
        self.keep(made)
        self._send(xs)
        return made, wait

    def back(self, xs: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Wait]:
        """Copies that count as the device's."""
        self._send(xs)
        with _disable_current_modes():
            made, wait = Plain().back(xs, device)
        self.hold(made)
        return made, wait

    def _send(self, xs: Sequence[Tensor]) -> None:
        label = f"{self.label} link" if self.label == "update" else "link"
        self.counts[label] = self.counts.get(label, Count()) + Count(moved=float(sum(x.numel() * x.element_size() for x in xs)))

    def finish(self) -> None:
        """All copies are done when they are issued."""

    def keep(self, values: Iterable[Tensor]) -> None:
        """Tensors in host memory."""
        self._host.hold(values)
        self.host = max(self.host, self._host.bytes())


def count(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Count:
    """What one operator does."""
    packet = func.overloadpacket
    if func.is_view or packet in FREE:
        return Count()
    values = (args, kwargs) if "out" in kwargs else (args, kwargs, out)
    moved = float(sum(x.numel() * x.element_size() for x in _tensors(values)))
    if packet in ATTENTION:
        return Count(attention=_attention(packet is ATTENTION[1], args, kwargs), moved=moved, operands=moved)
    if packet in flop_registry:
        return Count(matmul=float(flop_registry[packet](*args, **kwargs, out_val=out)), moved=moved, operands=moved)
    return Count(moved=moved)


def _attention(backward: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Two products forward; five backward, as the scores are computed again. Causal: half of each."""
    q, k = args[1:3] if backward else args[:2]
    causal = args[7] if backward else (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
    batch, heads, length, hd = q.shape
    return (10 if backward else 4) * batch * heads * length * k.shape[2] * hd * (0.5 if causal else 1.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


class Fused(TorchFunctionMode):
    """Attention on meta tensors runs as the fused kernel that it is on a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return func(*args, **given)
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=args[0].dtype)  # as torch does: minus infinity where nothing is seen
        options = {"attn_mask": mask, "scale": given.get("scale")}
        q, k, v = args[:3]
        narrow = q.shape[-1] - v.shape[-1]  # the kernel is of one width: values are padded
        y, _ = ATTENTION[0](q, k, F.pad(v, (0, narrow)) if narrow else v, 0.0, given.get("is_causal", False), **options)
        return y[..., : v.shape[-1]] if narrow else y
