"""Fine-tuning data: every conversation once, only the assistant learned, kept on disk, mistakes with their line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron.data import tokenizers
from fmegatron.data.chat import TEMPLATES, Chat
from fmegatron.data.sft import Conversations, Turns, spell, tokenize_conversations

QUIET = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text("abc é\n", min_size=1, max_size=9)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)
everyone = st.lists(turns, min_size=1, max_size=12)


def messages(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def decoded(row) -> list[tuple[str, str]]:
    """(text, learned text) of each document of a row of bytes."""
    out = []
    for document in np.unique(row["documents"]):
        here = row["documents"] == document
        if row["weights"][here].any():
            tokens, labels = row["tokens"][here], row["labels"][here]
            assert (tokens[1:] == labels[:-1]).all() and row["positions"][here][0] == 0
            learned = labels[row["weights"][here] == 1]
            out.append((bytes([tokens[0], *labels]).decode(), bytes(learned.tolist()).decode(errors="replace")))
    return out


@QUIET
@given(everyone, st.booleans(), st.integers(0, 2))
def test_every_conversation_is_learned_once_an_epoch_and_only_what_the_assistant_wrote(tmp_path, said, pack, seed):
    source = [{"messages": messages(pairs)} for pairs in said]
    corpus = Conversations(source, "byte", "chatml", tmp_path, pack=pack)
    cycle = corpus.samples(256, seed)
    count = len(cycle.rows)
    assert count == len(source) or (pack and count < len(source))
    for epoch in range(2):
        got = [pair for n in range(count) for pair in decoded(cycle.row(epoch * count + n))]
        texts = [Chat(TEMPLATES["chatml"]).render(example["messages"])[0] for example in source]
        learned = ["".join(f"{answer}<|im_end|>" for _, answer in pairs) for pairs in said]
        assert sorted(got) == sorted(zip(texts, learned, strict=True))


@QUIET
@given(everyone)
def test_a_file_a_list_and_prompts_say_the_same(tmp_path, said):
    lists = [{"messages": messages(pairs)} for pairs in said]
    split = [{"prompt": m["messages"][:-1], "completion": m["messages"][-1:]} for m in lists]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(example) for example in lists) + "\n")
    codec, chat = tokenizers.load("byte"), Chat(TEMPLATES["plain"])
    folders = [tokenize_conversations(s, tmp_path, codec, chat) for s in (lists, str(tmp_path / "x.jsonl"), split)]
    for other in folders[1:]:
        assert (Path(folders[0] / "tokens.bin").read_bytes()) == (other / "tokens.bin").read_bytes()
    assert (folders[0] / "targets.bin").read_bytes() == (folders[1] / "targets.bin").read_bytes()
    for example, pairs in zip(split, said, strict=True):
        text, spans, ends = spell(chat, example)
        assert [text[a:b] for a, b in spans] == [pairs[-1][1] + "\n"] and not ends  # earlier answers are not learned


def test_prompt_and_completion_end_with_the_end_of_a_document(tmp_path):
    folder = tokenize_conversations([{"prompt": "1+1=", "completion": "2"}], tmp_path, tokenizers.Bytes(), Chat(""))
    tokens, wanted = Turns(folder, 16)[0]
    assert tokens.tolist() == [*b"1+1=2", 256] and wanted.tolist() == [0, 0, 0, 0, 1, 1]


def test_long_ones_are_refused_cut_or_dropped(tmp_path):
    source = [{"prompt": "ab", "completion": "c" * n} for n in (1, 20, 3)]
    folder = tokenize_conversations(source, tmp_path, tokenizers.Bytes(), Chat(""))
    with pytest.raises(ValueError, match="1 of 3 conversations are longer than seq 16, the longest has 22 tokens"):
        Turns(folder, 16)
    cut, kept = Turns(folder, 16, "truncate"), Turns(folder, 16, "drop")
    assert cut.lengths.tolist() == [3, 16, 5] and kept.lengths.tolist() == [3, 5]
    assert cut[1][0].tolist() == [*b"ab", *b"c" * 15] and kept[1][0].tolist() == [*b"abccc", 256]
    with pytest.raises(ValueError, match="all 3 conversations are longer than seq 2"):
        Turns(folder, 2, "drop")


def test_made_once_and_anew_for_another_template_or_tokenizer(tmp_path):
    source = [{"messages": messages([("a", "b")])}]
    first = tokenize_conversations(source, tmp_path, tokenizers.Bytes(), Chat(TEMPLATES["plain"]))
    before = (first / "tokens.bin").stat().st_mtime_ns
    assert tokenize_conversations(source, tmp_path, tokenizers.Bytes(), Chat(TEMPLATES["plain"])) == first
    assert (first / "tokens.bin").stat().st_mtime_ns == before
    other = tokenize_conversations(source, tmp_path, tokenizers.Bytes(), Chat(TEMPLATES["chatml"]))
    codec = tokenizers.train_bpe(["user assistant"], 300)
    third = tokenize_conversations(source, tmp_path, codec, Chat(TEMPLATES["plain"]))
    assert len({first, other, third}) == 3


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": "x"}', "x.jsonl:2: neither messages nor prompt and completion in it, but text"),
    ("[1]", "x.jsonl:2: neither messages .* but list"),
    ("{", "x.jsonl:2: not JSON"),
    ('{"messages": []}', "x.jsonl:2: a conversation without messages"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "x.jsonl:2: nothing that the assistant wrote"),
    ('{"prompt": "a", "completion": []}', "x.jsonl:2: prompt and completion are two texts or two lists"),
    ('{"messages": ["hello"]}', "x.jsonl:2: a message is"),
])
def test_mistakes_name_their_line_and_leave_nothing(tmp_path, line, message):
    good = json.dumps({"messages": messages([("a", "b")])})
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        tokenize_conversations(tmp_path / "x.jsonl", tmp_path / "cache", tokenizers.Bytes(), Chat(TEMPLATES["llama3"]))
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="is not a file of conversations"):
        tokenize_conversations(tmp_path / "y.jsonl", tmp_path, tokenizers.Bytes(), Chat(""))
