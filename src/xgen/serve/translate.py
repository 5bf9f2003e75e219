"""From the body of a request to what the engine is asked; knows the model, but neither HTTP nor the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from xgen.convert.description import Description
from xgen.errors import DataError, XgenError
from xgen.infer.check import check as check_request
from xgen.infer.request import Request, Sampling
from xgen.serve.bodies import check, quoted
from xgen.serve.refusals import OR_SHORTEN, RequestError, refusal
from xgen.serve.schemas import (
    MOST_CHOICES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    MessageBody,
    TemplateBody,
    TokenizeBody,
)
from xgen.serve.shorten import Dropped, cut, shorten_chat
from xgen.tokens.chat import ChatTemplate, Message, Rendered
from xgen.tokens.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default of max_tokens for completions."""

SEED_STEP = 0x9E3779B9
"""Between the seeds of the n answers to a prompt: 2^32 / golden ratio, so that near seeds do not share answers."""


@dataclass(frozen=True)
class Echo:
    """What stands before an answer: the text, and how many of the prompt's first tokens are no part of it."""

    text: str
    unseen: int


@dataclass(frozen=True)
class Asked:
    """A body in the engine's terms: one of `requests` for each answer wanted, prompt by prompt, `n` for each.

    `echoes` has what stands before each answer (None: nothing). `logprobs`: how many alternatives are told of each
    token; None for no log-probabilities. `turn_ends` are stop strings and tokens that the chat template added; they end
    an answer as the model's own ends do. `dropped` says what was left out of each prompt, where that was allowed.
    """

    kind: Literal["completion", "chat"]
    model: str
    requests: tuple[Request, ...]
    n: int
    echoes: tuple[Echo | None, ...]
    logprobs: int | None
    turn_ends: tuple[str | int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    progress: bool = False
    dropped: tuple[Dropped, ...] = ()
    rule: str | None = None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_field(self) -> str:
        """The field of the body that holds the prompt."""
        return "prompt" if self.kind == "completion" else "messages"

    @property
    def truncation(self) -> dict[str, Any] | None:
        """What the answer tells of what was left out; None where that was not allowed."""
        if self.rule is None:
            return None
        return {"rule": self.rule, "prompts": [one.told() for one in self.dropped]}


class Translator:
    """One model's side of the interface. `name` is what it is called, `adapters` are other names to ask for.

    `window` is the most tokens of prompt and answer; `lenient` leaves out unknown fields instead of refusing them;
    `most_choices` bounds the answers to one request. Raises DataError for a model without a tokenizer.
    """

    def __init__(
        self,
        description: Description,
        *,
        name: str,
        window: int,
        adapters: Sequence[str] = (),
        template: ChatTemplate | None = None,
        lenient: bool = False,
        most_choices: int = MOST_CHOICES,
    ) -> None:
        if description.tokenizer is None:
            raise DataError(
                f"model {description.name} has no tokenizer; put its tokenizer.json into its folder and start again"
            )
        self.description, self.name, self.window, self.template = description, name, window, template
        self.adapters = tuple(adapters)
        self.tokenizer: Tokenizer = description.tokenizer
        self._lenient, self._most_choices = lenient, most_choices

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for as `model`."""
        return (self.name, *self.adapters)

    def completion(self, value: Any) -> Asked:
        """What the body `value` of /v1/completions asks for. Raises RequestError."""
        body = check(CompletionBody, value, lenient=self._lenient)
        n = body.n or 1
        if body.best_of not in (None, n):
            raise RequestError(
                f"best_of {body.best_of} differs from n {n}; every answer is returned, so leave best_of out",
                param="best_of",
                code="unsupported_parameter",
            )
        # Before they are encoded, which takes as long for a million prompts as for one of their length.
        self._check_choices(_count(body.prompt), n)
        prompts = self._prompts(body)
        rows, dropped = [], []
        for ids, unseen in prompts:
            max_tokens = body.max_tokens
            if body.truncation is not None:
                room = self.window - _stated(max_tokens)
                ids, one = cut(ids, unseen, room, body.truncation.rule)
                dropped.append(one)
            elif max_tokens is None:
                max_tokens = min(DEFAULT_COMPLETION_TOKENS, self._room(ids, "prompt"))
            rows.append((ids, _stated(max_tokens)))
        echoes = [self._echo(body, at, *prompts[at], rows[at][0]) if body.echo else None for at in range(len(rows))]
        scored = bool(body.echo) and body.logprobs is not None
        return Asked(
            kind="completion",
            requests=self._requests(body, rows, body.logprobs, scored),
            echoes=tuple(echo for echo in echoes for _ in range(n)),
            logprobs=body.logprobs,
            dropped=tuple(dropped),
            id=f"cmpl-{secrets.token_hex(12)}",
            **self._common(body),
        )

    def chat(self, value: Any) -> Asked:
        """What the body `value` of /v1/chat/completions asks for. Raises RequestError."""
        body = check(ChatBody, value, lenient=self._lenient)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(
                "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_combination"
            )
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.max_tokens not in (None, max_tokens):
            raise RequestError(
                f"max_tokens {body.max_tokens} and max_completion_tokens {max_tokens} differ; leave max_tokens out",
                param="max_tokens",
                code="invalid_combination",
            )
        n = body.n or 1
        self._check_choices(1, n)
        messages: Sequence[Message] = _messages(body.messages)
        dropped = []
        ids = tuple(self._rendered(messages).ids)
        if body.truncation is not None:
            room = self.window - _stated(max_tokens)
            messages, one = shorten_chat(self._rendered, self.tokenizer, messages, room, body.truncation.rule)
            ids = tuple(self._rendered(messages).ids)
            dropped.append(one)
        elif max_tokens is None:
            max_tokens = self._room(ids, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        turn_ends = self._turn_ends(body)
        return Asked(
            kind="chat",
            requests=self._requests(body, [(ids, _stated(max_tokens))], logprobs, False, turn_ends),
            echoes=(None,) * n,
            logprobs=logprobs,
            turn_ends=turn_ends,
            dropped=tuple(dropped),
            id=f"chatcmpl-{secrets.token_hex(12)}",
            **self._common(body),
        )

    def tokenize(self, value: Any) -> dict[str, Any]:
        """The answer to the body `value` of /tokenize. Raises RequestError."""
        body = check(TokenizeBody, value, lenient=self._lenient)
        if (body.content is None) == (body.messages is None):
            raise RequestError("give one of content and messages", param="content", code="invalid_combination")
        if body.messages is not None:
            ids = tuple(self._rendered(_messages(body.messages)).ids)
        else:
            ids = self._encoded([body.content or ""], "content")[0]
            ids = self._begin() + ids if body.add_special else ids
        return {"tokens": list(ids), "count": len(ids), "max_model_len": self.window}

    def detokenize(self, value: Any) -> dict[str, Any]:
        """The answer to the body `value` of /detokenize. Raises RequestError."""
        body = check(DetokenizeBody, value, lenient=self._lenient)
        size = self.description.real_vocab
        if unknown := [index for index in body.tokens if index >= size]:
            raise RequestError(
                f"'tokens' has {unknown[0]}, which is no token; ids are 0 to {size - 1}",
                param="tokens",
                code="invalid_value",
            )
        try:
            return {"content": self.tokenizer.decode(body.tokens)}
        except DataError as cause:
            raise refusal(cause, "tokens") from cause

    def apply_template(self, value: Any) -> dict[str, Any]:
        """The answer to the body `value` of /apply-template. Raises RequestError."""
        body = check(TemplateBody, value, lenient=self._lenient)
        rendered = self._rendered(_messages(body.messages))
        return {"prompt": rendered.text, "tokens": list(rendered.ids), "count": len(rendered.ids)}

    def _common(self, body: CompletionBody | ChatBody) -> dict[str, Any]:
        """What both kinds say alike, checked."""
        options = body.stream_options
        for name, given in (("stream_options", options), ("return_progress", body.return_progress)):
            if given and not body.stream:
                raise RequestError(f"{name} needs stream to be true", param=name, code="invalid_combination")
        return {
            "model": body.model or self.name,
            "n": body.n or 1,
            "stream": bool(body.stream),
            "include_usage": bool(options and options.include_usage),
            "progress": bool(body.return_progress),
            "rule": body.truncation.rule if body.truncation else None,
        }

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self._most_choices:
            raise RequestError(
                f"{prompts} prompts with {n} answers each are {prompts * n} answers; ask for at most "
                f"{self._most_choices} at once",
                param="n" if n > 1 else "prompt",
                code="too_many_choices",
            )

    def _room(self, ids: Sequence[int], param: str) -> int:
        """What the window holds after a prompt of `ids`, at least one token. Raises RequestError."""
        if len(ids) < self.window:
            return self.window - len(ids)
        raise RequestError(
            f"the prompt has {len(ids)} tokens, and the context holds {self.window} with the answer; shorten the "
            "prompt",
            param=param,
            code="context_length_exceeded",
            remedy=OR_SHORTEN,
            prompt_tokens=len(ids),
            context_length=self.window,
        )

    def _prompts(self, body: CompletionBody) -> list[tuple[tuple[int, ...], int]]:
        """Each prompt's ids, and how many of the first were put there by us."""
        prompt = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], str)):
            texts = [prompt] if isinstance(prompt, str) else [str(one) for one in prompt]
            begin = self._begin()
            # Nothing at all begins a document, as OpenAI has it: the model needs one token to go on from.
            start = begin or (self.tokenizer.end_of_text,)
            return [(begin + ids, len(begin)) if ids else (start, len(start)) for ids in self._encoded(texts, "prompt")]
        rows = [prompt] if prompt and isinstance(prompt[0], int) else prompt
        if not rows:
            raise RequestError("'prompt' is an empty list; give a prompt", param="prompt", code="invalid_value")
        return [(tuple(row), 0) for row in rows]  # type: ignore[arg-type]  # texts and single ids are dealt with above

    def _echo(self, body: CompletionBody, at: int, whole: tuple[int, ...], unseen: int, ids: tuple[int, ...]) -> Echo:
        if ids == whole and isinstance(body.prompt, str):
            return Echo(body.prompt, unseen)
        if ids == whole and isinstance(body.prompt[at], str):
            return Echo(str(body.prompt[at]), unseen)
        return Echo(self.tokenizer.decode(ids[unseen:]), unseen)

    def _begin(self) -> tuple[int, ...]:
        begin = self.description.begin_id
        return () if begin is None else (begin,)

    def _turn_ends(self, body: ChatBody) -> tuple[str | int, ...]:
        if self.template is None or body.ignore_eos:
            return ()
        own = (body.stop, *(body.stop or ()), *(body.stop_token_ids or ()))
        ends: tuple[str | int, ...] = (*self.template.stops, *self.template.end_ids)
        return tuple(end for end in ends if end not in own)

    def _encoded(self, texts: list[str], param: str) -> list[tuple[int, ...]]:
        try:
            return [tuple(ids) for ids in self.tokenizer.encode_batch(texts)]
        except DataError as cause:
            raise refusal(cause, param) from cause

    def _rendered(self, messages: Sequence[Message]) -> Rendered:
        if self.template is None:
            raise RequestError(
                f"model {self.name} has no chat template, so it knows no roles; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        try:
            return self.template.render(messages)
        except XgenError as cause:
            raise refusal(cause, "messages") from cause

    def _adapter(self, model: str | None) -> str:
        if model is None or model == self.name:
            return ""
        if model in self.adapters:
            return model
        raise RequestError(
            f"there is no model {quoted(model)} here; choose one of {', '.join(map(repr, self.names))}",
            status=404,
            param="model",
            code="model_not_found",
        )

    def _requests(
        self,
        body: CompletionBody | ChatBody,
        rows: Sequence[tuple[tuple[int, ...], int]],
        logprobs: int | None,
        scored: bool,
        turn_ends: Sequence[str | int] = (),
    ) -> tuple[Request, ...]:
        adapter = self._adapter(body.model)
        own_stops = [body.stop] if body.stop and isinstance(body.stop, str) else body.stop or []
        stop = (*own_stops, *(end for end in turn_ends if isinstance(end, str)))
        stop_ids = (*(body.stop_token_ids or ()), *(end for end in turn_ends if isinstance(end, int)))
        seed = secrets.randbits(32) if body.seed is None else _seed(body.seed)
        found = []
        for ids, max_tokens in rows:
            for choice in range(body.n or 1):
                request = Request(
                    ids=ids,
                    max_tokens=max_tokens,
                    sampling=_sampling(body, (seed + choice * SEED_STEP) % 2**32),
                    min_tokens=body.min_tokens or 0,
                    ignore_eos=bool(body.ignore_eos),
                    stop=stop,
                    stop_token_ids=stop_ids,
                    top_logprobs=logprobs,
                    score_prompt=scored,
                    adapter=adapter,
                )
                try:
                    check_request(request, self.description, self.window, (adapter,))
                except XgenError as cause:
                    raise refusal(cause, "prompt" if isinstance(body, CompletionBody) else "messages") from cause
                found.append(request)
        return tuple(found)


def _stated(max_tokens: int | None) -> int:
    """Only called where it was defaulted, or has to be given."""
    if max_tokens is None:
        raise RequestError("truncation needs max_tokens, to know how much room to make", param="max_tokens")
    return max_tokens


def _count(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> int:
    """How many prompts it is."""
    return 1 if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else len(prompt)


def _messages(bodies: Sequence[MessageBody]) -> list[Message]:
    return [Message("system" if one.role == "developer" else one.role, one.text) for one in bodies]


def _sampling(body: CompletionBody | ChatBody, seed: int) -> Sampling:
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return Sampling(**given, seed=seed, logit_bias=_biases(body.logit_bias or {}))


def _seed(seed: int) -> int:
    """32 bits of 64; small seeds are themselves."""
    high, low = divmod(seed % 2**64, 2**32)
    return (low + high * SEED_STEP) % 2**32


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(
                f"logit_bias has {quoted(key)}, which is no token id", param="logit_bias", code="invalid_value"
            )
    return tuple((int(key), bias) for key, bias in given.items())
