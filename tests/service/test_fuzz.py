"""Whatever the OpenAPI document lets strangers send, and what it does not, is answered in words and by no fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from services import application, begun, rails

from immunonet import Memory
from immunonet.service.limits import Limits


def test_no_request_that_can_be_made_from_the_document_is_a_fault_of_the_service(tmp_path: Path) -> None:
    # Here, as it takes long to import and every worker imports this module.
    import schemathesis
    from schemathesis.checks import not_a_server_error

    service = begun(rails(), Memory(tmp_path / "memory"), limits=Limits(body=100_000, batch=8))

    async def reload() -> None:
        """Take the same defence again."""

    service.reload = reload
    app = application(service)

    async def here(scope: Any, receive: Any, send: Any) -> None:
        """Ask it by a name of this machine."""
        others = [(name, value) for name, value in scope.get("headers", ()) if name != b"host"]
        await app(scope | {"headers": [*others, (b"host", b"127.0.0.1")]}, receive, send)

    schema = schemathesis.openapi.from_asgi("/openapi.json", here)
    met = set()
    for operation in schema.get_all_operations():
        made = operation.ok()

        @settings(
            max_examples=10, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=made.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            answer = case.call()
            case.validate_response(answer, checks=[not_a_server_error])
            # Written so, for words of this file are among those that are sent.
            assert "traceback".capitalize() not in answer.text
            if answer.status_code >= 400:
                assert set(answer.json()) == {"detail"}

        ask()
        met.add(made.path)
    assert {"/v1/respond", "/v1/feedback", "/v1/memory/rollback"} <= met
