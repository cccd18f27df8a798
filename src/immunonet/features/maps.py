"""Maps from cells to feature vectors: a callable, a layer of a model, what is affine, and cells as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import models
from immunonet.features.names import layer_parts
from immunonet.immune.backend import fused_for
from immunonet.immune.operators import Family

# Values of the widest activation of a chunk of cells: near the size of a last-level cache.
CHUNK_VALUES = 2**22
# Cells run at once through a model that was not probed, and through a matrix.
ROWS, MATRIX_ROWS = 128, 4096


class FeatureMap:
    """A map from cells `(n, *S)` to feature vectors `(n, D)` float32, differentiable in the cells.

    This one is a callable. `tap`: the layer whose output for an input is the features of the input's cell, if any.
    `keeps_cells`: whether the features are the cells themselves.
    """

    rows = ROWS
    tap: str | None = None
    keeps_cells = False

    def __init__(self, name: str, function: Callable[[Tensor], Any]) -> None:
        self.name = name
        self._function = function
        # A bool, because a memory format cannot be pickled.
        self._channels_last = False

    @property
    def memory_format(self) -> torch.memory_format:
        """How the cells are laid out for the model."""
        return torch.channels_last if self._channels_last else torch.preserve_format

    def _output(self, cells: Tensor) -> Any:
        return models.call(self._function, cells, self.memory_format)

    def _watched(self) -> list[nn.Module]:
        """Return the networks that run."""
        return models.networks_of(self._function)

    def probe(self, cells: Tensor) -> None:
        """Learn from a few cells how many to run at once, and the faster memory format."""
        widths: list[int] = []

        def measure(output: Any) -> None:
            if isinstance(output, Tensor):
                widths.append(output.numel() // len(cells))

        with models.watching({m: measure for network in self._watched() for m in network.modules()}):
            features = self(cells)
        self.rows = max(16, CHUNK_VALUES // max([features.shape[1], 1, *widths]))
        if cells.ndim == 4:
            # Convolutions run about twice as fast; models that reshape by view refuse it.
            self._channels_last = True
            with contextlib.suppress(RuntimeError):
                found = self(cells)
                if found.shape == features.shape and torch.allclose(found, features, rtol=1e-3, atol=1e-4):
                    return
            self._channels_last = False

    def __call__(self, cells: Tensor) -> Tensor:
        """Return the features `(n, D)`, in one piece; ValueError unless the layer gives one tensor row per cell."""
        return flat(self.name, self._output(cells), len(cells)).to(cells.device)

    def finished(self, features: Tensor) -> Tensor:
        """Return what this map makes of the features `(n, D)` that its tap gave; may overwrite them."""
        return features

    def measured(self, distances: Tensor) -> Tensor:
        """Return Euclidean distances of features in the metric's own units."""
        return distances

    def chunked(self, cells: Tensor) -> Tensor:
        """Return the features `(n, D)` of any number of cells, computed in chunks; ValueError if not finite."""
        first = self(cells[: self.rows])
        # A tensor of its own, which callers may overwrite.
        out = first.new_empty(len(cells), first.shape[1])
        out[: self.rows] = first
        for start in range(self.rows, len(cells), self.rows):
            out[start : start + self.rows] = self(cells[start : start + self.rows])
        return finite(self.name, out)

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return feature distances `(F, P)` of families of `cells` `(B, C, P, *S)` to their antigens `(B, *S)`.

        `features` `(B, D)` are the antigens' own. A cell whose features are NaN is infinitely far.
        """
        size = cells.shape[2]
        chunk = self.rows
        out = features.new_empty(len(family[0]), size)
        step = max(1, chunk // size)
        for start in range(0, len(out), step):
            some = slice(start, start + step)
            part, goal = cells[family[0][some], family[1][some]], features[family[0][some], None]
            for i in range(0, size, chunk):
                found = self(part[:, i : i + chunk].flatten(0, 1)).unflatten(0, (len(part), -1))
                out[some, i : i + chunk] = torch.linalg.vector_norm(found - goal, dim=2)
        return out.nan_to_num_(nan=torch.inf, posinf=torch.inf)


class LogitsMap(FeatureMap):
    """The model's logits `(n, C)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("logits", model)

    def _output(self, cells: Tensor) -> Any:
        return models.logits(self._function, cells)


