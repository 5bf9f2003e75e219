"""HTML and SVG text: the one place where other people's text becomes part of the page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")

SHOWN_CHARACTERS = 4000
"""Characters of one text shown on the page; the rest is counted there and stays in the run folder."""


def escape(text: str) -> str:
    """`text` safe inside an element or a quoted attribute.

    Characters that a page may not hold, or that would turn the text around them, are shown as
    U+FFFD or, for the ASCII controls, as their control picture.
    """
    text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\ufffd", text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _DIRECTION.sub("\ufffd", text)
    return html.escape(text, quote=True)


def clipped(text: str, characters: int) -> str:
    """`text`, not escaped, cut to `characters` with an ellipsis that shows the cut."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def whole_or_counted(text: str, source: str) -> str:
    """`text` escaped; a very long one cut, with a line that says how much is left out and where it is."""
    if len(text) <= SHOWN_CHARACTERS:
        return escape(text)
    rest = len(text) - SHOWN_CHARACTERS
    return f'{escape(text[:SHOWN_CHARACTERS])}<span class="cut">… {rest:,} more characters in {escape(source)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "numbers") -> str:
    """A table of cells that are markup already; the first column is each row's heading.

    `kind` is the table's CSS class: "numbers", "words" or "log". Wide tables scroll inside their
    own box, never the page.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that is folded away until asked for; `summary` is plain text, `body` markup."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def section(ident: str, title: str, question: str, body: str) -> str:
    """A part of the page: its title and the question it answers at the side, `body` (markup) beside them."""
    return (
        f'<section id="{ident}"><header><h2>{escape(title)}</h2><p>{escape(question)}</p></header>'
        f'<div class="content">{body}</div></section>\n'
    )
