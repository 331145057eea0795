"""What each of the processes runs: `torchrun ranks.py 'RULES AXIS=N... [SETTING=VALUE...]' ...`, a line of JSON per case.

Every rank measures the model on the mesh, and rank 0 compares all of it with one device: parameters, activations, loss,
gradients, norm. Start-up is paid once for many cases.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from fmegatron.models.gpt import Config, gpt
from fmegatron.nn.moe import Moe
from fmegatron.sharding import RULES, SINGLE, Sharding, make_mesh
from fmegatron.sharding.traffic import counted
from fmegatron.testing import assert_same, measure

WIDTHS = {"embed": 16, "heads": 4, "kv": 2, "mlp": 12, "vocab": 21, "vocab_pad": 8}
ODD = {"embed": 18, "heads": 3, "kv": 1, "mlp": 10, "vocab": 21}  # four ranks divide none of them: every leaf has pads
EXPERTS = Moe(experts=4, top_k=2, mlp=8, shared=4, score="sigmoid", sequence_loss=0.1, balance_bias=True)


def batch(rows=8, length=8, vocab=21):
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, length)
    tokens, labels = (torch.randint(0, vocab, shape, generator=generator) for _ in range(2))
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    documents = (torch.rand(shape, generator=generator) > 0.7).long().cumsum(1)
    return {"tokens": tokens, "labels": labels, "weights": weights, "documents": documents}


def most_under_way(traffic, collective, axis):
    """The most of this process's collectives of a kind that were issued and not yet waited for."""
    now, most = 0, 0
    for event in traffic.events[dist.get_rank()]:
        if event[1:3] == (collective, axis):
            now += 1 if event.kind == "issue" else -1
            most = max(most, now)
    return most


def main(cases):
    """Run the cases in turn; one that fails on this rank is reported, not raised, so that ranks stay together."""
    torch.set_num_threads(1)
    expected = {}
    for case in cases:
        rules, *words = case.split()
        given = {k: int(v) if v.isdigit() else v for k, v in (word.split("=") for word in words)}
        sizes = {k: given.pop(k) for k in ("dp", "fsdp", "ep", "cp", "cpa", "tp") if k in given}
        layers, block, odd = given.pop("layers", 2), EXPERTS if given.pop("experts", 0) else None, given.pop("odd", 0)
        widths = ODD if odd else WIDTHS
        model = gpt(Config(layers=layers, **widths, qk_norm="norm", z_loss=1e-3, label_smoothing=0.1, loss_chunks=2, moe=block))
        alone = layers, block, odd
        if alone not in expected:
            expected[alone] = measure(model, SINGLE, batch())
        start, wrong = time.perf_counter(), None
        mesh, traffic = counted(make_mesh("cpu", **sizes))
        actual = measure(model, Sharding(mesh, RULES[rules]), batch(), expected=expected[alone], **given)
        try:
            assert_same(actual, expected[alone], 1e-10)
            if "async_tp" in given and "compile" not in given:
                assert most_under_way(traffic, "all_gather", "tp") == 2, "no gather is under way while another is waited for"
        except AssertionError as error:
            wrong = f"rank {dist.get_rank()}: {error}"
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, wrong)
        if dist.get_rank() == 0:
            report = {"case": case, "wrong": [r for r in reports if r], "seconds": time.perf_counter() - start}
            print(json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
