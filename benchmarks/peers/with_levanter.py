"""Levanter: its LLaMA, its loss, its Adam and its trainer's state, with the attention and the loss that it takes by
itself on this platform. The step is that of its Trainer, less meshes, hooks and trackers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
from levanter.layers.attention import AttentionMask
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample
from levanter.optim.config import AdamConfig
from levanter.trainer_state import TrainerState
from levanter.utils.tree_utils import inference_mode
from protocol import Work, measure

HEAD_DEVIATION = 0.02
"""Of the output layer's first weights, as in the others. Levanter's own is 1/sqrt(fan-in), a first loss of half a nat
more."""

POLICY = jmp.get_policy("params=float32,compute=bfloat16,output=float32")


def build(work: Work) -> LlamaLMHeadModel:
    config = LlamaConfig(
        max_seq_len=work.length,
        hidden_dim=work.hidden_size,
        intermediate_dim=work.mlp_size,
        num_layers=work.layers,
        num_heads=work.heads,
        num_kv_heads=work.kv_heads,
        head_dim=work.head_size,
        layer_norm_epsilon=work.norm_epsilon,
        rope=DefaultRotaryEmbeddingsConfig(theta=work.rope_theta),
        gradient_checkpointing=work.variant == "checkpointed",
    )
    made, head = jax.random.split(jax.random.key(0))
    model = LlamaLMHeadModel.init(hax.Axis("vocab", work.vocab_size), config, key=made)
    weight = model.lm_head.weight
    drawn = HEAD_DEVIATION * hax.random.normal(head, weight.axes)
    return replace(model, lm_head=replace(model.lm_head, weight=drawn))


def examples(work: Work) -> LmExample:
    """The batch. Levanter shifts by itself, so that the last place of a row has no target."""
    Batch, Pos = hax.Axis("batch", work.batch), hax.Axis("position", work.length)
    ids = hax.named(jnp.asarray(work.tokens()[:, :-1]), (Batch, Pos))
    counted = LmExample.causal_loss_mask(Pos).astype(jnp.float32).broadcast_axis(Batch)
    return LmExample(tokens=ids, loss_weight=counted, attn_mask=AttentionMask.causal())


def main() -> None:
    work = Work.given()
    adam = AdamConfig(
        learning_rate=work.rate,
        weight_decay=work.decay,
        beta1=work.betas[0],
        beta2=work.betas[1],
        epsilon=work.epsilon,
        max_grad_norm=work.clip,
        lr_schedule="constant",
        warmup=0,
    )
    state = TrainerState.init(adam.build(work.warm_up + work.steps + 1), build(work), key=jax.random.key(1), mp=POLICY)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array)))
    batch = examples(work)

    @partial(hax.named_jit, donate_args=(True, False))
    def stepped(state: TrainerState, batch: LmExample) -> tuple[TrainerState, jax.Array]:
        def loss_of(model: LlamaLMHeadModel) -> jax.Array:
            return POLICY.cast_to_compute(model).compute_next_token_loss(batch).scalar()

        loss, gradients = eqx.filter_value_and_grad(loss_of)(inference_mode(state.model, False))
        moved, _ = state.take_step(gradients, loss=loss, key=state.training_key)
        return moved, loss

    def step() -> float:
        nonlocal state
        state, loss = stepped(state, batch)
        jax.block_until_ready((state, loss))
        return float(loss)

    measure(work, parameters, step)


if __name__ == "__main__":
    main()
