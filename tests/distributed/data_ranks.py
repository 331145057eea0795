"""What each of four processes runs: batches by one reader, and by each rank for itself; rank 0 prints JSON."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from fmegatron import data
from fmegatron.data.batches import batches, held_out_batches
from fmegatron.data.place import batches as corpus_batches
from fmegatron.data.place import reading
from fmegatron.data.share import share_of
from fmegatron.sharding import RULES, Sharding, make_mesh

CASES = [("tp_sp", {"tp": 4}), ("fsdp_tp_sp", {"dp": 2, "tp": 2}), ("cp_ring", {"cp": 2, "tp": 2}), ("ddp", {"pp": 2, "dp": 2}),
         ("fsdp", {"dp": 4})]  # fmt: skip


class Counted:
    """Rows of text that write down which of them were made; the bytes of a row are what it takes to read it."""

    def __init__(self, rows, fails=None):
        self.rows, self.read, self.bytes, self.fails = rows, [], 0, fails

    def row(self, number):
        if number == self.fails:
            raise ValueError(f"file: sample {number} is damaged")
        row = self.rows.row(number)
        self.read.append(number)
        self.bytes += sum(x.nbytes for x in row.values())
        return row


def taken(feed, count):
    """The first batches of a feed, which is then closed."""
    out = list(islice(feed, count))
    feed.close()
    return out


def case(name, sizes, folder):
    """Facts of one mesh: what this rank read, and whether what it got is what it would have read itself."""
    sh = Sharding(make_mesh("cpu", **sizes), RULES[name])
    corpus = data.Corpus(str(folder / "train"), "byte", str(folder / "train"))
    share, feed = share_of(sh), corpus_batches(corpus, sh, seq=16, global_batch=8)
    first, opened = next(feed), maps(folder)
    feed.close()
    rows = corpus.samples(16, 3, reset_positions=True)
    mine, alone = Counted(rows), Counted(rows)
    got = taken(batches(mine, 8, 24, **reading(sh, share)), 3)
    want = taken(batches(alone, 8, 24, ahead=0, **reading(sh)), 3)
    held = corpus.held_out(16, 8, limit=12) if share is None or share.reads else None
    got += held_out_batches(held, **reading(sh, share))
    want += held_out_batches(corpus.held_out(16, 8, limit=12), **reading(sh))
    got += [first]
    want += taken(batches(corpus.samples(16, 0), 8, **reading(sh)), 1)
    equal = len(got) == len(want) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
        for a, b in zip(got, want, strict=True))  # fmt: skip
    try:
        taken(batches(Counted(rows, fails=9), 8, **reading(sh, share)), 3)
        said = ""
    except ValueError as error:
        said = str(error)
    read = sorted(set(mine.read))
    return {"read": read, "bytes": mine.bytes, "alone": alone.read, "opened": opened, "equal": equal, "said": said}


def maps(folder):
    """How often this process has mapped the corpus' tokens, as the system says."""
    return sum(str(folder / "train.bin") in line for line in Path("/proc/self/maps").read_text().splitlines())


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    facts = {" ".join(f"{axis}={n}" for axis, n in sizes.items()): case(name, sizes, folder) for name, sizes in CASES}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, facts)
    if dist.get_rank() == 0:
        print(json.dumps(every), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
