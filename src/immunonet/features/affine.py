"""Affine feature maps: found numerically, and replaced by the root of their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from immunonet.features.maps import CHUNK_VALUES, MATRIX_ROWS, FeatureMap, every_digit, norms
from immunonet.immune.backend import fused_for
from immunonet.immune.operators import Family

# Above this width a Gram matrix of the space costs more than it saves.
AFFINE_WIDTH = 4096


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
        with every_digit(cells):
            return cells.flatten(1) @ matrix + offset

    def distances(self, cells: Tensor, family: Family, antigens: Tensor, features: Tensor) -> Tensor:
        """Return feature distances `(F, P)`; the offset cancels."""
        matrix, _ = self._on(cells)
        fused = fused_for(cells)
        if fused is not None and self._band is not None:
            return fused.band_distances(cells, family, antigens, *self._band)  # type: ignore[no-any-return]
        difference = (cells[family] - antigens[family[0], None]).flatten(2)
        with every_digit(cells):
            return norms(difference @ matrix)


def affine(function: FeatureMap, cells: Tensor) -> AffineMap | None:
    """Return the affine root of `function`, or None if it is not affine to float precision.

    An affine map is affine everywhere, so points far outside the data's range are tried as well: there a
    rectifier that is quiet on the data shows itself.
    """
    d = cells[0].numel()
    if d > AFFINE_WIDTH:
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(cells), *cells.shape[1:], generator=generator, dtype=torch.float32).to(cells.device)
    scale = float(cells.abs().max()) or 1.0
    for other in (cells.flip(0), noise * scale, noise * 100 * scale):
        try:
            a, b, middle = function(cells), function(other), function((cells + other) / 2)
        except ValueError:  # a defence within refuses what is outside its bounds: affine there it is not
            return None
        bend = (2 * middle - a - b).abs().max()
        if not bool(bend <= 2e-5 * torch.maximum(a.abs().max(), b.abs().max())):
            return None
    zero = function(torch.zeros_like(cells[:1]))
    eye = torch.eye(d, device=cells.device, dtype=torch.float32)
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
    band = torch.zeros(len(offsets), d, dtype=torch.float32)
    for row, t in zip(band, offsets, strict=True):
        row[: d - t] = gram.diagonal(t) * (1 if t == 0 else 2)
    return torch.tensor(offsets), band
