"""What a defence holds: a repertoire of examples, described in the layers of its model, and the search of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from immunonet import _check, incoming, indexed, models
from immunonet._estimates import told
from immunonet.defences.base import Defence
from immunonet.defences.repertoire import Examples, Repertoire
from immunonet.features.build import build
from immunonet.features.file import FeatureFile
from immunonet.features.grown import GrownIndex
from immunonet.features.maps import METRICS, FeatureMap
from immunonet.features.names import Layer, as_layers, check_names
from immunonet.features.passes import described, witnessed
from immunonet.features.search import (
    ExactIndex,
    Index,
    Progress,
    SignatureIndex,
    auto_budget,
    batches,
)
from immunonet.features.witness import Witness

PROBES = 8
# Cells that join a repertoire are searched beside it, up to this share of its examples; more are searched with them.
BESIDE = 0.25


class HoldingDefence(Defence):
    """A trained classifier with a repertoire of examples, an index of them in each layer, and the cells they give.

    `space`: the submodule whose outputs are cells; None: inputs are. `memory_budget`: bytes of features that are kept.
    """

    repertoire: Repertoire
    _witness: Witness
    _cell_range: _check.Bounds

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        metric: str,
        bounds: Any,
        space: str | None,
        memory_budget: int | Literal["auto"],
    ) -> None:
        super().__init__(model, bounds=bounds)
        if space is not None and not isinstance(space, str):
            raise TypeError(f"space must be None or a submodule's name, got {space!r}")
        self._layers = as_layers(layers)
        check_names(model, self._layers, space)
        # Registered so that .to(device) moves them with everything else.
        self._callables = nn.ModuleList(layer for layer in self._layers if isinstance(layer, nn.Module))
        self.space = space
        self.metric = _check.choice("metric", metric, tuple(METRICS))
        if isinstance(memory_budget, str) and memory_budget != "auto":
            raise TypeError(f"memory_budget must be bytes, an integer, or 'auto', got {memory_budget!r}")
        self.memory_budget = (
            auto_budget() if isinstance(memory_budget, str) else _check.integer("memory_budget", memory_budget)
        )
        self.shape: tuple[int, ...] = ()
        self.feature_maps: list[FeatureMap] = []
        self.indices = nn.ModuleList()
        # Those of the training examples alone, whatever joined them.
        self._sealed = self.indices

    def index(self, layer: int = 0) -> Index:
        """Return the search index of one layer, by its place in `layers`: its features of the repertoire."""
        self._require_fit()
        return cast(Index, self.indices[_check.integer("layer", layer, least=0, most=len(self.indices) - 1)])

    def features(self, x: Any) -> list[Tensor]:
        """Return the features `(B, D)` of inputs `x` `(B, *S)`, one tensor per layer (reduced where affine)."""
        with torch.no_grad():
            return self._described(self._inputs(x))[1]

    @torch.no_grad()
    def members(self, layer: int, index: Tensor) -> Tensor:
        """Return the cells `(*, *S')` of repertoire examples `index` `(*)`, as one layer's maturation begins with them.

        Where stored features are the cells themselves, nothing is computed.
        """
        if self.space is not None and self.feature_maps[layer].keeps_cells:
            shape = self._cells(self.repertoire.inputs(slice(1))).shape[1:]
            return self.index(layer).rows(index).reshape(*index.shape, *shape)
        examples, place = index.flatten().unique(return_inverse=True)
        n = int((examples < len(self.repertoire.x)).sum())
        old, new = self.repertoire.inputs(examples[:n]), self.repertoire.cells[examples[n:] - len(self.repertoire.x)]
        cells = torch.cat([*([self._cells(old)] if n else []), *([new] if len(new) else [])])
        found: Tensor = cells[place].unflatten(0, index.shape)
        return found

    def cell_limits(self) -> _check.Bounds:
        """Return the valid range of cells: of inputs, or in another space the repertoire's range per channel."""
        return self.bounds if self.space is None else self._cell_range

    def compared(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the cells `(B, *S')` of inputs and what is compared of them, `(B, D)` per layer, differentiable in x.

        ValueError for inputs of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return self._described(x)

    def check_current(self) -> None:
        """Raise ValueError unless the defence is fitted, and its model still is the one it was fitted with."""
        self._require_fit()
        if not self._witness.still(self._networks(), self._testimony):
            raise ValueError(
                "model's weights have changed since this defence was fitted (training went on, or others were loaded): "
                "its examples were described by the old ones. Call fit again, or load the old weights"
            )

    def _known(self, x: Tensor) -> Tensor | None:
        """Return what the model itself answers to inputs `(B, *S)`, probabilities `(B, C)`, if that counts."""
        return None

    def _described(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the cells `(B, *S')` of antigens `(B, *S)` and their features `(B, D)` at every layer, in one pass."""
        return described(self.model, self.space, self.feature_maps, x)

    def _examined(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the same of examples, which no defence inside of this one changes on their way."""
        return described(models.inside(self.model), self.space, self.feature_maps, x)

    def _cells(self, x: Tensor) -> Tensor:
        return described(models.inside(self.model), self.space, (), x)[0]

    @torch.no_grad()
    def _testimony(self) -> list[Tensor]:
        """Return what the model, as it is now, gives for the first examples wherever that counts."""
        x = self.repertoire.inputs(slice(PROBES))
        heard = self._known(x)
        return witnessed(models.inside(self.model), self._layers, x) + ([] if heard is None else [heard])

    def _networks(self) -> list[nn.Module]:
        return [self.model, *(m for layer in self._layers if callable(layer) for m in models.networks_of(layer))]

    def _remember(
        self,
        given: Examples,
        classes: int,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        y = given.y
        probes = given.inputs(slice(0, None, max(1, len(y) // PROBES)))[:PROBES]
        inside = models.inside(self.model)
        plain = build(inside, self._layers, self.space, probes, reduced=inside is models.eager(self.model))
        self.feature_maps = [METRICS[self.metric](feature_map) for feature_map in plain]
        self.classes, self.shape = classes, tuple(given.x.shape[1:])
        self.repertoire = Repertoire(given.x, y)
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=classes).tolist()
        widths = [features.shape[1] for features in self._examined(probes[:1])[1]]
        fit = [4 * len(y) * width * len(widths) <= self.memory_budget for width in widths]
        keys = [probes.new_empty(len(y), width) if fits else None for fits, width in zip(fit, widths, strict=True)]
        if self.space is not None or any(fit):
            self._pass(order, keys, on_progress)
        indices: list[nn.Module] = []
        for i, found in enumerate(keys):
            if found is not None:
                indices.append(ExactIndex(found, order, counts))
                continue
            file = feature_file if feature_file is None or len(widths) == 1 else f"{feature_file}.{i}"
            rows = _Rows(self, i)
            source = rows if file is None else FeatureFile(file, rows, len(y), on_progress=on_progress)
            indices.append(SignatureIndex(source, order, counts, on_progress=on_progress))
        self.indices = self._sealed = nn.ModuleList(indices)
        self._witness = Witness(self._networks(), self._testimony)

    def _pass(self, order: Tensor, keys: list[Tensor | None], on_progress: Progress | None) -> None:
        """Let every training example pass through the model once: fill what indices compare, and the cells' range."""
        place, ranges, n = order.argsort(), [], len(self.repertoire.x)
        parts, why = list(batches(n)), "each passes once through the model"
        for some in told(parts, len(parts), f"describing {n:,} examples", why):
            cells, features = self._examined(self.repertoire.inputs(some))
            channels = cells.movedim(1, 0).flatten(1) if cells.ndim > 1 else cells[None]
            ranges.append((channels.amin(1), channels.amax(1)))
            for out, found in zip(keys, features, strict=True):
                if out is not None:
                    out[place[some]] = found
            if on_progress is not None:
                on_progress(some.stop, len(order))
        low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        self._cell_range = _check.Bounds(tuple(low.amin(0).tolist()), tuple(high.amax(0).tolist()))

    def _join(self, cells: Tensor, labels: Tensor) -> None:
        """Let `cells` `(M, *S')` join the training examples, in place of those that joined before."""
        n, m = len(self.repertoire.x), len(cells)
        self.repertoire = self.repertoire.joined(cells, labels)
        if not m:
            self.indices = self._sealed
            return
        added = [feature_map.chunked(cells) for feature_map in self.feature_maps]
        most = 4 * len(added) * max(features.shape[1] for features in added)
        if most * m > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} is too small for the features of {m:,} cells, {most * m:,} "
                "bytes: remember fewer cells of each antigen, or give more"
            )
        if m > BESIDE * n and most * (2 * n + m) <= self.memory_budget:
            self.indices = nn.ModuleList(self._whole(added))
            return
        parts = zip(self._sealed, added, strict=True)
        self.indices = nn.ModuleList(
            GrownIndex(cast(Index, sealed), n, features, labels, self.classes) for sealed, features in parts
        )

    def _whole(self, added: Sequence[Tensor]) -> list[ExactIndex]:
        """Return an index per layer of training examples and of cells, with the features `(M, D)` of these."""
        y = self.repertoire.y
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=self.classes).tolist()
        keys = [features.new_empty(len(y), features.shape[1]) for features in added]
        self._pass(order, list(keys), None)
        place = order.argsort()[len(self.repertoire.x) :]
        for out, features in zip(keys, added, strict=True):
            out[place] = features
        return [ExactIndex(out, order, counts) for out in keys]

    def _taken(self, x: Any, y: Any, keep: str) -> tuple[Tensor | indexed.Indexed, Any]:
        """Return what `fit` is given: inputs, copied or where they are, and labels that are not checked yet."""
        keep = _check.choice("keep", keep, ("auto", "memory", "source"))
        if keep == "source" or (keep == "auto" and indexed.outgrows(x, self.memory_budget)):
            return indexed.opened(x, y, bounds=self.bounds)
        x, y = incoming.examples(x, y)
        return self._kept("x", x, fitted=True), y

    def _kept(self, name: str, x: Any, *, shape: tuple[int, ...] | None = None, fitted: bool = False) -> Tensor:
        """Return a checked copy of examples on the defence's device."""
        kept = incoming.inputs(name, x, bounds=self.bounds, shape=shape, own=True, fitted=fitted)
        if not len(kept):
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(kept.shape)}")
        return kept.to(self.device)

    def _count_classes(self, x: Tensor | indexed.Indexed) -> int:
        """Return how many classes the model tells apart, judged by its logits of a few inputs."""
        for probe in (x[:2], x[:: max(1, len(x) // PROBES)][:PROBES]):
            try:
                out = models.logits(self.model, probe)
            except Exception as error:
                raise ValueError(f"model fails on inputs of shape {tuple(probe.shape)}: {error}") from error
        models.warn_of_probabilities(out)
        return int(out.shape[1])

    def _inputs(self, x: Any, name: str = "x") -> Tensor:
        """Return checked inputs on the defence's device."""
        self.check_current()
        checked = incoming.inputs(name, x, bounds=self.bounds, shape=self.shape).to(self.device)
        if not len(checked):
            raise ValueError(f"{name} must hold at least one input, got shape {tuple(checked.shape)}")
        return checked

    def _require_fit(self) -> None:
        if not self.feature_maps:
            name = type(self).__name__
            raise ValueError(f"this {name} is not fitted: call {name.lower()}.fit(x, y) with the training set first")

    def _fitted_on(self) -> str:
        if not self.feature_maps:
            return "not fitted"
        joined = f", hardened by {m:,} cells" if (m := len(self.repertoire.cells)) else ""
        return f"fitted on {len(self.repertoire.x):,} examples of {self.classes} classes{joined}"


class _Rows:
    """What an index compares of the examples `(n,)` of a defence's repertoire at one layer, computed when asked."""

    def __init__(self, defence: HoldingDefence, layer: int) -> None:
        self._defence, self._layer = defence, layer

    def __call__(self, examples: Tensor) -> Tensor:
        defence = self._defence
        return defence._examined(defence.repertoire.inputs(examples))[1][self._layer]
