"""Markdown on the chat page: as an independent renderer reads it, the same however it streams in, never as markup."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from chromium import browser
from markdown_it import MarkdownIt
from markdown_it.token import Token
from page_reader import Reader, reader, server, until
from stand_in import Script

__all__ = ["browser", "reader", "server"]

pytestmark = pytest.mark.browser

TEXTS = [
    "# One\n\n## Two ##\n\n###### Six\n\n#hash",
    "a paragraph\nof two lines\n\nand another",
    "*em* **strong** ***both*** _em_ __strong__ ~~gone~~",
    "snake_case_name and 2 * 3 * 4 and a_b_ c",
    "**bold *and em* inside** and *em **and bold** inside*",
    "`code` and ``a ` tick`` and ` `` ` and `unfinished",
    "- a\n- b\n  - c\n  - d\n    - e\n- f",
    "1. a\n2. b\n   - c\n3. d",
    "3. three\n4. four",
    "- a\n\n  second paragraph\n\n- b",
    "* a\n* b\n\ntext after",
    "- a\n- b\n\n1. c\n2. d",
    "- item\n\n  ```py\n  code\n    more\n  ```\n- next",
    "> quote\n> goes on\n\ntext",
    "> - list in quote\n> - more\n>\n> > nested",
    "```python\nx = 1\n\n\ny = 2\n```\nafter",
    "~~~\n```\n~~~",
    "````md\n```\ninner\n```\n````",
    "```\nunfinished <b>\n",
    "    indented\n    code\n\ntext",
    "before\n\n---\n\nafter\n\n***\n\n___",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| *x* | `y` |\n\nafter",
    "a | b\n--|--\n1 | 2",
    "| a \\| b | c |\n|:-:|:--|\n| d | e |",
    "[link](https://example.org/a_b_c) and [two *em*](http://example.org 'title')",
    "<https://example.org/x> <mailto:a@b.org>",
    "[mail](mailto:a@example.org)",
    "\\*not em\\* \\[no](link) \\`no code\\`",
    "a line that breaks\\\nhere",
    "text [bracket] and [other](not a link",
    "1986\\. A year",
    "text\n- list right after\n- of it",
    "text\n```\ncode right after\n```",
    "日本語の**強調**です。 emoji 🙂 *ok*",
    "<b>no</b> &lt; <script>alert(1)</script>",
]

OUTLINE = """
const names = {H3: 'h1', H4: 'h2', H5: 'h3', H6: 'h6', STRONG: 'strong', EM: 'em', S: 's'};
const skip = new Set(['TBODY', 'THEAD', 'SPAN', 'BUTTON']);
function outline(node) {
    if (node.nodeType === 3) return node.data;
    if (node.classList.contains('code')) return ['pre', node.querySelector('code').textContent];
    if (node.classList.contains('scroll')) return outline(node.firstChild);
    const flat = one => one.tagName === 'TBODY' || one.tagName === 'THEAD' ? [...one.childNodes] : [one];
    const inside = [...node.childNodes].flatMap(flat).map(outline);
    const joined = [];
    for (const one of inside) {
        const both = typeof one === 'string' && typeof joined.at(-1) === 'string';
        joined.push(both ? joined.pop() + one : one);
    }
    const tag = names[node.tagName] ?? node.tagName.toLowerCase();
    if (tag === 'a') return [tag, node.getAttribute('href'), ...joined];
    if (tag === 'ol') return [tag, node.getAttribute('start') ?? '1', ...joined];
    return [tag, ...joined];
}
"""

SHOWN = f"""
const {{MarkdownView}} = await load('markdown.js');
{OUTLINE}
const whole = (texts) => {{
    const place = document.createElement('div'), view = new MarkdownView(place);
    for (const text of texts) view.update(text);
    return [...place.childNodes].map(outline);
}};
"""


def shown(reader: Reader, texts: list[list[str]]) -> list[Any]:
    """Outlines of views, each of which was given several texts one after another."""
    return list(reader.module(SHOWN + "return given[0].map(whole)", texts))


def merged(parts: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def reference(text: str) -> list[Any]:
    """The same outline by another renderer: CommonMark with tables and strikethrough, a line's end a break."""
    tokens = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).parse(text)
    return merged(nested(tokens)[0])


