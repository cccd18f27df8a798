"""Training of a path between two networks so that the points on it are robust (Wang et al. 2023, RMC)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _check, _store
from immunonet.data import Images, sample
from immunonet.defences.path import ModePath
from immunonet.learning import Epoch, Progress, Schedule, Task, train_task
from immunonet.zoo.adversarial import Adversarial, Adversary, robust_accuracies
from immunonet.zoo.training import accuracy

STATISTICS = 5000
"""Training images that batch statistics of points are computed from."""

MOST = 1000
"""Images that a profile is measured on, at most."""
# What rows of a profile hold beside accuracies under one threat.
_BESIDE = ("t", "n", "clean", "union")
# Where validation looks at the path after an epoch.
_MIDDLE = 0.5


def connect(
    path: ModePath,
    images: Images,
    validation: Images,
    *,
    threats: Mapping[str, float] | None = None,
    combine: str = "msd",
    iterations: int = 10,
    ramp: int = 0,
    checkpoint: str | Path | None = None,
    on_progress: Progress | None = None,
    **schedule: Any,
) -> list[Epoch]:
    """Train the bends of `path` so that the loss under attack is low at every point of it; the ends stay as they are.

    Of every batch one t is drawn uniformly from [0, 1]; the attack is made on the network there, and the loss taken
    there, both with the statistics of the batch. `threats` (radii by norm), `combine` and `iterations`: see
    `Adversarial`; without threats the path is trained on clean images (Garipov et al. 2018).

    `schedule`: see `train`; `epochs` (10), `lr` (1e-3), `weight_decay` (0): half of it times the squared length of the
    weights at t is added to the loss. `patience` is not taken: the path of the last epoch is kept, as the loss of one
    place says little of the others. The path keeps a sample of 5,000 images, from which statistics of its points are
    computed. `checkpoint`, `on_progress`: see `train`.

    Returns one row per epoch: `epoch`, `loss`, and at t = 1/2 `validation_accuracy` and, under threats,
    `validation_robust_accuracy` (right under all of them) and `validation_<norm>_accuracy`. Raises ValueError as
    `train` does.
    """
    for name, part in (("images", images), ("validation", validation)):
        if not len(part):
            raise ValueError(f"{name} is empty")
    if "patience" in schedule:
        raise ValueError("patience must be left out: the last epoch of a path is kept")
    plan = Schedule(**{"epochs": 10, "weight_decay": 0.0, **schedule})
    against = None
    if threats is not None:
        against = Adversarial(threats=threats, combine=combine, iterations=iterations, ramp=ramp)
        against.check_room(images.x)
    path.images = statistics_of(images).to(next(path.parameters()).device)
    known = {
        "adversarial": None if against is None else against.told(),
        "path": [path.curve, *(_store.digest(net.state_dict().values())[:12] for net in path.ends)],
        "first_weights": _store.digest(path.state_dict().values())[:12],
        "images": [_store.digest([part.x, part.y])[:12] for part in (images, validation)],
    }
    path.moved()
    history = train_task(
        _Connecting(path, validation, against, plan.weight_decay), images, plan, known, checkpoint, on_progress
    )
    path.moved()
    path.settings = dataclasses.asdict(plan) | {"adversarial": known["adversarial"]}
    return history


def statistics_of(images: Images) -> Tensor:
    """Return the images `(n, *S)` that batch statistics of points are computed from, a fixed random sample."""
    return images.x[sample(len(images), min(STATISTICS, len(images))).sort().values]


def profile(
    path: ModePath, images: Images, *, threats: Mapping[str, float], points: int = 21, iterations: int = 20
) -> list[dict[str, float]]:
    """Return what the networks at even places of a path keep of `images`, a row per place.

    A row: `t`, `n` (of more than 1,000 images a fixed random sample), `clean`, the accuracy by norm of each of
    `threats`, and `union` (see `robust_accuracies`).
    """
    rows = []
    if len(images) > MOST:
        images = images[sample(len(images), MOST)]
    for i in range(_check.integer("points", points, least=2)):
        net = path.at(t := i / (points - 1))
        under = robust_accuracies(net, images, threats=threats, iterations=iterations)
        rows.append({"t": t, "n": len(images), "clean": accuracy(net, images), **under})
    return rows


def best_of(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the row of a profile with the highest union, then the highest least accuracy; of equals the middle one."""
    scores = [(row["union"], min(v for k, v in row.items() if k not in _BESIDE)) for row in rows]
    top = [i for i, score in enumerate(scores) if score == max(scores)]
    return rows[top[len(top) // 2]]


class _Connecting(Task):
    """The bends of a path under training."""

    decay = 0.0  # the optimiser's would pull on the bends, not on the networks

    def __init__(self, path: ModePath, validation: Images, against: Adversarial | None, shrink: float) -> None:
        self.module, self.path, self.validation, self.shrink = path, path, validation, shrink
        self.adversary = None if against is None else Adversary(against)

    def start(self) -> None:
        """Forget what points were kept."""
        self.path.moved()

    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float, cast: Callable[[], Any]) -> Tensor:
        """Return the loss of a batch at one place."""
        t = float(torch.rand((), generator=generator))
        weights = self.path.weights(t)
        learn = self.path.at_weights(weights, training=True)
        if self.adversary is None:
            with cast():
                found = F.cross_entropy(learn(x).float(), y)
        else:
            still = {name: value.detach() for name, value in weights.items()}
            with cast():
                points = self.adversary.attacked(self.path.at_weights(still), x, y, generator, epoch)
            with cast():
                found = self.adversary.objective(learn, x, points[0], y, points[1])
        if self.shrink:
            found = found + self.shrink / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum()
        return found

    def measured(self) -> Epoch:
        """Return the accuracy of the middle, clean and under attack."""
        self.path.moved()
        net = self.path.at(_MIDDLE)
        row = {"validation_accuracy": accuracy(net, self.validation)}
        if self.adversary is not None:
            under = robust_accuracies(net, self.validation, threats=self.adversary.settings.measured)
            row["validation_robust_accuracy"] = under.pop("union")
            row |= {f"validation_{norm}_accuracy": share for norm, share in under.items() if len(under) > 1}
        return row

    def better(self, row: Epoch) -> tuple[float, ...]:
        """Return what is highest at the last epoch."""
        return (row["epoch"],)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the adversary has seen."""
        return {} if self.adversary is None else self.adversary.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it back."""
        if self.adversary is not None:
            self.adversary.restore(tensors)
