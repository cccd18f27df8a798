from __future__ import annotations

import pytest


@pytest.fixture(params=[(1, 8, 8), (3, 6, 5)], ids=["grey", "colour"])
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param
