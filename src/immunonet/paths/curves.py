"""Curves through points, and networks of one architecture as such points: pure functions of t and of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from immunonet import _check


def _bezier(t: float, points: int) -> list[float]:
    n = points - 1
    return [math.comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(points)]


def _chain(t: float, points: int) -> list[float]:
    return [max(0.0, 1 - abs(t * (points - 1) - j)) for j in range(points)]


CURVES: dict[str, Callable[[float, int], list[float]]] = {"bezier": _bezier, "chain": _chain}
"""Curves by name: the weights, which sum to 1, of so many points at a place t in [0, 1]."""


def place(t: object) -> float:
    """Return a place on a path, a number in [0, 1]; ValueError or TypeError otherwise."""
    return _check.number("t", t, least=0.0, most=1.0)


def mixed(points: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return tensors by name, the sum of those of all `points`, each times its share; differentiable in them."""
    out = {name: value * shares[0] for name, value in points[0].items()}
    for point, share in zip(points[1:], shares[1:], strict=True):
        out = {name: value + point[name] * share for name, value in out.items()}
    return out


def normalisers(net: nn.Module) -> dict[str, _NormBase]:
    """Return the layers of a network, by name, that keep statistics of what passes through them."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None
    }


def check_alike(networks: Sequence[nn.Module]) -> None:
    """Raise ValueError or TypeError unless networks are of one architecture and differ in their weights alone.

    Statistics of normalising layers may differ; other buffers may not, as no point between two of them has a meaning.
    """
    if len(networks) < 2:
        raise ValueError(f"networks must be two or more, got {len(networks)}")
    for i, net in enumerate(networks):
        if not isinstance(net, nn.Module):
            raise TypeError(f"networks[{i}] must be a torch.nn.Module, got {type(net).__name__}")
    first = networks[0]
    if not any(True for _ in first.parameters()):
        raise ValueError("networks must have parameters, networks[0] has none: there is nothing to join")
    own = {f"{name}.{key}" if name else key for name, module in normalisers(first).items() for key in _STATISTICS}
    for i, net in enumerate(networks[1:], 1):
        for what, a, b in (
            ("parameter", dict(first.named_parameters()), dict(net.named_parameters())),
            ("buffer", dict(first.named_buffers()), dict(net.named_buffers())),
        ):
            if odd := sorted(a.keys() ^ b.keys()):
                raise ValueError(f"networks[{i}] is of another architecture: {what} {odd[0]} is in one of them only")
            for name, value in a.items():
                if value.shape != b[name].shape or value.dtype != b[name].dtype:
                    found = f"{tuple(b[name].shape)} {b[name].dtype}, in the first {tuple(value.shape)} {value.dtype}"
                    raise ValueError(f"networks[{i}] is of another architecture: {what} {name} is {found}")
                if what == "buffer" and name not in own and not bool((value.cpu() == b[name].cpu()).all()):
                    raise ValueError(
                        f"networks[{i}] has another buffer {name}: only what is learnt may differ on a path"
                    )


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
