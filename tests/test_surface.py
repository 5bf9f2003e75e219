"""The surface that users build on: recipe keys, verbs, names in the metrics. Changing it must be meant.

These lists are written out here and nowhere else; a change of the surface is a change of this file.
"""

from typing import Any

RECIPE_KEYS = """
    extends name description
    model.layers model.hidden_size model.heads model.kv_heads model.head_size model.mlp_size model.vocab_size
    model.circuits model.activation model.norm model.norm_epsilon model.rope_theta
    model.rope_scaling.kind model.rope_scaling.factor model.rope_scaling.original_length
    model.rope_scaling.low_turns model.rope_scaling.high_turns model.rope_scaling.attention_factor
    model.attention_bias model.mlp_bias
    model.tied_embeddings model.initialisation
    tokenizer.name tokenizer.end_of_text
    data.seed data.document_mask data.sources data.held_out
    optimizer.name optimizer.learning_rate optimizer.final_fraction optimizer.warmup optimizer.betas
    optimizer.epsilon optimizer.weight_decay optimizer.clip optimizer.z_loss
    stages.N.name stages.N.length stages.N.tokens stages.N.batch_tokens stages.N.microbatch_tokens
    stages.N.mixture stages.N.remat
    stages.N.mesh.replica stages.N.mesh.fsdp stages.N.mesh.context stages.N.mesh.tensor
    compute.precision compute.attention compute.exchange
    checkpoints.every checkpoints.keep_last checkpoints.keep_every
    evaluation.every evaluation.tokens evaluation.contexts evaluation.target evaluation.stride evaluation.samples
    mesh.replica mesh.fsdp mesh.context mesh.tensor
    notes
"""

MOST_RECIPE_KEYS = 80

VERBS = """
    prepare
    plan
    train
    report
    watch
    generate
    chat
    serve
    bench generate
    bench serve
    bench train
    recipe list
    recipe show
    data show
    data verify
    checkpoint list
    checkpoint verify
    checkpoint hash
    convert hf
    convert gguf
    convert from-hf
    convert from-gguf
"""

STEP_METRICS = """
    step tokens stage length loss grad_norm update_norm param_norm lr tokens_per_second seconds flops_utilisation
    loss_by_position
"""


def test_recipe_keys() -> None:
    from xgen.recipe.keys import recipe_keys

    assert list(recipe_keys()) == RECIPE_KEYS.split()
    assert len(recipe_keys()) <= MOST_RECIPE_KEYS


def test_verbs() -> None:
    import typer.main

    from xgen.cli.app import app

    assert sorted(_verbs(typer.main.get_command(app), "")) == sorted(line.strip() for line in VERBS.split("\n")[1:-1])


def test_step_metrics() -> None:
    from xgen.training.folder import STEP_KEYS

    assert list(STEP_KEYS) == STEP_METRICS.split()


def _verbs(command: Any, name: str) -> list[str]:
    """The names of all commands below `command`, a group's and its own joined."""
    if not hasattr(command, "commands"):
        return [name]
    return [verb for part, below in command.commands.items() for verb in _verbs(below, f"{name} {part}".strip())]
