"""Whether a model still is the one that a defence was fitted with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Values of a tensor that are compared, and how far what they lead to may move before the model counts as another one.
_VALUES, _SAME, _SAME_HALF = 8, 5e-3, 0.1

Stamp = tuple[list[tuple[Any, ...]], Tensor]


class Witness:
    """What networks gave for a few inputs when a defence was fitted, and what their weights looked like then."""

    def __init__(self, networks: Sequence[nn.Module], testify: Callable[[], list[Tensor]]) -> None:
        """Take the networks, and what asks them again: tensors whose first axis are the same few inputs."""
        self._said = [said.detach().cpu() for said in testify()]
        self._stamp = stamp(networks)

    def still(self, networks: Sequence[nn.Module], testify: Callable[[], list[Tensor]]) -> bool:
        """Return whether the networks still say what they did; they are asked only if their weights look changed.

        A device or a dtype may change; a change of weights that hardly moves what the networks say passes.
        """
        now = stamp(networks)
        if _equal(now, self._stamp):
            return True
        same = _SAME_HALF if any(_is_half(network) for network in networks) else _SAME
        said = [found.detach().cpu() for found in testify()]
        for a, b in zip(self._said, said, strict=True):
            if a.shape != b.shape or not bool(((a - b).abs() <= same * a.abs().max() + 1e-6).all()):
                return False
        self._stamp = now
        return True


def stamp(networks: Sequence[nn.Module]) -> Stamp:
    """Return what changes with the weights of networks: where they lie, their versions, and a few values of each.

    Writing through `.data` leaves no other trace than the values.
    """
    tensors = [t.detach() for network in networks for t in (*network.parameters(), *network.buffers())]
    # Quantised values have no plain arithmetic.
    plain = [t for t in tensors if t.numel() and not t.is_quantized and not t.is_complex()]
    places = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.dtype) for t in tensors]
    steps = [max(1, t.numel() // _VALUES) for t in plain]
    values = [t.reshape(-1)[: _VALUES * step : step].float() for t, step in zip(plain, steps, strict=True)]
    where = plain[0].device if plain else torch.device("cpu")
    return places, torch.cat([v.to(where) for v in values]).cpu() if values else torch.zeros(0, dtype=torch.float32)


def _equal(a: Stamp, b: Stamp) -> bool:
    return a[0] == b[0] and torch.equal(a[1].nan_to_num(), b[1].nan_to_num())


def _is_half(network: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters())
