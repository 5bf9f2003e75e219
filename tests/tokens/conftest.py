from __future__ import annotations

import pytest

from xgen.tokens.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def xgen_tokenizer() -> Tokenizer:
    return load_tokenizer("xgen")
