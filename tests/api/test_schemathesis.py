"""Whatever our OpenAPI document allows or forbids is answered as it says, and never by a fault of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CheckContext
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sdfleet.api.app import create_app
from sdfleet.settings import load_settings
from tests.api.serving import Running

whole = schemathesis.openapi.from_dict(create_app(load_settings(home=Path("unused"), backend="fake")).openapi())
# The first has no end while somebody reads, the second switches off what the others ask for: see test_dashboard.py.
schema = whole.exclude(path="/dashboard/events").exclude(path="/dashboard/api/settings", method="POST")
few = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
many = settings(few, max_examples=80)


def no_fault_of_ours(_context: CheckContext, response: Response, _case: schemathesis.Case[Any]) -> None:
    """A `deadline_s` that is too short is answered by 504, as the caller wanted."""
    assert response.status_code < 500 or response.status_code == 504, response.text


CHECKS = [no_fault_of_ours, status_code_conformance, content_type_conformance, response_schema_conformance]


@schema.parametrize()
@few
def test_every_route_answers_as_documented(case: schemathesis.Case[Any], fake_server: Running) -> None:
    case.call_and_validate(base_url=fake_server.url, checks=CHECKS)


@pytest.mark.slow
@pytest.mark.thorough
@schema.parametrize()
@many
def test_every_route_answers_as_documented_many_times(case: schemathesis.Case[Any], fake_server: Running) -> None:
    case.call_and_validate(base_url=fake_server.url, checks=CHECKS)


def test_every_route_documents_its_faults_and_what_it_answers() -> None:
    document = create_app(load_settings(home=Path("unused"), backend="fake")).openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answers = operation["responses"]
            assert "content" in answers["default"], f"{method} {path} does not say how its faults look"
            good = {status: answer for status, answer in answers.items() if status.startswith("2")}
            assert good, f"{method} {path}"
            # Ollama's delete answers nothing, with 200.
            if "204" not in good and path != "/api/delete":
                assert all("content" in answer for answer in good.values()), f"{method} {path}"
