"""The verbs that generate over a program without a model, so that nothing compiles."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "infer"))
from fake_program import FakeProgram

from xgen.infer.engine import Engine
from xgen.serve.start import Loader

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is opened, its tokens are drawn by the fake program."""

    def engine(self: Loader, report: Callable[[str, float], None]) -> Engine:
        report("nothing", 0.0)
        adapters = ("", *self.translator.adapters)
        program = FakeProgram(window=self.translator.window, alphabet=tuple(range(1, 300)), adapters=adapters)
        return Engine(program, self.translator.description)

    monkeypatch.setattr(Loader, "engine", engine)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return path


def pipe(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """What standard input gives."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
