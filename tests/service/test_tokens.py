"""Tokens, their roles, and what a file of them may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from immunonet.service.limits import Limits
from immunonet.service.running import check_address
from immunonet.service.tokens import ANYBODY, ROLES, Tokens

ASK, ADMIN = "a" * 20, "b" * 20


def read(tmp_path: Path, text: str) -> Tokens:
    (tmp_path / "tokens").write_text(text)
    return Tokens.read(tmp_path / "tokens")


def test_a_token_tells_who_asks_and_a_role_holds_those_before_it(tmp_path: Path) -> None:
    tokens = read(tmp_path, f"# who\n\nsite ask {ASK}\nboss admin {ADMIN}\n")
    site, boss = tokens.holder(f"Bearer {ASK}"), tokens.holder(f"bearer {ADMIN}")
    assert site is not None
    assert boss is not None
    assert (site.name, [site.may(role) for role in ROLES]) == ("site", [True, False, False])
    assert (boss.name, [boss.may(role) for role in ROLES]) == ("boss", [True, True, True])
    for wrong in (None, "", ASK, f"Basic {ASK}", "Bearer", f"Bearer {ASK[:-1]}", f"Bearer {ASK}x", "Bearer ä"):
        assert tokens.holder(wrong) is None


def test_without_tokens_everybody_may_do_everything() -> None:
    assert Tokens().holder(None) is ANYBODY
    assert not Tokens()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no tokens"),
        ("site ask", "line 1: must be NAME ROLE TOKEN"),
        (f"# a\nsite boss {ASK}", "line 2: must be NAME ROLE TOKEN"),
        (f"a/b ask {ASK}", "line 1: a name must be without /"),
        ("site ask short", "at least 16 characters"),
        (f"a ask {ASK}\nb ask {ASK}", "one token to two names"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        read(tmp_path, text)
    assert "short" not in str(error.value).removesuffix("short")
    assert ASK not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"body": 0}, "body"), ({"batch": 0}, "batch"), ({"batch": 9, "queue": 8}, "queue"), ({"seconds": 0}, "seconds")],
)
def test_limits_are_checked(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Limits(**settings)  # type: ignore[arg-type]


def test_as_many_wait_as_a_batch_holds_unless_told() -> None:
    assert Limits(batch=64).room == 64
    assert Limits(batch=8, queue=20).room == 20


def test_others_reach_a_service_with_tokens_alone() -> None:
    for inside in ("127.0.0.1", "::1", "127.3.2.1"):
        check_address(inside, 0, tokens=False)
    for outside in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ValueError, match="--token-file"):
            check_address(outside, 0, tokens=False)
    with pytest.raises(OSError, match="cannot be listened on"):
        check_address("203.0.113.1", 0, tokens=True)
