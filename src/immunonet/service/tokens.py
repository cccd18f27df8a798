"""Who may do what: tokens with roles, read from a file."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Each role may do what those before it may.
ROLES = ("ask", "confirm", "admin")
SHORTEST = 16


@dataclass(frozen=True)
class Holder:
    """Who asks: the name that a token belongs to, "" where none is needed, and the role."""

    name: str
    role: str

    def may(self, role: str) -> bool:
        """Return whether the role is this one or one before it."""
        return ROLES.index(self.role) >= ROLES.index(role)


ANYBODY = Holder("", ROLES[-1])


class Tokens:
    """Tokens by which a service knows who asks; without any, everybody may do everything."""

    def __init__(self, known: Sequence[tuple[Holder, str]] = ()) -> None:
        self._known = [(holder, token.encode()) for holder, token in known]

    def __bool__(self) -> bool:
        return bool(self._known)

    @classmethod
    def read(cls, path: str | Path) -> Tokens:
        """Return the tokens of a file: lines of a name, a role (ask, confirm, admin) and a token, apart by blanks.

        Lines that begin with # are left out. ValueError names the line that is none; its token is never shown.
        """
        known: list[tuple[Holder, str]] = []
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            parts = line.split()
            if not parts or parts[0].startswith("#"):
                continue
            where = f"{path}, line {number}"
            if len(parts) != 3 or parts[1] not in ROLES:
                raise ValueError(f"{where}: must be NAME ROLE TOKEN, the role one of {', '.join(ROLES)}")
            if "/" in parts[0]:
                raise ValueError(f"{where}: a name must be without /, which comes between it and X-Source")
            if len(parts[2]) < SHORTEST:
                raise ValueError(
                    f"{where}: a token must have at least {SHORTEST} characters; make one by "
                    "python -c 'import secrets; print(secrets.token_urlsafe())'"
                )
            known.append((Holder(parts[0], parts[1]), parts[2]))
        if not known:
            raise ValueError(f"{path} has no tokens: give it a line NAME ROLE TOKEN")
        if len({token for _, token in known}) < len(known):
            raise ValueError(f"{path} gives one token to two names: make one for each")
        return cls(known)

    def holder(self, authorization: str | None) -> Holder | None:
        """Return who sends a header `Authorization: Bearer TOKEN`; None for a token that is not known."""
        if not self:
            return ANYBODY
        scheme, _, token = (authorization or "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        # All are compared, so that the time taken tells nothing of how near a wrong one came.
        found = [holder for holder, known in self._known if hmac.compare_digest(known, given)]
        return found[0] if found else None


def is_loopback(host: str) -> bool:
    """Return whether a host, by its name or address, is this machine as it calls itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
