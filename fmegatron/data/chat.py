"""Chats as text: a Jinja template renders messages and says which characters the assistant wrote.

    chat = load_chat("path/to/Qwen3-0.6B")       # the template in its tokenizer_config.json
    text, spans = chat.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

Templates follow Hugging Face's conventions: `messages`, `tools`, `add_generation_prompt`, special tokens by name, and
`{% generation %}…{% endgeneration %}` around what the assistant writes. A template without these marks is rendered
turn by turn, and what an assistant's message adds to the text after the generation prompt is the assistant's.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

Message = Mapping[str, Any]
Span = tuple[int, int]

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text that is exchanged holds them
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATES = MappingProxyType({
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token or '' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {% generation %}{{ m.content }}\n"
        "{% endgeneration %}{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
})


class Generation(jinja2.ext.Extension):
    """The `generation` block: its text, between marks."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


@dataclass(frozen=True)
class Chat:
    """A chat template and the special tokens that it may name ({"bos_token": "<s>", …})."""

    template: str
    specials: Mapping[str, str] = field(default_factory=dict)

    def render(
        self, messages: Sequence[Message], prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans [first, stop) of its characters that the assistant wrote.

        `prompt` ends it with what comes before an assistant's turn. Raises ValueError for what the template refuses, and
        for a template that neither marks the assistant's text nor renders each turn independently of the later ones.
        """
        if not messages:
            raise ValueError("a conversation without messages")
        if not all(isinstance(message, Mapping) and "role" in message for message in messages):
            raise ValueError('a message is {"role": …, "content": …}')
        said = json.dumps([messages, tools], ensure_ascii=False, default=str)
        if OPEN in said or CLOSE in said:
            raise ValueError("the conversation holds U+FDD0 or U+FDD1, which are no characters")
        marked = self._text(messages, prompt, tools)
        if OPEN in marked:
            return unmark(marked)
        return marked, [] if prompt else self._turns(messages, marked, tools)

    def _turns(self, messages: Sequence[Message], whole: str, tools: Sequence[Any] | None) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, after = self._text(messages[:i], True, tools), self._text(messages[: i + 1], False, tools)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template renders message {i} in another way once other messages follow, so what the assistant "
                    "wrote cannot be told: put {% generation %} and {% endgeneration %} around it in the template"
                )
            spans.append((len(before), len(after)))
        return spans

    def _text(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Any] | None) -> str:
        given = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._compiled.render(**self.specials, **given)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template cannot render this conversation: {error}") from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no Jinja: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self.template, dict(self.specials))


def load_chat(source: str | Path) -> Chat:
    """The chat template that `source` names: a built-in name, a Jinja file, or a Hugging Face folder.

    A folder's `chat_template.jinja` comes before the `chat_template` of its tokenizer_config.json; of several named ones
    the one called "default" is taken.
    """
    if str(source) in TEMPLATES:
        return Chat(TEMPLATES[str(source)])
    path = Path(source)
    if path.is_file():
        return Chat(path.read_text(encoding="utf-8"))
    names = ", ".join(TEMPLATES)
    if not path.is_dir():
        raise ValueError(f"no chat template {source}: give {names}, a Jinja file, or a Hugging Face folder")
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if template is None:
        raise ValueError(f"{path}: its tokenizer_config.json has no chat_template: name one, {names}, or a Jinja file")
    specials = {name: _content(config[name]) for name in SPECIALS if config.get(name)}
    return Chat(template, specials)


def unmark(marked: str) -> tuple[str, list[Span]]:
    """A text without its marks, and the spans that they enclosed."""
    first, *parts = marked.split(OPEN)
    text, spans = first, []
    for part in parts:
        inside, _, after = part.partition(CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def _content(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    """JSON as it is written, where Jinja's own filter escapes HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **more)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