class LayerMap(FeatureMap):
    """A layer of a model, from inputs: what it gives, or its average over a grid."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(layer, model)
        self.model, self.tap = model, layer

    def _output(self, cells: Tensor) -> Any:
        module, side = layer_parts(self.name, self.model)
        (found,) = models.outputs(self.model, [module], cells, memory_format=self.memory_format)
        return found if side is None else averaged(found, self.name, side)


class TailMap(LayerMap):
    """A layer of a model, from cells at another layer, the space, before it.

    The model runs on a dummy input, and the space's output is replaced by the cells. One dummy row is cheapest; models
    that reshape by their input's batch size need as many as there are cells.
    """

    def __init__(self, model: nn.Module, layer: str, space: str, x: Tensor, *, single: bool) -> None:
        super().__init__(model, layer)
        # Zeros show whether anything but the space reaches the layer.
        self._space, self._dummy, self._single = space, torch.zeros_like(x[:1]), single

    def _output(self, cells: Tensor) -> Any:
        module, side = layer_parts(self.name, self.model)
        dummy = self._dummy.to(cells.device).expand(1 if self._single else len(cells), *self._dummy.shape[1:])
        given = self._space, models.own(self.model, cells, self.memory_format)
        (found,) = models.outputs(self.model, [module], dummy, given=given)
        return found if side is None else averaged(found, self.name, side)


class IdentityMap(FeatureMap):
    """Cells as their own features: `"input"`, or a layer that is itself the space."""

    rows = MATRIX_ROWS
    keeps_cells = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, cells: Tensor) -> Tensor:
        """Return the cells, flattened."""
        return cells.flatten(1)

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return Euclidean distances `(F, P)` of the cells themselves."""
        fused = fused_for(cells)
        if fused is not None:
            ones = antigens.new_ones(1, antigens[0].numel())
            return fused.band_distances(cells, family, antigens, torch.zeros(1, dtype=torch.long), ones)  # type: ignore[no-any-return]
        return norms((cells[family] - antigens[family[0], None]).flatten(2))


class UnitMap(FeatureMap):
    """The features of another map divided by their length, so that distances tell angles; zero stays zero.

    Half a squared distance is one minus the cosine.
    """

    def __init__(self, inner: FeatureMap) -> None:
        self.name, self.tap, self.rows = inner.name, inner.tap, inner.rows
        self._inner = inner

    @property
    def memory_format(self) -> torch.memory_format:
        """How the cells are laid out for the model."""
        return self._inner.memory_format

    def finished(self, features: Tensor) -> Tensor:
        """Return features of length 1; may overwrite what it is given."""
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
        unit: Tensor = features / length if features.requires_grad else features.div_(length)
        return unit

    def measured(self, distances: Tensor) -> Tensor:
        """Return one minus the cosine."""
        return distances.square() / 2

    def __call__(self, cells: Tensor) -> Tensor:
        """Return the features `(n, D)` of length 1."""
        features = self._inner(cells)
        unit: Tensor = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
        return unit


METRICS: dict[str, Callable[[FeatureMap], FeatureMap]] = {"euclidean": lambda inner: inner, "cosine": UnitMap}
"""What a layer's features become before their Euclidean distances are taken, by the name of the metric."""


def every_digit(like: Tensor) -> torch.autocast:
    """Switch autocast off, which is for the model."""
    return torch.autocast(like.device.type, enabled=False)


def norms(difference: Tensor) -> Tensor:
    """Return the lengths `(F, P)` of vectors `(F, P, D)`."""
    found: Tensor = torch.linalg.vector_norm(difference, dim=2)
    return found


def flat(name: str, output: Any, n: int) -> Tensor:
    """Return a layer's output for n cells as features `(n, D)` float32; ValueError unless it is one row per cell."""
    if not isinstance(output, Tensor):
        raise ValueError(f"layer {name!r} must give one tensor, got {type(output).__name__}")
    if output.ndim == 0 or len(output) != n:
        raise ValueError(f"layer {name!r} must give one row per input, got shape {tuple(output.shape)} for {n}")
    plain: Tensor = output.dequantize() if output.is_quantized else output
    return plain.flatten(1).float() if plain.ndim > 1 else plain[:, None].float()


def finite(name: str, features: Tensor) -> Tensor:
    """Return features as they are; ValueError that names the layer if they are not finite."""
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"layer {name!r} gave NaN or infinite features: check the model and its precision")
    return features


def averaged(output: Any, name: str, side: int) -> Tensor:
    """Return images `(n, c, h, w)` averaged over the fields of a grid of `side` x `side`: `(n, c, side, side)`."""
    if not isinstance(output, Tensor) or output.ndim != 4 or not 1 <= side <= min(output.shape[2:]):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {name!r} must give images of at least {side} x {side}, side at least 1, got {shape}")
    return F.adaptive_avg_pool2d(output, side)
