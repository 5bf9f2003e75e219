"""XGen-7B's tokenizer, rebuilt from GPT-2's own two files.

XGen builds a tiktoken encoding: GPT-2's 50,257 ids, then runs of spaces and of tabs as mergeable ranks, longest
first, then StarCoder's 18 control tokens; the split of the text stays GPT-2's. tiktoken merges whichever two
neighbours join to the lowest rank. A `tokenizer.json` lists pairs instead, and gives equal ids because
(`tests/tokens/test_xgen.py` checks each premise):

1. For every GPT-2 token, merging its bytes with only the ranks below its own leaves just the two parts that
   `vocab.bpe` lists, so tiktoken never joins any other two parts to it.
2. No GPT-2 token holds two spaces or two tabs in a row, so runs start only after all GPT-2 merges in a piece are
   done, and from single characters.
3. Longer runs rank lower. So the leftmost two characters merge first and that run grows one character at a time,
   to the longest or to its end, before another begins: (n - 1, 1) -> n are the only merges of runs that occur.

tiktoken also gives a piece that is itself a token its id without merging. By 1 and 3 merging ends at the same id, so
`ignore_merges` is not needed, and llama.cpp's `gpt-2` pre-tokenizer, which has no such rule, serves this vocabulary.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from xgen.tokens.bytelevel import ALPHABET, END_OF_TEXT, byte_level_document

EMBEDDING_ROWS = 51_200
"""Rows of XGen's embedding: 50,313 ids and 887 rows of padding that no text produces."""

LONGEST_SPACES = 31
LONGEST_TABS = 9
CONTROL = (
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)


def xgen_document() -> dict[str, Any]:
    """XGen's tokenizer as a standard `tokenizer.json` document of 50,313 ids."""
    folder = files("xgen.tokens") / "gpt2"
    vocab: dict[str, int] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = _gpt2_merges((folder / "vocab.bpe").read_text(encoding="utf-8"))
    for byte, longest in ((ord(" "), LONGEST_SPACES), (ord("\t"), LONGEST_TABS)):
        one = ALPHABET[byte]
        for length in range(longest, 1, -1):
            vocab[one * length] = len(vocab)
            merges.append((one * (length - 1), one))
    vocab |= {token: len(vocab) + place for place, token in enumerate(CONTROL)}
    return byte_level_document(vocab, merges, (END_OF_TEXT, *CONTROL))


def _gpt2_merges(text: str) -> list[tuple[str, str]]:
    """The pairs of `vocab.bpe`, first merged first; its first line states a version."""
    pairs = (line.split(" ") for line in text.splitlines()[1:])
    return [(left, right) for left, right in pairs]
