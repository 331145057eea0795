"""Models: values made of declarations and pure functions. By name, from Hugging Face, or your own."""

from fmegatron.models.config import Config
from fmegatron.models.gpt import gpt
from fmegatron.models.hf import from_hf, to_hf
from fmegatron.models.model import Model, Node, run_chain
from fmegatron.models.presets import (
    deepseek,
    gemma,
    gemma2,
    gpt2,
    gpt_oss,
    llama2,
    llama3,
    mistral,
    mixtral,
    preset,
    qwen2,
    qwen3,
)
from fmegatron.models.upcycle import upcycle

__all__ = [
    "Config",
    "Model",
    "Node",
    "deepseek",
    "from_hf",
    "gemma",
    "gemma2",
    "gpt",
    "gpt2",
    "gpt_oss",
    "llama2",
    "llama3",
    "mistral",
    "mixtral",
    "preset",
    "qwen2",
    "qwen3",
    "run_chain",
    "to_hf",
    "upcycle",
]
