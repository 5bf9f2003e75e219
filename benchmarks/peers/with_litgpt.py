"""litgpt: its GPT in LLaMA's shape, its initialisation, and the loss of its pretraining loop."""

from __future__ import annotations

import torch
import torch_step
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from protocol import Work
from torch import nn


def build(work: Work) -> nn.Module:
    config = Config(
        block_size=work.length,
        n_layer=work.layers,
        n_embd=work.hidden_size,
        n_head=work.heads,
        n_query_groups=work.kv_heads,
        head_size=work.head_size,
        intermediate_size=work.mlp_size,
        vocab_size=work.vocab_size,
        padded_vocab_size=work.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=work.norm_epsilon,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(work.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    model.apply(model._init_weights)
    return model


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return chunked_cross_entropy(model(inputs), targets)


if __name__ == "__main__":
    torch_step.run(Work.given(), build, loss_of)
