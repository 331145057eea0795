"""`fmegatron train` on conversations, from a Hugging Face folder: what is learned, on any mesh, packed or padded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken

from fmegatron import cli, data
from fmegatron.data import tokenizers

SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama with its tokenizer and chat template, as transformers writes it; and conversations."""
    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(path)
    codec = tokenizers.train_bpe(["user assistant add one to 1 2 3 is answer"] * 5, 300)
    codec.inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=codec.inner, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    for name, numbers in {"train": range(24), "valid": range(30, 35)}.items():
        pairs = [(f"add one to {n % 5}", f"the answer is {n % 5 + 1}" + " 1" * (n % 3)) for n in numbers]
        lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def words(folder: Path, out: Path, *more: str) -> list[str]:
    options = {"run.dir": out, "model.hf": folder, "data.sft": folder / "train.jsonl", "data.valid": folder / "valid.jsonl",
               "data.seq": 64, "training.steps": 4, "training.global_batch": 4, "optimizer.schedule": "constant",
               "optimizer.lr": 0.01, "optimizer.warmup": 0, "log.prompt": "", "validation.interval": 2}
    return ["train", "debug", *(f"--{key}={value}" for key, value in options.items()), *more]


def records(out: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pack", ["true", "false"])
def test_the_loss_is_that_of_the_assistants_tokens_and_falls(folder, tmp_path, pack):
    out = tmp_path / "run"
    assert cli.main(words(folder, out, "--data.pack", pack, "--training.steps", "12")) == 0
    loss = records(out, "loss")
    assert loss[-1] < 0.5 * loss[0]
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["heldout_loss"] < 0.5 * loss[0]

    model = transformers.LlamaForCausalLM.from_pretrained(folder)  # the first step's loss, by transformers alone
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    corpus = data.Conversations(str(folder / "train.jsonl"), str(folder), str(folder), tmp_path / "cache", pack=pack == "true")
    rows = corpus.samples(64, 0)
    lines = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    index = rows.rows.index
    seen = [int(i) for n in range(4) for i in index.items[slice(*index.starts[rows.row_number(n) :][:2])]]
    nats, count = 0.0, 0
    for i in seen:
        out_ = fast.apply_chat_template(lines[i], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt")
        labels = torch.where(torch.as_tensor(out_["assistant_masks"]).bool().reshape(1, -1), out_["input_ids"], -100)
        wanted = int((labels[:, 1:] >= 0).sum())
        with torch.no_grad():
            nats += float(model(input_ids=out_["input_ids"], labels=labels).loss) * wanted
        count += wanted
    assert loss[0] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("more", [
    "--mesh.virtual true --mesh.dp 2 --mesh.tp 2 --training.microbatches 2 --sharding.rules fsdp_tp_sp",
    "--mesh.virtual true --mesh.cp 2 --mesh.dp 2",
])
def test_the_mesh_changes_nothing(folder, tmp_path, more):
    assert cli.main(words(folder, tmp_path / "one")) == 0
    assert cli.main(words(folder, tmp_path / "other", *more.split())) == 0
    for name in ("loss", "grad_norm"):
        assert records(tmp_path / "other", name) == pytest.approx(records(tmp_path / "one", name), rel=1e-4)


def test_a_skipped_sample_is_not_seen_and_a_resumed_run_is_the_same(folder, tmp_path):
    skip = ("--data.skip", '["4:8"]', "--data.pack", "false")
    assert cli.main(words(folder, tmp_path / "whole", "--data.pack", "false")) == 0
    assert cli.main(words(folder, tmp_path / "parts", "--training.steps", "1", *skip)) == 0
    assert cli.main(words(folder, tmp_path / "parts", *skip)) == 0
    whole, parts = records(tmp_path / "whole", "loss"), records(tmp_path / "parts", "loss")
    assert parts[0] == whole[0] and parts[1] != whole[1] and len(parts) == 4
    assert cli.main(words(folder, tmp_path / "at_once", *skip)) == 0
    assert records(tmp_path / "at_once", "loss") == parts


class Table:
    """A data set as Hugging Face's are: a length, and rows by number."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int):
        return json.loads(self.lines[index])


def table(file: str) -> Table:
    return Table(Path(file).read_text().splitlines())


def test_a_sequence_of_mappings_is_as_good_as_a_file(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    more = ["--data.sft", "mine:table", "--data.arguments.file", str(folder / "train.jsonl"), "--training.steps", "2"]
    assert cli.main(words(folder, tmp_path / "one", "--training.steps", "2")) == 0
    assert cli.main(words(folder, tmp_path / "other", *more)) == 0
    assert records(tmp_path / "other", "loss") == records(tmp_path / "one", "loss")


def test_mistakes(folder, tmp_path, capsys):
    for more, message in [
        (["--data.seq", "16"], "longer than seq 16"),
        (["--data.skip", '["8"]'], "data.skip"),
        (["--data.chat", "nothing"], "no chat template nothing"),
    ]:
        assert cli.main(words(folder, tmp_path / "run", *more)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["train", "debug", "--data.sft", str(folder / "train.jsonl"), f"--run.dir={tmp_path / 'x'}"]) == 2
    assert "data.sft: name the data.tokenizer" in capsys.readouterr().err


def test_without_the_document_mask_the_batch_has_no_documents(folder, tmp_path):
    masked, open_ = tmp_path / "masked", tmp_path / "open"
    assert cli.main(words(folder, masked)) == 0
    assert cli.main(words(folder, open_, "--data.document_mask", "false")) == 0
    assert records(masked, "loss")[0] != records(open_, "loss")[0]
