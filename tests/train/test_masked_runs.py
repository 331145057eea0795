"""`fmegatron train` on BERT's and T5's rows, by keys, with a model of one's own; the decoder refuses them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pieces import files, records_of

from fmegatron import cli, config, data
from fmegatron.models import Model, Node
from fmegatron.nn.param import Param, normal
from fmegatron.train.source import source_of

VOCAB, WORDS = 60, 50  # the rest are marks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Files of 40 documents of sentences, each word followed by itself plus one."""
    folder, draw = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    for name in ("train", "valid"):
        with data.IndexedWriter(folder / name, "<u2") as out:
            for _ in range(40):
                out.add_document(*((draw.integers(WORDS) + np.arange(draw.integers(3, 9))) % WORDS for _ in range(5)))
    return folder


def near(sh, p, v, key):
    """A token from the two beside it: all that BERT needs here."""
    h = torch.nn.functional.embedding(v["tokens"], p["table"])
    return {"h": torch.roll(h, 1, 1) @ p["left"] + torch.roll(h, -1, 1) @ p["right"]}


def summed(sh, p, v, key):
    """What was taken out, from what is left of the text and the token before."""
    h = torch.nn.functional.embedding(v["tokens"], p["table"]).mean(1, keepdim=True)
    return {"h": h @ p["left"] + torch.nn.functional.embedding(v["decoder_tokens"], p["table"]) @ p["right"]}


def loss(sh, p, v, key):
    nats = torch.nn.functional.cross_entropy((v["h"] @ p["table"].T).movedim(-1, 1), v["labels"], reduction="none")
    return {"loss.masked": (nats * v["weights"]).sum()}


def model(kind):
    """For `model.function`."""
    w = normal(0.3)
    declare = {"table": Param("vocab embed", w), "left": Param("embed other", w), "right": Param("embed other", w)}
    body, reads = (near, ("tokens",)) if kind == "bert" else (summed, ("tokens", "decoder_tokens"))
    own = tuple((name, name) for name in declare)
    chain = (Node(body, own, reads, ("h",)), Node(loss, own[:1], ("h", "labels", "weights"), ("loss.masked",)))
    return Model(declare, {"vocab": VOCAB, "embed": 32, "other": 32}, chain, lambda sh, batch: dict(batch),
                 lambda sh, v: {"masked": v["weights"].sum()})  # fmt: skip


MASKED = {"bert": "{cls = 50, sep = 51, mask = 52}",
          "t5": "{bos = 50, eos = 51, sentinels = [52, 53, 54, 55, 56, 57, 58, 59], decoder_seq = 24}"}  # fmt: skip


def words(corpus: Path, out: Path, kind: str, *more: str) -> list[str]:
    options = {"data.kind": kind, "data.masked": MASKED[kind], "data.source": corpus / "train", "data.valid": corpus / "valid",
               "data.tokenizer": f"null:{VOCAB - 1}", "data.seq": 32, "training.steps": 24, "training.global_batch": 16,
               "model.function": "mine:model", "model.overrides.kind": kind, "optimizer.lr": 0.05, "validation.interval": 24,
               "run.dir": out, "checkpoint.keep": 0, "optimizer.schedule": "constant", "log.prompt": ""}  # fmt: skip
    options |= dict(word[2:].split("=", 1) for word in more)
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items() if value != "" or key == "log.prompt")]


@pytest.mark.parametrize("kind", MASKED)
def test_a_model_of_ones_own_learns_and_goes_on_bitwise(kind, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    assert cli.main(words(corpus, tmp_path / "whole", kind)) == 0
    assert cli.main(words(corpus, tmp_path / "parts", kind, "--training.steps=15")) == 0
    assert cli.main(words(corpus, tmp_path / "parts", kind)) == 0
    whole, parts = records_of(tmp_path / "whole"), records_of(tmp_path / "parts")
    assert whole[-1]["loss"] < 0.7 * whole[0]["loss"] and whole[-1]["heldout_loss"] < whole[0]["loss"]
    assert [r["loss"] for r in whole] == [r["loss"] for r in parts]
    assert files(tmp_path / "whole").items() <= files(tmp_path / "parts").items()


def test_the_rows_are_the_librarys(corpus, tmp_path):
    table = {"data": {"kind": "bert", "masked": {"cls": 50, "sep": 51, "mask": 52, "rate": 0.3, "pairs": False},
                      "source": str(corpus / "train"), "tokenizer": f"null:{VOCAB - 1}", "seq": 32},
             "run": {"seed": 4}}  # fmt: skip
    source = source_of(config.load("debug", table), print)
    masking = data.Masking(rate=0.3)
    rows = data.Bert(data.IndexedDataset(corpus / "train"), 32, 4, 50, 51, 52, VOCAB, masking, pairs=False)
    for number in (0, 7, len(rows) + 3):
        row = source.rows.row(number)
        assert all((row[key] == value).all() for key, value in rows.row(number).items())


@pytest.mark.parametrize("kind, more, said", [
    ("bert", "--model.function= --model.overrides.kind=", "data.kind = bert: this decoder predicts the next token"),
    ("t5", "--model.function= --model.overrides.kind=", "data.kind = t5: this decoder predicts the next token"),
    ("bert", "--data.masked={cls=50,sep=51}", "data.masked: mask = None: name a token"),
    ("bert", "--data.masked={cls=50,sep=51,mask=52,bos=53}", "data.masked: bert has no bos, it has cls, sep, mask"),
    ("t5", "--data.masked={bos=50,eos=51}", "data.masked: sentinels = None: a list of tokens"),
    ("bert", "--data.masked={cls=50,sep=51,mask=60}", "data.masked: mask = 60: name a token, by its text or its number"),
    ("bert", "--data.step_tokens=99", "data.step_tokens are both set"),
    ("bert", "--data.kind=text", "data.masked is for data.kind"),
    ("bert", "--data.tokenizer=null:55 --data.masked={cls=3,sep=4,mask=5}", "another tokenizer's files?"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(kind, more, said, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    with data.IndexedWriter(tmp_path / "wide", "<u2") as out:
        out.add_document(*(np.full(5, 59) for _ in range(9)))
    last = [f"--data.source={tmp_path / 'wide'}"] if "55" in more else []
    assert cli.main(words(corpus, tmp_path / "run", kind, *more.split(), *last)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
