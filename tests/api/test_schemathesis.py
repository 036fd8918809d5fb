"""Whatever our OpenAPI document allows or forbids is answered as it says, and never by a fault of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sdfleet.api.app import create_app
from sdfleet.settings import load_settings
from tests.api.serving import Running

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(create_app(load_settings(home=Path("unused"), backend="fake")).openapi())
bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@schema.parametrize()
@bounded
def test_every_route_answers_as_documented(case: schemathesis.Case, fake_server: Running) -> None:
    case.call_and_validate(base_url=fake_server.url, checks=CHECKS)
