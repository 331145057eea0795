"""mosaicml-streaming in a process of its own: `python oracle.py` answers pickled calls (function name, arguments).

Its package imports torchvision, which is not installed, for data sets of pictures that nothing here uses: empty modules
stand in for it, in this process only.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from types import ModuleType
from typing import Any


class Oracle:
    """Calls a function of this file in the other process; its error comes back as RuntimeError."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            data = pickle.dumps((name, args, kwargs))
            self.process.stdin.write(struct.pack("<Q", len(data)) + data)
            self.process.stdin.flush()
            kind, value = pickle.loads(self.process.stdout.read(struct.unpack("<Q", self.process.stdout.read(8))[0]))
            if kind == "error":
                raise RuntimeError(value)
            return value

        return call

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def stand_ins() -> None:
    from importlib.machinery import ModuleSpec

    def module(name: str, **attributes: Any) -> None:
        made = ModuleType(name)
        made.__spec__, made.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(made).update(attributes)
        sys.modules[name] = made

    module("torchvision", __version__="0")
    module("torchvision.datasets", VisionDataset=type("VisionDataset", (), {}), CIFAR10=type("CIFAR10", (), {}))
    module("torchvision.transforms")
    module("torchvision.transforms.functional", to_tensor=None)


def write(out: str, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any) -> None:
    from streaming import MDSWriter
    with MDSWriter(columns=columns, out=out, **options) as writer:
        for sample in samples:
            writer.write(sample)


def read(local: str, **options: Any) -> list[dict[str, Any]]:
    from streaming import StreamingDataset
    data = StreamingDataset(local=local, batch_size=1, **options)
    return [data[i] for i in range(data.num_samples)]


def encode(values: dict[str, Any]) -> dict[str, bytes]:
    from streaming.base.format.mds.encodings import mds_encode
    return {name: mds_encode(name, value) for name, value in values.items()}


def shuffle(algo: str, *args: Any) -> Any:
    from streaming.base.shuffle import get_shuffle
    return get_shuffle(algo, *args)


def partition(algo: str, *args: Any) -> Any:
    from streaming.base.partition import get_partitions
    return get_partitions(algo, *args)


def of_shards(*args: Any) -> Any:
    from streaming.base.sampling import get_sampling
    return get_sampling(*args)


def epochs(streams: list[dict[str, Any]], world: dict[str, int], epoch: int, consumed: int, **options: Any) -> Any:
    """The work of an epoch, int64 [machines, ranks, workers, batches, batch_size], of a real StreamingDataset."""
    from streaming import Stream, StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.util import clean_stale_shared_memory
    from streaming.base.world import World
    clean_stale_shared_memory()
    data = StreamingDataset(streams=[Stream(**stream) for stream in streams], **options)
    there = World.detect()
    for name, value in world.items():
        setattr(there, name, value)
    data._resume(there, 0)
    return generate_work(data.batching_method, data, there, epoch, consumed)


def main() -> None:
    import os
    import warnings
    out, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    stand_ins()
    import transformers  # noqa: F401  looks for torchvision by itself
    while head := sys.stdin.buffer.read(8):
        name, args, kwargs = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", head)[0]))
        try:
            answer = ("value", globals()[name](*args, **kwargs))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        data = pickle.dumps(answer)
        out.write(struct.pack("<Q", len(data)) + data)
        out.flush()


if __name__ == "__main__":
    main()
