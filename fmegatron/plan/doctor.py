"""`fmegatron doctor`: what is here, and whether its collectives tell the truth, before a long run finds out.

    fmegatron doctor                                        one process: versions and devices
    torchrun --nproc-per-node 8 -m fmegatron doctor --mesh.tp 4

Each collective of each mesh axis runs on values of which every rank knows all, and its backward too, which must be its
transpose. Then each axis is timed. The last line says that all is well, or what is wrong first.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron.config import Mesh as MeshConfig
from fmegatron.plan.config import DoctorConfig
from fmegatron.sharding import Mesh
from fmegatron.sharding.collectives import AllGather, AllToAll, Op, Ppermute, Psum, ReduceScatter, apply
from fmegatron.sharding.mesh import Axis
from fmegatron.train import setup
from fmegatron.transforms import why_not_compile

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LARGE = 1 << 22  # bytes of the timed all_reduce


@dataclass(frozen=True)
class Finding:
    """One line of the report. wrong: whether it is a fault."""

    line: str
    wrong: bool = False


def main(config: DoctorConfig) -> None:
    """Print what is found, on rank 0. Raises ValueError naming the first fault, on every rank that sees it."""
    wrong: list[str] = []

    def say(finding: Finding) -> None:
        wrong.extend([finding.line] if finding.wrong else [])
        if os.environ.get("RANK", "0") == "0":
            print(f"{'WRONG ' if finding.wrong else ''}{finding.line}", flush=True)

    for finding in [*versions(), *launcher(os.environ, config.mesh)]:
        say(finding)
    if not wrong:
        for finding in together(config):
            say(finding)
    if wrong:
        raise ValueError(f"doctor: {len(wrong)} fault(s), the first: {wrong[0]}")
    say(Finding("all is well"))


def together(config: DoctorConfig) -> Iterator[Finding]:
    """The process group, and what `over` finds on its mesh; what does not answer in time is a fault."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if world > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
        yield from over(setup.mesh_of(config.mesh))
    except (RuntimeError, dist.DistError) as error:
        line = " ".join(str(error).split())
        yield Finding(f"{world} processes should work together, and after {config.timeout} s at most: {line[:300]}", wrong=True)
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def versions() -> Iterator[Finding]:
    """Python, torch, devices, compiler."""
    yield Finding(f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}, "
                  f"{os.cpu_count()} CPUs")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield Finding(f"cuda:{i} {about.name}, {about.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}")
    else:
        yield Finding("no CUDA device: gloo on the CPU")
    missing = why_not_compile()
    yield Finding("blocks can be compiled" if missing is None else f"blocks run eager: {missing}")


def launcher(env: os._Environ[str] | dict[str, str], config: MeshConfig) -> Iterator[Finding]:
    """The launcher's variables, and whether the mesh fills its processes."""
    given = {name: env[name] for name in VARIABLES if name in env}
    if not given:
        yield Finding("no launcher: one process")
    else:
        yield Finding("launcher: " + " ".join(f"{name}={value}" for name, value in given.items()))
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            yield Finding(f"the launcher set {', '.join(given)} but not {', '.join(missing)}: start with torchrun", wrong=True)
            return
    world, sizes = int(env.get("WORLD_SIZE", "1")), config.sizes
    if int(env.get("RANK", "0")) >= world:
        yield Finding(f"RANK = {env['RANK']} is not below WORLD_SIZE = {world}", wrong=True)
    ranks = 1
    for axis, n in sizes.items():
        ranks *= n if axis != "dp" or n != -1 else 1
    shown = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1) or "one device"
    if (config.dp == -1 and world % ranks) or (config.dp != -1 and ranks != world):
        others = ranks if config.dp == -1 else ranks // config.dp
        hint = f"set mesh.dp = {world // others}" if world % others == 0 else f"start {ranks} processes"
        yield Finding(f"the mesh ({shown}) has {ranks} rank(s) and WORLD_SIZE is {world}: {hint}", wrong=True)


def over(mesh: Mesh) -> Iterator[Finding]:
    """Each axis: its collectives, then its latency and bandwidth."""
    axes = [axis for axis in mesh.axes if axis.size > 1]
    if not axes:
        yield Finding("one rank: no collective to check")
        return
    assert mesh.rank is not None
    rank = torch.tensor(mesh.rank, device=mesh.device)
    for axis in axes:
        faults = [fault for fault in (check(axis, rank) for check in CHECKS) if fault]
        wrong = _any(bool(faults), mesh)
        if wrong:
            line = faults[0] if faults else "another rank got wrong values"
            yield Finding(f"{axis.name} of {axis.size} ranks: {line}", wrong=True)
            continue
        yield Finding(f"{axis.name} of {axis.size} ranks: {len(CHECKS)} collectives and their transposes are right")
        yield Finding(f"{axis.name} of {axis.size} ranks: {timed(axis, rank)}")


