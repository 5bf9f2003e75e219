"""The OpenAPI document and the server agree: requests made from it are answered as it says, and never with a fault."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import listening

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
POSITIVE = schemathesis.GenerationMode.POSITIVE
EXAMPLES = 25
"""Of each operation and mode."""


@pytest.fixture(scope="module")
def address() -> Any:
    with listening() as found:
        yield found.address


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_whatever_the_document_allows_or_forbids_is_answered_as_it_says(address: str, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    asked: dict[int, int] = {}
    # Only a body can be wrong: a request without one has nothing that could be.
    for result in (schema if mode is POSITIVE else schema.include(method="POST")).get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            response = case.call(timeout=20)
            asked[response.status_code] = asked.get(response.status_code, 0) + 1
            case.validate_response(response, checks=CHECKS)

        ask()
    assert sum(asked.values()) > 100
    assert asked.get(200, 0) > 20 if mode is POSITIVE else asked.get(400, 0) > 100
