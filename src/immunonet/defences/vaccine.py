"""Vaccination: attacked training examples beside the clean ones.

After DAEkNN (Wang, Chen, Hero 2021, arXiv 2108.06797), which weighs the votes of both; here the share of examples that
are attacked does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from immunonet import _check, attacks
from immunonet._estimates import told
from immunonet.defences.repertoire import Examples
from immunonet.features.search import batches

# Steps of the attack, and the share of the radius that each goes.
STEPS, STEP = 10, 1 / 4


def vaccinated(model: nn.Module, given: Examples, *, eps: float, share: float, bounds: _check.Bounds) -> Examples:
    """Return examples `(N, *S)` and after them copies of a random `share` of them, attacked under their own labels.

    The attack: PGD in linf with a radius `eps` > 0 on the model, which knows of no defence. At least one is attacked.
    Same examples and model, same copies. ValueError where the examples stay in their source.
    """
    if not isinstance(given.x, Tensor):
        raise ValueError("vaccine must be None where examples are read from their source: use keep='memory'")
    n = max(1, round(share * len(given)))
    which = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))[:n].sort().values.to(given.y.device)
    parts, moved = list(batches(n)), []
    for part in told(parts, len(parts), f"vaccinating with {n:,} examples", f"each takes {STEPS} steps of an attack"):
        attack = attacks.PGD(eps=eps, step=STEP * eps, iterations=STEPS, bounds=bounds.pairs(), seed=part.start)
        with torch.enable_grad():
            moved.append(attack(model, given.x[which[part]], given.y[which[part]]).adversarials)
    return Examples(torch.cat([given.x, *moved]), torch.cat([given.y, given.y[which]]))
