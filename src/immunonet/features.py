"""Feature maps: a model up to a layer, or any callable on inputs, as a map from cells to feature vectors."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet.immune.backend import fused_for
from immunonet.immune.operators import Family

Layer = str | Callable[[Tensor], Tensor]

# Values of the widest activation of a chunk of cells: near the size of a last-level cache.
CHUNK_VALUES = 2**22
# Cells run at once through a model that was not probed, and through a matrix.
ROWS, MATRIX_ROWS = 128, 4096
# Above this width a Gram matrix of the space costs more than it saves.
AFFINE_WIDTH = 4096


class _Reached(BaseException):
    """Carries a layer's output out of the model, so that nothing after the layer runs."""

    def __init__(self, output: Any) -> None:
        self.output = output


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode; leave every training flag as it was found."""
    flags = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


def own(model: nn.Module, x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Return a copy of inputs `x` in the model's dtype: a model may change its input in place."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    return x.to(dtype, copy=True, memory_format=memory_format)


class FeatureMap:
    """A map from cells `(n, *S)` to feature vectors `(n, D)` float32, differentiable in the cells."""

    rows = ROWS

    def __init__(self, name: str, function: Callable[[Tensor], Any], model: nn.Module) -> None:
        """Take a function that runs (part of) `model`, which is in eval mode and gets a copy in its own dtype."""
        self.name = name
        self._function = function
        self._model = model
        self._format = torch.preserve_format

    def probe(self, cells: Tensor) -> None:
        """Learn from a few cells how many to run at once, and the faster memory format."""
        widths: list[int] = []

        def measure(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                widths.append(output.numel() // len(cells))

        handles = [module.register_forward_hook(measure) for module in self._model.modules()]
        try:
            features = self(cells)
        finally:
            for handle in handles:
                handle.remove()
        self.rows = max(16, CHUNK_VALUES // max([features.shape[1], *widths]))
        if cells.ndim == 4:
            # Convolutions run about twice as fast; models that reshape by view refuse it.
            self._format = torch.channels_last
            with contextlib.suppress(RuntimeError):
                found = self(cells)
                if found.shape == features.shape and torch.allclose(found, features, rtol=1e-3, atol=1e-4):
                    return
            self._format = torch.preserve_format

    def __call__(self, cells: Tensor) -> Tensor:
        """Return the features `(n, D)`, in one piece; ValueError unless the layer gives one tensor row per cell."""
        with evaluating(self._model):
            out = self._function(own(self._model, cells, self._format))
        if not isinstance(out, Tensor):
            raise ValueError(f"layer {self.name!r} must give one tensor, got {type(out).__name__}")
        if out.ndim == 0 or len(out) != len(cells):
            raise ValueError(
                f"layer {self.name!r} must give one row per input, got shape {tuple(out.shape)} for {len(cells)}"
            )
        return out.flatten(1).float() if out.ndim > 1 else out[:, None].float()

    def chunked(self, cells: Tensor) -> Tensor:
        """Return the features `(n, D)` of any number of cells, computed in chunks; ValueError if not finite."""
        first = self(cells[: self.rows])
        # A tensor of its own, which callers may overwrite.
        out = first.new_empty(len(cells), first.shape[1])
        out[: self.rows] = first
        for start in range(self.rows, len(cells), self.rows):
            out[start : start + self.rows] = self(cells[start : start + self.rows])
        if not bool(torch.isfinite(out).all()):
            raise ValueError(f"layer {self.name!r} gave NaN or infinite features: check the model and its precision")
        return out

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return feature distances `(F, P)` of families of `cells` `(B, C, P, *S)` to their antigens `(B, *S)`.

        `features` `(B, D)` are the antigens' own. A cell whose features are NaN is infinitely far.
        """
        size = cells.shape[2]
        chunk = self.rows
        out = torch.empty(len(family[0]), size, device=cells.device)
        step = max(1, chunk // size)
        for start in range(0, len(out), step):
            some = slice(start, start + step)
            part, goal = cells[family[0][some], family[1][some]], features[family[0][some], None]
            for i in range(0, size, chunk):
                found = self(part[:, i : i + chunk].flatten(0, 1)).unflatten(0, (len(part), -1))
                out[some, i : i + chunk] = torch.linalg.vector_norm(found - goal, dim=2)
        return out.nan_to_num_(nan=torch.inf, posinf=torch.inf)


class AffineMap(FeatureMap):
    """An affine feature map of cells, reduced to at most d + 1 dimensions for cells of d values.

    With homogeneous coordinates [a, 1] and the map's matrix W (its offset the last row), the root R of
    W W' = R R' keeps every inner product, so distances and angles of `[a, 1] R` are those of the features.
    The Gram matrix of a small convolution has few diagonals, whose quadratic form is cheaper than the root.
    """

    rows = MATRIX_ROWS

    def __init__(self, name: str, matrix: Tensor, offset: Tensor) -> None:
        self.name = name
        self._matrix, self._offset = matrix, offset
        self._band = _band(matrix)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._matrix.device != like.device:
            self._matrix, self._offset = self._matrix.to(like.device), self._offset.to(like.device)
        return self._matrix, self._offset

    def __call__(self, cells: Tensor) -> Tensor:
        """Return reduced features `(n, r)`."""
        matrix, offset = self._on(cells)
        with _every_digit(cells):
            return cells.flatten(1) @ matrix + offset

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return feature distances `(F, P)`; the offset cancels."""
        matrix, _ = self._on(cells)
        fused = fused_for(cells)
        if fused is not None and self._band is not None:
            return fused.band_distances(cells, family, antigens, *self._band)  # type: ignore[no-any-return]
        difference = (cells[family] - antigens[family[0], None]).flatten(2)
        with _every_digit(cells):
            return _norms(difference @ matrix)


class IdentityMap(FeatureMap):
    """Cells as their own features: `"input"`, or a layer that is itself the space."""

    rows = MATRIX_ROWS

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, cells: Tensor) -> Tensor:
        """Return the cells, flattened."""
        return cells.flatten(1)

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return Euclidean distances `(F, P)` of the cells themselves."""
        fused = fused_for(cells)
        if fused is not None:
            ones = torch.ones(1, antigens[0].numel())
            return fused.band_distances(cells, family, antigens, torch.zeros(1, dtype=torch.long), ones)  # type: ignore[no-any-return]
        return _norms((cells[family] - antigens[family[0], None]).flatten(2))


def _every_digit(like: Tensor) -> torch.autocast:
    """Switch autocast off, which is for the model."""
    return torch.autocast(like.device.type, enabled=False)


def _norms(difference: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(difference, dim=2)
    return norms


def logits_map(model: nn.Module) -> FeatureMap:
    """Return the map from inputs `(n, *S)` to the model's logits `(n, C)` float32."""
    return FeatureMap("logits", model, model)


def layer_names(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Return each layer's name; a callable is called by its own name."""
    return tuple(layer if isinstance(layer, str) else _callable_name(layer) for layer in layers)


def as_layers(layers: Layer | Sequence[Layer]) -> tuple[Layer, ...]:
    """Return one or several layers as a tuple; TypeError unless each is a name or a callable."""
    # An nn.Sequential or nn.ModuleList is a sequence by protocol; it is one callable here.
    several = isinstance(layers, Sequence) and not isinstance(layers, str) and not callable(layers)
    out: tuple[Any, ...] = tuple(layers) if several else (layers,)  # type: ignore[arg-type]
    if not out or not all(isinstance(layer, str) or callable(layer) for layer in out):
        raise TypeError(
            "layers must be a submodule's name, 'input', a callable that maps inputs to features, "
            f"or a non-empty list of these, got {layers!r}"
        )
    return out


def check_names(model: nn.Module, layers: Sequence[Layer], space: str | None) -> None:
    """Raise ValueError, naming the nearest names, unless every named layer is a submodule of `model`."""
    names = [name for name, _ in model.named_modules() if name]
    for argument, layer in [*(("layers", layer) for layer in layers), ("space", space)]:
        if not isinstance(layer, str) or (argument == "layers" and layer == "input"):
            continue
        if (module := layer_parts(layer)[0]) not in names:
            near = difflib.get_close_matches(module, names, n=5, cutoff=0.4) or names[:8]
            raise ValueError(f"{argument}={layer!r} is no submodule of the model; nearest names: {', '.join(near)}")
    if space is not None and layer_parts(space)[1] is not None and any(layer != space for layer in layers):
        raise ValueError(
            f"layers={list(layer_names(layers))} must be the space itself when space={space!r} is averaged: "
            "the model cannot go on from there"
        )
    if space is not None and any(layer == "input" or not isinstance(layer, str) for layer in layers):
        raise ValueError(
            f"layers={list(layer_names(layers))} must be names of submodules when space={space!r}: "
            "affinity is then computed from cells, not from inputs"
        )


def space_map(model: nn.Module, space: str | None) -> Callable[[Tensor], Tensor]:
    """Return the map from inputs `(n, *S)` to cells `(n, *S')` in `space`; the identity if it is None."""
    if space is None:
        return lambda x: x
    flat = FeatureMap(space, functools.partial(_tap, model, space), model)

    def cells(x: Tensor) -> Tensor:
        with evaluating(model):
            shape = _tap(model, space, own(model, x[:1])).shape[1:]
        return flat.chunked(x).reshape(-1, *shape)

    return cells


@torch.no_grad()
def build(model: nn.Module, layers: Sequence[Layer], space: str | None, x: Tensor) -> list[FeatureMap]:
    """Return one feature map per layer, from cells in `space` to features, probed on a few inputs `x`.

    Raises ValueError for a layer that the model does not call exactly once, that gives no tensor, or that
    is no function of `space` alone. An affine map is found numerically and reduced to its root.
    """
    if space is not None:
        _check_called_once(model, space, x)
    cells = space_map(model, space)(x)
    maps: list[FeatureMap] = []
    for layer, name in zip(layers, layer_names(layers), strict=True):
        if layer == "input" or (layer == space and space is not None):
            maps.append(IdentityMap(name))
            continue
        found: FeatureMap
        if not isinstance(layer, str):
            found = FeatureMap(name, layer, layer if isinstance(layer, nn.Module) else model)
        else:
            _check_called_once(model, layer, x)
            direct = FeatureMap(name, functools.partial(_tap, model, layer), model)
            found = direct if space is None else _tail(model, layer, space, x, cells, direct(x))
        expected = found(cells[:1])
        if expected.shape != found(cells[:2])[:1].shape:
            raise ValueError(f"layer {name!r} must give features of one width, whatever the batch")
        found.probe(cells)
        maps.append(_affine(found, cells) or found)
    return maps


def _callable_name(layer: Callable[[Tensor], Tensor]) -> str:
    return str(getattr(layer, "__name__", type(layer).__name__))


def layer_parts(name: str) -> tuple[str, int | None]:
    """Return a layer's submodule and the side of the grid that its output is averaged over: "block2:4" is block2, 4."""
    module, _, side = name.rpartition(":")
    return (module, int(side)) if module and side.isdecimal() else (name, None)


def _tap(model: nn.Module, name: str, x: Tensor) -> Any:
    """Return what layer `name` gives for inputs `x`; nothing after it runs, so nothing can change it."""

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise _Reached(output)

    module, side = layer_parts(name)
    handle = model.get_submodule(module).register_forward_hook(stop)
    try:
        model(x)
    except _Reached as reached:
        return reached.output if side is None else _averaged(reached.output, name, side)
    finally:
        handle.remove()
    raise ValueError(f"layer {name!r} is never called by the model")


def _averaged(output: Any, name: str, side: int) -> Tensor:
    """Return images `(n, c, h, w)` averaged over the fields of a grid of `side` x `side`: `(n, c, side, side)`."""
    if not isinstance(output, Tensor) or output.ndim != 4 or not 1 <= side <= min(output.shape[2:]):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {name!r} must give images of at least {side} x {side}, side at least 1, got {shape}")
    return F.adaptive_avg_pool2d(output, side)


def _check_called_once(model: nn.Module, name: str, x: Tensor) -> None:
    calls = []
    handle = model.get_submodule(layer_parts(name)[0]).register_forward_hook(lambda *_: calls.append(1))
    try:
        with evaluating(model):
            model(own(model, x))
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ValueError(
            f"layer {name!r} is called {len(calls)} times in one pass of the model; it must be called once"
        )


def _tail(model: nn.Module, layer: str, space: str, x: Tensor, cells: Tensor, expected: Tensor) -> FeatureMap:
    """Return the map from cells at `space` on to `layer`, or raise if the layer depends on more than the space.

    The model runs on a dummy input, and the space's output is replaced by the cells. Zeros as the dummy
    show whether anything else reaches the layer. One dummy row is cheapest; models that reshape by their
    input's batch size need as many as there are cells.
    """

    def replay(rows: int | None, c: Tensor) -> Any:
        dummy = torch.zeros_like(x[:1], dtype=c.dtype).expand(rows or len(c), *x.shape[1:])
        handle = model.get_submodule(space).register_forward_hook(lambda *_: c)
        try:
            return _tap(model, layer, dummy)
        finally:
            handle.remove()

    for rows in (1, None):
        tail = FeatureMap(layer, functools.partial(replay, rows), model)
        with contextlib.suppress(RuntimeError, ValueError):
            found = tail(cells)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
                return tail
    raise ValueError(
        f"layer {layer!r} must come after space={space!r} and depend on it alone (no path around it): "
        "cells that live there could not be followed"
    )


def _affine(function: FeatureMap, cells: Tensor) -> AffineMap | None:
    """Return the affine root of `function`, or None if it is not affine to float precision.

    An affine map is affine everywhere, so points far outside the data's range are tried as well: there a
    rectifier that is quiet on the data shows itself.
    """
    d = cells[0].numel()
    if d > AFFINE_WIDTH:
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(cells), *cells.shape[1:], generator=generator).to(cells.device)
    scale = float(cells.abs().max()) or 1.0
    for other in (cells.flip(0), noise * scale, noise * 100 * scale):
        a, b = function(cells), function(other)
        bend = (2 * function((cells + other) / 2) - a - b).abs().max()
        if not bool(bend <= 2e-5 * torch.maximum(a.abs().max(), b.abs().max())):
            return None
    zero = function(torch.zeros_like(cells[:1]))
    eye = torch.eye(d, device=cells.device)
    rows = torch.cat(
        [
            function(part.reshape(-1, *cells.shape[1:])) - zero
            for part in eye.split(max(1, CHUNK_VALUES // zero.shape[1]))
        ]
        + [zero]
    )
    if rows.shape[1] > len(rows):
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for part in rows.split(max(1, CHUNK_VALUES // len(rows)), dim=1):
            gram += part.double() @ part.double().T
        values, vectors = torch.linalg.eigh(gram)
        rows = (vectors * values.clamp(min=0).sqrt()).float()
    found = AffineMap(function.name, rows[:-1].contiguous(), rows[-1].contiguous())
    far = noise * scale
    exact = torch.linalg.vector_norm(function(cells) - function(far), dim=1)
    family = (
        torch.arange(len(cells), device=cells.device),
        torch.zeros(len(cells), dtype=torch.long, device=cells.device),
    )
    close = torch.allclose(found.distances(cells[:, None, None], family, far, far)[:, 0], exact, rtol=1e-4)
    return found if close else None


def _band(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the diagonals of the Gram matrix of `matrix` `(d, r)`: offsets `(t,)` >= 0 and values `(t, d)`.

    Those above the main diagonal count twice. None where the root is cheaper: a band's sums run at about a
    sixth of the rate of a matrix product.
    """
    d = len(matrix)
    gram = (matrix.double() @ matrix.double().T).float().cpu()
    gram[gram.abs() <= 1e-7 * gram.abs().max()] = 0
    offsets = [t for t in range(d) if t == 0 or bool(gram.diagonal(t).any())]
    if 6 * len(offsets) > matrix.shape[1]:
        return None
    band = torch.zeros(len(offsets), d)
    for row, t in zip(band, offsets, strict=True):
        row[: d - t] = gram.diagonal(t) * (1 if t == 0 else 2)
    return torch.tensor(offsets), band
