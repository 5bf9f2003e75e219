"""What a run is: the typed recipe.

A `Recipe` is complete: whatever a recipe file leaves out has been derived or defaulted before it
is built (`xgen.recipe.load`), so that no other room ever asks whether a value is set.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt

from xgen.recipe.units import parse_length, parse_tokens

Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
"""A count of tokens; text takes decimal units: "800B" is 800 000 000 000."""

Length = Annotated[int, BeforeValidator(parse_length), Field(gt=0)]
"""A length or a batch in tokens; text takes binary units: "2K" is 2048, "4M" is 4 194 304."""

SHORTEST_LENGTH = 8
"""No stage is shorter: below it there is no room for an eighth, a quarter and a half of the length."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_BPE_NAME = re.compile(r"bpe:([0-9]+)")
_SMALLEST_BPE = 257
"""Every byte, and the end of text."""


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name; use letters, digits, '-', '_' and '.', for files will bear it")
    return name


def _check_tokenizer(name: str) -> str:
    match = _BPE_NAME.fullmatch(name)
    if not name or (match is None and name.split(":")[0] == "bpe"):
        raise ValueError(f'{name!r} is no tokenizer; use "xgen", "bpe:2048", "store" or the path of a tokenizer.json')
    if match is not None and int(match[1]) < _SMALLEST_BPE:
        raise ValueError(f"{name!r} has no room for 256 bytes and the end of text; use bpe:{_SMALLEST_BPE} or more")
    return name


def _check_not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is empty; write what it should be")
    return text


Name = Annotated[str, AfterValidator(_check_name)]
"""A name that files and folders can bear."""

Text = Annotated[str, AfterValidator(_check_not_empty)]

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _high_turns(given: dict[str, Any]) -> float:
    """As published: 4 for Llama 3.1, 32 for YaRN."""
    return 32.0 if given.get("kind") == "yarn" else 4.0


def _attention_factor(given: dict[str, Any]) -> float:
    """YaRN's own rule (Peng et al. 2023, equation 22); the other kinds leave queries and keys as long as they are."""
    factor = given.get("factor", 1.0)
    return 0.1 * math.log(factor) + 1.0 if given.get("kind") == "yarn" and factor > 1 else 1.0


class RopeScaling(Section):
    """Stretch of the rotary frequencies, for a model used beyond the length it was trained on.

    Planes that turn less than `low_turns` times in `original_length` are stretched, those over `high_turns` times are
    kept: "llama3" and "yarn" only. `attention_factor` multiplies cosine and sine.
    """

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    factor: PositiveFloat = 1.0
    original_length: Length = 8192
    low_turns: PositiveFloat = 1.0
    high_turns: PositiveFloat = Field(default_factory=_high_turns)
    attention_factor: PositiveFloat = Field(default_factory=_attention_factor)


class Model(Section):
    """The decoder's shape."""

    layers: PositiveInt
    hidden_size: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    mlp_size: PositiveInt
    vocab_size: PositiveInt
    circuits: Literal["sequential", "parallel"] = "sequential"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    initialisation: Literal["fan_in", "normal"] = "normal"


class TokenizerChoice(Section):
    """Which tokenizer: "xgen", "bpe:N" to train one of N ids, a tokenizer.json, or "store" to take the stores'."""

    name: Annotated[str, AfterValidator(_check_tokenizer)] = "store"
    end_of_text: Text = "<|endoftext|>"


class Data(Section):
    """Where documents come from. A source is a token store, a folder or file of text, or "embedded:NAME"."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    document_mask: bool = True
    sources: dict[Name, Text]
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05


class Optimizer(Section):
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    warmup: Tokens
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip: PositiveFloat = 1.0
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0


class Mesh(Section):
    """Device counts along each axis; "rest" takes what the other axes leave."""

    replica: PositiveInt | Literal["rest"] = 1
    fsdp: PositiveInt | Literal["rest"] = "rest"
    context: PositiveInt = 1
    tensor: PositiveInt = 1


class Stage(Section):
    name: Name
    length: Annotated[Length, Field(ge=SHORTEST_LENGTH)]
    tokens: Annotated[Tokens, Field(gt=0)]
    batch_tokens: Length
    microbatch_tokens: Length
    mixture: dict[str, PositiveFloat]
    remat: Literal["none", "dots", "block"] = "none"
    mesh: Mesh = Mesh()

    @property
    def steps(self) -> int:
        """Optimizer steps: `tokens` rounded up to whole batches."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def spent(self) -> int:
        """Tokens the stage really takes: whole steps."""
        return self.steps * self.batch_tokens

    @property
    def sequences(self) -> int:
        """Sequences of one batch."""
        return self.batch_tokens // self.length


class Compute(Section):
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "reference", "blockwise", "splash", "cudnn"] = "auto"
    exchange: Literal["gather", "ring"] = "gather"
    """Of keys and values between the context parts of a mesh: all at once, or one part's after the other."""


class Checkpoints(Section):
    """Saved every `every` tokens and at every stage's end. Kept: the last `keep_last`, every
    multiple of `keep_every` (0: none), and the stages' ends."""

    every: Annotated[Tokens, Field(gt=0)]
    keep_last: PositiveInt = 3
    keep_every: Tokens = 0


class Evaluation(Section):
    """Held-out measurement: `every` tokens in the loop, and of every stage's checkpoint at the end."""

    every: Annotated[Tokens, Field(gt=0)]
    tokens: Annotated[Tokens, Field(gt=0)] = 100_000
    contexts: Annotated[tuple[Length, ...], Field(min_length=1)]
    target: Length
    stride: Annotated[float, Field(gt=0.0, le=1.0)] = 0.125
    samples: Annotated[int, Field(ge=0)] = 2


class Recipe(Section):
    """A whole run. Every value is set; `xgen recipe show` says where each came from.

    `notes` say of single keys, by dotted path, what a reader must know of their values.
    """

    name: Name
    description: str = ""
    model: Model
    tokenizer: TokenizerChoice = TokenizerChoice()
    data: Data
    optimizer: Optimizer
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    compute: Compute = Compute()
    checkpoints: Checkpoints
    evaluation: Evaluation
    mesh: Mesh = Mesh()
    notes: dict[str, str] = {}

    @property
    def total_tokens(self) -> int:
        return sum(stage.spent for stage in self.stages)

    def stage_start(self, index: int) -> int:
        """Token position at which stage `index` begins."""
        return sum(stage.spent for stage in self.stages[:index])

    def stage_at(self, position: int) -> int:
        """Index of the stage that the batch at token `position` belongs to."""
        for index in range(len(self.stages)):
            if position < self.stage_start(index + 1):
                return index
        raise IndexError(f"token position {position} lies past the run's {self.total_tokens} tokens")
