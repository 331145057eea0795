"""Text in, text out, from what lies on disk: a run's folder, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmegatron import models
from fmegatron.config import ConfigError
from fmegatron.data import tokenizers
from fmegatron.inference.decode import stream
from fmegatron.models import Model
from fmegatron.sharding import SINGLE
from fmegatron.train import checkpoint, saving
from fmegatron.train.convert import model_of, tokenizer_of
from fmegatron.train.remote import is_remote
from fmegatron.train.resume import steps_of
from fmegatron.tree import Tree


def main(source: str, prompt: str, *, tokens: int, **settings: Any) -> None:
    """Print a prompt and its continuation, as it comes."""
    model, params, codec = load(source)
    shown = ""
    for text in continuations(model, params, codec, prompt, tokens, **settings):
        ready = text[: -1 if text.endswith("\ufffd") else None]  # half of a character waits for its other half
        print(ready.removeprefix(shown) if ready.startswith(shown) else "", end="", flush=True)
        shown = ready if ready.startswith(shown) else shown
    print()


def sample(path: str | Path, prompt: str, tokens: int = 160, **settings: Any) -> str:
    """A prompt with its continuation."""
    model, params, codec = load(path)
    *_, text = continuations(model, params, codec, prompt, tokens, **({"temperature": 0.7, "seed": 0} | settings))
    return text


def continuations(model: Model, params: Tree, codec: tokenizers.Tokenizer, prompt: str, tokens: int, **settings: Any) -> Any:
    """The text after each token, the prompt first; ends at the end of a document."""
    end = _eod(codec)
    ids = codec.encode(prompt) or ([] if end is None else [end])
    if not ids:
        raise ConfigError("the prompt is empty, and this tokenizer has no end-of-document token to start from")
    yield codec.decode(ids)
    for token in stream(model, params, torch.tensor([ids]), tokens, **settings):
        if int(token) == end:
            return
        ids.append(int(token))
        yield codec.decode(ids)


def load(source: str | Path) -> tuple[Model, Tree, tokenizers.Tokenizer]:
    """Model, parameters on one device, and tokenizer."""
    path = Path(source)
    if not (path.exists() or is_remote(source)):
        raise ConfigError(f"{source}: no such folder; expected a run's folder, a checkpoint, or a Hugging Face folder")
    if (path / "config.json").is_file():
        return *models.from_hf(path), tokenizers.load(path)
    found = checkpoint.find(steps_of(str(source)))
    meta = checkpoint.read_meta(found)
    model = model_of(meta)
    home = tokenizer_of(str(source), found)
    where = home / "tokenizer.json" if home is not None else meta.get("tokenizer")
    if where is None:
        raise ConfigError(f"{found}: no tokenizer is known: put its tokenizer.json into {found.parent.parent}")
    return model, saving.load_params(found, model, SINGLE), tokenizers.load(where)


def _eod(codec: tokenizers.Tokenizer) -> int | None:
    try:
        return codec.eod
    except ValueError:
        return None