def nested(tokens: list[Token], at: int = 0) -> tuple[list[Any], int]:
    parts: list[Any] = []
    while at < len(tokens):
        token = tokens[at]
        if token.nesting == -1:
            return merged(parts), at
        if token.nesting == 1:
            inside, at = nested(tokens, at + 1)
            # Tight lists have no paragraphs there, and tables no groups of rows here.
            flat = token.tag in ("thead", "tbody")
            parts += inside if flat else [opened(token, inside)]
        else:
            parts += single(token)
        at += 1
    return merged(parts), at


def opened(token: Token, inside: list[Any]) -> list[Any]:
    if token.tag == "a":
        return ["a", token.attrs["href"], *inside]
    if token.tag == "ol":
        return ["ol", str(token.attrs.get("start", 1)), *inside]
    return [{"h4": "h6", "h5": "h6"}.get(token.tag, token.tag), *inside]


def single(token: Token) -> list[Any]:
    if token.type == "inline":
        return nested(token.children or [])[0]
    if token.type in ("fence", "code_block"):
        return [["pre", token.content.removesuffix("\n")]]
    if token.type in ("softbreak", "hardbreak"):
        return [["br"]]
    if token.type == "code_inline":
        return [["code", token.content]]
    return [token.content] if token.type == "text" else [[token.tag]]


def without_differences(outline: Any) -> Any:
    """Where the two may differ: entities stay as they are written, and an address has a last slash."""
    if isinstance(outline, str):
        return outline.replace("&lt;", "<")
    if outline[:1] == ["a"]:
        outline = ["a", outline[1].rstrip("/"), *outline[2:]]
    return [without_differences(part) for part in outline]


def test_blocks_and_lines_are_read_as_another_renderer_reads_them(reader):
    found = shown(reader.open(), [[text] for text in TEXTS])
    for text, outline in zip(TEXTS, found, strict=True):
        assert without_differences(outline) == without_differences(reference(text)), text


def test_a_text_looks_the_same_however_it_streamed_in(reader):
    draw = random.Random(5)
    texts = [*TEXTS, *("\n\n".join(draw.sample(TEXTS, 4)) for _ in range(12))]
    streams = []
    for text in texts:
        cuts = sorted(draw.sample(range(len(text) + 1), min(len(text), 25)))
        streams.append([text[:cut] for cut in cuts] + [text])
    reader.open()
    assert shown(reader, streams) == shown(reader, [[text] for text in texts])


def test_what_did_not_change_keeps_its_elements_while_more_streams_in(reader):
    kept = reader.open().module(
        """const {MarkdownView} = await load('markdown.js'); const place = document.createElement('div');
        const view = new MarkdownView(place); view.update('# a\\n\\nb\\n\\n```py\\nx = 1');
        const [heading, text, code] = place.children; const inner = code.querySelector('code');
        view.update('# a\\n\\nb\\n\\n```py\\nx = 1\\ny = 2\\n```\\n\\nc');
        const same = [place.children[0] === heading, place.children[1] === text];
        return [...same, place.children[2].querySelector('code') === inner, inner.textContent, place.children.length]"""
    )
    assert kept == [True, True, True, "x = 1\ny = 2", 4]


ENDLESS = {
    "stars": "*" * 30000,
    "openers": "*a " * 15000,
    "brackets": "[" * 30000,
    "links": "[a](" * 8000,
    "empty links": "[](" * 10000,
    "ticks": "".join("`" * length + " " for length in range(1, 240)),
    "quotes": ">" * 30000,
    "lists": "".join(" " * (2 * depth) + "- x\n" for depth in range(200)),
    "spaces": "# a" + " " * 30000 + "b\n|x\n-" + " " * 30000 + "x",
    "addresses": "http://[" * 4000,
    "dots": "http://a" + "." * 30000 + "x",
    "table": "|" * 15000 + "\n" + "|-" * 15000,
    "breaks": ("a" + " " * 300 + "\n") * 100,
    "angles": "<https://" * 4000,
}


@pytest.mark.parametrize("case", ENDLESS)
def test_no_text_takes_a_time_that_grows_with_its_square(reader, case):
    reader.open()
    begin = time.monotonic()
    reader.module(SHOWN + "whole([given[0]]); return true", ENDLESS[case])
    assert time.monotonic() - begin < 3


