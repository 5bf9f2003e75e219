"""How the server behaves, whatever model it serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """`host` is what the server is bound to. `api_key`: what everybody must show but for the page and /health; None
    for nothing. `allow_origins`: sites besides our own page whose scripts may ask, "*" for all. `max_body`: bytes of a
    request. `log_prompts`: prompts and answers too.

    The rest are seconds: `body_seconds` for a request to come in whole, and again for the rest of one that is already
    refused, `send_seconds` for a piece of an answer to be taken, `ping_seconds` of silence in a stream before a comment
    is sent, `drain_seconds` for what is under way to end once the server is told to stop.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    max_body: int = 4 << 20
    log_prompts: bool = False
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    ping_seconds: float = 5.0
    drain_seconds: float = 30.0
