"""Chat templates as published models have them, and small tokenizers with the control tokens that they write."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from xgen.tokens.bytelevel import ALPHABET, byte_level_document
from xgen.tokens.chat import ChatTemplate
from xgen.tokens.sentencepiece import document_of
from xgen.tokens.tokenizer import Tokenizer
from xgen.tokens.xgen import xgen_document

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}{{- raise_exception('system comes first') }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA_2 = """
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'].strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- continue %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}{% generation %}{{ content }}<|im_end|>{% endgeneration %}{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
PIECES = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
JOINING = (
    "<|im_start|>{% for message in messages %}{{ message['content'] | trim }}{% endfor %}<|im_end|>"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""What several messages say becomes one text."""
AS_JSON = "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "llama 2": LLAMA_2,
    "thinking": THINKING,
    "pieces": PIECES,
    "joining": JOINING,
    "as json": AS_JSON,
}

NAMES = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<s>", "</s>"),
)


SENTENCEPIECE = Path(__file__).parent / "data" / "sentencepiece.model"
TOKENIZERS = ("byte level", "byte level, merged", "xgen", "prepend", "normalized", "first", "always", "wide", "Unigram")


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer that has NAMES as control tokens."""
    if kind == "xgen":
        return with_names(xgen_document(), kind)
    if kind == "Unigram":
        pieces = [["<unk>", 0.0], *([c, -1.0] for c in "abc<|>/[]_ imstartend"), *([name, -0.1] for name in NAMES)]
        unique = list({piece: [piece, score] for piece, score in pieces}.values())
        document = byte_level_document({}, [], []) | {"pre_tokenizer": None, "post_processor": None, "decoder": None}
        document["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": unique}
        return with_names(document, kind)
    if kind in ("prepend", "normalized", "first", "always"):
        document = document_of(SENTENCEPIECE)
        if kind in ("first", "always"):
            metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False}
            document |= {"normalizer": None, "pre_tokenizer": metaspace}
        return with_names(document, kind, normalized=kind == "normalized")
    letters = {character: place for place, character in enumerate(ALPHABET.values())}
    merges = [("<", "|"), ("<|", "e"), ("|", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
    if kind == "byte level":
        return with_names(byte_level_document(letters, [], []), kind)
    merged = {left + right: 256 + place for place, (left, right) in enumerate(merges)}
    document = byte_level_document(letters | merged, merges, [])
    document["model"]["ignore_merges"] = kind == "wide"
    return with_names(document, kind, lstrip=kind == "wide", rstrip=kind == "wide")


def with_names(document: dict[str, Any], name: str, **flags: bool) -> Tokenizer:
    """`document` with those of NAMES that it has not got as control tokens; `flags` are for all of these."""
    document = deepcopy(document)
    vocab = document["model"]["vocab"]
    ids = {entry[0]: at for at, entry in enumerate(vocab)} if isinstance(vocab, list) else vocab
    added = {token["content"]: token for token in document["added_tokens"]}
    for token in NAMES:
        if token not in ids:
            if isinstance(vocab, list):
                vocab.append([token, 0.0])
            ids[token] = len(ids)
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added[token] = {"id": ids[token], "content": token, **plain, "special": True} | flags
    document["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    return Tokenizer(document, name, "</s>")


def template_of(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], tokenizer, tokenizer.control["<s>"], tokenizer.control["</s>"])
