"""Schemathesis reads the document that the server publishes, and asks every route for what it allows and forbids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.running import PREFIX, SUFFIX, Running

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import checks  # noqa: E402

NUM_EXAMPLES = 10
BOUNDED = settings(
    max_examples=NUM_EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def operations(running: Running) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def ask(operations: list[Any], mode: Any, excluded: list[Any]) -> set[int]:
    """The statuses of all answers."""
    statuses = set()
    for operation in operations:

        @BOUNDED
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Any) -> None:
            answer = case.call(timeout=60)
            statuses.add(answer.status_code)
            case.validate_response(answer, excluded_checks=excluded)

        one()
    return statuses


def test_every_route_bears_what_its_description_allows(running: Running, operations: list[Any]) -> None:
    published = running.client.get("/openapi.json").json()["paths"]
    assert len(operations) == sum(map(len, published.values())) > 20
    before = running.post("/v1/completions", prompt=PREFIX, suffix=SUFFIX)["choices"]
    # No schema says that an empty prompt is wrong unless there is a suffix, or how long a model's longest prompt is.
    statuses = ask(operations, schemathesis.GenerationMode.POSITIVE, [checks.positive_data_acceptance])
    assert 200 in statuses and statuses <= {200, 400, 422}
    assert running.post("/v1/completions", prompt=PREFIX, suffix=SUFFIX)["choices"] == before


def test_a_body_that_its_description_forbids_is_no_server_error(running: Running, operations: list[Any]) -> None:
    before = running.post("/v1/completions", prompt=PREFIX, suffix=SUFFIX)["choices"]
    with_body = [operation for operation in operations if operation.body]
    assert {operation.path for operation in with_body} >= {"/v1/completions", "/infill", "/api/generate"}
    # Not all are refused: null is taken as absent, whatever the description says of it.
    statuses = ask(with_body, schemathesis.GenerationMode.NEGATIVE, [checks.negative_data_rejection])
    assert {400, 422} <= statuses <= {200, 400, 422}
    assert running.post("/v1/completions", prompt=PREFIX, suffix=SUFFIX)["choices"] == before
