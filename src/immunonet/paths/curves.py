"""Curves through points, and networks of one architecture as such points: pure functions of t and of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from immunonet import _check


def _bezier(t: float, points: int) -> list[float]:
    n = points - 1
    return [math.comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(points)]


def _chain(t: float, points: int) -> list[float]:
    return [max(0.0, 1 - abs(t * (points - 1) - j)) for j in range(points)]


CURVES: dict[str, Callable[[float, int], list[float]]] = {"bezier": _bezier, "chain": _chain}
"""Curves by name: the weights, which sum to 1, of so many points at a place t in [0, 1]."""


def place(t: object, name: str = "t") -> float:
    """Return a place on a path, a number in [0, 1]; ValueError or TypeError names the argument otherwise."""
    return _check.number(name, t, least=0.0, most=1.0)


def mixed(points: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return tensors by name, the sum of those of all `points`, each times its share; differentiable in them."""
    out = {name: value * shares[0] for name, value in points[0].items()}
    for point, share in zip(points[1:], shares[1:], strict=True):
        out = {name: value + point[name] * share for name, value in out.items()}
    return out


def normalisers(net: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of a network, by name, that keep statistics of what passes through them."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def trainable(networks: Sequence[nn.Module]) -> list[str]:
    """Return the names of the parameters that some of the networks train, of all where none trains any."""
    names = [name for name, value in networks[0].named_parameters() if value.is_floating_point()]
    some = [name for name in names if any(net.get_parameter(name).requires_grad for net in networks)]
    return some or names


def check_alike(networks: Sequence[nn.Module]) -> None:
    """Raise ValueError or TypeError unless networks are of one architecture and differ in their weights alone.

    Statistics of normalising layers may differ; other buffers, and parameters that nobody trains, may not, as no point
    between two of them has a meaning.
    """
    if len(networks) < 2:
        raise ValueError(f"networks must be two or more, got {len(networks)}")
    for i, net in enumerate(networks):
        if not isinstance(net, nn.Module):
            raise TypeError(f"networks[{i}] must be a torch.nn.Module, got {type(net).__name__}")
    first = networks[0]
    if not any(True for _ in first.parameters()):
        raise ValueError("networks must have parameters, networks[0] has none: there is nothing to join")
    free = {f"{name}.{key}" if name else key for name, module in normalisers(first).items() for key in _STATISTICS}
    free |= set(trainable(networks))
    kinds = [(name, type(module)) for name, module in first.named_modules()]
    for i, net in enumerate(networks[1:], 1):
        other = f"networks[{i}] is of another architecture"
        for what, a, b in (
            ("parameter", dict(first.named_parameters()), dict(net.named_parameters())),
            ("buffer", dict(first.named_buffers()), dict(net.named_buffers())),
        ):
            if odd := sorted(a.keys() ^ b.keys()):
                raise ValueError(f"{other}: {what} {odd[0]} is in one of them only")
            for name, value in a.items():
                _check_one(f"{other}: {what} {name}", value, b[name])
                if name not in free and not bool((value == b[name]).all()):
                    raise ValueError(f"networks[{i}] has another {what} {name}: only what is trained may differ")
        for (name, kind), found in zip(kinds, net.modules(), strict=False):
            if type(found) is not kind:
                raise ValueError(f"{other}: {name or 'the module'} is a {type(found).__name__}, not a {kind.__name__}")


def _check_one(what: str, value: Tensor, other: Tensor) -> None:
    for own, found in ((value.shape, other.shape), (value.dtype, other.dtype), (value.device, other.device)):
        if own != found:
            shown = [str(tuple(one) if isinstance(one, tuple) else one) for one in (found, own)]
            raise ValueError(f"{what} is {shown[0]}, in the first {shown[1]}")


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