def test_a_long_reply_is_drawn_within_a_frame_or_two_at_its_end(reader):
    text = "\n\n".join(random.Random(2).choices(TEXTS[:16], k=500))
    reader.open()
    milliseconds = reader.module(
        """const {MarkdownView} = await load('markdown.js');
        const place = document.body.appendChild(document.createElement('div'));
        const view = new MarkdownView(place); view.update(given[0]); const times = [];
        for (let step = 1; step <= 20; step++) {
            const begin = performance.now();
            view.update(given[0] + ' word'.repeat(step));
            times.push(performance.now() - begin);
        }
        return times.sort((a, b) => a - b)[10]""",
        text,
    )
    assert len(text) > 15000
    assert milliseconds < 30


PWN = "window.__pwned=1"
HOSTILE = [
    f"<script>{PWN}</script>",
    f"<img src=x onerror={PWN}>",
    "<img src=https://evil.example/pixel.png>",
    f"<svg onload={PWN}>",
    f"<svg><script>{PWN}</script></svg>",
    f"<iframe srcdoc='<script>parent.{PWN.removeprefix('window.')}</script>'></iframe>",
    f"<iframe src=javascript:{PWN}></iframe>",
    f"<body onload={PWN}>",
    f"<details open ontoggle={PWN}>x</details>",
    f"<input autofocus onfocus={PWN}>",
    f"<a href=javascript:{PWN}>click</a>",
    f"[click](javascript:{PWN})",
    f"[click](JaVaScRiPt:{PWN})",
    f"[click](java\tscript:{PWN})",
    f"[click](&#106;avascript:{PWN})",
    f"[click](\u0001javascript:{PWN})",
    f"[click](data:text/html,<script>{PWN}</script>)",
    f"[click](vbscript:{PWN})",
    "[click](//evil.example/)",
    "[click](file:///etc/passwd)",
    f'[click](https://example.org/"onmouseover="{PWN})',
    f"[click](<javascript:{PWN}>)",
    f"<javascript:{PWN}>",
    "![pixel](https://evil.example/pixel.png)",
    f"![pixel](javascript:{PWN})",
    f"[![pixel](https://evil.example/a.png)](javascript:{PWN})",
    "[ref]: https://evil.example/\n\n![ref]",
    f'```"><script>{PWN}</script>\ncode\n```',
    f"```<img src=x onerror={PWN}>\n</code></pre><script>{PWN}</script>\n```",
    f"`</code><script>{PWN}</script>`",
    f"| <script>{PWN}</script> | b |\n|---|---|\n| <img src=x onerror={PWN}> | c |",
    f"# <script>{PWN}</script>",
    f"> <svg/onload={PWN}>",
    f"- <math><mtext><script>{PWN}</script></mtext></math>",
    f"</p></div></article><script>{PWN}</script>",
    "<style>@import 'https://evil.example/x.css';</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<base href=https://evil.example/>",
    f"<form action=javascript:{PWN}><button>x</button></form>",
    f"<template><script>{PWN}</script></template>",
    f"<object data=javascript:{PWN}></object>",
    f"{{{{constructor.constructor('{PWN}')()}}}}",
    f"${{{PWN}}}",
    "__proto__",
    "\u202etxt.exe\u202c \u0000 \ufeff",
    "<!--><script>" + PWN + "</script>-->",
    "]]><script>" + PWN + "</script>",
]


def assert_only_text(reader: Reader) -> None:
    """Nothing hostile became an element or a handler, and what links there are lead to the web or to mail."""
    found = reader.js(
        """const never = 'script, img, iframe, object, embed, link, meta, base, style, template, math, details, video';
        const bad = [...document.querySelectorAll('main *, .side *, dialog *, .pop *, .settings *')].filter(one =>
            one.matches(never)
            || [...one.attributes].some(({name}) => name.startsWith('on') || name === 'srcdoc')
            || (one.tagName === 'svg' && !one.classList.contains('icon')));
        const links = [...document.querySelectorAll('main a')].filter(one =>
            !['http:', 'https:', 'mailto:'].includes(one.protocol)
            || one.rel !== 'noopener noreferrer' || one.target !== '_blank');
        return [...bad, ...links].map(one => one.outerHTML)"""
    )
    assert found == []


def squeezed(text: str) -> str:
    """What is seen of a text: signs of Markdown, spaces and signs without a form left out."""
    return "".join(sign for sign in text if sign.isalnum())


def test_hostile_replies_are_shown_as_text(reader):
    reader.server.script = Script(reply=[f"\n\n{text}\n\n" for text in HOSTILE])
    reader.open().ask("Attack.")
    assert_only_text(reader)
    seen = squeezed(reader.js("return document.querySelector('.assistant .body').textContent"))
    for text in HOSTILE:
        label = squeezed(text)
        # Links show their label alone; a table's divider has nothing to show.
        assert label in seen or text.startswith(("[click](https", "![pixel](https", "[![pixel]")), text
    reader.click(".assistant [aria-label='Copy this message']")
    reader.visit().click(".conversation-open")
    assert_only_text(reader)
    reader.assert_clean()


