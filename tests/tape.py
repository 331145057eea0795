"""A recorder with the manners of CUDA graphs, on a CPU: what tests of recorded steps replay.

Recording runs nothing that lasts: what was written over is put back, what was made is poisoned. A replay calls the very
operators again on the very memory, intermediates included, and knows nothing of the Python that once chose them. Reading a
value on the host is an error while recording, as it is for CUDA.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def place(x):
    return x.untyped_storage().data_ptr()


def alias(x):
    """The same memory in a tensor that nobody else can empty."""
    return x.detach()


class Reading(TorchFunctionMode):
    """Refuses what reads a tensor on the host without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records operators with their operands and results."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in READS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        flat, spec = tree_flatten((args, kwargs))
        held = [alias(x) if isinstance(x, torch.Tensor) else x for x in flat]
        given = {place(x) for x in held if isinstance(x, torch.Tensor)}
        if func._schema.is_mutable and func is not torch.ops.aten.set_.default:
            for x in held:  # whatever it may write over
                if isinstance(x, torch.Tensor) and place(x) not in self.made and place(x) not in self.before and x.numel():
                    whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                    self.before[place(x)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        if func is torch.ops.aten.set_.default:
            return out
        results = [alias(x) for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        fresh = [x if place(x) not in given else None for x in results]
        self.made |= {place(x): x for x in fresh if x is not None and x.numel()}
        if func._schema.is_mutable or any(x is not None for x in fresh):
            self.calls.append((func, held, spec, fresh))
        return out


class Recorder:
    """A Backend of graphs.py."""

    def __init__(self):
        self.warm, self.tapes = 0, []

    def warm_up(self, run):
        self.warm += 1
        return run()

    def capture(self, run):
        tape = Tape()
        with Reading(), tape:
            out = run()
        for whole, before in tape.before.values():
            whole.copy_(before)
        for x in tape.made.values():
            x.untyped_storage().fill_(0x7F)
        self.tapes.append(tape)

        def replay():
            for func, held, spec, fresh in tape.calls:
                args, kwargs = tree_unflatten(held, spec)
                results = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
                for x, y in zip(fresh, results, strict=True):
                    if x is not None:
                        x.copy_(y)

        return out, replay

    def pool_bytes(self):
        storages = {place(x): x.untyped_storage().nbytes() for tape in self.tapes for x in tape.made.values()}
        return sum(storages.values())
