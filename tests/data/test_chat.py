"""Chat templates against transformers: the same text, the same tokens, the same assistant's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fmegatron.data import tokenizers
from fmegatron.data.chat import TEMPLATES, Chat, load_chat, unmark
from fmegatron.data.sft import spans_encoder

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
TOOLS = (
    "{%- if tools %}{{- tools[0] | tojson(indent=2) }}{%- endif %}\n{%- for m in messages -%}\n"
    "  {%- if m['role'] == 'user' and loop.index0 > 100 %}{% continue %}{% endif %}\n"
    "  {%- if not m.role in ['user', 'assistant', 'system'] %}{{ raise_exception('a strange role') }}{% endif -%}\n"
    "  {{- bos_token + m.role + ': ' -}}\n"
    "  {%- if m.role == 'assistant' -%}\n    {% generation %}{{- m.content | trim + eos_token }}{% endgeneration %}\n"
    "  {%- else %}\n    {{- m.content }}{% endif %}\n{%- endfor -%}\n{% if add_generation_prompt %}assistant: {% endif %}"
)
CASES = {**TEMPLATES, "tools": TOOLS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a small tokenizer."""
    path = tmp_path_factory.mktemp("hf")
    codec = tokenizers.train_bpe(["the cat sat on the mat, über naïve 12 + 13 = 25 " * 20, "{'role': 'user'}"] * 3, 400)
    codec.inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=codec.inner, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TOOLS
    fast.save_pretrained(path)
    return path


# No half of a surrogate pair; and no character of several tokens at a message's end, where char_to_token loses the last.
words = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1"), max_size=8)
contents = st.builds(lambda text, end: text + end, words, st.sampled_from(["a", " cat", "25", "<|im_end|>x", " "]))
roles = st.sampled_from(["user", "assistant", "system"])
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=5)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15)
@given(conversations, st.booleans())
def test_text_and_tokens_are_those_of_transformers(folder, name, messages, prompt):
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    tools = [{"name": "<look & see>"}] if name == "tools" else None
    given = {"chat_template": CASES[name], "tools": tools, "add_generation_prompt": prompt}
    text, spans = Chat(CASES[name], specials).render(messages, prompt, tools)
    assert text == fast.apply_chat_template(messages, tokenize=False, **given)

    theirs = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **given)
    ids, wanted = next(spans_encoder(tokenizers.load(folder))([(text, spans, False)]))
    assert ids.tolist() == theirs["input_ids"]
    assert wanted.tolist() == theirs["assistant_masks"]


@settings(max_examples=15)
@given(conversations)
def test_without_marks_the_turns_tell_the_same(messages):
    for template in TEMPLATES.values():
        bare = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        text, spans = Chat(template).render(messages)
        same, turns = Chat(bare).render(messages)
        assert same == text and [first for first, _ in turns] == [first for first, _ in spans]
        assert {text[stop:turn] for (_, stop), (_, turn) in zip(spans, turns, strict=True)} <= {"", "\n"}  # what follows a turn
        assert len(spans) == sum(message["role"] == "assistant" for message in messages)


def test_a_template_that_looks_ahead_is_refused_unless_it_has_marks():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    thinking = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="message 1 in another way once other messages follow.*endgeneration"):
        Chat(thinking).render(said)
    marked = thinking.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    assert Chat(marked).render(said) == ("aab", [(0, 1), (1, 2), (2, 3)])


def test_where_templates_are_found(folder, tmp_path):
    assert load_chat(folder) == Chat(TOOLS, {"bos_token": "<s>", "eos_token": "</s>"})
    file = tmp_path / "my.jinja"
    file.write_text("{{ messages[0].content }}")
    assert load_chat(file).render([{"role": "user", "content": "x"}])[0] == "x"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}],
                    "eos_token": {"content": "</s>"}}))
    assert load_chat(tmp_path) == Chat("d", {"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load_chat(tmp_path).template == "newer"
    (tmp_path / "none").mkdir()
    for source, message in {tmp_path / "none": "has no chat_template", "chatlm": "give chatml, llama3, plain"}.items():
        with pytest.raises(ValueError, match=message):
            load_chat(source)


def test_mistakes_are_one_line():
    user = [{"role": "user", "content": "x"}]
    for template, messages, message in [
        ("{{ raise_exception('no system here') }}", user, "cannot render this conversation: no system here"),
        ("{% for %}", user, "is no Jinja"),
        ("{{ messages[0].content }}", [], "without messages"),
        ("{{ messages[0].content }}", [{"role": "user", "content": "\ufdd0"}], "no characters"),
        ("{{ messages.append(1) }}", user, "is unsafe"),
    ]:
        with pytest.raises(ValueError, match=message):
            Chat(template).render(messages)


@given(st.lists(st.tuples(words, words), max_size=4), words)
def test_unmark(parts, last):
    text, spans = unmark("".join(f"{outside}\ufdd0{inside}\ufdd1" for outside, inside in parts) + last)
    assert text == "".join(outside + inside for outside, inside in parts) + last
    assert [text[first:stop] for first, stop in spans] == [inside for _, inside in parts]


def test_a_tokenizer_without_offsets_encodes_stretch_by_stretch():
    ids, wanted = next(spans_encoder(tokenizers.Bytes())([("user: é\nme: ß", [(12, 13)], False)]))
    assert bytes(ids.tolist()).decode() == "user: é\nme: ß"
    assert np.flatnonzero(wanted).tolist() == [13, 14] and ids[13:].tolist() == list("ß".encode())