def timed(axis: Axis, rank: Tensor) -> str:
    """Seconds of the smallest all_reduce, and bytes/s of a large one, by the ring's bytes."""
    small, large = (torch.zeros(n // 4, device=rank.device) for n in (4, LARGE))
    latency = min(_seconds(lambda: apply(small, rank, Psum(axis)), rank) for _ in range(5))
    each = min(_seconds(lambda: apply(large, rank, Psum(axis)), rank) for _ in range(3))
    sent = 2 * (axis.size - 1) / axis.size * LARGE
    return f"latency {latency * 1e6:.0f} us, bandwidth {sent / each / 1e9:.2f} GB/s"


def _seconds(run: Callable[[], object], rank: Tensor) -> float:
    def settle() -> None:
        if rank.device.type == "cuda":
            torch.cuda.synchronize()

    settle()
    start = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - start


def _any(flag: bool, mesh: Mesh) -> bool:
    """Whether any rank says so: over the process group itself, not over what is being checked."""
    if not dist.is_initialized():
        return flag
    flags: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


# -- collectives on values that every rank knows --------------------------------------------------------------------
Check = Callable[[Axis, Tensor], str | None]
WIDTH = 6


def values(axis: Axis, rank: Tensor, rows: int) -> list[Tensor]:
    """What each rank along the axis holds: fp64 [rows, WIDTH], different everywhere, exact in sums."""
    first = int(rank) - int(axis.coordinate(rank)) * axis.stride
    numbers = torch.arange(rows * WIDTH, dtype=torch.float64, device=rank.device).view(rows, WIDTH)
    return [numbers * (1 + first + i * axis.stride) + i for i in range(axis.size)]


def check(
    name: str, op: Callable[[Axis], Op], rows: Callable[[int], int], expect: Callable[[list[Tensor], int], Tensor]
) -> Check:
    """A check of a collective: its result, and that its backward is its transpose: <y, A x> = <A' y, x>, summed over ranks."""

    def run(axis: Axis, rank: Tensor) -> str | None:
        place = int(axis.coordinate(rank))
        held = values(axis, rank, rows(axis.size))
        x = held[place].clone().requires_grad_()
        y = apply(x, rank, op(axis))
        wanted = expect(held, place)
        right = y.shape == wanted.shape and torch.equal(y, wanted)
        cotangents = [torch.cos(torch.arange(wanted.numel(), dtype=x.dtype, device=x.device) + i).view(wanted.shape)
                      for i in range(axis.size)]
        (back,) = torch.autograd.grad(y, x, cotangents[place].reshape(y.shape))  # also of what is wrong: others wait for it
        if not right:
            return f"{name} gives {_sample(y)}, not {_sample(wanted)}"
        inputs = [h.clone().requires_grad_() for h in held]
        whole = sum((expect(inputs, i) * cotangents[i]).sum() for i in range(axis.size))
        assert isinstance(whole, Tensor)
        true = torch.autograd.grad(whole, inputs[place])[0]
        if not torch.allclose(back, true, rtol=1e-12, atol=1e-12):
            return f"the backward of {name} gives {_sample(back)}, not {_sample(true)}"
        return None

    return run


def _sample(x: Tensor) -> str:
    return f"{[round(v, 3) for v in x.detach().flatten()[:3].tolist()]}... of {list(x.shape)}"


def _next(axis: Axis) -> Op:
    return Ppermute(axis, tuple((i - 1) % axis.size for i in range(axis.size)))


CHECKS: tuple[Check, ...] = (
    check("psum", Psum, lambda n: 2, lambda held, i: torch.stack(held).sum(0)),
    check("all_gather", lambda axis: AllGather(axis, 0), lambda n: 2, lambda held, i: torch.cat(held)),
    check("reduce_scatter", lambda axis: ReduceScatter(axis, 0), lambda n: 2 * n,
          lambda held, i: torch.stack(held).sum(0)[2 * i : 2 * i + 2]),
    check("all_to_all", lambda axis: AllToAll(axis, 0, 0), lambda n: 2 * n,
          lambda held, i: torch.cat([x[2 * i : 2 * i + 2] for x in held])),
    check("permute", _next, lambda n: 2, lambda held, i: held[(i - 1) % len(held)]),
)