def test_hostile_messages_names_prompts_and_titles_are_shown_as_text(reader):
    reader.server.window = 1_000_000
    reader.open()
    for number, text in enumerate(HOSTILE):
        reader.drop(text.replace("/", "∕").replace("\u0000", "") or str(number), text.replace("\u0000", ""))
    until(lambda: len(reader.texts("#documents .chip-name")) == len(HOSTILE), "the chips")
    reader.put("\n".join(HOSTILE), "#system")
    reader.ask("\n".join(HOSTILE))
    assert_only_text(reader)
    assert reader.js("return document.querySelector('.user .body').textContent") == "\n".join(HOSTILE)
    reader.click(".user .chip-open")
    until(lambda: reader.seen("#preview-text"), "the document")
    assert reader.text("#preview-text").strip() == HOSTILE[0]
    assert_only_text(reader)
    reader.click("#preview-close")
    reader.js(
        """arguments[0].forEach((title, at) =>
            localStorage.setItem('xgen.title.' + at + title, JSON.stringify({title, updated: at})))""",
        HOSTILE,
    )
    reader.visit()
    assert len(reader.texts(".conversation-open")) == len(HOSTILE) + 1
    assert_only_text(reader)
    reader.assert_clean()


def test_hostile_tokens_are_shown_as_text(reader):
    reader.server.chat = False
    others = dict(zip(HOSTILE[:4], (0.1, 0.05, 0.02, 0.01), strict=True))
    tokens = [(text, 0.5, {**others, "__proto__": 0.001}) for text in HOSTILE]
    reader.server.script = Script(reply=HOSTILE, tokens=tokens)
    reader.open().put("".join(HOSTILE), "#prompt")
    reader.click("#run-complete")
    until(lambda: len(reader.texts("#strip .token")) == len(HOSTILE), "the tokens")
    assert reader.js("return document.getElementById('strip').textContent") == "".join(HOSTILE)
    for at in range(len(HOSTILE)):
        reader.js("document.querySelectorAll('#strip .token')[arguments[0]].focus()", at)
        assert reader.seen("#pop")
        assert_only_text(reader)
    reader.assert_clean()


def test_hostile_errors_names_and_files_are_shown_as_text(reader):
    reader.server.models = [HOSTILE[0], HOSTILE[1]]
    reader.server.script = Script(fails=HOSTILE[1])
    reader.open().say("Hello")
    until(lambda: HOSTILE[1] in reader.text(".assistant .notice"), "the error")
    conversation = {"title": HOSTILE[0], "system": HOSTILE[1], "chosen": {"__proto__": "x", "first": HOSTILE[2]}}
    message = {
        "id": HOSTILE[2],
        "parent": None,
        "role": "assistant",
        "content": HOSTILE[3],
        "error": HOSTILE[4],
        "ended": "error",
    }
    stats = {"tokens": HOSTILE[5], "seed": HOSTILE[6]}
    conversation["messages"] = [{**message, "stats": stats}]
    reader.js(
        """const carried = new DataTransfer(), name = '<img src=x onerror=window.__pwned=1>';
        carried.items.add(new File([arguments[0]], name));
        const field = document.getElementById('import-file'); field.files = carried.files;
        field.dispatchEvent(new Event('change'))""",
        json.dumps({"format": "xgen-conversation", "conversation": conversation}),
    )
    until(lambda: reader.text(".assistant .body") == HOSTILE[3], "the imported conversation")
    assert HOSTILE[4] in reader.text(".assistant .notice")
    assert reader.texts(".conversation-open") == [HOSTILE[0], "Hello"]
    assert_only_text(reader)
    reader.assert_clean()


def test_the_check_for_markup_can_fail(reader):
    reader.open().js("document.getElementById('messages').innerHTML = '<img src=\"data:,\" onerror=\"1\">'")
    with pytest.raises(AssertionError):
        assert_only_text(reader)
    reader.js("const s = document.createElement('script'); s.textContent = '1'; document.body.append(s)")
    until(lambda: reader.js("return window.__violations.length"), "the policy to act")
    with pytest.raises(AssertionError):
        reader.assert_clean()
