"""Writes a checkpoint with Megatron-LM's own code on a CPU, and the logits of its model: run as a script by test_convert.py."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F


def main(kind: str, folder: str) -> None:
    import megatron.core.tensor_parallel.random as rng
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.current_device = lambda: "cpu"  # what it asks of a GPU it has, even on a CPU
    torch.cuda.synchronize = lambda *_: None
    rng.CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()
    dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    llama = kind == "llama"
    config = TransformerConfig(
        num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2 if llama else None, kv_channels=6,
        ffn_hidden_size=40, use_cpu_initialization=True, normalization="RMSNorm" if llama else "LayerNorm",
        gated_linear_unit=llama, activation_func=F.silu if llama else F.gelu, add_bias_linear=not llama, qk_layernorm=False,
        layernorm_epsilon=1e-5, bias_activation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False)  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization=config.normalization), vocab_size=56, max_sequence_length=64,
        position_embedding_type="rope" if llama else "learned_absolute", share_embeddings_and_output_weights=not llama)  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    os.makedirs(f"{folder}/iter_0000005")
    with open(f"{folder}/latest_checkpointed_iteration.txt", "w") as file:
        file.write("5")
    state = {"iteration": 5, "checkpoint_version": 3.0} | model.sharded_state_dict()
    dist_checkpointing.save(state, f"{folder}/iter_0000005")
    tokens, places = torch.randint(0, 56, (2, 9)), torch.arange(9).expand(2, 9)
    logits = model.eval()(tokens, places, torch.ones(1, 1, 9, 9).triu(1).bool())
    torch.save({"tokens": tokens, "logits": logits.detach()}, f"{folder}.logits")


if __name__ == "__main__":
    main(*sys.argv[1:])
