"""Where memory runs out: which tensors there were, and on a GPU the allocator's own history."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

SHOWN = 30  # lines of a report
EVENTS = 100_000  # of the allocator's history


@contextmanager
def memory_report(folder: Path, rank: int, wanted: bool = True) -> Iterator[None]:
    """Leave `oom-rank-00000.txt` (and `.pickle`, for pytorch.org/memory_viz) where the block runs out of memory; raise on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not wanted or not out_of_memory(error):
            raise
        path = folder / f"oom-rank-{rank:05d}.txt"
        path.write_text(f"{str(error).splitlines()[0] if str(error) else 'out of memory'}\n\n" + "\n".join(tensors()) + "\n")
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        error.add_note(f"rank {rank}: out of memory; what it held: {path}")
        raise


@contextmanager
def history() -> Iterator[None]:
    """Let the GPU's allocator note what it does, for a snapshot; nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: Python's, torch's allocators' on CPU and on GPU."""
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in words


def tensors() -> list[str]:
    """The memory of the process, and its tensors by device, dtype and shape, largest first; views of one memory count once."""
    count: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    bytes_of: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    seen = set()
    for x in gc.get_objects():
        if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided:
            continue
        store = x.untyped_storage()
        if (key := (str(x.device), store.data_ptr())) in seen:
            continue
        seen.add(key)
        kind = (str(x.device), str(x.dtype).removeprefix("torch."), tuple(x.shape))
        count[kind] += 1
        bytes_of[kind] += store.nbytes()
    lines = [f"resident memory of the process: {psutil.Process().memory_info().rss:,} bytes"]
    if torch.cuda.is_available():
        lines += torch.cuda.memory_summary().splitlines()
    lines.append(f"tensors: {sum(bytes_of.values()):,} bytes in {sum(count.values())}")
    for (device, dtype, shape), size in bytes_of.most_common(SHOWN):
        lines.append(f"{size:>18,}  {count[device, dtype, shape]:>5} x {dtype} {list(shape)} on {device}")
    return lines
