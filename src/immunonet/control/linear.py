"""Controls of linear manifolds in closed form: how much of what lies off each of them is left."""

from __future__ import annotations


def kept_off(penalty: float, layers: int, *, look_ahead: bool) -> list[float]:
    """Return for each of so many layers, in running order, the share of the state off its manifold that control leaves.

    The control is u = -(1 - share) Q x, Q the projection off the manifold. Without `look_ahead` the share is c / (1 +
    c) everywhere. With it what later layers will pay counts, as if every layer between were a rotation that maps
    manifolds into each other: share_t = c / (1 + l_{t+1} + c), l_t = c (1 + l_{t+1}) / (1 + c + l_{t+1}), l_T = 0 (the
    Riccati recursion of the linear-quadratic problem; Chen et al. 2022).
    """
    cost, shares = 0.0, list[float]()
    for _ in range(layers):
        ahead = cost if look_ahead else 0.0
        shares.append(penalty / (1 + ahead + penalty))
        cost = penalty * (1 + cost) / (1 + penalty + cost)
    return shares[::-1]
