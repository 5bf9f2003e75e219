"""Hugging Face transformers: LlamaForCausalLM with sdpa, and its own loss."""

from __future__ import annotations

import torch
import torch_step
from protocol import Work
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def build(work: Work) -> nn.Module:
    config = LlamaConfig(
        hidden_size=work.hidden_size,
        intermediate_size=work.mlp_size,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        head_dim=work.head_size,
        vocab_size=work.vocab_size,
        max_position_embeddings=work.length,
        rms_norm_eps=work.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": work.rope_theta},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # The targets are shifted already: given as labels alone they would be shifted once more.
    return model(input_ids=inputs, labels=targets, shift_labels=targets).loss


if __name__ == "__main__":
    torch_step.run(Work.given(), build, loss_of)
