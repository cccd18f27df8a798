"""Differentiable votes of nearest neighbours: SoftNeighbours, SoftCount, ASK and AdvKnn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check
from immunonet.attacks._surrogate import Surrogate, fewest_examples, probe_distances
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.features.search import Index

# A softer vote leaves the defence's own, harder one standing; a harder one gives gradients of few neighbours.
_SHARPNESS = 0.3
# Width of a soft count's edge. Narrower ones follow the count more closely.
_WIDTH = 0.1
# Of AdvKnn's heads.
_BATCH, _RATE = 100, 1e-2


class SoftNeighbours(Surrogate):
    """A soft vote of the nearest repertoire examples at a defence's own layers, for attacks that know it.

    Per layer and class c, the logit is the logsumexp of -d^2 / temperature over the `neighbours` examples of c
    nearest to the antigen (found anew at every call, without gradient); d is the distance that the defence
    measures: Euclidean for RAILS, of unit vectors for DkNN with cosine (d^2 / 2 = 1 - cosine). Log-softmax
    over classes, mean over layers, log-softmax again. After Sitawarin & Wagner (2019, 2020).

    It is the first word on a defence, not the last: the vote knows nothing of maturation (no unrolled
    generations). What an attack on it finds must be tested again on the defence itself: `AttackResult.success` is
    only about this surrogate.

    `defence`: a fitted RAILS or DkNN. `neighbours` per class, at most the examples of the smallest class; None:
    20, or a DkNN's own number if that is more, or as many as that class has. `temperature` > 0, or "auto": per layer
    0.3 times the mean, over 100 repertoire examples, of the standard deviation of d^2 over their C x neighbours
    nearest. Raises ValueError or TypeError that names the argument.
    """

    thorough = True

    def __init__(
        self, defence: NeighbourDefence, *, neighbours: int | None = None, temperature: float | Literal["auto"] = "auto"
    ) -> None:
        super().__init__(defence)
        self.neighbours = _neighbours(neighbours, defence, max(20, defence.counted or 0))
        self.temperatures = _scales("temperature", temperature, defence, self.neighbours, _SHARPNESS, squared=True)

    def softened(self, factor: float) -> SoftNeighbours:
        """Return the same vote with its temperatures, one per layer, times `factor` > 0."""
        other = SoftNeighbours(self.defence, neighbours=self.neighbours)
        other.temperatures = [factor * temperature for temperature in self.temperatures]
        return other

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        index, temperature = self.defence.index(layer), self.temperatures[layer]
        with torch.no_grad():
            distances, near = index.nearest(features, self.neighbours)
            closeness = -distances.square() / temperature
            means = _means(index, near, closeness.softmax(2))
        # The logsumexp climbs like the closeness of its weighted mean neighbour: that term, which adds nothing to the
        # value, carries the gradient.
        slope = -(features[:, None] - means).square().sum(2) / temperature
        return closeness.logsumexp(2) + slope - slope.detach()


class SoftCount(Surrogate):
    """A soft count of the examples that DkNN counts, for attacks that know it.

    Per layer and class, the logit is the log of the sum of sigmoid((r - d^2) / width) over the examples of the class
    nearest to the antigen, k of them or 20 if that is more; d as for `SoftNeighbours`, and r lies midway between the
    squared distances of the k-th and the next of all. The examples are found anew at every call; they and r are
    constants for the gradient. After Sitawarin & Wagner (2019), who keep both as they are without an attack.

    Where k is large it follows DkNN far more closely than `SoftNeighbours`, whose vote is that of the nearest few. What
    an attack on it finds must be tested again on DkNN itself.

    `dknn`: a fitted DkNN. `neighbours`: k over all classes; None: DkNN's own. `width` > 0, or "auto": per layer 0.1
    times the mean, over 100 repertoire examples, of the standard deviation of d^2 over the same examples. Raises
    ValueError or TypeError that names the argument.
    """

    thorough = True

    def __init__(
        self, dknn: NeighbourDefence, *, neighbours: int | None = None, width: float | Literal["auto"] = "auto"
    ) -> None:
        own = getattr(dknn, "counted", None)
        if own is None:
            raise TypeError(f"dknn must be a DkNN, got {type(dknn).__name__}")
        super().__init__(dknn)
        counted = own if neighbours is None else neighbours
        self.counted = _check.integer("neighbours", counted, most=len(dknn.repertoire))
        self.neighbours = _neighbours(None, dknn, max(20, self.counted))
        self.widths = _scales("width", width, dknn, self.neighbours, _WIDTH, squared=True)

    def softened(self, factor: float) -> SoftCount:
        """Return the same count with its widths, one per layer, times `factor` > 0."""
        other = SoftCount(self.defence, neighbours=self.counted)
        other.widths = [factor * width for width in self.widths]
        return other

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        index, width = self.defence.index(layer), self.widths[layer]
        return soft_count(index, features, self.neighbours, counted=self.counted, width=width)


class ASK(Surrogate):
    """The vote behind the adversarial soft k-nearest-neighbour loss (Wang et al. 2022, ASK-Atk).

    Per layer and class, the logit is minus the mean distance to the `neighbours` examples of the class nearest to
    the antigen, over `temperature`; the cross-entropy of these logits is the class-wise ASK loss. The published code
    keeps the neighbours of the unperturbed input; here they are found anew at every call, without gradient.

    `defence`: a fitted RAILS or DkNN. `neighbours` per class; None: 5, as published, or as many as the smallest
    class has. `temperature` > 0, or "auto": as for `SoftNeighbours`, of d instead of d^2. Raises ValueError or
    TypeError that names the argument.
    """

    def __init__(
        self, defence: NeighbourDefence, *, neighbours: int | None = None, temperature: float | Literal["auto"] = "auto"
    ) -> None:
        super().__init__(defence)
        self.neighbours = _neighbours(neighbours, defence, 5)
        self.temperatures = _scales("temperature", temperature, defence, self.neighbours, _SHARPNESS, squared=False)

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        index, temperature = self.defence.index(layer), self.temperatures[layer]
        with torch.no_grad():
            distances, near = index.nearest(features, self.neighbours)
            # A distance climbs along the unit vector from its example.
            away = torch.stack(
                [
                    ((f - index.rows(i)) / d[..., None].clamp(min=1e-12)).mean(1)
                    for f, i, d in zip(features, near, distances, strict=True)
                ]
            )
        climb = (features[:, None] * away).sum(2)
        return -(distances.mean(2) + climb - climb.detach()) / temperature


class AdvKnn(Surrogate):
    """A linear block per layer that learned the distribution of the neighbours' labels (Li et al. 2019, AdvKnn).

    The block's softmax of a layer's features is fitted, by the cross-entropy to the share of each label among the
    `neighbours` nearest of every example (itself left out), on `examples` examples of the repertoire: the
    "deep kNN block" with its consistency learning. Where neighbours vote in a way that is far from linear in the
    features, so is the block from the vote.

    `defence`: a fitted RAILS or DkNN. `neighbours` over all classes; None: the DkNN's own number, or 75, less in
    a repertoire with fewer. `epochs`: passes over the examples. `seed`: of their choice and order. Raises ValueError
    or TypeError that names the argument.
    """

    def __init__(
        self,
        defence: NeighbourDefence,
        *,
        neighbours: int | None = None,
        examples: int = 5000,
        epochs: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(defence)
        n = len(defence.repertoire)
        default = defence.counted or 75
        neighbours = min(default, n - 1) if neighbours is None else neighbours
        self.neighbours = _check.integer("neighbours", neighbours, most=n - 1)
        self.examples = min(_check.integer("examples", examples), n)
        self.epochs = _check.integer("epochs", epochs)
        self.seed = _check.integer("seed", seed, least=0)
        self.blocks = nn.ModuleList(self._fitted_block(layer) for layer in range(len(defence.layers)))

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        logits: Tensor = self.blocks[layer](features)
        return logits

    @torch.no_grad()
    def _fitted_block(self, layer: int) -> nn.Module:
        defence, index = self.defence, self.defence.index(layer)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(defence.repertoire), generator=generator)[: self.examples]
        chosen = chosen.to(defence.repertoire.y.device)
        sample = index.rows(chosen[:_BATCH])
        centre, scale = sample.mean(0), sample.std(correction=0).clamp(min=1e-12)
        votes = torch.cat([self._votes(layer, part) for part in chosen.split(_BATCH)])
        # A convex problem: zeros are as good a start as any.
        weight = centre.new_zeros(defence.classes, len(centre)).requires_grad_()
        bias = centre.new_zeros(defence.classes).requires_grad_()
        optimiser = torch.optim.Adam([weight, bias], lr=_RATE)
        for _ in range(self.epochs):
            for some in torch.randperm(len(chosen), generator=generator).to(chosen.device).split(_BATCH):
                features = (index.rows(chosen[some]) - centre) / scale
                with torch.enable_grad():
                    loss = F.cross_entropy(F.linear(features, weight, bias), votes[some])
                    weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
                optimiser.step()
        block = nn.Linear(len(centre), defence.classes, device=centre.device, dtype=centre.dtype)
        block.weight.copy_(weight / scale)
        block.bias.copy_(bias - weight @ centre / scale)
        return block.requires_grad_(False)

    def _votes(self, layer: int, examples: Tensor) -> Tensor:
        """Return the share `(n, C)` of each label among the neighbours of examples `(n,)`, themselves left out."""
        index = self.defence.index(layer)
        _, near = index.nearest(index.rows(examples), self.neighbours + 1, by_class=False)
        itself = near == examples[:, None]
        # Among equal examples it may be missing: then the farthest goes.
        itself[:, -1] |= ~itself.any(1)
        labels = self.defence.repertoire.y[near[~itself].view(len(examples), -1)]
        return F.one_hot(labels, self.defence.classes).float().mean(1)


def soft_count(index: Index, features: Tensor, neighbours: int, *, counted: int, width: float) -> Tensor:
    """Return the log `(B, C)` of how many of the `counted` nearest examples each class has, softly, by `features`.

    As for `SoftCount`, over the `neighbours` nearest of each class; differentiable in `features` `(B, D)`.
    """
    with torch.no_grad():
        distances, near = index.nearest(features, neighbours)
        squares = distances.square()
        nearest = squares.flatten(1)
        nearest = nearest.topk(min(counted + 1, nearest.shape[1]), dim=1, largest=False).values
        inside = (nearest[:, -2:].mean(1)[:, None, None] - squares) / width
        counts = F.logsigmoid(inside)
        weights = counts.softmax(2) * torch.sigmoid(-inside)
        share = weights.sum(2)
        means = _means(index, near, weights / share[:, :, None].clamp(min=1e-12))
    slope = -share * (features[:, None] - means).square().sum(2) / width
    return counts.logsumexp(2) + slope - slope.detach()


def _neighbours(value: int | None, defence: NeighbourDefence, default: int) -> int:
    fewest = fewest_examples(defence)
    return _check.integer("neighbours", min(default, fewest) if value is None else value, most=fewest)


def _scales(
    name: str, value: float | str, defence: NeighbourDefence, neighbours: int, share: float, *, squared: bool
) -> list[float]:
    """Return per layer the `value` called `name`, or `share` of the spread of distances, where it is "auto"."""
    if value != "auto":
        return [_check.number(name, value, least=0, above=True)] * len(defence.layers)
    distances = probe_distances(defence, [neighbours] * len(defence.layers))
    found = [d.square() if squared else d for d in distances]
    return [max(share * float(d.flatten(1).std(1).mean()), 1e-12) for d in found]


def _means(index: Index, near: Tensor, weights: Tensor) -> Tensor:
    """Return the means `(B, C, D)` of the features of examples `near` under `weights`, both `(B, C, k)`."""
    # One antigen at a time: the features of its neighbours together may be large.
    return torch.stack([(w[:, :, None] * index.rows(i)).sum(1) for w, i in zip(weights, near, strict=True)])


def neighbour_votes(defence: NeighbourDefence) -> dict[str, Callable[[], Surrogate]]:
    """Return what makes the votes that know a defence's layers and repertoire, by name, the strongest first."""
    return {
        "adv-knn": lambda: AdvKnn(defence),
        "ask": lambda: ASK(defence),
        "soft-knn": lambda: SoftNeighbours(defence),
    }
