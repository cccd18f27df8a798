"""Threats: what an attacker may do to an image, how a caller claims to stand it, and which threat holds which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from immunonet import _check
from immunonet.attacks.norms import NORMS

UNION = "union"
"""What stands for the norm where all threats are meant at once."""
# p of each norm, as 1 / p: what the sizes of a perturbation by two norms can be apart follows from it.
_INVERSE = {"linf": 0.0, "l2": 0.5, "l1": 1.0}


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attacker may do: a perturbation of size `eps` in `norm`, within `bounds`; `seed`: of the attacks."""

    eps: float
    norm: str
    bounds: _check.Bounds
    seed: int

    def reach(self, x: Tensor) -> float:
        """Return the largest eps that the bounds have room for, of inputs `x` `(B, *S)`."""
        return room(self.norm, self.bounds, x)


def room(norm: str, bounds: _check.Bounds, x: Tensor) -> float:
    """Return the size, in `norm`, of the largest perturbation of inputs `x` `(B, *S)` that `bounds` have room for."""
    low, high = bounds.tensors(x, x.shape[1:])
    return NORMS[norm].reach((high - low).double().expand(x.shape[1:]))


def claimed(eps: object, norm: object, threats: object, most: Callable[[str], float]) -> dict[str, float]:
    """Return the radius by norm of what a caller claims: `eps` in `norm`, or all `threats`, radii by norm.

    `most(norm)`: the largest radius that makes sense. ValueError or TypeError names the argument: both or neither are
    given, no threat at all, an unknown norm, or a radius that is no number in [0, most].
    """
    if threats is None:
        name = _check.choice("norm", norm, tuple(NORMS))
        if eps is None:
            raise ValueError("eps or threats must be given: eps=8/255, or threats={'linf': 8/255, 'l2': 0.5}")
        return {name: _check.number("eps", eps, least=0, most=most(name))}
    if eps is not None or norm != "linf":
        given = f"eps={eps!r}" if eps is not None else f"norm={norm!r}"
        raise ValueError(f"threats goes without eps and norm, which it tells itself, got {given}: leave one out")
    if not isinstance(threats, Mapping):
        raise TypeError(f"threats must be radii by norm, such as {{'linf': 8/255, 'l2': 0.5}}, got {threats!r}")
    if not threats:
        raise ValueError("threats must hold at least one, such as {'linf': 8/255}, got {}")
    for name in threats:
        if name not in NORMS:
            raise ValueError(
                f"threats must be by the name of a norm, got {name!r}{_check.nearest(str(name), [*NORMS])}"
            )
    return {
        name: _check.number(f"threats[{name!r}]", radius, least=0, most=most(name)) for name, radius in threats.items()
    }


def held(outer: Threat, norm: str, d: int) -> float:
    """Return the radius of the largest ball of `norm` that lies in that of `outer`, for inputs of `d` values.

    From ||v||_p <= d^max(0, 1/p - 1/q) ||v||_q; 0.0 for a norm of which nothing is known.
    """
    if outer.norm not in _INVERSE or norm not in _INVERSE:
        return 0.0
    return outer.eps / math.pow(d, max(0.0, _INVERSE[outer.norm] - _INVERSE[norm]))
