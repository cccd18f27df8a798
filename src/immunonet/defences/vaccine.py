"""Vaccination: attacked training examples beside the clean ones.

After DAEkNN (Wang, Chen, Hero 2021, arXiv 2108.06797), which weighs the votes of both; here the share of examples that
are attacked does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from immunonet import attacks
from immunonet._estimates import told
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.defences.repertoire import Examples
from immunonet.features.search import batches

# Steps of the attack, and the share of the radius that each goes.
STEPS, STEP = 10, 1 / 4


def vaccinated(defence: NeighbourDefence, given: Examples) -> Examples:
    """Return examples `(N, *S)` and after them attacked copies of a random `vaccine_share` of them, at least of one.

    The attack: PGD in linf with the radius `vaccine` on the defence's model, away from each one's own label, which the
    copy keeps. Without a vaccine there are none. Same examples and model, same copies. ValueError where the examples
    stay in their source.
    """
    eps = defence.vaccine
    if eps is None:
        return given
    if not isinstance(given.x, Tensor):
        raise ValueError("vaccine must be None where examples are read from their source: use keep='memory'")
    n = max(1, round(defence.vaccine_share * len(given)))
    which = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))[:n].sort().values.to(given.y.device)
    parts, moved = list(batches(n)), []
    for part in told(parts, len(parts), f"vaccinating with {n:,} examples", f"each takes {STEPS} steps of an attack"):
        attack = attacks.PGD(eps=eps, step=STEP * eps, iterations=STEPS, bounds=defence.bounds.pairs(), seed=part.start)
        with torch.enable_grad():
            moved.append(attack(defence.model, given.x[which[part]], given.y[which[part]]).adversarials)
    return Examples(torch.cat([given.x, *moved]), torch.cat([given.y, given.y[which]]))
