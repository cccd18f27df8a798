"""Manifolds of clean states: which kind is asked for, learned from what a network gives for examples, and rebuilt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.control.autoencoders import Autoencoder
from immunonet.control.manifolds import Denoiser, Subspace
from immunonet.control.passing import bare
from immunonet.data import Images
from immunonet.learning import Epoch

# Examples that pass at once.
ROWS = 500

Progress = Callable[[int, int, list[Epoch]], None]
"""What is told while an autoencoder is trained: step, steps, epochs so far."""


def chosen(value: Any, layers: int) -> tuple[Autoencoder | str | None, list[nn.Module]]:
    """Return how manifolds are learned, None where they are given, and those that are given."""
    if isinstance(value, Autoencoder):
        return value, []
    if isinstance(value, str):
        name = _check.choice("manifold", value, ("linear", "autoencoder"))
        return (Autoencoder() if name == "autoencoder" else name), []
    given = [value] if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList) else value
    if not isinstance(given, Sequence | nn.ModuleList) or not all(isinstance(m, nn.Module) for m in given):
        raise TypeError(
            f"manifold must be 'linear', 'autoencoder', an Autoencoder, or a module per layer, got {value!r}"
        )
    if len(given) != layers:
        raise ValueError(f"manifold must be one module per layer ({layers}), got {len(given)}")
    return None, list(given)


def directions(value: Any) -> float | int:
    """Return a share of variance in (0, 1] as a float, or a number of directions as an int."""
    found = value.item() if hasattr(value, "item") else value
    if isinstance(found, int) and not isinstance(found, bool):
        return _check.integer("rank", found)
    return _check.number("rank", found, least=0, most=1, above=True)


def learned(
    model: nn.Module,
    layers: Sequence[str],
    kind: Autoencoder | str,
    images: Images,
    clean: Images,
    *,
    rank: float | int,
    basis: str,
    bounds: _check.Bounds,
    seed: int,
    checkpoint: Path | None,
    on_progress: Progress | None,
) -> tuple[list[nn.Module], dict[str, float]]:
    """Return a manifold per layer of the states that `images` give, and the share of variance that linear ones hold.

    `clean`: images that an autoencoder is judged by. The settings are those of `ClosedLoop`. ValueError that names the
    layer where states cannot be used.
    """
    found: list[nn.Module] = []
    shares: dict[str, float] = {}
    for layer in layers:
        states = functools.partial(_states, model, layer, images.x)
        if isinstance(kind, Autoencoder):
            file = None if checkpoint is None else checkpoint / f"{layer}.checkpoint.safetensors"
            net = kind.trained(
                model, layer, images, clean, bounds=bounds, states=states, checkpoint=file, on_progress=on_progress
            )
            found.append(net)
            continue
        try:
            subspace, fitted = Subspace.fitted(states, rank, channels=basis == "channels", seed=seed)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
        shares[layer] = fitted.share
        found.append(subspace.to(images.x.device))
    return found, shares


def rebuilt(kind: Autoencoder | str, tensors: Mapping[str, Tensor], state: Tensor, basis: str) -> nn.Module:
    """Return the manifold of a layer, whose states are like `state` `(1, *S_t)`, with what was saved of it."""
    if not isinstance(kind, Autoencoder):
        return Subspace(tensors["mean"], tensors["directions"], channels=basis == "channels")
    net: Denoiser = kind.built(tuple(state.shape[1:]), tensors["mean"], tensors["scale"])
    net.load_state_dict(dict(tensors))
    return net.requires_grad_(False)


def _states(model: nn.Module, layer: str, x: Tensor) -> Iterator[Tensor]:
    """Yield what a layer gives for inputs, in batches."""
    for part in x.split(ROWS):
        with torch.no_grad():
            yield bare(model, [layer], part)[0]
