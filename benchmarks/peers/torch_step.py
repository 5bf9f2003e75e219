"""The training step of the PyTorch peers: autocast to bfloat16 over float32 weights, clipped, AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from protocol import Work, measure
from torch import nn

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(model, inputs, targets) -> mean loss."""


def run(work: Work, build: Callable[[Work], nn.Module], loss_of: Loss) -> None:
    """Build, step and answer. With the variant "torch.compile" the model is compiled as the libraries' own trainers do
    it: the module, not the loop. AdamW is the fused one, the fastest there is."""
    torch.manual_seed(0)
    torch.set_num_threads(work.threads)
    model = build(work).train()
    parameters = list(model.parameters())
    matrices = [one for one in parameters if one.dim() > 1]
    vectors = [one for one in parameters if one.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": work.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=work.rate, betas=work.betas, eps=work.epsilon, fused=True)
    called = torch.compile(model) if work.variant == "torch.compile" else model
    tokens = torch.from_numpy(work.tokens()).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(called, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, work.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    measure(work, sum(one.numel() for one in parameters), step)
