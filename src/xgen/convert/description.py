"""What a model is besides its weights: shape, tokenizer, special ids, origin. Every format is read into one of these
and written from one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xgen.model.spec import Spec
from xgen.recipe.schema import Model
from xgen.tokens.tokenizer import Tokenizer

StoredType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    `real_vocab` counts the rows of the vocabulary that are tokens; those past it are padding, and masked.
    `context_length` is the longest input in tokens that the model was trained on. `begin_id` goes before a text, if
    anything does; `bos_id` is what the model's files call the beginning, which chat templates may use. `end_ids` end a
    generation, the first of them also a document. `dtype` is the type that most weights are stored in. `origin` says
    where it came from, for the model card: JSON values only. `repairs` tells, a sentence each, what was put right while
    it was read.
    """

    name: str
    model: Model
    real_vocab: int
    context_length: int
    tokenizer: Tokenizer | None = None
    begin_id: int | None = None
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None
    dtype: StoredType = "float32"
    origin: dict[str, Any] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()

    @property
    def named_begin(self) -> int | None:
        """What other formats are told is the token of the beginning, whether or not texts begin with it."""
        return self.bos_id if self.begin_id is None else self.begin_id

    @property
    def spec(self) -> Spec:
        return Spec(self.model, self.real_vocab)
