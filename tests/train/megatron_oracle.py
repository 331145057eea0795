"""Writes a checkpoint with Megatron-LM's own code on a CPU, and the logits of its model: run as a script by test_convert.py."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F


def write(kind: str, folder: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    llama = kind == "llama"
    norm = "RMSNorm" if llama else "LayerNorm"
    sizes = dict(num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2 if llama else None, kv_channels=6)
    unfused = ("bias_activation", "bias_dropout", "masked_softmax", "gradient_accumulation")
    config = TransformerConfig(
        **sizes,
        **{f"{name}_fusion": False for name in unfused},
        apply_rope_fusion=False,
        ffn_hidden_size=40,
        use_cpu_initialization=True,
        normalization=norm,
        gated_linear_unit=llama,
        activation_func=F.silu if llama else F.gelu,
        add_bias_linear=not llama,
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=norm),
        vocab_size=56,
        max_sequence_length=64,
        position_embedding_type="rope" if llama else "learned_absolute",
        share_embeddings_and_output_weights=not llama,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    os.makedirs(f"{folder}/{kind}/iter_0000005")
    with open(f"{folder}/{kind}/latest_checkpointed_iteration.txt", "w") as file:
        file.write("5")
    state = {"iteration": 5, "checkpoint_version": 3.0} | model.sharded_state_dict()
    dist_checkpointing.save(state, f"{folder}/{kind}/iter_0000005")
    tokens, places = torch.randint(0, 53, (2, 9)), torch.arange(9).expand(2, 9)
    logits = model.eval()(tokens, places, torch.ones(1, 1, 9, 9).triu(1).bool())
    torch.save({"tokens": tokens, "logits": logits.detach()}, f"{folder}/{kind}.logits")


def main(folder: str) -> None:
    import megatron.core.tensor_parallel.random as rng
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: "cpu"  # what it asks of a GPU it has, even on a CPU
    torch.cuda.synchronize = lambda *_: None
    rng.CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    for kind in ("llama", "gpt2"):
        write(kind, folder)


if __name__ == "__main__":
    main(sys.argv[1])
