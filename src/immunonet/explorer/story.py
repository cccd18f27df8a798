"""What happens to one antigen: it is attacked, and answered, and what the answer was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import attacks, models
from immunonet.defences.base import Defence
from immunonet.report.html import Cell
from immunonet.report.images import cell_images
from immunonet.response import Cells, Trace

# How many nearest examples, plasma and memory cells are shown.
NEAREST, CELLS = 12, 12


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a defence says of one antigen: a label, a share `(C,)` for each, and what else it tells; None: it does not.

    `credibility` in (0, 1]; `foreign`, `recalled` from memory, and `innate`: answered at once, without generations.
    """

    label: int
    shares: list[float]
    credibility: float | None = None
    foreign: bool | None = None
    recalled: bool | None = None
    innate: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Assailed:
    """An antigen after an attack: `x` `(1, *S)`.

    `eps`: how far a pixel may have moved; `steps` that were taken; `knows`: what it was taken against, in words.
    """

    x: Tensor
    eps: float
    steps: int
    knows: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that is shown of one antigen `clean` `(1, *S)`, and of what was `met` in its place `(1, *S)`.

    `truth`: its class, None where nobody knows. `network`, `defence`: their replies to both, in that order. The rest is
    about what was met: `nearest` known examples, `curves` by layer, `plasma` and `memory` cells, and what the network
    `healed` `(1, *S)` met in its place; None of a defence that has no such thing.
    """

    clean: Tensor
    met: Tensor
    truth: int | None
    attack: Assailed | None
    network: tuple[Reply, Reply]
    defence: tuple[Reply, Reply]
    nearest: Sequence[Cell] | None
    curves: Sequence[tuple[str, Trace]]
    plasma: Sequence[Cell] | None
    memory: Sequence[Cell] | None
    healed: Tensor | None


@torch.no_grad()
def told(
    defence: Defence, base: nn.Module, x: Tensor, *, truth: int | None, attack: Assailed | None, seed: int
) -> Story:
    """Return the story of an antigen `x` `(1, *S)`, which may have been attacked."""
    met = x if attack is None else attack.x
    before, response = _heard(defence, x, seed)
    after, response = (before, response) if attack is None else _heard(defence, met, seed)
    shape = tuple(x.shape[1:])
    healed = defence.healed(met)
    return Story(
        clean=x,
        met=met,
        truth=truth,
        attack=attack,
        network=(plain(base, x), plain(base, met)),
        defence=(before, after),
        nearest=nearest(defence, met),
        curves=list(zip(defence.layers, defence.learning_curves(met, seed), strict=False)),
        plasma=cells(defence, getattr(response, "plasma", None), shape),
        memory=cells(defence, getattr(response, "memory", None), shape),
        healed=None if healed is None else healed.x,
    )


def assailed(
    model: Callable[[Tensor], Tensor], x: Tensor, y: int, *, knows: str, eps: float, bounds: Any, steps: int,
    seconds: float, seed: int,
) -> Assailed:  # fmt: skip
    """Return `x` `(1, *S)` after PGD on a model, away from the label `y`, in as many steps as the time allows.

    There are at most `steps`, and at least one; what one takes tells how many fit in `seconds`.
    """
    label = torch.tensor([y], device=x.device)

    def climb(iterations: int) -> Tensor:
        step = 2.5 * eps / iterations if iterations > 1 else eps
        pgd = attacks.PGD(eps=eps, step=min(step, eps), iterations=iterations, bounds=bounds, seed=seed)
        return pgd(model, x, label).adversarials

    def timed() -> tuple[float, Tensor]:
        start = time.monotonic()
        found = climb(1)
        return time.monotonic() - start, found

    until = time.monotonic() + seconds
    took, found = timed()
    if took < seconds / 4:  # what is asked for the first time takes longer
        took, found = timed()
    # A step takes no longer than one of those, which are checked besides.
    most = max(1, min(steps, int((until - time.monotonic()) / max(took, 1e-9))))
    return Assailed(x=climb(most) if most > 1 else found, eps=eps, steps=most, knows=knows)


def reply(defence: Defence, x: Tensor, seed: int) -> Reply:
    """Return what a defence says of `x` `(1, *S)`."""
    return _heard(defence, x, seed)[0]


@torch.no_grad()
def plain(base: nn.Module, x: Tensor) -> Reply:
    """Return what a network by itself says of `x` `(1, *S)`."""
    shares = models.logits(base, x)[0].softmax(0)
    return Reply(label=int(shares.argmax()), shares=shares.tolist())


@torch.no_grad()
def nearest(defence: Defence, x: Tensor, *, most: int = NEAREST) -> list[Cell] | None:
    """Return the nearest known example of each class to `x` `(1, *S)`, the nearest first, or None.

    They are those of the first layer, and at most so many.
    """
    known: Any = defence
    if not all(hasattr(defence, part) for part in ("repertoire", "index", "features")):
        return None
    distances, found = (part[0, :, 0] for part in known.index(0).nearest(known.features(x)[0], 1))
    return [
        Cell(image=known.repertoire.shown[int(found[label])], label=label, value=float(distances[label]))
        for label in distances.argsort()[:most].tolist()
    ]


def cells(defence: Defence, part: Cells | None, shape: tuple[int, ...], *, most: int = CELLS) -> list[Cell] | None:
    """Return the fittest cells of one response as images of `shape`, none if it was recalled; None without cells."""
    if part is None:
        return None
    known = getattr(defence, "repertoire", None)
    part = part.part(slice(most))
    real = part.label[0] >= 0
    if not bool(real.any()):
        return []
    images = cell_images(part, shape, None if known is None else known.shown)[0]
    rows = zip(images, part.label[0].tolist(), part.affinity[0].tolist(), real.tolist(), strict=True)
    return [Cell(image=image, label=label, value=affinity) for image, label, affinity, one in rows if one]


@torch.no_grad()
def _heard(defence: Defence, x: Tensor, seed: int) -> tuple[Reply, Any]:
    """Return a defence's reply to `x` `(1, *S)`, and its whole response, None of one that only answers."""
    answer, respond = defence.answered(x, seed), getattr(defence, "respond", None)
    response = None if respond is None else respond(x, seed)

    told = Reply(
        label=int(answer.labels[0]),
        shares=answer.probabilities[0].tolist(),
        credibility=None if answer.credibility is None else float(answer.credibility[0]),
        foreign=None if answer.sense is None else bool(answer.sense.foreign[0]),
        recalled=None if answer.recalled is None else bool(answer.recalled[0]),
        innate=None if answer.innate is None else bool(answer.innate[0]),
    )
    return told, response
