"""Devices as plain data: what one computes, holds and sends, by its data sheet; and what of that a training step gets.

A link is named by where a mesh axis lies. Ranks are numbered as the mesh is, node by node; an axis whose ranks all lie in one
node has the link inside, any other the network across nodes:

    stride x size <= node      inside                       tp=8 on nodes of 8
    otherwise                  across, times the ranks of a group that share a node (each brings its own adapter)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """flops: {dtype: dense peak FLOP/s}. memory: bytes. bandwidth, inside, across: bytes/s, of links in one direction.

    latency: seconds until a collective's first byte, (inside, across). node: devices that share the link inside.
    host: bytes/s to and from host memory, each. watts: its limit of power. attention: the part of the peak that its fused
    attention gets; None: as much as products.
    """

    name: str
    flops: MappingProxyType[str, float]
    memory: float
    bandwidth: float
    inside: float
    across: float
    latency: tuple[float, float] = (1e-5, 3e-5)
    node: int = 8
    host: float = 64e9
    watts: float = 700.0
    attention: float | None = None

    def link(self, stride: int, size: int) -> tuple[Literal["inside", "across"], float]:
        """The link of a mesh axis and its bytes/s for one rank: `size` ranks, `stride` apart."""
        if stride * size <= self.node:
            return "inside", self.inside
        return "across", min(self.inside, self.across * min(size, max(1, self.node // stride)))


STATIC = 0.3  # of the power that a loaded device draws: leakage, memory and links idle, a common figure for H100s


def capped(device: Hardware, watts: float) -> Hardware:
    """The device under a lower limit of power: its clock falls, and the FLOP/s with it; memory and links keep their own.

    P = static + dynamic, dynamic ~ clock * voltage^2, and voltage follows the clock: so the clock goes as the cube root of what
    is left for it. Raises ValueError for a limit that leaves nothing or is above the device's own.
    """
    idle = STATIC * device.watts
    if not idle < watts <= device.watts:
        raise ValueError(f"a limit of {watts:g} W: {device.name} has {device.watts:g} W, of which {idle:g} W are static")
    clock = ((watts - idle) / (device.watts - idle)) ** (1 / 3)
    flops = MappingProxyType({dtype: value * clock for dtype, value in device.flops.items()})
    return replace(device, flops=flops, watts=watts)


@dataclass(frozen=True)
class Efficiency:
    """The part of a peak that a training step gets. flops: of products; bytes: of memory; links: as nccl-tests mostly show."""

    flops: float
    bytes: float
    links: float = 0.8


# With these the first and the last row of Megatron-LM's H100 table are predicted right: experiments/plan_vs_published
# calibrates them, and its test compares.
STEP = Efficiency(flops=0.6145, bytes=0.5369)


def _flops(bf16: float, tf32: float, fp32: float, **more: float) -> MappingProxyType[str, float]:
    return MappingProxyType({"bf16": bf16, "fp16": bf16, "tf32": tf32, "fp32": fp32} | more)


# Peaks: the sources in train/flops.py. Memory and links: the same data sheets. Networks: one 400 Gb/s adapter a device
# (A100: 200 Gb/s), as in NVIDIA's reference designs; hosts: PCIe 5 (A100: 4) of 16 lanes. cpu: one core of about 2.5 GHz with
# AVX2, gloo on one host.
# Attention is torch's scaled_dot_product_attention, FlashAttention-2: 0.35 of the peak of an H100 (arXiv 2407.08608).
HARDWARE = MappingProxyType({
    "h100": Hardware("h100", _flops(989.4e12, 494.7e12, 66.9e12, fp8=1978.9e12), 80e9, 3.35e12, 450e9, 50e9, attention=0.35),
    "h200": Hardware("h200", _flops(989.4e12, 494.7e12, 66.9e12, fp8=1978.9e12), 141e9, 4.8e12, 450e9, 50e9, attention=0.35),
    "a100": Hardware("a100", _flops(312e12, 156e12, 19.5e12), 80e9, 2.039e12, 300e9, 25e9, host=32e9, watts=400),
    "b200": Hardware("b200", _flops(2250e12, 1125e12, 75e12, fp8=4500e12), 180e9, 7.7e12, 900e9, 50e9, watts=1000),
    "cpu": Hardware("cpu", _flops(80e9, 80e9, 80e9), 16e9, 10e9, 1e9, 1e9, latency=(1e-4, 1e-4), host=10e9),
})  # fmt: skip


def hardware(name: str) -> Hardware:
    """A device by name, "h100", or one under a limit of watts, "h100@500". Raises ValueError naming the known ones."""
    known, at, watts = name.lower().partition("@")
    if known not in HARDWARE:
        raise ValueError(f"hardware = {name}: unknown, known are {', '.join(HARDWARE)}")
    if at and not watts.replace(".", "", 1).isdigit():
        raise ValueError(f"hardware = {name}: a limit is a number of watts, as in {known}@{HARDWARE[known].watts:g}")
    return capped(HARDWARE[known], float(watts)) if at else HARDWARE[known]
