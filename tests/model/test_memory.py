"""Memory: what the compiler reserves, and what a long step of a real shape takes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xgen.model import Spec, initialise, native
from xgen.model.attention import attention
from xgen.model.decoder import objective
from xgen.model.loss import CHUNK_LOGITS, token_nll, weighted_loss
from xgen.recipe.load import load_recipe

GIB = 2**30


def temporaries(function, *shapes) -> int:
    """Bytes that the compiled `function` reserves beside its arguments and results."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


def of_attention(length, backend, *, backward) -> int:
    def forward(q, k, v, segments):
        return attention(q, k, v, segments, backend)

    def total(q, k, v, segments):
        return forward(q, k, v, segments).sum()

    function = jax.grad(total, (0, 1, 2)) if backward else forward
    heads = [((1, length, count, 64), np.float32) for count in (4, 2, 2)]
    return temporaries(function, *heads, ((1, length), np.int32))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_is_linear_in_the_length_and_the_reference_is_not(backward):
    ratios = {
        backend: of_attention(8192, backend, backward=backward) / of_attention(2048, backend, backward=backward)
        for backend in ("auto", "reference")
    }
    assert ratios["auto"] <= 4.5
    assert ratios["reference"] > 14


TOKENS, WIDTH, ROWS = 8192, 64, 51_200
LOGITS = 4 * TOKENS * ROWS


def of_loss(function) -> int:
    return temporaries(function, ((TOKENS, WIDTH), jnp.bfloat16), ((WIDTH, ROWS), np.float32), ((TOKENS,), np.int32))


def test_the_loss_never_holds_all_logits():
    """A few chunks of 64 MiB (scores, their gradient in two types), where all logits are 1.6 GiB."""
    each = np.full(TOKENS, 1 / TOKENS, np.float32)

    def training(x, head, targets):
        total = lambda x, head: weighted_loss(x, head, targets, jnp.asarray(each), 50_313, 1e-4)  # noqa: E731
        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, head)

    assert of_loss(training) < 6 * 4 * CHUNK_LOGITS < LOGITS / 4
    assert of_loss(lambda x, head, targets: token_nll(x, head, targets, 50_313)) < 3 * 4 * CHUNK_LOGITS


def test_a_plain_loss_would_hold_them():
    def plain(x, head, targets):
        shares = jax.nn.log_softmax((x @ head.astype(x.dtype)).astype(jnp.float32))
        return -jnp.take_along_axis(shares, targets[:, None], axis=1).mean()

    assert of_loss(jax.grad(plain, (0, 1))) > LOGITS


def of_gradients(remat: str, layers: int) -> int:
    """Of a model's objective in bfloat16 at 4,096 tokens."""
    model = ["model.hidden_size=128", "model.heads=2", "model.mlp_size=512", "tokenizer.name=bpe:512"]
    spec = Spec.of(load_recipe("xgen-125m", overrides=[*model, f"model.layers={layers}"]).recipe, 512)
    assert spec.dtype == jnp.bfloat16
    weights = jax.eval_shape(lambda: initialise(spec, 0))
    gradients = jax.grad(lambda weights, *batch: objective(weights, spec, *batch, 1.0, 0.0, remat)[0])
    compiled = jax.jit(gradients).lower(weights, *[jax.ShapeDtypeStruct((1, 4096), np.int32)] * 4).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_layer_costs_what_its_rematerialisation_keeps():
    """The bytes by which six more layers need more, a token and layer: what its backward pass reads but for SwiGLU's
    product, the results of its products, its input. Left to itself XLA's CPU computes all layers again before it goes
    back through the last, and needs as much for all three."""
    each = {remat: (of_gradients(remat, 8) - of_gradients(remat, 2)) / 6 / 4096 for remat in ("none", "dots", "block")}
    if native.library() is not None:
        assert each["none"] < 2 * (10 * 128 + 2 * 512)
        assert each["dots"] < 2 * (6 * 128 + 2 * 512)
    assert each["block"] < 0.3 * each["none"]


STEP = """
import json
import jax
import numpy as np
from pathlib import Path
from xgen.model import Spec, initialise
from xgen.recipe.load import load_recipe
from xgen.training.optimizer import build
from xgen.training.state import State
from xgen.training.step import Tokens, compile_step

recipe = load_recipe("xgen-125m").recipe
stage = recipe.stages[-1].model_copy(update={"batch_tokens": 8192, "microbatch_tokens": 8192})
assert stage.length == 8192
spec, transformation = Spec.of(recipe, 50_313), build(recipe.optimizer)
weights = initialise(spec, 0)
state = State(weights, transformation.init(weights))
step = compile_step(spec, stage, recipe.optimizer, transformation, state)
ids = np.random.default_rng(0).integers(0, 50_313, (1, 8193), np.int32)
places = np.arange(8192, dtype=np.int32)[None]
state, metrics = step(state, Tokens(ids[:, :-1], ids[:, 1:], np.zeros_like(places), places), np.float32(1e-4))
jax.block_until_ready(state)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"loss": float(metrics.loss), "finite": bool(metrics.finite), "peak": int(peak.split()[1]) * 1024}))
"""


@pytest.mark.slow
def test_a_step_of_xgen_125m_at_8192_tokens_fits(capsys):
    done = subprocess.run([sys.executable, "-c", STEP], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nxgen-125m, one step of 8,192 tokens: peak resident memory {found['peak'] / GIB:.2f} GiB")
    assert found["finite"]
    assert abs(found["loss"] - np.log(50_313)) < 0.5
    assert found["peak"] < (8 if native.library() is None else 5) * GIB
